"""The benchmarks show how far they are, from the start, on stderr: stdout is for their tables."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measuring import Machine, in_turn, spread, watched_machine
from recorded import SMALL, Workload, make_model, make_trainer
from update_phase import cpu_attention_flops

from .conftest import HUNG


ROOT = Path(__file__).parents[1]
TINY_UPDATE = ["--prompts", 2, "--group_size", 2, "--micro_batch", 2, "--runs", 1, "--divide", 256]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "bars", "table"),
    [
        (
            "update_phase.py",
            TINY_UPDATE,
            ["Peak memory of two steps: 100%.*4/4", "Steps of all trainers: 100%.*8/8"],
            "update phase.*speed-up of shared prompts over TRL: .* times fewer FLOPs",
        ),
        (
            "update_phase.py",
            [*TINY_UPDATE, "--whole", "--configurations", "TRL", "trimmed"],
            ["Steps of all trainers: 100%.*4/4"],
            "whole step.*speed-up",
        ),
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
        timeout=HUNG,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for bar in bars:
        assert re.search(bar, run.stderr), bar
    assert re.search(table, run.stdout, re.DOTALL)
    assert "%|" not in run.stdout
    assert json.loads(output.read_text())


def test_a_record_says_how_far_runs_lie_apart():
    assert spread([4.0, 1.0, 2.0, 3.0, 10.0]) == {
        "median": 3.0,
        "quartiles": [2.0, 4.0],
        "min": 1.0,
        "max": 10.0,
        "runs": 5,
    }
    assert spread([2.0]) == {"median": 2.0, "quartiles": [2.0, 2.0], "min": 2.0, "max": 2.0, "runs": 1}


def test_trainers_alternate_each_other_round_backwards():
    assert in_turn(["TRL", "LUFFY"], 2) == [(0, "TRL"), (0, "LUFFY"), (1, "LUFFY"), (1, "TRL")]


@pytest.mark.parametrize(("before", "during", "warns"), [(0.01, 0.02, False), (0.4, 0.0, True), (0.0, 0.4, True)])
def test_a_machine_that_was_not_idle_is_warned_of(before, during, warns):
    warning = Machine(load_before=1.5, others_before=before, others=during).warning()
    assert (warning is not None) == warns
    if warning:
        assert "was not idle" in warning
        assert "40%" in warning


def test_what_the_benchmark_itself_takes_is_no_other_processs():
    with watched_machine(seconds_before=0.0) as machine:
        values = torch.rand(400, 400)
        for _ in range(200):
            values = values @ values / 400
        busy = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True, env=busy)
    assert 0.0 <= machine.others <= 1.0


def test_recorded_lengths_are_the_papers():
    groups = Workload(prompts=200, divide=1).groups()
    assert all(len(group["rollouts"]) == 7 and len(group["demonstrations"]) == 1 for group in groups)
    rollouts = [len(c) for group in groups for c in group["rollouts"]]
    demonstrations = [len(c) for group in groups for c in group["demonstrations"]]
    assert abs(sum(rollouts) / len(rollouts) - 2832) < 100
    assert abs(sum(demonstrations) / len(demonstrations) - 4500) < 400  # some are cut
    assert max(rollouts + demonstrations) == 8192
    long = Workload(prompts=2, lengths="long_prompt", divide=16).groups()
    assert [len(group["prompt"]) for group in long] == [256, 256]


def test_every_configuration_takes_the_same_rows_and_trains(tmp_path):
    work = Workload(prompts=2, group_size=3, micro_batch=3, divide=256)
    losses = {}
    for name in ("trimmed", "packed", "budget", "shared prompts"):
        model = make_model("cpu", "sdpa", {**SMALL, "hidden_size": 32, "num_hidden_layers": 1})
        trainer = make_trainer(name, work, model, str(tmp_path))
        rows = [row for row in trainer.train_dataset for _ in range(trainer.num_generations)]
        steps = [trainer.training_step(trainer.model, rows, None) for _ in range(2)]
        losses[name] = sum(float(loss) for loss in steps)
    assert max(losses.values()) - min(losses.values()) < 1e-6


def test_attention_of_a_cpu_counts_the_past_or_all_of_a_mask():
    query, key = (1, 2, 10, 8), (1, 2, 10, 8)
    assert cpu_attention_flops(query, key, key, products=2, is_causal=False) == 2 * 2 * 2 * 8 * 100
    assert cpu_attention_flops(query, key, key, products=2, is_causal=True) == 2 * 2 * 2 * 8 * 55
