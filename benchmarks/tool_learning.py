"""GRPO, mixed policy and LUFFY on a task of several turns with a tool: what recorded trajectories are worth.

Started again, a benchmark that was stopped goes on: each run is one line of the log, written when it ends.

    python benchmarks/tool_learning.py
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: two processes beat one with two threads

from learning import METHODS, quiet, read_runs, rounded
from learning_report import cell, insert, steps_to

from luffy_trl.commands.comparison import make_trainer
from luffy_trl.comparing.methods import known_methods
from luffy_trl.tasks.letter_chain import (
    MAX_TRAJECTORY_LENGTH,
    Links,
    chains_to_dataset,
    letter_chain_reward,
    split_chains,
)
from luffy_trl.tasks.letter_chain_base import chain_accuracy, pretrain_chain


COMPARED = ("GRPO", "mixed policy", "LUFFY")
SEEDS, STEPS, LEARNING_RATE = (0, 1, 2), 40, 1e-4


def execute(method: str, seed: int, steps: int, bases: Path) -> dict[str, Any]:
    """Train and measure; everything that is reported of the run."""
    base = bases / f"letter-chain-seed{seed}"
    if not (base / "tokenizer_config.json").exists():  # written last
        pretrain_chain(base, seed)
    chains = split_chains(seed=seed)
    [stage] = known_methods()[METHODS[method]].stages
    start = time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(
            stage, base, chains_to_dataset(chains["train"]), directory, seed, steps, LEARNING_RATE, [],
            MAX_TRAJECTORY_LENGTH, letter_chain_reward, Links, logging_steps=1,
        )  # fmt: skip
        trainer.train()
    seconds = time.process_time() - start
    log = [line for line in trainer.state.log_history if "on_policy/reward" in line]
    return {
        "method": method, "seed": seed, "steps": steps, "learning_rate": LEARNING_RATE,
        "accuracy": chain_accuracy(trainer.model, trainer.processing_class, chains["test"]),
        "curves": {"step": list(range(1, steps + 1)), "reward": [line["on_policy/reward"] for line in log]},
        "calls": [line["tools/call_frequency"] for line in log], "train_cpu_seconds": seconds,
    }  # fmt: skip


def work(job: tuple[str, int, int, Path]) -> tuple[str, dict[str, Any]]:
    method, seed, steps, _ = job
    return f"{method} | seed {seed} | {steps}", execute(*job)


def table(runs: list[dict[str, Any]]) -> str:
    columns = ("method", "seeds", "accuracy", "last 5 rewards", "highest reward", "steps to 0.5", "CPU s")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for method in COMPARED:
        own = [run for run in runs if run["method"] == method]
        if own:
            cells = [
                cell([run["accuracy"] for run in own]),
                cell([statistics.mean(run["curves"]["reward"][-5:]) for run in own]),
                cell([max(run["curves"]["reward"]) for run in own]),
                cell([steps_to(run, "reward", 0.5) for run in own], ".0f"),
                cell([run["train_cpu_seconds"] for run in own], ".1f"),
            ]
            lines.append(f"| {method} | {', '.join(str(run['seed']) for run in own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tool_learning_cpu.json"))
    parser.add_argument(
        "--log", type=Path, default=Path("outputs/learning/tool_runs.jsonl"), help="one JSON line a run"
    )
    parser.add_argument("--bases", type=Path, default=Path("outputs/learning/bases"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where learning.md is")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args(argv)
    done = read_runs(args.log)
    jobs = [(method, seed, args.steps, args.bases) for seed in args.seeds for method in COMPARED]
    todo = [job for job in jobs if f"{job[0]} | seed {job[1]} | {job[2]}" not in done]
    args.log.parent.mkdir(parents=True, exist_ok=True)
    first = {job[1]: job for job in todo}  # one a seed makes its base
    with (
        multiprocessing.get_context("spawn").Pool(args.workers, initializer=quiet) as pool,
        args.log.open("a") as file,
    ):
        for batch in (list(first.values()), [job for job in todo if job not in first.values()]):
            for key, result in pool.imap_unordered(work, batch):
                done[key] = {"key": key, **result}
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
                print(f"{key}: accuracy {result['accuracy']:.3f}", flush=True)
    runs = [done[f"{method} | seed {seed} | {steps}"] for method, seed, steps, _ in jobs]
    results = {
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, one thread a run",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "runs": runs,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rounded(results)) + "\n")
    insert(args.docs / "learning.md", table(runs), "benchmarks/tool_learning.py")


if __name__ == "__main__":
    main()
