"""A cold start, and what helps: a policy of high entropy that is never right, on the letter walk.

The base babbles: under the trigger of the task it writes letters drawn at random, and no answer. Each remedy takes the
learning rate that serves it best on seeds of its own. Started again, a benchmark that was stopped goes on. At the end
it writes the figure and the table of docs/method.md.

    python benchmarks/cold_start.py --workers 2
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: two processes beat one with two threads

import matplotlib
from learning import quiet, rounded
from learning_report import insert
from lm_report import cell
from transformers import AutoTokenizer

from luffy_trl.commands.comparison import make_trainer
from luffy_trl.comparing.methods import Stage, known_methods, stage_steps
from luffy_trl.comparing.results import Measured, chosen_rates
from luffy_trl.tasks.letter_walk import MAX_COMPLETION_LENGTH, distinct_walks, to_dataset
from luffy_trl.tasks.letter_walk_base import accuracy, load_or_pretrain
from luffy_trl.tasks.probe import Probe


SEEDS, RATE_SEEDS = (0, 1, 2), (7, 8, 9)
RATES = (1e-4, 3e-4)
STEPS, PROBE_EVERY = 60, 5
LENGTH, TRAIN_SIZE, TEST_SIZE, PROBE_SIZE = 5, 2048, 256, 64
HELD_OUT = "held_out"
# Name -> fields of LuffyConfig over the paper's, or the name of a method of several stages
REMEDIES: dict[str, dict[str, Any] | str] = {
    "GRPO": "grpo",
    "LUFFY, the paper's": "luffy",
    "rollouts' baseline": "luffy_on_policy",
    "success gate": "gate",
    "prefixes": "prefix",
    "gamma 0.01": {"shaping_gamma": 0.01},
    "gamma 1": {"shaping_gamma": 1.0},
    "log shaping": {"shaping": "log"},
    "log shaping, rollouts' baseline": "luffy_log",
    "demonstration weight 8": {"demonstration_weight": 8.0},
    "SFT loss, rollouts' baseline": "rl_sft",
    "SFT, then LUFFY": "sft_then_luffy",
    "SFT": "sft",
}
DRAWN = (
    "LUFFY, the paper's",
    "rollouts' baseline",
    "gamma 0.01",
    "log shaping",
    "SFT loss, rollouts' baseline",
    "SFT",
)
PANELS = {
    "reward": ("reward of sampled answers", "linear"),
    "entropy": ("entropy of sampled tokens (nats)", "linear"),
    "rare": ("probability of a demonstration's rare tokens", "log"),
}


@dataclass(frozen=True)
class Run:
    remedy: str
    seed: int
    rate: float
    chooses_rate: bool

    @property
    def key(self) -> str:
        return f"{self.remedy} | seed {self.seed} | rate {self.rate:g}"


def stages_of(remedy: str) -> tuple[Stage, ...]:
    what = REMEDIES[remedy]
    return known_methods()[what].stages if isinstance(what, str) else (Stage("train", what, 1.0),)


def execute(run: Run, base: Path, steps: int) -> dict[str, Any]:
    """Train and measure; everything that is reported of the run."""
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(base)
    walks = distinct_walks(run.seed, LENGTH)
    test, probed, train = (list(islice(walks, size)) for size in (TEST_SIZE, PROBE_SIZE, TRAIN_SIZE))
    probe, start, logs = Probe(tokenizer, probed, PROBE_EVERY), time.process_time(), []
    stages = stages_of(run.remedy)
    with tempfile.TemporaryDirectory() as directory:
        model_dir = base
        for number, (stage, own_steps) in enumerate(zip(stages, stage_steps(stages, steps), strict=True)):
            more = {"logging_steps": PROBE_EVERY} if stage.command == "train" else {}
            trainer = make_trainer(
                stage, model_dir, to_dataset(train), Path(directory) / str(number), run.seed, own_steps, run.rate,
                [probe], MAX_COMPLETION_LENGTH, **more,
            )  # fmt: skip
            trainer.train()
            logs += trainer.state.log_history
            model_dir = Path(directory) / str(number)
            trainer.save_model(str(model_dir))
            probe.steps_before += own_steps
    push = [line["groups/push_to_pull"] for line in logs if "groups/push_to_pull" in line]
    return {
        "remedy": run.remedy, "seed": run.seed, "learning_rate": run.rate, "chooses_rate": run.chooses_rate,
        "accuracy": accuracy(trainer.model, tokenizer, test), "curves": probe.curves,
        "push_to_pull": push[0] if push else None, "cpu_seconds": time.process_time() - start - probe.cpu_seconds,
    }  # fmt: skip


def work(job: tuple[Run, Path, int]) -> dict[str, Any]:
    return execute(*job)


# The grid


def run_all(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """First the rates' runs of all remedies, then those of the seeds; each is kept as it ends."""

    def do(todo: list[Run]) -> None:
        kept = {(run["remedy"], run["seed"], run["learning_rate"]) for run in runs}
        todo = [run for run in todo if (run.remedy, run.seed, run.rate) not in kept]
        jobs = [(run, base_of(run.seed, args.bases), args.steps) for run in todo]
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            for number, result in enumerate(pool.imap_unordered(work, jobs), start=1):
                runs.append(rounded(result))
                write(args, runs)
                print(f"{number:>3} of {len(jobs)}  {result['remedy']}, seed {result['seed']}", flush=True)

    do([Run(remedy, seed, rate, True) for seed in args.rate_seeds for remedy in REMEDIES for rate in RATES])
    rates = rates_of(runs)
    do([Run(remedy, seed, rates[remedy], False) for seed in args.seeds for remedy in REMEDIES])


def base_of(seed: int, directory: Path) -> Path:
    return load_or_pretrain(directory / f"babble-seed{seed}", seed, babble=True)


def rates_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    return chosen_rates(
        [
            Measured(run["remedy"], run["seed"], run["learning_rate"], {HELD_OUT: run["accuracy"]})
            for run in runs
            if run["chooses_rate"]
        ],
        HELD_OUT,
    )


def write(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    unfinished = args.output.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"steps": args.steps, "runs": runs}) + "\n")
    unfinished.replace(args.output)


# What is reported


def table(runs: list[dict[str, Any]]) -> list[str]:
    """A line a remedy: right answers in percent after half of the steps (sampled) and at the end (greedy)."""
    lines = ["| | half-way, sampled | at the end, greedy | push to pull | rate |", "| --- | --- | --- | --- | --- |"]
    for remedy, rate in rates_of(runs).items():
        own = [run for run in runs if run["remedy"] == remedy and not run["chooses_rate"]]
        if not own:
            continue
        half, end = ([100 * share(run) for run in own] for share in (at_half, lambda run: run["accuracy"]))
        push = [run["push_to_pull"] for run in own if run["push_to_pull"] is not None]
        told = f"{fmean(push):.1f}" if push else "-"
        cells = (remedy, cell(half, ".0f"), cell(end, ".0f"), told, f"{rate:g}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def at_half(run: dict[str, Any]) -> float:
    curves = run["curves"]
    return next(v for step, v in zip(curves["step"], curves["reward"], strict=True) if 2 * step >= curves["step"][-1])


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Means over seeds, and a band from the lowest to the highest."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(4.6 * len(PANELS), 3.8), constrained_layout=True)
    for ax, (metric, (title, scale)) in zip(axes, PANELS.items(), strict=True):
        for remedy in DRAWN:
            curves = [run["curves"] for run in runs if run["remedy"] == remedy and not run["chooses_rate"]]
            if not curves:
                continue
            values = list(zip(*(curve[metric] for curve in curves), strict=True))
            steps = curves[0]["step"]
            [line] = ax.plot(steps, [fmean(v) for v in values], label=remedy)
            ax.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.12, color=line.get_color())
        ax.set(title=title, xlabel="optimizer step", yscale=scale)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(runs: list[dict[str, Any]], docs: Path) -> None:
    insert(docs / "method.md", "\n".join(table(runs)), "benchmarks/cold_start.py")
    draw(runs, docs / "cold_start.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "cold_start_cpu.json")
    parser.add_argument("--bases", type=Path, default=Path("outputs/cold_start"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where method.md and the figure are")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--rate_seeds", type=int, nargs="+", default=list(RATE_SEEDS))
    parser.add_argument("--report", action="store_true", help="no runs: table and figure from what there is")
    args = parser.parse_args(argv)
    runs = json.loads(args.output.read_text())["runs"] if args.output.is_file() else []
    if not args.report:
        run_all(args, runs)
    report(runs, args.docs)


if __name__ == "__main__":
    main()
