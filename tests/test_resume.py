"""A run that is killed, stopped, or fails: what is on disk, what is said, and how it goes on."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import luffy_trl.commands.train
from luffy_trl import LuffyTrainer
from luffy_trl.commands.cli import main
from luffy_trl.runs.checkpoints import UNFINISHED_DIR, checkpoints, damage, find_checkpoint, newest_complete
from luffy_trl.tasks.letter_walk import split_walks, to_dataset

from .conftest import HUNG, SMALL_RUN


ROOT = Path(__file__).parents[1]

# `make test` kills five times; LUFFY_KILLS=20 is the long version
KILLS = int(os.environ.get("LUFFY_KILLS", "5"))


@pytest.fixture
def arguments(tiny_model_dir, tmp_path):
    """Flags of a run of a few seconds on the tiny model, a checkpoint a step."""
    to_dataset(split_walks(train_size=16, test_size=1, length=4)["train"]).to_json(str(tmp_path / "walks.jsonl"))
    options = {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": tmp_path / "walks.jsonl",
        "reward_funcs": "letter_walk_reward",
        "output_dir": tmp_path / "out",
        "save_steps": 1,
        **SMALL_RUN,
    }

    def make(**overrides) -> list[str]:
        return [str(part) for name, value in (options | overrides).items() for part in (f"--{name}", value)]

    return make


def start(arguments: list[str], launcher: tuple[str, ...] = (), **options) -> subprocess.Popen:
    """`train.py` as a user starts it, its output in one pipe."""
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def wait_until(condition, process: subprocess.Popen) -> None:
    """Until the condition holds, the process ends, or it is hung."""
    end = time.monotonic() + HUNG
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "the process neither ends nor gets there"
        time.sleep(0.001)


# Checkpoints


@pytest.mark.parametrize("manifest", ["[]", "null", '{"files": []}', '{"files": null}', "{}", "{", "[" * 10**5])
def test_a_manifest_that_is_none_is_damage(manifest, tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(manifest)
    assert damage(checkpoint) == "its manifest.json cannot be read"
    with pytest.raises(ValueError, match=r"checkpoint-1 is damaged: its manifest\.json cannot be read"):
        find_checkpoint(str(checkpoint), tmp_path)


def test_complete_damaged_and_unfinished_checkpoints(make_trainer, tmp_path, caplog):
    make_trainer(max_steps=3, save_strategy="steps", save_steps=1).train()
    out = tmp_path / "out"
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    assert [damage(path) for path in checkpoints(out)] == [None] * 3
    assert not (out / UNFINISHED_DIR / "checkpoint-3").exists()

    weights = out / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (out / "checkpoint-2" / "optimizer.pt").unlink()
    (out / "checkpoint-4").mkdir()  # as another program would have left it
    (out / "checkpoint-5-backup").mkdir()
    assert newest_complete(out) == out / "checkpoint-1"
    assert "checkpoint-4 is skipped: it has no manifest.json" in caplog.text
    assert f"checkpoint-3 is skipped: model.safetensors has {weights.stat().st_size} bytes instead of" in caplog.text
    assert "checkpoint-2 is skipped: optimizer.pt is missing" in caplog.text

    (out / "checkpoint-1" / "manifest.json").write_text("{")
    assert find_checkpoint("auto", out) is None
    assert find_checkpoint(None, out) is None
    with pytest.raises(ValueError, match=r"checkpoint-3 is damaged: model\.safetensors has .* bytes instead of"):
        find_checkpoint(str(out / "checkpoint-3"), out)
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no trainer_state\.json"):
        find_checkpoint(str(out / "checkpoint-4"), out)
    with pytest.raises(ValueError, match="there is no such directory, and it is no USER/REPO on the Hub"):
        find_checkpoint("checkpoint-9", out)
    with pytest.raises(ValueError, match="no directory, and not to be had from the Hub"):
        find_checkpoint("nobody/nothing", out)


def test_the_best_checkpoint_is_kept_under_its_final_name(make_trainer, walks, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(
        max_steps=4, load_best_model_at_end=True, save_total_limit=2, metric_for_best_model="eval_reward",
        greater_is_better=True, trainer_options={"eval_dataset": walks.select(range(4))}, **options,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path / "out"
    assert best.is_dir()
    kept = {path.name for path in checkpoints(tmp_path / "out")}
    assert kept == {best.name, "checkpoint-4"}
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def test_auto_starts_anew_and_goes_on(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    # with a weight that remembers how often rollouts were right
    options |= {"demonstration_weight_schedule": "success", "solved_threshold": 0.85}
    whole = make_trainer(max_steps=4, output_dir=str(tmp_path / "whole"), **options)
    whole.train(resume_from_checkpoint="auto")
    make_trainer(max_steps=2, **options).train(resume_from_checkpoint="auto")
    resumed = make_trainer(max_steps=4, **options)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 4
    assert [line["step"] for line in resumed.state.log_history if "loss" in line] == [1, 2, 3, 4]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    rates = [
        [line["groups/success_rate"] for line in run.state.log_history if "loss" in line] for run in (resumed, whole)
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == 4


@pytest.mark.slow
def test_a_run_killed_again_and_again_finishes(arguments, tmp_path):
    out, steps, rng = tmp_path / "out", 12 * KILLS, random.Random(0)
    command = arguments(max_steps=steps, resume_from_checkpoint="auto", save_total_limit=3)
    during_a_save = 0
    for kill in range(KILLS):
        before = newest_complete(out) if out.exists() else None
        process = start(command, start_new_session=True)
        unfinished = out / UNFINISHED_DIR
        wait_until(lambda: newest_complete(out) != before if out.exists() else False, process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.5))
        if kill % 2:
            wait_until(lambda: any(unfinished.glob("checkpoint-*")), process)  # noqa: B023
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output
        during_a_save += any(unfinished.glob("checkpoint-*"))
        if before is not None:
            assert f"Resuming from {before}" in output
        for checkpoint in checkpoints(out):
            if damage(checkpoint) is None:
                AutoModelForCausalLM.from_pretrained(checkpoint)
                torch.load(checkpoint / "optimizer.pt", weights_only=True)
                assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] > 0
    assert during_a_save > 0
    process = start(command)
    output = process.communicate(timeout=HUNG)[0]
    assert process.returncode == 0, output
    state = json.loads((out / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "loss" in line] == list(range(1, steps + 1))


# Signals


@pytest.mark.slow
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on(arguments, tmp_path):
    out = tmp_path / "out"
    process = start(arguments(max_steps=1000, save_strategy="steps", save_steps=20))
    wait_until((out / "checkpoint-20").is_dir, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=HUNG)[0]
    assert process.returncode == 75, output
    [stopped, *_] = checkpoints(out)
    step = int(stopped.name.removeprefix("checkpoint-"))
    assert step > 20
    assert damage(stopped) is None
    assert f"Stopped on SIGTERM, saved {stopped.name}." in output
    assert "--resume_from_checkpoint auto goes on from there" in output

    # and Ctrl-C twice ends at once, in the middle of a step
    slow = arguments(
        max_steps=1000, save_strategy="no", resume_from_checkpoint="auto", reward_funcs="tests.test_resume.slow_reward"
    )
    process = start(slow)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "reward is slow" in line:
            break
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    output = "".join(lines) + process.communicate(timeout=HUNG)[0]
    assert process.returncode == -signal.SIGINT, output
    assert f"Resuming from {stopped}" in output
    assert checkpoints(out)[0] == stopped


def test_a_signal_after_the_last_step_costs_nothing(arguments, tmp_path, monkeypatch, capsys):
    class SignalAtTheEnd(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(luffy_trl.commands.train, "StartSummary", lambda trainer, name: SignalAtTheEnd())
    main(["train", *arguments(max_steps=2, save_strategy="no")])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "Stopped" not in capsys.readouterr().err


def test_ctrl_c_while_the_model_is_saved_is_no_ctrl_c_before_the_training(arguments, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LuffyTrainer, "create_model_card", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments(max_steps=1, save_strategy="no")])
    assert stop.value.code == 130
    assert "Interrupted after the training, while the model was saved or pushed." in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_stop_together_and_one_that_dies_ends_the_other(arguments, tmp_path):
    out = tmp_path / "out"
    config = ROOT / "accelerate_configs" / "cpu_zero3.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0")
    flags = arguments(max_steps=1000, save_steps=5, per_device_train_batch_size=4, resume_from_checkpoint="auto")
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}

    process = start(flags, launcher, env=environment, start_new_session=True)
    wait_until((out / "checkpoint-5").is_dir, process)
    worker(process, rank=1).send_signal(signal.SIGTERM)  # one of them is enough
    output = process.communicate(timeout=HUNG)[0]
    [stopped, *_] = checkpoints(out)
    assert damage(stopped) is None
    assert f"Stopped on SIGTERM, saved {stopped.name}." in output

    process = start(flags, launcher, env=environment, start_new_session=True)
    wait_until(lambda: checkpoints(out)[0] != stopped, process)
    worker(process, rank=1).kill()
    output = process.communicate(timeout=HUNG)[0]  # the bounded time is the test
    assert process.returncode != 0
    assert f"Resuming from {stopped}" in output
    assert "Signal 9 (SIGKILL)" in output


@pytest.mark.slow
def test_a_quiet_launcher_leaves_the_last_line_to_the_run(arguments, tmp_path):
    """Without --quiet, Accelerate prints a traceback of its own below it."""
    config = str(ROOT / "accelerate_configs" / "single_gpu.yaml")
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--config_file",
        config,
        "--cpu",
        "--mixed_precision",
        "no",
    )
    process = start(arguments(max_steps=1000), launcher)
    wait_until((tmp_path / "out" / "checkpoint-1").is_dir, process)
    [run] = psutil.Process(process.pid).children()
    run.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=HUNG)[0]
    assert "Stopped on SIGTERM, saved checkpoint-" in output.splitlines()[-1]
    assert output.splitlines()[-1].endswith("with --resume_from_checkpoint auto goes on from there.")
    assert process.returncode == 1


@pytest.mark.slow
def test_without_a_launcher_both_processes_report_that_they_were_stopped(arguments, tmp_path):
    """As Slurm starts them: their places come by environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    flags = arguments(max_steps=1000, per_device_train_batch_size=4)
    processes = [
        start(flags, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]
    wait_until((tmp_path / "out" / "checkpoint-2").is_dir, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=HUNG)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    [stopped, *_] = checkpoints(tmp_path / "out")
    assert damage(stopped) is None
    assert all(f"Stopped on SIGTERM, saved {stopped.name}." in output for output in outputs)


@pytest.mark.slow
def test_two_processes_without_sharding_resume_to_the_same_weights(arguments, tmp_path):
    out = tmp_path / "out"
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2",
                "--main_process_port", "0")  # fmt: skip
    flags = arguments(
        max_steps=2, per_device_train_batch_size=4, lr_scheduler_type="constant", resume_from_checkpoint="auto"
    )
    process = start(flags, launcher)
    output = process.communicate(timeout=HUNG)[0]
    assert process.returncode == 0, output
    whole = load_file(out / "model.safetensors")

    shutil.rmtree(out / "checkpoint-2")
    (out / "model.safetensors").unlink()
    process = start(flags, launcher)
    output = process.communicate(timeout=HUNG)[0]
    assert process.returncode == 0, output
    assert f"Resuming from {out / 'checkpoint-1'}" in output
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def worker(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    children = psutil.Process(launcher.pid).children(recursive=True)
    [found] = [child for child in children if child.environ().get("RANK") == str(rank)]
    return found


def slow_reward(completions: list, **kwargs) -> list[float]:
    print("the reward is slow", flush=True)
    time.sleep(60)
    return [0.0] * len(completions)


# Faults


def test_a_directory_that_cannot_be_written_to_is_said_at_once(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments(output_dir=tmp_path / "file" / "out")])
    assert stop.value.code == 2
    assert f"--output_dir {tmp_path / 'file' / 'out'} cannot be written to" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_earlier_checkpoints(arguments, tmp_path, make_trainer):
    out = tmp_path / "out"
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    largest = (out / "checkpoint-1" / "model.safetensors").stat().st_size

    def limit_files():  # the nearest thing to a full disk that needs no disk of its own
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    process = start(arguments(max_steps=3, resume_from_checkpoint="auto"), preexec_fn=limit_files)
    output = process.communicate(timeout=HUNG)[0]
    assert process.returncode == 1, output
    assert "File too large" in output
    assert "Raised while checkpoint-2 was saved. Earlier checkpoints are as they were." in output
    assert [path.name for path in checkpoints(out)] == ["checkpoint-1"]
    assert damage(out / "checkpoint-1") is None
    assert not (out / UNFINISHED_DIR).exists()
    assert load_file(out / "checkpoint-1" / "model.safetensors")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: [float("nan")] * n, "'broken' returned nan for row 0. Return a finite number, or None"),
        (lambda n: [0.0] * (n - 1) + [float("-inf")], "'broken' returned -inf for row 7"),
        (lambda n: [0.0] * (n - 1), "'broken' returned 7 rewards, but 8 were expected"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_that_is_none_ends_the_run(make_trainer, returned, message, is_async):
    def broken(completions, **kwargs):
        return returned(len(completions))

    async def broken_later(completions, **kwargs):
        return returned(len(completions))

    broken_later.__name__ = "broken"
    with pytest.raises(ValueError, match=message):
        make_trainer(reward=broken_later if is_async else broken).train()


def test_what_a_reward_function_raises_names_it(make_trainer):
    def divides(completions, **kwargs):
        return [1 / 0]

    with pytest.raises(ZeroDivisionError) as error:
        make_trainer(reward=divides).train()
    assert error.value.__notes__ == ["Raised by the reward function 'divides'."]


def test_a_reward_function_may_be_a_generator(make_trainer):
    def lengths(completions, **kwargs):
        yield from (float(len(text)) for text in completions)

    trainer = make_trainer(reward=lengths, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["on_policy/reward"] > 0


def test_none_still_means_that_a_reward_does_not_apply(make_trainer):
    trainer = make_trainer(reward=lambda completions, **kwargs: [None, *[0.5] * (len(completions) - 1)])
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == pytest.approx(0.5)
