"""Two real processes against one: the same losses, metrics and weights, whatever rows a process holds."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from .conftest import HUNG
from .tiny_vlm import build_model, build_processor


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "accelerate_configs"

OPTIONS = {
    # a baseline that asks which rows this process's are, among rewards of which some are missing; a weight that
    # follows the success of all, and averages over the tokens of all
    "one micro-batch": {
        "rows": 16,
        "advantage_baseline": "on_policy",
        "demonstration_weight_schedule": "success",
        "solved_threshold": 0.85,
        "demonstration_average": "token",
    },
    # micro-batches of two rows: most hold no demonstration, and each process has its own mix
    "micro-batches of two rows": {
        "rows": 4,
        "gradient_accumulation_steps": 4,
        "loss_type": "dapo",
        "beta": 0.1,
        "temperature": 0.7,
    },
    # the first process's rollouts act, and sampling is collective under ZeRO-3
    "trajectories": {"rows": 16, "acts": True, "beta": 0.1},
    # one or two images a row, which stay with their rows
    "images": {"rows": 4, "gradient_accumulation_steps": 4, "images": True},
    "rows without an advantage left out": {
        "rows": 4,
        "gradient_accumulation_steps": 4,
        "loss_type": "grpo",
        "skip_zero_advantages": True,
    },
    # processes have rows of other lengths, and other numbers of rows that have an advantage
    "a budget of tokens": {
        "rows": 4,
        "gradient_accumulation_steps": 4,
        "loss_type": "grpo",
        "tokens_per_micro_batch": 70,
        "skip_zero_advantages": True,
        "demonstration_loss": "sft",
        "advantage_baseline": "on_policy",
    },
}


# Whether rows are left out, which are another process's fill -> metrics that are the same on any number of processes
COMPARED = {
    False: ("on_policy/", "off_policy/", "groups/", "tools/"),
    True: (
        "on_policy/reward",
        "on_policy/length",
        "off_policy/reward",
        "off_policy/length",
        "off_policy/loss",
        "groups/",
    ),
}


def launch(config: Path, processes: int, script: str, *arguments) -> str:
    """What the script prints on so many processes."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", config,
        "--num_processes", processes, "--main_process_port", 0, ROOT / "tests" / script, *arguments,
    ]  # fmt: skip
    # the bounded time is the test for deadlocks
    run = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=HUNG,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def train(config: Path, processes: int, model_dir: Path, output_dir: Path, options: dict) -> list[dict]:
    output = launch(config, processes, "run_two_processes.py", model_dir, output_dir, json.dumps(options))
    [line] = [line for line in output.splitlines() if line.startswith("LOG ")]
    return json.loads(line.removeprefix("LOG "))


@pytest.fixture(scope="module")
def model_dirs(tiny_model_dir, acting_model, tmp_path_factory):
    """The base of each set of options."""
    directory = tmp_path_factory.mktemp("tiny-vlm")
    build_model(build_processor()).save_pretrained(directory)
    return dict.fromkeys(OPTIONS, tiny_model_dir) | {"images": directory, "trajectories": acting_model}


@pytest.fixture(scope="module")
def one_process(model_dirs, tmp_path_factory):
    """What one process logs and saves, per set of options."""
    directory = tmp_path_factory.mktemp("one")

    @cache
    def run(name: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
        log = train(CONFIGS / "cpu.yaml", 1, model_dirs[name], directory / name, OPTIONS[name])
        return log, load_file(directory / name / "model.safetensors")

    return run


@pytest.fixture
def fsdp2_on_cpu(tmp_path) -> Path:
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    # needs a GPU's backend to broadcast
    config["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] = False
    path = tmp_path / "fsdp2_on_cpu.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("ddp", "one micro-batch"),
        ("ddp", "micro-batches of two rows"),
        ("fsdp2", "micro-batches of two rows"),
        ("zero3", "one micro-batch"),
        ("zero3", "micro-batches of two rows"),
        ("ddp", "rows without an advantage left out"),
        ("ddp", "a budget of tokens"),
        ("fsdp2", "a budget of tokens"),
        ("zero3", "a budget of tokens"),
        ("zero3", "trajectories"),
        ("ddp", "images"),
        ("zero3", "images"),
    ],
)
def test_two_processes_equal_one(backend, name, one_process, fsdp2_on_cpu, model_dirs, tmp_path):
    config = {"ddp": CONFIGS / "cpu.yaml", "fsdp2": fsdp2_on_cpu, "zero3": CONFIGS / "cpu_zero3.yaml"}[backend]
    expected, expected_weights = one_process(name)
    log = train(config, 2, model_dirs[name], tmp_path / "two", OPTIONS[name])
    assert [line["groups/guided"] for line in log] == [0.5, 1.0, 0.5, 0.0]
    for line, expected_line in zip(log, expected, strict=True):
        assert line["loss"] == pytest.approx(expected_line["loss"], abs=1e-4)
        for key in expected_line:
            if key.startswith(COMPARED[OPTIONS[name].get("skip_zero_advantages", False)]):
                assert line[key] == pytest.approx(expected_line[key], abs=1e-4, rel=1e-4), key

        if "tokens_per_micro_batch" in OPTIONS[name]:  # of TRL's four micro-batches, with as many gathers of ZeRO-3
            assert line["micro_batches"] < 4

    # the saved model is whole, and a model like any other
    weights = load_file(tmp_path / "two" / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    for key, tensor in expected_weights.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-4)
    kind = AutoModelForImageTextToText if name == "images" else AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "two")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4).shape == (1, 7)


@pytest.mark.slow
def test_vllm_server_mode_hands_each_process_its_own_completions(tiny_model_dir, tmp_path):
    launch(CONFIGS / "cpu.yaml", 2, "run_server_mode.py", tiny_model_dir, tmp_path)
    first, second = (json.loads((tmp_path / f"process{i}.json").read_text()) for i in range(2))
    # rollouts of each step, and how many of them answer their own prompt: all
    assert first["own"] == [[6, 6], [6, 6], [8, 8], [8, 8]]
    assert second["own"] == [[8, 8], [6, 6], [6, 6], [8, 8]]
    # the main process asks for all; the one with fewer rollouts asks for its last one again
    assert first["asked"] == [16, 12, 16, 16]
    assert second["asked"] == []
