"""The benchmarks show how far they are, from the start, on stderr: stdout is for their tables."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
TINY_UPDATE = ["--prompts", 2, "--group_size", 2, "--micro_batch", 2, "--runs", 1, "--divide", 256]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "bars", "table"),
    [
        (
            "update_phase.py",
            TINY_UPDATE,
            ["Peak memory of two steps: 100%.*2/2", "Steps of both trainers: 100%.*4/4"],
            "update phase.*speed-up",
        ),
        ("update_phase.py", [*TINY_UPDATE, "--whole"], ["Steps of both trainers: 100%.*4/4"], "whole step.*speed-up"),
        (
            "generation.py",
            ["--prompts", 1, "--group_size", 2, "--tokens", 4, "--runs", 1],
            ["Generations of both trainers: 100%.*4/4"],
            "generation.*ratio",
        ),
        (
            "rewards.py",
            ["--completions", 8, "--runs", 1],
            ["Runs of both rewards: 100%.*2/2"],
            "8 completions.*ratio",
        ),
        (
            "replay.py",
            ["--trajectories", 50, "--tokens", 6, "--prompts", 300],
            [
                "Filling the buffer: 100%.*50/50",
                "Generations of the paper's size: 100%.*5/5",
                "Forward passes.*: [1-9]",
            ],
            "step_seconds",
        ),
    ],
    ids=["update phase", "whole step", "generation", "rewards", "replay"],
)
def test_a_benchmark_shows_progress(tmp_path, script, arguments, bars, table):
    output = tmp_path / "results.json"
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments, "--output", output]
    run = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for bar in bars:
        assert re.search(bar, run.stderr), bar
    assert re.search(table, run.stdout, re.DOTALL)
    assert "%|" not in run.stdout
    assert json.loads(output.read_text())
