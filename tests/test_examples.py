"""The scripts of `examples/` with local models and data; `make test-uv` runs them as `uv run` does."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from .conftest import HUNG
from .hub_server import HubServer
from .teacher_server import Reply, TeacherServer
from .test_train_script import build_text_model


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SHORT = [
    "--max_steps", "1", "--use_cpu", "True", "--bf16", "False", "--num_generations", "2", "--disable_tqdm", "True",
    "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_completion_length", "64",
    "--gradient_checkpointing", "False", "--save_strategy", "no",
]  # fmt: skip


def metadata(script: Path) -> dict:
    """The inline metadata, as PEP 723 has it read."""
    [block] = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", script.read_text(), flags=re.MULTILINE)
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in block.splitlines(True)))


def start(script: str, *arguments) -> None:
    runpy.run_path(str(ROOT / "examples" / script))["main"]([str(part) for part in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build_text_model(["What is 7 * 8? 7 * 8 = 56.\n\nThe answer is \\boxed{56}.", "<think>\n</think>\n"], directory)
    return directory


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_what_it_needs_and_how_it_is_started(script):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = metadata(script)
    assert found["requires-python"] == project["requires-python"]
    assert found["tool"]["uv"]["sources"]["luffy_trl"] == {"git": project["urls"]["Repository"]}
    assert any(re.match(r"luffy_trl\b", dependency) for dependency in found["dependencies"])
    text = script.read_text()
    assert f"uv run {script.name}" in text
    assert re.search(rf"hf jobs uv run [^\n]*{script.name}", text)
    assert len(text.splitlines()) <= 100


def jobs(text: str) -> list[list[str]]:
    """The commands of HF Jobs that stand in a text, of scripts in this folder."""
    text = text.replace("https://raw.githubusercontent.com/luffy-trl/luffy_trl/main/examples/", "")
    return [shlex.split(found.replace("\\\n", " "))[1:] for found in re.findall(r"hf jobs uv run (?:.*\\\n)*.*", text)]


@pytest.mark.parametrize("source", [*SCRIPTS, ROOT / "docs" / "jobs.md"], ids=lambda source: source.stem)
def test_a_job_is_one_that_the_hub_would_take(source, monkeypatch):
    monkeypatch.chdir(ROOT / "examples")
    commands = jobs(source.read_text())
    assert commands
    for command in commands:
        dry = [sys.executable, "-m", "huggingface_hub.cli.hf", *command[:3], "--dry-run", *command[3:]]
        environment = os.environ | {"HF_TOKEN": "hf_of_nobody"}
        result = subprocess.run(dry, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        assert re.search(r"script +\S+\.py\n", result.stdout)
        assert "hf_of_nobody" not in result.stdout


def test_luffy_from_a_dataset(model):
    rows = [
        {"prompt": f"What is 7 * {n}?", "completion": f"\\boxed{{{7 * n}}}", "solution": str(7 * n)} for n in (5, 8)
    ]
    pd.DataFrame(rows).to_parquet("data.parquet")
    start("luffy_hub_dataset.py", "--model", model, "--dataset", "data.parquet", "--output_dir", "out", *SHORT)
    [line] = [line for line in json.loads(Path("out/trainer_state.json").read_text())["log_history"] if "loss" in line]
    assert line["off_policy/reward"] == 1
    assert line["groups/guided"] == 1
    AutoModelForCausalLM.from_pretrained("out")
    assert list(Path("out/completions").glob("*.parquet"))


@pytest.mark.parametrize("own", [True, False], ids=["own table", "products"])
def test_lora_from_a_table(own, model):
    table = {"question": ["What is 7 * 8?"] * 2, "working": ["7 * 8 = 56."] * 2, "result": [56, 56]}
    pd.DataFrame(table).to_csv("mine.csv", index=False)
    columns = ["--table", "mine.csv", "--problem", "question", "--solution", "working", "--answer", "result"]
    start("luffy_own_table.py", "--model", model, "--output_dir", "out", *SHORT, *(columns if own else []))
    [line] = [line for line in json.loads(Path("out/trainer_state.json").read_text())["log_history"] if "loss" in line]
    assert line["off_policy/reward"] == 1
    assert isinstance(AutoPeftModelForCausalLM.from_pretrained("out").peft_config["default"].r, int)


def test_a_teacher_then_luffy(model):
    problems = {"question": [f"What is 7 * {n}?" for n in range(2, 8)], "answer": [7 * n for n in range(2, 8)]}
    pd.DataFrame(problems).to_csv("problems.csv", index=False)

    def teach(body: dict) -> Reply:
        n = int(re.findall(r"\d+", body["messages"][-1]["content"])[1])
        return Reply(f"\\boxed{{{7 * n}}}", message={"reasoning_content": f"7 * {n}"})

    with TeacherServer(teach) as server:
        arguments = ["--problems", "problems.csv", "--model", model, "--teacher", "big", "--teacher_url", server.url]
        limits = ["--test_size", "2", "--max_tokens", "64", "--num_samples", "1", "--device", "cpu"]
        # the length is the script's own flag
        short = SHORT[: SHORT.index("--max_completion_length")] + SHORT[SHORT.index("--max_completion_length") + 2 :]
        start("teacher_then_luffy.py", *arguments, *limits, "--directory", "out", "--report_to", "none", *short)
        assert len(server.bodies) == 4
    AutoModelForCausalLM.from_pretrained("out/model")
    before, after = (json.loads(Path(f"out/{name}/results.json").read_text()) for name in ("before", "after"))
    assert set(before["tasks"]) == set(after["tasks"]) == {"demonstrations"}
    assert "before" in Path("out/after/results.md").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("luffy_hub_dataset.py", ["--dataset", "no.csv"], "--dataset no.csv: there is no such file"),
        ("luffy_hub_dataset.py", ["--dataset", "mine.csv", "--split", "tes"], "has no split 'tes'"),
        (
            "luffy_own_table.py",
            ["--table", "mine.csv"],
            "has no column problem: name --problem, --solution, --answer of a",
        ),
        ("luffy_own_table.py", ["--tabel", "mine.csv"], "--tabel"),
    ],
)
def test_a_mistake_is_one_sentence(script, arguments, message, capsys):
    pd.DataFrame({"a": [1], "solution": ["s"], "answer": [1]}).to_csv("mine.csv", index=False)
    with pytest.raises((SystemExit, ValueError)) as stop:
        start(script, *arguments, *SHORT)
    assert message in capsys.readouterr().err + str(stop.value)


def test_a_model_is_evaluated_and_pushed_with_its_results(model):
    row = {"data_source": "math", "prompt": [{"role": "user", "content": "1?"}], "reward_model": {"ground_truth": "2"}}
    Path("problems.jsonl").write_text(json.dumps(row) + "\n")
    (model / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# A model\n")
    arguments = [
        "--model", model, "--push_to", "tester/judged", "--data_files", "problems.jsonl", "--max_new_tokens", 8,
        "--temperature", 0, "--device", "cpu",
    ]  # fmt: skip
    command = [sys.executable, ROOT / "examples" / "evaluate_and_push.py", *arguments]
    with HubServer() as hub:
        result = subprocess.run(
            [str(part) for part in command], env=os.environ | hub.environment(), capture_output=True, text=True,
            timeout=HUNG, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    [judged] = ModelCard(hub.model("judged").at()["README.md"].decode()).data.eval_results
    assert (judged.dataset_name, judged.metric_value) == ("luffy_math500", 0.0)
