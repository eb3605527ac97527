"""Runs that people repeat, change, and start twice."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

import luffy_trl.commands.train
from luffy_trl.commands.cli import main
from luffy_trl.runs.checkpoints import UNFINISHED_DIR, checkpoints, damage, find_checkpoint, publish, recover
from luffy_trl.runs.identity import IDENTITY, read_identity
from luffy_trl.runs.lock import alone_in
from luffy_trl.runs.manifest import read_manifest
from luffy_trl.tasks.letter_walk import split_walks, to_dataset

from .conftest import SMALL_RUN, save_tiny_qwen2
from .run_two_processes import letters_reward


@pytest.fixture
def arguments(tiny_model_dir, tmp_path):
    """Flags of a run of a few seconds, 8 steps an epoch."""
    to_dataset(split_walks(train_size=16, test_size=1, length=4)["train"]).to_json(str(tmp_path / "walks.jsonl"))
    options = {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": tmp_path / "walks.jsonl",
        "reward_funcs": "letter_walk_reward",
        "output_dir": tmp_path / "out",
        "save_steps": 1,
        **SMALL_RUN,
    }

    def make(command: str = "train", **overrides) -> list[str]:
        given = options | overrides
        if command == "sft":
            for name in ("reward_funcs", "num_generations", "max_completion_length"):
                given.pop(name)
        flags = [str(part) for name, value in given.items() if value is not None for part in (f"--{name}", value)]
        return [command, *flags]

    return make


def fails(argv: list[str], capsys) -> str:
    """The one line of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    [line] = [line for line in error.splitlines() if ": error: " in line]
    assert "Traceback" not in error
    return line.partition(": error: ")[2]


def said(argv: list[str], capsys) -> str:
    capsys.readouterr()
    main(argv)
    return capsys.readouterr().out


def contents(directory: Path) -> dict[str, str]:
    """Of every file."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


LORA = {"use_peft": True, "lora_target_modules": "all-linear"}


# A finished run


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 1},
        {"max_steps": 3, "save_steps": 2},
        {"num_train_epochs": 0.25},
        {"max_steps": 2, "save_strategy": "no"},
        {"max_steps": 2, "save_strategy": "epoch"},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_finished_run_started_again_changes_nothing(arguments, tmp_path, capsys, command, options):
    again = arguments(command, resume_from_checkpoint="auto", **options)
    main(again)
    before = contents(tmp_path / "out")
    assert "model.safetensors" in before
    for _ in range(2):
        out = said(again, capsys)
        steps = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["max_steps"]
        assert f"This run is finished: {steps} of {steps} optimizer steps are done" in out
        assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("adapter", [False, True])
def test_the_trainer_of_a_finished_run_has_what_was_learned(arguments, tmp_path, monkeypatch, adapter):
    trainers = []

    def keep(*args):
        trainers.append(luffy_trl.commands.train._run(*args))
        return trainers[-1]

    monkeypatch.setattr(luffy_trl.commands.train, "run", keep)
    again = arguments(max_steps=2, resume_from_checkpoint="auto", **(LORA if adapter else {}))
    main(again)
    before = contents(tmp_path / "out")
    main(again)
    assert contents(tmp_path / "out") == before
    first, second = (trainer.model.state_dict() for trainer in trainers)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert trainers[1].state.global_step == 2


def test_tokens_of_sft_before_a_resumption_count(arguments, tmp_path):
    """Also those since the last log, in the log and towards the budget."""

    def logged(*flags: str) -> list[tuple[int, float]]:
        main([*arguments("sft", logging_steps=2), *flags])
        state = json.loads((Path(flags[1]) / "trainer_state.json").read_text())
        return [(log["step"], log["num_tokens"]) for log in state["log_history"] if "num_tokens" in log]

    at_once = logged("--output_dir", str(tmp_path / "at_once"), "--max_steps", "4")
    assert [step for step, _ in at_once] == [2, 4]
    resumed = ["--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "auto"]
    logged(*resumed, "--max_steps", "3")
    assert logged(*resumed, "--max_steps", "8", "--token_budget", str(int(at_once[-1][1]))) == at_once


def test_a_finished_epoch_is_finished_and_more_steps_go_on(arguments, tmp_path, capsys):
    main(arguments(max_steps=8, resume_from_checkpoint="auto"))
    before = contents(tmp_path / "out")
    assert "This run is finished: 8 of 8" in said(arguments(max_steps=8, resume_from_checkpoint="auto"), capsys)
    assert "This run is finished: 8 of 8" in said(arguments(max_steps=3, resume_from_checkpoint="auto"), capsys)
    last = str(tmp_path / "out" / "checkpoint-8")
    assert "This run is finished: 8 of 8" in said(arguments(max_steps=8, resume_from_checkpoint=last), capsys)
    assert contents(tmp_path / "out") == before
    out = said(arguments(max_steps=9, resume_from_checkpoint="auto"), capsys)
    assert "9 optimizer steps done" in out
    assert "max_steps: 9 is in force from here; it was 8" in out


@pytest.mark.parametrize("steps", [2, 8])
def test_a_run_killed_before_its_model_was_saved_saves_what_it_had_learned(arguments, tmp_path, capsys, steps):
    again = arguments(max_steps=steps, resume_from_checkpoint="auto", save_total_limit=1)
    main(again)
    learned = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    out = said(again, capsys)
    assert "This run is finished" not in out
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in learned.items())
    assert "This run is finished" in said(again, capsys)


def test_in_python_a_finished_run_makes_no_step_and_has_its_weights(make_trainer):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    first = make_trainer(**options)
    first.train()
    second = make_trainer(**options)
    assert second.train(resume_from_checkpoint="auto").global_step == 2
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [line["step"] for line in second.state.log_history if "loss" in line] == [1, 2]


# A kill between two renames


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("old", ["damaged", "whole"])
def test_a_kill_while_a_checkpoint_is_replaced_loses_neither(tmp_path, monkeypatch, call, old):
    def write(directory: Path, text: str) -> Path:
        directory.mkdir(parents=True)
        (directory / "trainer_state.json").write_text(text)
        return directory

    final = tmp_path / "checkpoint-3"
    publish(write(tmp_path / UNFINISHED_DIR / "checkpoint-3", "old"), final)
    if old == "damaged":
        (final / "trainer_state.json").write_text("old, damaged")
    unfinished = write(tmp_path / UNFINISHED_DIR / "checkpoint-3", "new")

    calls, rename = [], Path.rename

    def killed(self, target):
        calls.append(self)
        if len(calls) > call:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        patched.setattr("shutil.rmtree", lambda *args, **kwargs: killed(tmp_path, tmp_path))
        with pytest.raises(Killed):
            publish(unfinished, final)
    texts = {path.read_text() for path in tmp_path.rglob("trainer_state.json")}
    assert "new" in texts
    assert any(text.startswith("old") for text in texts)

    recover(tmp_path)
    recover(tmp_path)
    if call > 0:  # the old one had lost its name
        assert (final / "trainer_state.json").read_text() == "new"
        assert find_checkpoint("auto", tmp_path) == str(final)
        assert not any((tmp_path / UNFINISHED_DIR).iterdir())
    else:
        assert (final / "trainer_state.json").read_text().startswith("old")


def test_a_kill_before_the_new_one_was_whole_brings_the_old_one_back(tmp_path):
    old = tmp_path / UNFINISHED_DIR / "replaced-checkpoint-3"
    old.mkdir(parents=True)
    (old / "trainer_state.json").write_text("old")
    (tmp_path / UNFINISHED_DIR / "checkpoint-3").mkdir()
    recover(tmp_path)
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").read_text() == "old"


def test_training_recovers_what_a_kill_has_left(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=1).train()
    out = tmp_path / "out"
    (out / UNFINISHED_DIR).mkdir(exist_ok=True)
    (out / "checkpoint-2").rename(out / UNFINISHED_DIR / "checkpoint-2")
    (out / UNFINISHED_DIR / "replaced-checkpoint-2").mkdir()
    trainer = make_trainer(max_steps=3, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint="auto")
    assert {path.name: damage(path) for path in checkpoints(out)} == dict.fromkeys(
        ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    )


# The best model


def by_step(values: dict[int, float]):
    """A reward that depends on nothing but the optimizer step in which it is asked for."""

    def reward(completions, trainer_state, **kwargs):
        return [values.get(trainer_state.global_step, 0.0)] * len(completions)

    return reward


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def test_the_best_model_is_the_one_with_the_highest_reward(make_trainer, walks, tmp_path):
    trainer = make_trainer(
        reward=by_step({1: 0.25, 2: 0.75, 3: 0.5}), max_steps=3, load_best_model_at_end=True, **EVALUATED,
        trainer_options={"eval_dataset": walks.select(range(2))},
    )  # fmt: skip
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("eval_reward", True)
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    best = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_early_stopping_looks_at_the_reward(make_trainer, walks):
    trainer = make_trainer(
        reward=by_step({1: 0.25, 2: 0.75, 3: 0.5}), max_steps=5, **EVALUATED,
        trainer_options={"eval_dataset": walks.select(range(2)), "callbacks": [EarlyStoppingCallback(1)]},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_metric == pytest.approx(0.75)


def test_of_several_evaluation_sets_the_first_decides_unless_one_is_named(make_trainer, walks, caplog):
    sets = {"easy": walks.select(range(2)), "hard": walks.select(range(2, 4))}
    options = {"max_steps": 2, "load_best_model_at_end": True, **EVALUATED}
    trainer = make_trainer(trainer_options={"eval_dataset": sets}, **options)
    trainer.train()
    assert "the highest eval_easy_reward, of the first of the evaluation sets easy, hard" in caplog.text
    rewards = [line["eval_easy_reward"] for line in trainer.state.log_history if "eval_easy_reward" in line]
    assert trainer.state.best_metric == max(rewards)
    assert len(rewards) == len([line for line in trainer.state.log_history if "eval_hard_reward" in line]) == 2

    make_trainer(
        trainer_options={"eval_dataset": sets}, metric_for_best_model="hard_reward", **options
    ).check_before_training()
    wrong = make_trainer(trainer_options={"eval_dataset": sets}, metric_for_best_model="eval_hart_reward", **options)
    with pytest.raises(ValueError, match="did you mean eval_hard_reward"):
        wrong.train()


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("eval_rewrad", "did you mean eval_reward?"),
        ("rewards", "did you mean eval_reward?"),
        ("eval_rewards/letters_reward", "did you mean eval_rewards/letters_reward/mean?"),
        ("completions/mean_lenght", "did you mean eval_completions/mean_length?"),
        ("accuracy", "the usual one is eval_reward."),
    ],
)
def test_a_mistyped_metric_is_refused_before_the_first_step(make_trainer, walks, metric, hint):
    trainer = make_trainer(
        metric_for_best_model=metric, trainer_options={"eval_dataset": walks.select(range(2))}, **EVALUATED
    )
    with pytest.raises(ValueError, match="is logged by no evaluation of this run: ") as error:
        trainer.train()
    assert hint in str(error.value)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("metric", ["reward", "eval_loss", "eval_rewards/letters_reward/std", "entropy"])
def test_what_an_evaluation_logs_can_choose_the_best(make_trainer, walks, metric):
    trainer = make_trainer(
        metric_for_best_model=metric,
        max_steps=1,
        trainer_options={"eval_dataset": walks.select(range(2))},
        **EVALUATED,
    )
    trainer.train()
    assert trainer.state.best_metric is not None


def test_a_reward_function_can_log_the_metric_that_chooses(make_trainer, walks):
    def reward(completions, log_metric, **kwargs):
        log_metric("mine", 1.0)
        return letters_reward(completions=completions, **kwargs)

    options = {"max_steps": 1, "trainer_options": {"eval_dataset": walks.select(range(2))}, **EVALUATED}
    make_trainer(reward=reward, metric_for_best_model="mine", **options).check_before_training()
    with pytest.raises(ValueError, match="did you mean eval_reward"):
        make_trainer(reward=reward, metric_for_best_model="eval_rewart", **options).train()


def test_less_of_nothing_is_no_best_model(config):
    with pytest.raises(ValueError, match="greater_is_better=False needs metric_for_best_model"):
        config(load_best_model_at_end=True, greater_is_better=False, **EVALUATED)


def test_the_end_of_a_run_says_which_checkpoint_it_saved(arguments, capsys):
    flags = arguments(
        max_steps=2, load_best_model_at_end=True, dataset_test_split="train", save_strategy="steps",
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=64,
    )  # fmt: skip
    out = said(flags, capsys)
    assert "(the best, of checkpoint-" in out
    assert ", eval_reward " in out
    assert "(the last, of step 1)" in said(arguments(max_steps=1), capsys)
    message = fails([*flags, "--metric_for_best_model", "eval_rewrd"], capsys)
    assert "did you mean eval_reward?" in message


# Another run in the same directory


def test_a_new_run_says_what_another_has_left_and_takes_none_of_it(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    main(arguments(max_steps=3, log_completions=True))
    first, card = read_identity(out), (out / "README.md").read_text()
    output = said(arguments(max_steps=2, seed=1, log_completions=True), capsys)
    assert f"Warning: {out} holds checkpoint-3 of an earlier run." in output
    assert f"{out} holds another run (checkpoint-3, checkpoint-2, checkpoint-1)." in output
    second = read_identity(out)
    assert second != first
    assert {read_manifest(path)["run"] for path in checkpoints(out)} == {second.run}
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-1"]
    # nothing of it is lost
    earlier = out / "_earlier-1"
    assert [damage(path) for path in checkpoints(earlier)] == [None] * 3
    assert (earlier / "README.md").read_text() == card
    assert len(list((earlier / "completions").glob("*.parquet"))) == 3

    assert f"Resuming from {out / 'checkpoint-2'}" in said(
        arguments(max_steps=3, resume_from_checkpoint="auto"), capsys
    )
    main(["report", str(out), "--output_dir", str(tmp_path / "report")])
    output = said(arguments(max_steps=4, resume_from_checkpoint=earlier / "checkpoint-3"), capsys)
    assert f"Resuming from {earlier / 'checkpoint-3'}" in output
    assert read_identity(out) == first
    assert (out / "_earlier-2" / "checkpoint-3").is_dir()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(make_trainer, tmp_path, caplog):
    out, options = tmp_path / "out", {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**options).train()
    (out / "checkpoint-2").rename(out / "checkpoint-9")  # beyond the end of the next run
    # the name of a new run, whose kill has left the other's checkpoints where they were
    (out / IDENTITY).write_text(json.dumps({"run": "new", "continues_unnamed": False}))
    trainer = make_trainer(**options)
    trainer.train(resume_from_checkpoint="auto")
    assert "checkpoint-9 is skipped: it is another run's" in caplog.text
    assert read_identity(out).run == "new"
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-1"]
    assert [path.name for path in checkpoints(out / "_earlier-1")] == ["checkpoint-9", "checkpoint-1"]


def test_a_report_takes_no_checkpoint_of_another_run(make_trainer, tmp_path):
    from luffy_trl.reporting.finding import read_runs

    out, options = tmp_path / "out", {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**options).train()
    other = read_manifest(out / "checkpoint-1") | {"run": "another"}
    (out / "checkpoint-1").rename(out / "checkpoint-7")
    (out / "checkpoint-7" / "manifest.json").write_text(json.dumps(other))
    state = out / "checkpoint-7" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 1', '"global_step": 7'))
    make_trainer(**options).save_state()
    runs = read_runs(out, "out")
    assert [(run.name, run.step) for run in runs] == [("out", 0), ("out/checkpoint-7", 7)]


@pytest.mark.parametrize("identity", [None, "", "[]", "{", '{"run": 1}'])
def test_checkpoints_without_a_name_go_on(make_trainer, tmp_path, identity):
    """As earlier versions have written them."""
    out, options = tmp_path / "out", {"save_strategy": "steps", "save_steps": 1}
    make_trainer(max_steps=2, **options).train()
    (out / IDENTITY).unlink()
    if identity is not None:
        (out / IDENTITY).write_text(identity)
    for checkpoint in checkpoints(out):
        manifest = {"files": read_manifest(checkpoint)["files"]}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    make_trainer(max_steps=3, **options).train(resume_from_checkpoint="auto")
    (out / "checkpoint-3" / "optimizer.pt").unlink()
    trainer = make_trainer(max_steps=4, **options)
    trainer.train(resume_from_checkpoint="auto")  # from 2, which is this run's by now
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3, 4]
    assert not list(out.glob("_earlier-*"))


# Resuming with something changed


def test_what_has_changed_is_said_with_the_value_in_force(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    main(arguments(max_steps=2, lr_scheduler_type="linear"))
    to_dataset(split_walks(train_size=20, test_size=1, length=4)["train"]).to_json(str(tmp_path / "more.jsonl"))
    changed = {
        "max_steps": 4, "learning_rate": 5e-4, "dataset_name": tmp_path / "more.jsonl", "temperature": 0.9,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "logging_steps": 2,
        "lr_scheduler_type": "cosine",
    }  # fmt: skip
    output = said(arguments(resume_from_checkpoint="auto", **changed), capsys)
    lines = [line.strip() for line in output.splitlines()]
    assert "learning_rate: 0.001 of the checkpoint stays in force; 0.0005, asked for now, has no effect" in lines
    assert "weight_decay: 0.0 of the checkpoint stays in force; 0.1, asked for now, has no effect" in lines
    assert "temperature: 0.9 is in force from here; it was 1.0" in lines
    assert "per_device_train_batch_size: 4 is in force from here; it was 8" in lines
    assert 'lr_scheduler_type: "cosine" is in force from here; it was "linear"' in lines
    assert "max_steps: 4 is in force from here; it was 2" in lines
    assert any(line.startswith('dataset: "20 rows, ') and 'it was "16 rows, ' in line for line in lines)
    assert "the next step's learning rate, of the schedule as it is now: 0.0005" in lines  # cosine, at 2 of 4
    assert not any(line.startswith(("logging_steps", "generation_batch_size")) for line in lines)
    state = json.loads((out / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "loss" in line] == [1, 2, 4]

    card = (out / "README.md").read_text()
    assert "learning_rate: 0.001\n" in card
    assert "- At step 2, learning_rate: 0.001 of the checkpoint stays in force" in card
    # again: what was in force is what is compared with, and the card keeps both
    output = said(arguments(resume_from_checkpoint="auto", **(changed | {"max_steps": 5})), capsys)
    assert "learning_rate: 0.001 of the checkpoint stays in force; 0.0005" in output
    assert "temperature" not in output.partition("this has changed:")[2].partition("model ")[0]
    card = (out / "README.md").read_text()
    assert "- At step 2, temperature: 0.9 is in force from here" in card
    assert "- At step 4, max_steps: 5 is in force from here; it was 4" in card


def test_nothing_is_said_where_nothing_has_changed(arguments, tmp_path, capsys):
    main(arguments(max_steps=2))
    (tmp_path / "out" / "trainer_state.json").unlink()
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "walks.jsonl").rename(moved)
    output = said(arguments(max_steps=2, resume_from_checkpoint="auto", dataset_name=moved, save_steps=2), capsys)
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-1'}" in output
    assert "has changed" not in output
    assert "resumed with something changed" not in (tmp_path / "out" / "README.md").read_text()


def test_a_finished_schedule_that_is_stretched_starts_with_a_rate(make_trainer, capsys):
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    make_trainer(max_steps=2, **options).train()
    resumed = make_trainer(max_steps=4, **options)
    resumed.train(resume_from_checkpoint="auto")
    rates = [line["learning_rate"] for line in resumed.state.log_history if "loss" in line]
    assert rates == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])
    assert "learning rate, of the schedule as it is now: 0.0005" in capsys.readouterr().out


def test_what_cannot_be_resumed_is_one_sentence(arguments, tmp_path, capsys):
    main(arguments(max_steps=1, output_dir=tmp_path / "full"))
    main(arguments(max_steps=1, output_dir=tmp_path / "lora", lora_r=4, **LORA))
    full, lora = tmp_path / "full" / "checkpoint-1", tmp_path / "lora" / "checkpoint-1"
    before = contents(tmp_path / "full"), contents(tmp_path / "lora")
    for how in ("auto", full):
        flags = arguments(max_steps=2, output_dir=tmp_path / "full", resume_from_checkpoint=how, **LORA)
        assert fails(flags, capsys).startswith(f"{full} holds a whole model, and this run trains an adapter")
    for how in ("auto", lora):
        flags = arguments(max_steps=2, output_dir=tmp_path / "lora", resume_from_checkpoint=how)
        assert fails(flags, capsys).startswith(f"{lora} holds an adapter, and this run trains the whole model")
        flags = arguments(max_steps=2, output_dir=tmp_path / "lora", resume_from_checkpoint=how, lora_r=8, **LORA)
        assert fails(flags, capsys).startswith(f"{lora} holds an adapter with r 4, and this run has 8")
    flags = arguments(
        max_steps=2, output_dir=tmp_path / "lora", resume_from_checkpoint=lora, lora_r=4, use_peft=True,
        lora_target_modules="q_proj", lora_target_parameters=None,
    )  # fmt: skip
    assert "holds an adapter with target_modules" in fails([*flags, "v_proj"][:-1], capsys)
    for name in (tmp_path / "full" / "checkpoint-7", "outputs/nowhere", tmp_path / "walks.jsonl", tmp_path / "full"):
        flags = arguments(max_steps=2, output_dir=tmp_path / "full", resume_from_checkpoint=name)
        # the output directory is finished, but is no checkpoint
        assert f"--resume_from_checkpoint {name}" in fails(flags, capsys)
    flags = arguments("sft", max_steps=2, output_dir=tmp_path / "full", resume_from_checkpoint="auto")
    assert "is of a run with LuffyConfig, and this one has LuffySFTConfig" in fails(flags, capsys)
    after = contents(tmp_path / "full"), contents(tmp_path / "lora")
    assert after == before


def test_a_checkpoint_of_another_model_is_one_sentence(arguments, tmp_path, tokenizer, capsys):
    main(arguments(max_steps=1))
    save_tiny_qwen2(tmp_path / "tied", tokenizer, max_position_embeddings=128)
    config = json.loads((tmp_path / "tied" / "config.json").read_text())
    from transformers import AutoConfig, AutoModelForCausalLM

    wider = AutoConfig.for_model(**(config | {"intermediate_size": 96}))
    AutoModelForCausalLM.from_config(wider).save_pretrained(tmp_path / "wider")
    tokenizer.save_pretrained(tmp_path / "wider")
    flags = arguments(max_steps=2, resume_from_checkpoint="auto", model_name_or_path=tmp_path / "wider")
    message = fails(flags, capsys)
    assert "checkpoint-1 is of another model: its model.layers.0.mlp" in message


def test_a_tied_weight_is_not_missing(make_trainer, tmp_path, tokenizer, walks, config, caplog):
    from luffy_trl import LuffyTrainer

    model = save_tiny_qwen2(tmp_path / "tied", tokenizer, max_position_embeddings=128, tie_word_embeddings=True)
    weights = load_file(model / "model.safetensors")
    assert "lm_head.weight" not in weights

    def trainer(steps):
        args = config(max_steps=steps, save_strategy="steps", save_steps=1)
        return LuffyTrainer(str(model), letters_reward, args, train_dataset=walks, processing_class=tokenizer)

    trainer(1).train()
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint="auto")
    assert "missing keys" not in caplog.text
    assert resumed.model.lm_head.weight is resumed.model.model.embed_tokens.weight


# Two at once


HOLDER = """
import sys, time
from luffy_trl.runs.lock import alone_in
with alone_in(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the output directory."""
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_second_run_stops_before_it_touches_anything(holder, arguments, tmp_path, capsys, command):
    before = contents(tmp_path / "out")
    message = fails(arguments(command, max_steps=1), capsys)
    assert message == (
        f"--output_dir {tmp_path / 'out'} is in use: another run is writing to it. Wait for its end, stop it, or give "
        "this one another --output_dir."
    )
    assert contents(tmp_path / "out") == before
    assert holder.poll() is None
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    main(arguments(command, max_steps=1))  # what the killed one has left locks nobody out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_run_lets_go_of_its_directory(tmp_path):
    for _ in range(2):
        with alone_in(tmp_path), pytest.raises(ValueError, match="is in use"), alone_in(tmp_path):
            pass
