"""Two real gloo processes against one: the same losses, metrics and weights, whatever rows a process holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]


def launch(processes: int, model_dir: Path, output_dir: Path, options: dict) -> list[dict]:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "cpu.yaml",
        "--num_processes", processes, "--main_process_port", 0,
        ROOT / "tests" / "run_two_processes.py", model_dir, output_dir, json.dumps(options),
    ]  # fmt: skip
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    [line] = [line for line in run.stdout.splitlines() if line.startswith("LOG ")]
    return json.loads(line.removeprefix("LOG "))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"rows": 16},
        # micro-batches of two rows: most hold no demonstration; each process has its own mix
        {"rows": 4, "gradient_accumulation_steps": 4, "loss_type": "dapo", "beta": 0.1},
    ],
    ids=["one micro-batch", "micro-batches of two rows"],
)
def test_two_processes_equal_one(tiny_model_dir, tmp_path, options):
    one = launch(1, tiny_model_dir, tmp_path / "one", options)
    two = launch(2, tiny_model_dir, tmp_path / "two", options)
    assert [line["groups/guided"] for line in one] == [0.5, 1.0, 0.5, 0.0]
    for line_one, line_two in zip(one, two, strict=True):
        assert line_two["loss"] == pytest.approx(line_one["loss"], abs=1e-4)
        for key in line_one:
            if key.startswith(("on_policy/", "off_policy/", "groups/")):
                assert line_two[key] == pytest.approx(line_one[key], abs=1e-4, rel=1e-4), key
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)
