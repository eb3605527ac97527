"""What `make test-gpu` runs on a GPU, on the CPU at tiny size; and what it says where there is no GPU."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from recorded import SMALL, Workload

from .conftest import HUNG


ROOT = Path(__file__).parents[1]
WORK = Workload(prompts=1, group_size=3, micro_batch=3, divide=256)
SHAPE = {**SMALL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests_gpu"))
    import checks

    return checks


def test_a_packed_gradient_is_the_padded_one(checks):
    apart = checks.packed_against_padded("shared prompts", "sdpa", "cpu", torch.float32, WORK, SHAPE)
    assert apart["padded"] == 0
    assert apart["packed"] < 1e-5


def test_another_gradient_is_told_apart(checks):
    one, other = (
        checks.gradient("trimmed", "sdpa", "cpu", torch.float32, Workload(1, 3, 1, 3, divide=256, seed=seed), SHAPE)
        for seed in (0, 1)
    )
    assert checks.distance(one, other) > 0.1


@pytest.mark.slow
def test_a_measured_step_stands_beside_what_is_counted_for_it(checks):
    step = checks.measured_against_counted("TRL", "sdpa", "cpu", WORK, SHAPE, steps=1)
    assert step["seconds"] > 0
    assert step["counted_flops"] > 0
    assert step["counted_peak_memory_bytes"] > 0
    assert step["peak_memory_bytes"] is step["mfu"] is None  # of a GPU


def test_the_results_say_what_was_installed(checks, tmp_path):
    checks.write_results(tmp_path / "gpu.json", "a GPU", 80 * 2**30, {"attention": {"packed": 0.0}})
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert (written["device"], written["attention"]) == ("a GPU", {"packed": 0.0})
    assert written["versions"]["torch"] == version("torch")
    assert set(written["versions"]) >= {"transformers", "flash-attn", "kernels", "vllm"}


@pytest.mark.slow
def test_without_a_gpu_it_skips_with_a_sentence():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests_gpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HUNG,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:]
    assert "There is no GPU here" in run.stdout
    assert " passed" not in run.stdout
