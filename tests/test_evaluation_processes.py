"""Several processes share one directory of samples: nothing is made twice, nobody waits, and the table is the same."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luffy_trl.commands.eval import main
from luffy_trl.evaluation import EvaluationError, LeftToOthersError
from luffy_trl.evaluation.launching import stand_alone
from luffy_trl.evaluation.lines import Sample
from luffy_trl.evaluation.samples import SampleStore

from .conftest import HUNG


SETTINGS = {"model": "m", "data": {"t": "1"}}


def sample(repeat: int) -> Sample:
    return Sample("t", 0, repeat, "hash", f"text {repeat}", 10, False)


class Other:
    """A process with a store in the directory, which does as it is told until it is killed."""

    def __init__(self, directory: Path, script: str, settings: dict = SETTINGS):
        code = f"""
import json, sys, time
from luffy_trl.evaluation.samples import SampleStore
from tests.test_evaluation_processes import sample
store = SampleStore(sys.argv[1], json.loads(sys.argv[2]))
{script}
print("ready", flush=True)
time.sleep(600)
"""
        command = [sys.executable, "-c", code, str(directory), json.dumps(settings)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def test_each_process_has_a_file_of_its_own_and_reads_the_others(tmp_path):
    other = Other(tmp_path, "store.append([sample(0)])")
    store = SampleStore(tmp_path, SETTINGS)
    assert (store.process, set(store.samples)) == (2, {("t", 0, 0)})
    store.append([sample(1)])
    with open(tmp_path / "samples" / "t.jsonl", "a") as file:  # the other's: in the middle of a write
        file.write('{"task": "t", "doc_id": 0, "rep')
        file.flush()
        store.refresh()
        assert len(store.samples) == 2
        file.write('eat": 2, "prompt_hash": "h", "response": "r", "tokens": 1, "truncated": false}\n')
    store.refresh()
    assert len(store.samples) == 3
    assert store.half_written == 0
    with pytest.raises(LeftToOthersError):
        store.be_last()
    store.close()
    other.kill()

    store = SampleStore(tmp_path, SETTINGS)
    assert (store.process, len(store.samples)) == (1, 3)
    store.be_last()
    store.rewrite("t")
    store.close()
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["t.jsonl"]
    assert [json.loads(line)["repeat"] for line in (tmp_path / "samples" / "t.jsonl").open()] == [0, 1, 2]


def test_what_another_process_makes_is_not_made_here_until_it_is_killed(tmp_path):
    other = Other(
        tmp_path, "held = store.claimed([('t', 0, 0), ('t', 0, 1)]); held.__enter__(); store.append([sample(0)])"
    )
    store = SampleStore(tmp_path, SETTINGS)
    with store.claimed([("t", 0, 1), ("t", 0, 2)]) as mine:
        assert mine == set()
    with store.claimed([("t", 0, 2)]) as mine:
        assert mine == {("t", 0, 2)}
    other.kill()
    with store.claimed([("t", 0, 0), ("t", 0, 1)]) as mine:
        assert mine == {("t", 0, 1)}
    store.be_last()
    store.close()


def test_nobody_comes_in_while_samples_are_scored_and_nobody_waits_for_long(tmp_path):
    other = Other(tmp_path, "store.be_last()")
    start = time.monotonic()
    with pytest.raises(EvaluationError, match="is in use by another run, which scores its samples"):
        SampleStore(tmp_path, SETTINGS, patience=0.2)
    assert time.monotonic() - start < 10
    other.kill()
    SampleStore(tmp_path, SETTINGS).close()


def test_a_process_with_other_settings_is_refused_before_there_is_a_sample(tmp_path):
    other = Other(tmp_path, "")
    with pytest.raises(EvaluationError, match="holds samples made with model 'm' instead of 'n'"):
        SampleStore(tmp_path, SETTINGS | {"model": "n"})
    other.kill()


# The whole command

PYTHON = [sys.executable, "-u"]
ALONE = [*PYTHON, "-m", "luffy_trl"]


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"What is {i}?", "answer": str(i % 4)} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model: Path, data: Path, output: Path) -> list[str]:
    return [
        "--model", str(model), "--dataset_name", str(data), "--reward_funcs", "math_reward_optional_thought",
        "--output_dir", str(output), "--max_new_tokens", "64", "--n_samples", "20", "--temperature", "1.1",
        "--chunk_size", "8", "--batch_size", "4", "--k", "1", "4",
    ]  # fmt: skip


def start(arguments: list[str], launcher: list[str] = ALONE) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher, "eval", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def lines_in(output: Path) -> list[dict]:
    return [json.loads(line) for path in (output / "samples").glob("*.jsonl") for line in path.open()]


def table_of(output: Path) -> dict:
    results = json.loads((output / "results.json").read_text())
    return {name: results[name] for name in ("tasks", "percent")}


def test_a_process_leaves_to_another_what_that_is_at_and_the_next_makes_what_a_kill_left(
    speaking_model, data, tmp_path, capsys
):
    output = tmp_path / "shared"
    arguments = [*command(speaking_model, data, output), "--limit", "2"]
    main(arguments)
    settings = json.loads((output / "run.json").read_text())
    claim = "held = store.claimed([('mine', 3, repeat) for repeat in range(20)]); held.__enter__()"
    other = Other(output, claim, settings)
    capsys.readouterr()
    main(arguments[:-2])
    # problem 3 has samples 60 to 79; whole chunks of 8 are left out, and those before and after them are made
    assert "216 of 240 samples are kept" in (printed := capsys.readouterr().out)
    assert "Other processes are at work there: the last of them writes the results." in printed
    assert {(s["doc_id"], s["repeat"]) for s in lines_in(output)}.isdisjoint({(3, repeat) for repeat in range(20)})
    assert len(lines_in(output)) == 216
    other.kill()
    main(arguments[:-2])
    assert len(lines_in(output)) == 240
    assert "mine" in capsys.readouterr().out


def test_benchmarks_are_shared_in_the_same_way(speaking_model, tmp_path, capsys):
    rows = [
        {
            "data_source": "math",
            "prompt": [{"role": "user", "content": f"{i}?"}],
            "reward_model": {"ground_truth": "2"},
        }
        for i in range(4)
    ]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(speaking_model), "--data_files", str(tmp_path / "math.jsonl"), "--chunk_size", "1"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_new_tokens", "48"]
    main([*arguments, "--limit", "1"])
    claim = "held = store.claimed([('luffy_math500', 2, 0)]); held.__enter__()"
    other = Other(tmp_path / "out", claim, json.loads((tmp_path / "out" / "run.json").read_text()))
    main(arguments)
    assert "3 of 4 samples are kept" in (printed := capsys.readouterr().out)
    assert "Other processes are at work there" in printed
    other.kill()
    main(arguments)
    assert {s["doc_id"] for s in lines_in(tmp_path / "out")} == {0, 1, 2, 3}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["luffy_math500"]["problems"] == 4


def test_a_launched_process_that_comes_while_another_scores_is_no_failure(
    speaking_model, data, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "shared"
    arguments = [*command(speaking_model, data, output), "--limit", "2"]
    main(arguments)
    other = Other(output, "store.be_last()", json.loads((output / "run.json").read_text()))
    monkeypatch.setattr("luffy_trl.evaluation.samples.GATE_PATIENCE", 0.1)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    main(arguments)
    assert "in use by another run, which scores its samples" in capsys.readouterr().out
    other.kill()


def test_each_launched_process_takes_gpus_of_its_own(monkeypatch):
    group = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "node"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)

    def launch(device: str | None, gpus: int, visible: str | None) -> str | None:
        for name, value in group.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert stand_alone(device, gpus) == 4
        assert not set(group) & set(os.environ)
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert launch(None, 1, None) == "1"
    assert launch(None, 2, "4,5,6,7") == "6,7"
    assert launch("cpu", 1, None) is None
    with pytest.raises(EvaluationError, match="2 processes need 6 GPUs, and 4 are there"):
        launch(None, 3, None)
    with pytest.raises(EvaluationError, match="--device cuda:1: processes that are launched together take a GPU each"):
        launch("cuda:1", 1, None)
    monkeypatch.setenv("MASTER_ADDR", "node")
    assert stand_alone("cuda:1", 1) == 1  # nobody launched it
    assert os.environ["MASTER_ADDR"] == "node"


@pytest.fixture
def alone(speaking_model, data, tmp_path) -> Path:
    """What one process makes of it."""
    main(command(speaking_model, data, tmp_path / "alone"))
    return tmp_path / "alone"


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True], ids=["started by hand", "torchrun"])
def test_two_processes_give_the_table_of_one(launched, alone, speaking_model, data, tmp_path):
    arguments = command(speaking_model, data, tmp_path / "two")
    if launched:
        torchrun = [*PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
        processes = [start(arguments, [*torchrun, "-m", "luffy_trl"])]
    else:
        processes = [start(arguments), start(arguments)]
    outputs = [process.communicate(timeout=HUNG) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    said = "".join(out for out, _ in outputs)
    assert said.count("± one standard error over problems") == 1  # one of them scores
    assert table_of(tmp_path / "two") == table_of(alone)

    def responses(output: Path) -> dict[tuple, str]:
        return {(s["doc_id"], s["repeat"]): s["response"] for s in lines_in(output)}

    assert len(lines_in(tmp_path / "two")) == 12 * 20
    assert responses(tmp_path / "two") == responses(alone)
    assert [path.name for path in (tmp_path / "two" / "samples").iterdir()] == ["mine.jsonl"]


@pytest.mark.slow
def test_what_a_killed_process_left_is_made_by_the_other_or_by_the_next(alone, speaking_model, data, tmp_path, capsys):
    output = tmp_path / "killed"
    arguments = command(speaking_model, data, output)
    first = start(arguments)
    while not list((output / "samples").glob("*.jsonl")):
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=HUNG)
    kept = {(s["doc_id"], s["repeat"]): s["response"] for s in lines_in(output)}
    assert 0 < len(kept) < 240
    main(arguments)
    printed = capsys.readouterr().out
    assert f"{len(kept)} of 240 samples are kept" in printed
    after = lines_in(output)
    assert len(after) == 240  # nothing is there twice
    assert kept.items() <= {(s["doc_id"], s["repeat"]): s["response"] for s in after}.items()  # nor made again
    assert re.search(r"mine +12 +20 ", printed)
    assert table_of(output) == table_of(alone)
