"""Pushing to the Hub: real trainers and the real client against a local Hub that fails when told to."""

import copy
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser

from luffy_trl import LuffyConfig
from luffy_trl.commands.cli import main
from luffy_trl.commands.inputs import LuffyScriptArguments
from luffy_trl.commands.push import what_to_do
from luffy_trl.commands.sft import LuffySFTConfig
from luffy_trl.hub.card import card_for_hub, prompting
from luffy_trl.hub.errors import PushError, with_retries
from luffy_trl.hub.queue import PushQueue, Record, what_is_missing
from luffy_trl.hub.upload import Push, check_weights, is_pushed
from luffy_trl.runs.recipe import as_yaml, given_fields, shown_command
from luffy_trl.runs.redaction import holds_secret, known_secrets, redact, redact_command, redact_values

from .conftest import HUNG
from .hub_server import PUSH_ENDPOINTS, TOKEN, HubServer
from .run_hub import FAULTS


ROOT = Path(__file__).parents[1]
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there


def run(hub: HubServer, *command, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=HUNG, cwd=ROOT, check=False,
        env=os.environ | hub.environment() | environment,
    )  # fmt: skip


def push(hub: HubServer, *arguments, **environment: str) -> subprocess.CompletedProcess:
    return run(hub, "-m", "luffy_trl", "push", *arguments, **environment)


TRAIN = [
    "--config", "recipes/letter_walk.yaml", "--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1,
    "--logging_steps", 1, "--num_generations", 4, "--per_device_train_batch_size", 8, "--push_to_hub",
]  # fmt: skip


# Every fault


@pytest.fixture(scope="module")
def cases(tiny_model_dir, tmp_path_factory) -> list[dict]:
    directory = tmp_path_factory.mktemp("hub")
    command = [sys.executable, "-m", "tests.run_hub", tiny_model_dir, directory]
    run_ = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=HUNG, cwd=ROOT, check=False,
        env=os.environ | {"HF_HOME": str(directory / "home")},
    )  # fmt: skip
    assert run_.returncode == 0, run_.stderr[-3000:]
    assert TOKEN not in run_.stdout + run_.stderr
    return [json.loads(line.removeprefix("CASE ")) for line in run_.stdout.splitlines() if line.startswith("CASE ")]


@pytest.mark.slow
def test_a_push_survives_every_fault_at_every_endpoint(cases):
    pushes = [case for case in cases if case["kind"] == "push"]
    assert {(case["endpoint"], case["fault"]) for case in pushes} == {(e, f) for e in PUSH_ENDPOINTS for f in FAULTS}
    reasons = {
        "429": "the Hub answered 429", "429 with Retry-After": "the Hub answered 429", "500": "the Hub answered 500",
        "401": "the Hub refused the token (401). Log in with `hf auth login`", "403": "refused the token (403)",
        "dropped": "no connection to the Hub",
    }  # fmt: skip
    for case in pushes:
        name = f"{case['endpoint']}: {case['fault']}"
        if case["fault"] == "slow":
            assert case["missing"] is None, name
        else:
            assert reasons[case["fault"]] in case["missing"], name
            assert "\n  luffy-trl push " in case["missing"], name
        # when the Hub works again, the record alone is enough
        assert case["same"], name
        assert case["missing_later"] is None, name


@pytest.mark.slow
def test_training_ends_normally_whatever_fails_and_the_command_pushes_it_all_later(cases):
    runs = {case["endpoint"]: case for case in cases if case["kind"] == "run"}
    assert runs.keys() == set(PUSH_ENDPOINTS)
    for endpoint, case in runs.items():
        assert case["step"] == 2, endpoint
        assert case["whole"], endpoint
        assert case["held"] == [], endpoint
        assert case["status"] == 0, endpoint
        assert case["pushed"], endpoint
        missing = [(source, branch) for source, branch, _ in case["missing"]]
        if endpoint == "verify":  # what is there need not be verified: the second attempt works
            assert missing == []
        else:
            assert {("checkpoint-1", "step-1"), ("checkpoint-2", "step-2")} <= set(missing), endpoint
            assert case["committed"] == (endpoint == "branch")  # main needs no branch


@pytest.mark.slow
def test_a_run_recovers_from_faults_that_pass(cases):
    [case] = [case for case in cases if case["kind"] == "recovers"]
    assert case["missing"] == []
    assert case["committed"]
    assert case["pushed"]
    assert case["faults_left"] == [0, 0, 0, 0]


@pytest.mark.slow
def test_what_was_pushed_loads_and_holds_nothing_else(cases):
    [case] = [case for case in cases if case["kind"] == "loads"]
    assert case["difference"] == 0
    for names in case["files"].values():
        assert set(names) == {
            ".gitattributes", "README.md", "chat_template.jinja", "config.json", "curves.png",
            "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip


# A run with an adapter, as a user starts it, with a token in every place where one can be


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def adapter_run(hub, tiny_model_dir, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    output_dir = tmp_path_factory.mktemp("adapter") / "adapter"
    run_ = run(
        hub, "train.py", *TRAIN, "--model_name_or_path", tiny_model_dir, "--output_dir", output_dir, "--use_peft",
        "--lora_target_modules", "all-linear", "--learning_rate", 0.01, "--hub_token", TOKEN,
        "--hub_retry_seconds", 0, "--hub_strategy", "checkpoint", "--log_completions",
        "--log_completions_hub_repo", "rollouts", **NO_HUB,
    )  # fmt: skip
    assert run_.returncode == 0, run_.stderr[-3000:]
    return output_dir, run_


LOAD = """
import sys, torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, local, target = sys.argv[1:]
def fresh(): return AutoModelForCausalLM.from_pretrained(base)
ids = AutoTokenizer.from_pretrained("tester/merged")("Da:bc", return_tensors="pt")["input_ids"]
models = {
    "base": fresh(),
    "local": PeftModel.from_pretrained(fresh(), local),
    "adapter": PeftModel.from_pretrained(fresh(), "tester/adapter"),
    "merged": AutoModelForCausalLM.from_pretrained("tester/merged"),
    "card": AutoModelForCausalLM.from_pretrained("tester/adapter"),
}
logits = {name: model(ids).logits for name, model in models.items()}
torch.save(logits | {"rollouts": load_dataset("tester/rollouts")["train"].to_dict()}, target)
"""


@pytest.mark.slow
def test_an_adapter_is_pushed_later_alone_and_merged_and_loads_on_a_fresh_base(
    hub, adapter_run, tiny_model_dir, tmp_path
):
    output_dir, run_ = adapter_run
    lines = run_.stderr.splitlines()
    screen = lines[lines.index("Not pushed to the Hub:") :]
    assert [line.split(": no connection to the Hub (ConnectError")[0] for line in screen[1:4]] == [
        "  checkpoint-2 (with its optimizer states) to adapter/last-checkpoint",
        "  the completions to rollouts",
        "  the model to adapter",
    ]
    assert screen[4:6] == [f"This pushes what is in {output_dir}:", f"  luffy-trl push {output_dir}"]

    pushed = push(hub, output_dir, "--tag", "v1")
    assert pushed.returncode == 0, pushed.stderr
    assert "Pushed the model to adapter: README.md, adapter_config.json, adapter_model.safetensors" in pushed.stdout
    assert f"{tiny_model_dir}, which others do not have: see --merge" in pushed.stdout
    again = push(hub, output_dir, "--tag", "v1")
    assert again.returncode == 0
    assert "Pushed" not in again.stdout
    assert "Already there: the model to adapter" in again.stdout
    merged = push(hub, output_dir, "--merge", "--repo_id", "merged", "--private")
    assert merged.returncode == 0, merged.stderr

    repo = hub.model("adapter")
    assert repo.tags["v1"] == repo.branches["main"]
    last = {name.removeprefix("last-checkpoint/") for name in repo.at() if name.startswith("last-checkpoint/")}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < last
    assert not repo.private
    assert hub.model("merged").private
    assert not any("adapter" in name or "optimizer" in name for name in hub.model("merged").at())
    assert b"This is an adapter" in repo.at()["README.md"]
    assert b"This is an adapter" not in hub.model("merged").at()["README.md"]
    assert not list(output_dir.glob("_merged-*"))

    loaded = run(hub, "-c", LOAD, tiny_model_dir, output_dir, tmp_path / "logits.pt", HF_HOME=str(tmp_path))
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    logits = torch.load(tmp_path / "logits.pt")
    assert (logits["local"] - logits["base"]).abs().max() > 0.1  # the adapter does something
    for name in ("adapter", "card"):
        torch.testing.assert_close(logits[name], logits["local"], rtol=0, atol=0)
    torch.testing.assert_close(logits["merged"], logits["local"], rtol=1e-4, atol=1e-4)
    assert logits["rollouts"]["step"] == [1] * 8 + [2] * 8
    assert sum(logits["rollouts"]["demonstration"]) == 4  # of 2 groups a step

    # merged onto the adapter's own repository: nothing of the adapter stays
    assert push(hub, output_dir, "--merge").returncode == 0
    assert {"model.safetensors", "config.json"} <= repo.at().keys()
    assert not any(name.startswith("adapter_") for name in repo.at())
    assert "last-checkpoint/adapter_model.safetensors" in repo.at()
    other = push(hub, output_dir, "--tag", "v1", "--merge", "--retry_seconds", "0")
    assert other.returncode == 1
    assert "Not tagged: the tag v1 exists already, for another commit" in other.stdout


@pytest.mark.slow
def test_no_token_leaves_the_run(hub, adapter_run):
    output_dir, run_ = adapter_run
    assert "--hub_token '***'" in (output_dir / "README.md").read_text()
    assert TOKEN not in run_.stdout + run_.stderr
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert {"training_args.bin", "_hub.json", "trainer_state.json"} <= {path.name for path in files}
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    (output_dir / "notes.txt").write_text(f"my token is {TOKEN}")  # a user's own file
    pushed = push(hub, output_dir)
    (output_dir / "notes.txt").unlink()
    assert pushed.returncode == 0
    assert "notes.txt was left out: a token" in pushed.stdout
    assert TOKEN not in pushed.stdout + pushed.stderr
    assert [content for content in hub.contents() if TOKEN.encode() in content] == []


@pytest.mark.slow
def test_a_zero3_run_on_two_processes_pushes_a_whole_model(hub, tiny_model_dir, tmp_path):
    run_ = run(
        hub, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_zero3.yaml",
        "--main_process_port", 0, "train.py", *TRAIN, "--model_name_or_path", tiny_model_dir,
        "--output_dir", tmp_path / "zero3", "--hub_checkpoint_revisions", "--hub_private_repo", "True",
        DS_ACCELERATOR="cpu", HF_HOME=str(tmp_path),
    )  # fmt: skip
    assert run_.returncode == 0, run_.stderr[-3000:]
    assert f"Pushed them to {hub.url}/tester/zero3" in run_.stdout
    repo = hub.model("zero3")
    assert repo.private
    expected = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    for branch in ("main", "step-1", "step-2"):
        assert not any("global_step" in name or "zero_to_fp32" in name for name in repo.at(branch))
        (tmp_path / "model.safetensors").write_bytes(repo.at(branch)["model.safetensors"])
        weights = load_file(tmp_path / "model.safetensors")
        assert {name: tensor.shape for name, tensor in weights.items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }
        assert any(not torch.equal(weights[name], expected[name]) for name in expected)


# The command


@pytest.mark.slow
def test_a_run_resumes_from_its_last_checkpoint_on_the_hub(hub, tiny_model_dir, walks, tmp_path):
    walks.to_json(str(tmp_path / "walks.jsonl"))
    more = ["--model_name_or_path", tiny_model_dir, "--dataset_name", tmp_path / "walks.jsonl"]
    more += ["--reward_funcs", "letter_walk_reward", "--hub_model_id", "me/resumed"]
    first = run(hub, "train.py", *TRAIN, *more, "--hub_strategy", "checkpoint", "--output_dir", tmp_path / "one")
    assert first.returncode == 0, first.stderr[-3000:]
    on_another_machine = ["--output_dir", tmp_path / "two", "--max_steps", 3]
    second = run(hub, "train.py", *TRAIN, *more, *on_another_machine, "--resume_from_checkpoint", "me/resumed")
    assert second.returncode == 0, second.stderr[-3000:]
    assert "Resuming from" in second.stdout
    state = json.loads((tmp_path / "two" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "loss" in line] == [1, 2, 3]


@pytest.fixture
def output_dir(make_trainer, tmp_path) -> Path:
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such directory"),
        (["OUT", "--checkpoint", "3"], "whole checkpoints in OUT: 1, 2."),
        (["OUT", "--checkpoint", "last"], "--checkpoint last is neither a step nor 'all'"),
        (["OUT", "--checkpoint", "all", "--tag", "v1"], "--tag names one push, and --checkpoint all makes several"),
        (["OUT", "--retry_seconds", "-1"], "--retry_seconds -1.0 must be 0 or more"),
        (["OUT/checkpoint-1/nothing", "--repo_id", "x"], "there is no such directory"),
        (["OUT", "--hub_token", "x"], "unrecognized arguments: --hub_token x"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, message, output_dir, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["push", *(argument.replace("OUT", str(output_dir)) for argument in arguments)])
    assert exit_.value.code == 2
    assert message.replace("OUT", str(output_dir)) in capsys.readouterr().err.splitlines()[-1]


A_PUSH = {"source": ".", "repo_id": "me/model"}
DAMAGED_RECORDS = {
    "other keys": b"{}", "a list": b"[]", "null": b"null", "cut": b"{", "empty": b"", "no UTF-8": b"\xff\xfe{}",
    "NUL bytes": b"\0" * 64, "nested without an end": b"[" * 100_000,
    "another field": json.dumps({"model": {"repo": "a"}, "missing": []}).encode(),
    "a number for a name": json.dumps({"model": A_PUSH | {"repo_id": 3}, "missing": []}).encode(),
    "a list for a folder": json.dumps({"model": None, "missing": [[A_PUSH | {"folder": ["a"]}, "why"]]}).encode(),
    "no reason": json.dumps({"model": None, "missing": [A_PUSH]}).encode(),
    "no list": json.dumps({"model": None, "missing": 3}).encode(),
    "a place outside": json.dumps({"model": A_PUSH | {"source": "../../other"}, "missing": []}).encode(),
    "a directory": None,
}  # fmt: skip


def damage_record(output_dir: Path, content: bytes | None) -> None:
    output_dir.mkdir(exist_ok=True)
    if content is None:
        (output_dir / "_hub.json").mkdir()
    else:
        (output_dir / "_hub.json").write_bytes(content)


@pytest.mark.parametrize("content", DAMAGED_RECORDS.values(), ids=DAMAGED_RECORDS)
def test_a_record_that_is_none_is_said(content, adapter_dir, capsys):
    output_dir = adapter_dir
    damage_record(output_dir, content)
    with pytest.raises(SystemExit) as stop:
        main(["push", str(output_dir)])
    assert stop.value.code == 2
    assert "_hub.json does not say what a run could not push" in capsys.readouterr().err.splitlines()[-1]


def test_a_record_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "_hub.json")
    with pytest.raises(ValueError, match=r"_hub\.json does not say"):
        Record(tmp_path)


@pytest.mark.parametrize("content", DAMAGED_RECORDS.values(), ids=DAMAGED_RECORDS)
def test_a_damaged_record_is_set_aside_by_a_run_that_pushes(content, tmp_path, caplog):
    damage_record(tmp_path, content)
    for i in (1, 2):  # the second time too
        pushes = PushQueue(tmp_path, HfApi(), retry_seconds=0)
        pushes.set_model(Push(".", "me/model"))
        assert Record(tmp_path).model == Push(".", "me/model")
        assert f"damaged, or not luffy-trl's. It is now _hub-damaged-{i}.json" in caplog.text
        aside = tmp_path / f"_hub-damaged-{i}.json"
        assert aside.is_dir() if content is None else aside.read_bytes() == content
        (tmp_path / "_hub.json").unlink()
        damage_record(tmp_path, content)


def test_a_run_that_pushes_nothing_leaves_a_damaged_record_alone(make_trainer, tmp_path):
    damage_record(tmp_path / "out", b"{")
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    assert (tmp_path / "out" / "_hub.json").read_bytes() == b"{"


def test_a_run_that_pushes_trains_beside_a_damaged_record(make_trainer, tmp_path, caplog):
    damage_record(tmp_path / "out", b"{")
    trainer = make_trainer(max_steps=1, push_to_hub=True)
    assert "It is now _hub-damaged-1.json" in caplog.text  # before training
    trainer.train()
    assert trainer.push_to_hub() is None
    assert [push.source for push in Record(tmp_path / "out").missing] == ["."]
    assert not is_pushed("_hub-damaged-1.json")


# No wait without an end


class DyingApi(HfApi):
    """Its first calls raise."""

    def __init__(self, *errors: BaseException):
        super().__init__(endpoint="http://127.0.0.1:9")
        self.errors = list(errors)

    def create_repo(self, *args, **kwargs):
        raise self.errors.pop(0)


@pytest.fixture
def adapter_dir(tmp_path) -> Path:
    """What looks like the output directory of a run with an adapter."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    save_file({"weight": torch.ones(2)}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text("{}")
    return directory


def finished(pushes: PushQueue, seconds: float = 20) -> bool:
    thread = threading.Thread(target=pushes.finish, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit("closed"), MemoryError(), BaseException("odd")]
)
def test_a_push_that_dies_ends_neither_the_run_nor_the_other_pushes(error, adapter_dir, caplog):
    pushes = PushQueue(adapter_dir, DyingApi(error, PushError("refused")), retry_seconds=0)
    pushes.add(Push(".", "first"))
    pushes.add(Push(".", "second"))
    assert finished(pushes)
    reason = ": ".join(filter(None, [type(error).__name__, str(error)]))
    assert {push.repo_id: why for push, why in pushes.record.missing.items()} == {"first": reason, "second": "refused"}
    assert f"Not pushed: the model to first: {reason}. The run goes on" in caplog.text
    assert "luffy-trl push" in what_is_missing(adapter_dir)
    assert finished(pushes)  # and once more, with nothing to do


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_not_waited_for(adapter_dir, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PushQueue, "_note_failure", dies)  # even what follows a failure fails
    pushes = PushQueue(adapter_dir, DyingApi(*[PushError("refused")] * 3), retry_seconds=0)
    for name in ("first", "second", "third"):
        pushes.add(Push(".", name))
    assert finished(pushes)
    assert [push.repo_id for push in Record(adapter_dir).missing] == ["first", "second", "third"]


def test_a_system_without_a_thread_left_ends_no_run(adapter_dir, monkeypatch, caplog):
    def no_thread(_):
        raise RuntimeError("can't start new thread")

    pushes = PushQueue(adapter_dir, DyingApi(PushError("refused")), retry_seconds=0)
    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", no_thread)
        pushes.add(Push(".", "first"))
        pushes.finish()
    assert "Nothing is pushed now: RuntimeError: can't start new thread" in caplog.text
    assert [push.repo_id for push in Record(adapter_dir).missing] == ["first"]
    assert finished(pushes)
    assert list(pushes.record.missing.values()) == ["refused"]


def test_a_checkpoint_that_cannot_be_read_ends_no_run(adapter_dir):
    checkpoint = adapter_dir / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 64)
    pushes = PushQueue(adapter_dir, DyingApi(), retry_seconds=0)
    pushes.add(Push("checkpoint-1", "me/model"), checkpoint)
    [reason] = pushes.record.missing.values()
    assert f"{checkpoint / 'model.safetensors'} is damaged" in reason


def test_a_directory_without_a_model_and_an_offline_machine_are_told_so(output_dir, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as exit_:
        main(["push", str(tmp_path / "empty")])
    assert exit_.value.code == 2
    assert "holds neither a model nor a whole checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1 not done"):  # conftest.py sets HF_HUB_OFFLINE
        main(["push", str(output_dir)])
    assert "Not pushed: the model to out: HF_HUB_OFFLINE is set" in capsys.readouterr().out


# An adapter and its base


@pytest.fixture
def real_adapter(tiny_model_dir, tokenizer, tmp_path) -> Path:
    """What a run with an adapter leaves: adapter, tokenizer, card, pickled arguments, and a checkpoint."""
    output_dir = tmp_path / "run"
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
    for directory in (output_dir, output_dir / "checkpoint-3"):
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "training_args.bin").write_bytes(b"pickled")
        for name, parameter in model.named_parameters():  # the checkpoint's is another one
            parameter.data *= 2 if "lora_" in name else 1
    (output_dir / "checkpoint-3" / "manifest.json").write_text('{"files": {}}')
    card = "---\nlibrary_name: peft\n---\n<!-- adapter -->This is an adapter<!-- /adapter -->\nPATH/TO/THIS/DIRECTORY"
    (output_dir / "README.md").write_text(card)
    (output_dir / "curves.png").write_bytes(b"a picture")
    return output_dir


def status_of(arguments: list, capsys) -> tuple[int, str, str]:
    """Status, what was printed, and the last line of the errors, of `luffy-trl push`."""
    status: int | str | None = 0
    try:
        main(["push", *map(str, arguments)])
    except SystemExit as exit_:
        status = exit_.code
    out, err = capsys.readouterr()
    if isinstance(status, str):  # what Python prints for it, before it ends with 1
        return 1, out, status
    return status or 0, out, err.splitlines()[-1] if err else ""


@pytest.mark.parametrize(("flags", "source"), [([], "."), (["--checkpoint", "3"], "checkpoint-3")])
def test_a_merged_model_is_written_to_a_directory_without_a_push(
    flags, source, real_adapter, tiny_model_dir, tokenizer, tmp_path, capsys
):
    (real_adapter / "_hub.json").write_text("{")  # of no interest here
    save_file({"stale": torch.ones(2)}, real_adapter / "model.safetensors")  # of an earlier run, without an adapter
    target = tmp_path / "new" / "merged"
    assert status_of([real_adapter, "--merge", "--to", target, *flags], capsys)[0] == 0
    names = {path.name for path in target.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert not {name for name in names if name.startswith(("adapter", "training_args", "checkpoint", "_", "manifest"))}
    assert [path.name for path in target.parent.iterdir()] == ["merged"]  # nothing unfinished is left
    ids = AutoTokenizer.from_pretrained(target)("Da:bc", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    expected = PeftModel.from_pretrained(base, real_adapter / source)(ids).logits
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(target)(ids).logits, expected, rtol=1e-4, atol=1e-4
    )
    card = (target / "README.md").read_text()
    assert "This is an adapter" not in card
    assert "library_name: transformers" in card


def test_the_bases_tokenizer_goes_with_an_adapter_that_has_none(real_adapter, tmp_path, capsys):
    for path in [*real_adapter.glob("tokenizer*"), *real_adapter.glob("*.jinja")]:
        path.unlink()
    assert status_of([real_adapter, "--merge", "--to", tmp_path / "merged"], capsys)[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("Da:bc")["input_ids"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "NEW"], "--to NEW is where --merge writes the merged model. Give both, or neither."),
        (["--merge", "--to", "OLD"], "--to OLD exists. Choose another directory, or remove it."),
        (["--merge", "--to", "OLD/file"], "--to OLD/file exists."),
        (["--merge", "--to", "LINK"], "--to LINK exists."),
        (["--merge", "--to", "NEW", "--repo_id", "me/x"], "--repo_id is of a push, and with --to nothing is pushed."),
        (["--merge", "--to", "NEW", "--tag", "v1"], "--tag is of a push"),
        (["--merge", "--to", "NEW", "--private"], "--private is of a push"),
        (["--merge", "--to", "NEW", "--revision", "dev"], "--revision is of a push"),
        (["--merge", "--to", "NEW", "--checkpoint", "all"], "--to NEW takes one model, and --checkpoint all makes"),
        (["--merge", "--to", "RUN/merged"], "--to RUN/merged lies in RUN, so that later pushes would take it along."),
        (["--merge", "--to", "NEW", "--checkpoint", "9"], "whole checkpoints in RUN: 3."),
    ],
)
def test_a_place_for_the_merged_model_that_is_none_is_refused(flags, message, real_adapter, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    places = {"NEW": "new", "OLD": "old", "LINK": "link", "RUN": "run"}

    def with_places(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, str(tmp_path / place))
        return text

    before = sorted(tmp_path.rglob("*"))
    status, _, error = status_of([real_adapter, *map(with_places, flags)], capsys)
    assert (status, with_places(message) in error) == (2, True), error
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old" / "file").read_text() == "mine"


@pytest.mark.parametrize("flags", [["--merge"], ["--merge", "--checkpoint", "1"], ["--merge", "--to", "new"]])
def test_merging_a_run_without_an_adapter_is_refused_once_and_for_all(flags, tmp_path, capsys):
    for directory in (tmp_path, tmp_path / "checkpoint-1"):
        directory.mkdir(exist_ok=True)
        save_file({"weight": torch.ones(2)}, directory / "model.safetensors")
    (tmp_path / "checkpoint-1" / "manifest.json").write_text('{"files": {}}')
    status, _, error = status_of([tmp_path, *flags], capsys)
    assert status == 2
    assert "holds no adapter that could be merged. Without --merge it is pushed as it is." in error
    assert "again" not in error
    assert not Path("new").exists()


def break_shapes(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: torch.cat([w, w]) for name, w in weights.items()}, adapter / "adapter_model.safetensors")


def break_base(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/no/such/base"}))


BROKEN_ADAPTERS = {
    "other shapes": break_shapes,
    "no base": break_base,
    "no JSON": lambda adapter: (adapter / "adapter_config.json").write_text("{"),
    "empty JSON": lambda adapter: (adapter / "adapter_config.json").write_text("{}"),
    "cut weights": lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 64),
}


@pytest.mark.parametrize("damage", BROKEN_ADAPTERS.values(), ids=BROKEN_ADAPTERS)
@pytest.mark.parametrize("to", [True, False])
def test_an_adapter_that_never_merges_is_not_to_be_tried_again(damage, to, real_adapter, tmp_path, capsys):
    damage(real_adapter)
    flags = ["--to", tmp_path / "new"] if to else []
    status, out, error = status_of([real_adapter, "--merge", *flags], capsys)
    assert status == 1
    assert "cannot be merged into its base" in (error if to else out)
    assert "again" not in error
    if not to:
        assert "1 not done, see above. It will not pass by itself" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # all or nothing
    assert not list(real_adapter.glob("_merged-*"))


@pytest.mark.parametrize("seconds", ["nan", "inf"])
def test_attempts_without_an_end_are_refused(seconds, adapter_dir, capsys):
    status, _, error = status_of([adapter_dir, "--retry_seconds", seconds], capsys)
    assert status == 2
    assert f"--retry_seconds {seconds} must be 0 or more, and have an end" in error


def test_what_may_pass_is_told_from_what_does_not():
    passes, stays = PushError("busy", passes=True), PushError("refused")
    assert what_to_do([passes, passes]) == "Run the same command again later."
    assert "again" not in what_to_do([stays])
    assert what_to_do([passes, stays]).startswith("Run the same command again later for 1 of them")


def test_empty_weights_are_refused(tmp_path):
    save_file({"whole": torch.ones(2), "embed": torch.ones(0)}, tmp_path / "model.safetensors")
    with pytest.raises(PushError, match=r"holds empty weights \(embed\)"):
        check_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "global_step2").mkdir()
    with pytest.raises(PushError, match="only the shards of its processes: set zero3_save_16bit_model"):
        check_weights(tmp_path)


def test_a_checkpoint_of_shards_is_recorded_with_the_reason(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "global_step1").mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    PushQueue(tmp_path, HfApi(), retry_seconds=0).add(Push("checkpoint-1", "model"), checkpoint)
    assert "holds no model weights, only the shards of its processes" in what_is_missing(tmp_path)


def test_what_is_the_runs_own_is_never_pushed():
    own = [
        "_base-seed0/model.safetensors", "_hub.json", "checkpoint-1/model.safetensors", ".env", "a/.git/config",
        "completions/completions_00001.parquet", "training_args.bin", "optimizer.pt", "rng_state_0.pth",
        "scheduler.pt", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "trainer_state.json",
    ]  # fmt: skip
    assert [name for name in own if is_pushed(name)] == []
    assert [name for name in own if is_pushed(name, states=True)] == own[7:]
    model = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "vocab.json"]
    assert all(is_pushed(name) for name in model)


def test_retries_grow_heed_the_hub_and_end():
    class Hub:
        def __init__(self, *answers):
            self.answers, self.waits = list(answers), []

        def __call__(self):
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    busy, refused = PushError("busy", passes=True), PushError("refused")
    hub = Hub(busy, PushError("busy", passes=True, retry_after=7), busy, "done")
    assert with_retries(hub, 100, lambda _: None, hub.waits.append) == "done"
    assert hub.waits == [2, 7, 8]
    for answers, seconds in (([refused], 100), ([busy], 0), ([PushError("busy", passes=True, retry_after=99)], 50)):
        hub = Hub(*answers)
        with pytest.raises(PushError):
            with_retries(hub, seconds, lambda _: None, hub.waits.append)
        assert hub.waits == []


# The card and the recipe


def test_the_card_tells_how_to_use_and_repeat_it(output_dir):
    card = card_for_hub(output_dir, "me/model", merged=False).decode()
    assert 'from_pretrained("me/model")' in card
    assert "PATH/TO" not in card
    assert "<!--" not in card
    for expected in (
        "Learning to Reason under Off-Policy Guidance", "@article{yan2025luffy", "@software{vonwerra2020trl",
        "![Reward, entropy and probability", "trl 1.16.", "do_sample=True, temperature=1.0",
    ):  # fmt: skip
        assert expected in card
    assert (output_dir / "curves.png").stat().st_size > 10_000
    assert ModelCard(card).data.get("model-index") is None


def test_the_recipe_of_the_card_gives_the_same_config(output_dir, config, tmp_path):
    card = (output_dir / "README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["num_generations"] == 4
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    parser = TrlParser((LuffyScriptArguments, LuffyConfig, ModelConfig))
    _, again, _ = parser.parse_args_and_config(["--config", str(tmp_path / "recipe.yaml")])
    original = config(max_steps=2, save_strategy="steps", save_steps=1).to_dict()
    different = {name for name, value in again.to_dict().items() if value != original[name]}
    assert different <= {"output_dir"}  # its last name alone


def test_an_evaluation_becomes_metadata_and_a_table(output_dir):
    (output_dir / "eval").mkdir()
    summary = {"score": 0.501, "stderr": 0.0123, "problems": 30, "samples": 32, "truncated": 0.0}
    results = {"name": "out", "tasks": {"luffy_aime24": summary, "luffy_one": summary | {"stderr": None}}}
    (output_dir / "eval" / "results.json").write_text(json.dumps(results))
    card = card_for_hub(output_dir, "me/model", merged=False).decode()
    assert "| luffy_aime24 | 50.1 ± 1.2 | 30 | 32 |\n| luffy_one | 50.1 | 30 | 32 |" in card
    [first, _] = ModelCard(card).data.eval_results
    assert (first.dataset_name, first.metric_type, first.metric_value) == ("luffy_aime24", "accuracy", 50.1)
    as_text = {"tasks": {"luffy_aime24": summary | {"score": "0.5"}}}
    for damaged in (b"{}", b"[]", b"\xff", b"[" * 100_000, json.dumps(as_text).encode()):
        (output_dir / "eval" / "results.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="does not hold the results of `luffy-trl eval`"):
            card_for_hub(output_dir, "me/model", merged=False)


def test_a_conversational_dataset_is_prompted_through_its_template(make_trainer, walks, tmp_path):
    messages = [{"role": "system", "content": "Think first."}, {"role": "user", "content": "a row of the data"}]
    lines = prompting(messages, {"enable_thinking": True}, 64, 0.6)
    assert "Think first." in lines
    assert "a row of the data" not in lines
    assert 'return_tensors="pt", enable_thinking=True' in lines
    compile(lines, "card", "exec")


# Secrets


def test_secrets_are_masked_wherever_they_stand(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SOME_TOKEN", "true")  # too short to be one
    secrets = known_secrets("given-by-hand")
    assert {"0123456789abcdef", "given-by-hand"} <= secrets
    assert "true" not in secrets
    assert redact(f"a {TOKEN} b given-by-hand c", secrets) == "a *** b *** c"
    assert shown_command(
        ["train.py", "--hub_token", "secret1", "--hub-token=secret2", "--output_dir", "/home/me/out", TOKEN], secrets
    ) == "train.py --hub_token '***' '--hub-token=***' --output_dir out '***'"  # fmt: skip
    assert shown_command(
        ["train.py", "--output_dir=/home/me/out", "--model_init_kwargs", '{"token": "abcdefgh", "revision": "main"}',
         "--vllm_server_base_url", "http://me:password@host:8000", "--model_init_kwargs={broken", "/no_think"], secrets
    ) == (
        "train.py --output_dir=out --model_init_kwargs '{\"token\": \"***\", \"revision\": \"main\"}' "
        "--vllm_server_base_url 'http://***@host:8000' '--model_init_kwargs=***' /no_think"
    )  # fmt: skip
    nested = {"model_init_kwargs": {"token": "x", "revision": "main"}, "list": [TOKEN]}
    assert redact_values(nested) == {"model_init_kwargs": {"token": "***", "revision": "main"}, "list": ["***"]}
    (tmp_path / "file").write_bytes(b"x" * ((1 << 20) - 5) + b"given-by-hand")  # across two blocks
    assert holds_secret(tmp_path / "file", secrets)
    assert not holds_secret(tmp_path / "file", {"another one"})


SECRET_VARIABLES = [
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "DB_PASSWORD", "PGPASSWORD", "MYSQL_PWD", "SMTP_PASS", "BOT_TOKEN", "LINE_TOKEN", "BOX_TOKEN",
    "NEW_TOKEN", "GITLAB_TRIGGER_TOKEN", "REFRESH_TOKEN", "DJANGO_SECRET_KEY", "API_KEY_2", "AZURE_CLIENT_SECRET",
    "gh_token", "USE_AUTH_TOKEN",
]  # fmt: skip
NO_SECRET_VARIABLES = [
    "EOS_TOKEN", "PAD_TOKEN", "BOS_TOKEN", "UNK_TOKEN", "SEP_TOKEN", "MASK_TOKEN", "MAX_TOKEN", "MAX_TOKENS",
    "MAX_NEW_TOKENS", "MIN_TOKEN", "NUM_TOKEN", "STOP_TOKEN", "IMAGE_TOKEN", "VISION_START_TOKEN", "THINK_END_TOKEN",
    "END_OF_TURN_TOKEN", "NEXT_TOKEN", "MY_EOS_TOKEN", "eos_token", "EOS_TOKEN_2", "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "TOKENIZERS_PARALLELISM", "TOKENIZERS_EOS_TOKEN", "HF_TOKEN_PATH", "OLDPWD",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_VARIABLES)
def test_a_secret_of_the_environment_is_masked(name, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "a-value-of-its-own")
    assert redact("it is a-value-of-its-own.", known_secrets()) == "it is ***."
    assert shown_command(["train.py", "a-value-of-its-own"], known_secrets()) == "train.py '***'"
    (tmp_path / "notes.txt").write_text("a-value-of-its-own")
    assert holds_secret(tmp_path / "notes.txt", known_secrets())
    assert redact_values({name: "x"}) == {name: "***"}
    flag = f"--{name.lower()}"
    assert redact_command([flag, "x", f"{flag}=x"]) == [flag, "***", f"{flag}=***"]


@pytest.mark.parametrize("name", NO_SECRET_VARIABLES)
def test_a_token_of_text_in_the_environment_is_no_secret(name, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "endoftext-of-its-own")
    assert redact("it is endoftext-of-its-own.", known_secrets()) == "it is endoftext-of-its-own."
    (tmp_path / "tokenizer.json").write_text("endoftext-of-its-own")
    assert not holds_secret(tmp_path / "tokenizer.json", known_secrets())
    assert redact_values({name: "x"}) == {name: "x"}
    flag = f"--{name.lower()}"
    assert redact_command([flag, "x", f"{flag}=x"]) == [flag, "x", f"{flag}=x"]


@pytest.mark.parametrize(
    "value",
    [
        "<|im_end|>",
        "<|endoftext|>",
        "</s>",
        "<pad>",
        "[PADDING]",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[/INSTRUCTION]",
    ],
)
def test_a_token_of_text_is_known_by_its_form_too(value, monkeypatch):
    monkeypatch.setenv("OUR_TOKEN", value)
    assert value not in known_secrets()
    assert redact_values({"our_token": value, "token": True}) == {"our_token": value, "token": True}
    assert redact_command(["--our_token", value, "--hub_token", TOKEN]) == ["--our_token", value, "--hub_token", "***"]


def test_the_recipe_of_a_run_keeps_its_special_tokens(monkeypatch, tmp_path):
    monkeypatch.setenv("EOS_TOKEN", "<|im_end|>")
    args = LuffySFTConfig(str(tmp_path), eos_token="<|im_end|>", use_cpu=True, bf16=False)
    assert yaml.safe_load(as_yaml(given_fields(args), known_secrets()))["eos_token"] == "<|im_end|>"
    command = ["luffy-trl", "sft", "--eos_token", "<|im_end|>", "--pad_token=<|endoftext|>"]
    assert shown_command(command, known_secrets()) == shlex.join(command)


@pytest.mark.parametrize("config_class", [LuffyConfig, LuffySFTConfig])
def test_a_pickled_config_holds_no_token_and_a_copied_one_does(config_class, tmp_path):
    args = config_class(str(tmp_path), hub_token=TOKEN, model_init_kwargs={"revision": "a"}, use_cpu=True, bf16=False)
    for made in (args, copy.deepcopy(args), copy.copy(args), copy.deepcopy({"args": [args]})["args"][0]):
        assert TOKEN.encode() not in pickle.dumps(made)
        assert made.hub_token == TOKEN
        assert made == args
    torch.save(args, tmp_path / "training_args.bin")
    assert TOKEN.encode() not in (tmp_path / "training_args.bin").read_bytes()
    copied = copy.deepcopy(args)
    copied.model_init_kwargs["revision"] = "b"
    assert args.model_init_kwargs == {"revision": "a"}


# Fields


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_and_push": True}, "merge_and_push=True does nothing without push_to_hub=True"),
        ({"hub_checkpoint_revisions": True}, "hub_checkpoint_revisions=True does nothing without push_to_hub=True"),
        ({"hub_retry_seconds": -1}, "hub_retry_seconds=-1 must be a number of seconds, 0 or above"),
    ],
)
def test_fields_that_cannot_work_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_merging_needs_an_adapter(make_trainer):
    with pytest.raises(ValueError, match="merge_and_push=True, but the model has no adapter"):
        make_trainer(push_to_hub=True, merge_and_push=True)


def test_a_trainer_made_offline_trains_and_says_what_is_missing(make_trainer, tmp_path, caplog):
    trainer = make_trainer(push_to_hub=True, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer.train()
    assert trainer.push_to_hub() is None
    assert "HF_HUB_OFFLINE is set" in caplog.text
    assert f"luffy-trl push {tmp_path / 'out'}" in caplog.text
    record = json.loads((tmp_path / "out" / "_hub.json").read_text())
    assert [push["source"] for push, _ in record["missing"]] == ["."]  # it takes the checkpoints' place on main


def test_an_older_checkpoint_never_takes_the_place_of_the_model(tmp_path):
    """A run that could not reach the Hub does not know its owner there yet; resumed, it does."""
    pushes = PushQueue(tmp_path, HfApi(), retry_seconds=0)
    pushes.add(Push("checkpoint-1", "model"))
    pushes.finish()
    pushes.add(Push(".", "me/model"))
    pushes.finish()
    assert [push.source for push in pushes.record.missing] == ["."]


def test_a_checkpoint_that_is_gone_is_said_to_be(output_dir, capsys):
    record = Record(output_dir)
    record.missing = {Push("checkpoint-1", "out", revision="step-1"): "no connection"}
    record.save()
    shutil.rmtree(output_dir / "checkpoint-1")
    with pytest.raises(SystemExit, match="2 not done"):
        main(["push", str(output_dir)])
    assert "Cannot be pushed any more: checkpoint-1 to out@step-1" in capsys.readouterr().out
    assert Record(output_dir).missing == {}
