"""All methods on embedded tasks, from the same bases, with the same steps: what each claim of the paper looks like.

Each run is one line of the log, outputs/learning/runs.jsonl, written when it ends: started again, a benchmark that was
stopped goes on. Runs are ordered so that the claims come first and the sweeps last; each worker takes the next.
The table of docs/learning.md and its figures are written from the JSON file at the end, and by --report alone.

    python benchmarks/learning.py --workers 2
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: two processes beat one with two threads

import datasets
import torch
from free_order import sample_free_order_walk
from learning_report import write_report
from transformers import AutoTokenizer, logging, set_seed
from variants import demonstrate

from luffy_trl.commands.comparison import GROUP_SIZE, PROMPTS_PER_STEP, make_trainer
from luffy_trl.comparing.methods import known_methods, stage_steps
from luffy_trl.comparing.results import Measured
from luffy_trl.comparing.results import chosen_rates as best_rates
from luffy_trl.tasks.letter_walk import distinct_walks, letter_walk_reward, sample_walk
from luffy_trl.tasks.letter_walk_base import accuracy, load_or_pretrain
from luffy_trl.tasks.probe import Probe


TRAINED, LENGTHS = 5, (3, 5, 6, 7)
SEEDS, VALIDATION_SEEDS = (0, 1, 2, 3, 4), (7, 8, 9)  # also the bases'
FEW = 3  # seeds of the conditions that no claim rests on
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
STEPS = 60
TEST = "test"  # the one by which rates are chosen
TRAIN_SIZE, TEST_SIZE, PROBE_SIZE, SAMPLED_SIZE, SAMPLES = 2048, 256, 64, 32, 16
PROBE_EVERY = 5
TASKS: dict[str, dict[str, Any]] = {
    "letter walk": {"sample": sample_walk, "max_completion_length": 20},
    # More to learn (the shift's number), so more steps of pretraining. Its base goes on often enough to be right now
    # and then, in one order or another: else there are no other ways for a method to keep.
    "free order": {
        "sample": sample_free_order_walk,
        "max_completion_length": 24,
        "pretraining": {"steps": 900, "diligence": 0.4},
    },
}
# As the results name them, and as luffy_trl/comparing/methods.yaml does
METHODS = {
    "GRPO": "grpo", "mixed policy": "mixed_policy", "LUFFY": "luffy", "RL + SFT loss": "rl_sft", "prefixes": "prefix",
    "success gate": "gate", "SFT": "sft", "SFT then RL": "sft_then_rl",
}  # fmt: skip
ALL = tuple(METHODS)
# Learning rates are chosen for these; the others are LUFFY with an option, and take LUFFY's
CORE = ("GRPO", "mixed policy", "LUFFY", "RL + SFT loss", "SFT", "SFT then RL")


@dataclass(frozen=True)
class Run:
    """One training run; `data` goes to `demonstrate`, `flags` to the trainer, over the method's own."""

    condition: str
    method: str
    seed: int
    task: str = "letter walk"
    data: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    diligence: float = 0.0
    learning_rate: float | None = None  # None: the one chosen for the method on this task
    label: str = ""  # of the setting in a sweep

    @property
    def key(self) -> str:
        rate = "" if self.learning_rate is None else f" lr={self.learning_rate:g}"
        return f"{self.condition} | {self.method} | {self.label}{rate} | seed {self.seed}"


def grid(seeds: tuple[int, ...] = SEEDS, rates: tuple[float, ...] = LEARNING_RATES) -> list[Run]:
    runs: list[Run] = []

    def add(condition: str, methods: tuple[str, ...], seeds: tuple[int, ...] = seeds, **options):
        runs.extend(Run(condition, method, seed, **options) for method in methods for seed in seeds)

    def choose_rates(task: str):
        for rate in rates:
            add(f"validation: {task}", CORE, VALIDATION_SEEDS, task=task, learning_rate=rate)

    choose_rates("letter walk")
    add("clean", ALL)
    add("60% faulty", ALL, data={"faulty": 0.6})
    add("60% faulty, wrong ones dropped", ("LUFFY", "SFT"), data={"faulty": 0.6, "dropped": True})
    for epsilon in (0.2, 1e6):  # several optimizer steps a generation: in the first one the clip never acts
        flags = {"num_iterations": 4, "epsilon": epsilon}
        add("four steps a generation", ("LUFFY",), flags=flags, label=f"epsilon {epsilon:g}")
    choose_rates("free order")
    add("free order", ALL, task="free order")
    few = seeds[:FEW]
    add("30% faulty", CORE, few, data={"faulty": 0.3})
    add("5% demonstrated", CORE, few, data={"demonstrated": 0.05})
    add("25% demonstrated", CORE, few, data={"demonstrated": 0.25})
    add("doubled letters", CORE, few, data={"style": "doubled"})
    for gamma in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0):
        add("gamma", ("LUFFY",), few, flags={"shaping_gamma": gamma}, label=f"{gamma:g}")
    for count in (0, 1, 2, 4):
        flags = {"num_demonstrations": count}
        add("demonstrations", ("LUFFY",), few, data={"copies": 4}, flags=flags, label=str(count))
    for diligence in (0.0, 0.0005, 0.003, 0.02):
        add("initial probability", ("GRPO", "mixed policy", "LUFFY"), few, diligence=diligence, label=f"{diligence:g}")
    return runs


def tuned(method: str) -> str:
    """The method whose learning rate this one takes."""
    return method if method in CORE else "LUFFY"


def base_of(run: Run, directory: Path) -> Path:
    task = TASKS[run.task]
    options = {"diligence": run.diligence} | task.get("pretraining", {})
    name = f"{run.task.replace(' ', '-')}-{options['diligence']:g}-seed{run.seed}"
    return load_or_pretrain(directory / name, run.seed, sample=task["sample"], **options)


def execute(run: Run, base: Path, learning_rate: float, steps: int, test_size: int = TEST_SIZE) -> dict[str, Any]:
    """Train and measure; everything that is reported of the run."""
    task = TASKS[run.task]
    limit = 32 if run.data.get("style") == "doubled" else task["max_completion_length"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    walks = distinct_walks(run.seed, TRAINED, task["sample"])
    tests = {TRAINED: list(islice(walks, test_size))}
    probe = Probe(tokenizer, list(islice(walks, PROBE_SIZE)), PROBE_EVERY, limit)
    train_dataset = demonstrate(list(islice(walks, TRAIN_SIZE)), seed=run.seed, **run.data)
    for length in LENGTHS:
        tests.setdefault(length, list(islice(distinct_walks(run.seed, length, task["sample"]), test_size)))

    start = time.process_time()  # one thread: what it would take alone, whatever else the machine does
    model, generated, clipped = train(run, base, train_dataset, learning_rate, steps, probe, limit)
    seconds = time.process_time() - start - probe.cpu_seconds
    set_seed(0)
    return {
        "condition": run.condition, "method": run.method, "label": run.label, "seed": run.seed, "task": run.task,
        "learning_rate": learning_rate, "steps": steps,
        "accuracy": {str(k): accuracy(model, tokenizer, tests[k], max_new_tokens=limit) for k in LENGTHS},
        "sampled": {str(k): sample_answers(model, tokenizer, tests[k][:SAMPLED_SIZE], limit) for k in (5, 7)},
        "curves": probe.curves, "generated_tokens": generated, "clip_ratio": clipped, "train_cpu_seconds": seconds,
        "date": date.today().isoformat(),
    }  # fmt: skip


def train(run: Run, base: Path, train_dataset, learning_rate: float, steps: int, probe: Probe, limit: int):
    """The trained model, the tokens it sampled for training, and the mean share of clipped tokens."""
    stages = known_methods()[METHODS[run.method]].stages
    logs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        start: str | Path = base
        for number, (stage, own_steps) in enumerate(zip(stages, stage_steps(stages, steps), strict=True)):
            flags = {"logging_steps": 1, **run.flags} if stage.command == "train" else {}
            trainer = make_trainer(
                stage, start, train_dataset, directory, run.seed, own_steps, learning_rate, [probe], limit, **flags
            )
            trainer.train()
            logs += trainer.state.log_history
            if number < len(stages) - 1:
                start = Path(directory) / f"stage-{number}"
                trainer.save_model(str(start))
                probe.steps_before += own_steps
    rows, most = PROMPTS_PER_STEP * GROUP_SIZE, (stages[-1].fields | run.flags).get("num_demonstrations", 1)
    # Rollouts of the generations there were, as a share of the rows held demonstrations; none in SFT's logs. Of
    # prefixes the policy's part is left out.
    generated = sum(
        log["on_policy/length"] * (rows - PROMPTS_PER_STEP * most * log["groups/guided"])
        for log in logs
        if "on_policy/length" in log
    )
    clips = [log["clip_ratio/region_mean"] for log in logs if "clip_ratio/region_mean" in log]
    return trainer.model, generated, sum(clips) / len(clips) if clips else 0.0


@torch.no_grad()
def sample_answers(model, tokenizer, walks, max_new_tokens: int) -> dict[str, float]:
    """Over `SAMPLES` answers a walk at temperature 1: shares with the right letter and with the whole working right,
    pass@8, pass@16, different ones with the whole working right, and mean tokens."""
    model.eval()
    inputs = tokenizer([walk.prompt() for walk in walks for _ in range(SAMPLES)], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, top_k=0)
    completion_ids = ids[:, inputs["input_ids"].size(1) :]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    right = letter_walk_reward(texts, [walk.answer for walk in walks for _ in range(SAMPLES)])
    solved, distinct, pass_at_8, sound = [], [], [], 0
    for i, walk in enumerate(walks):
        answers = texts[i * SAMPLES : (i + 1) * SAMPLES]
        right_here = sum(right[i * SAMPLES : (i + 1) * SAMPLES])
        ways = walk.sound_answers()
        sound_here = [text for text in answers if text in ways]
        sound += len(sound_here)
        distinct.append(len(set(sound_here)))
        solved.append(right_here > 0)
        pass_at_8.append(pass_at_k(int(right_here), 8))
    return {
        "right": sum(right) / len(right),
        "sound": sound / len(right),
        "pass@8": sum(pass_at_8) / len(pass_at_8),
        "pass@16": sum(solved) / len(solved),
        "distinct": sum(distinct) / len(distinct),
        "length": (completion_ids != tokenizer.pad_token_id).sum(1).float().mean().item(),
    }


def pass_at_k(right: int, k: int, n: int = SAMPLES) -> float:
    """Chance that k of n samples, `right` of which are right, hold a right one (arXiv 2107.03374)."""
    wrong_only = 1.0
    for i in range(k):
        wrong_only *= max(n - right - i, 0) / (n - i)
    return 1.0 - wrong_only


# The grid


def quiet() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def work(job: tuple[Run, Path, float, int, int]) -> tuple[str, dict[str, Any]]:
    run, directory, learning_rate, steps, test_size = job
    return run.key, execute(run, base_of(run, directory), learning_rate, steps, test_size)


def read_runs(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["key"]: line for line in map(json.loads, lines)}


def chosen_rates(done: dict[str, dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(task, method) -> the smallest learning rate that is as good as the best.

    By the share of right sampled answers at the end, of the trained length, averaged over the validation seeds.
    """
    trials: dict[str, list[Measured]] = {}
    for result in done.values():
        if result["condition"].startswith("validation"):
            score = {TEST: result["sampled"][str(TRAINED)]["right"]}
            trial = Measured(result["method"], result["seed"], result["learning_rate"], score)
            trials.setdefault(result["task"], []).append(trial)
    return {
        (task, method): rate for task, of_task in trials.items() for method, rate in best_rates(of_task, TEST).items()
    }


def run_grid(runs: list[Run], steps: int, test_size: int, workers: int, directory: Path, log: Path) -> None:
    """Execute the runs that the log does not have, in order, and append each as it ends."""
    done = read_runs(log)
    directory.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    start, total = time.time(), len(runs)
    with multiprocessing.get_context("spawn").Pool(workers, initializer=quiet) as pool, log.open("a") as file:
        for name, condition in groupby(runs, key=lambda run: run.condition):
            todo = [run for run in condition if run.key not in done]
            print(f"{name}: {len(todo)} runs to do, a line each as they end", file=sys.stderr, flush=True)
            bases = {(run.task, run.diligence, run.seed): run for run in todo}
            pool.starmap(base_of, [(run, directory) for run in bases.values()], chunksize=1)
            rates = chosen_rates(done)
            jobs = [
                (run, directory, run.learning_rate or rates[run.task, tuned(run.method)], steps, test_size)
                for run in todo
            ]
            for key, result in pool.imap_unordered(work, jobs):
                done[key] = {"key": key, **result}
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
                finished = sum(run.key in done for run in runs)
                print(f"{time.time() - start:6.0f} s  {finished:>3} of {total}  {key}", flush=True)


def selected(runs: list[Run], conditions: Sequence[str], methods: Sequence[str]) -> list[Run]:
    """The runs of these, and the validation runs that they need."""
    wanted = [run for run in runs if run.condition in conditions and run.method in methods and not is_validation(run)]
    needed = {(run.task, tuned(run.method)) for run in wanted}
    return [run for run in runs if run in wanted or (is_validation(run) and (run.task, run.method) in needed)]


def is_validation(run: Run) -> bool:
    return run.condition.startswith("validation")


def rounded(value: Any) -> Any:
    """The same with four significant digits, which is more than three seeds tell."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/learning_cpu.json"))
    parser.add_argument("--log", type=Path, default=Path("outputs/learning/runs.jsonl"), help="one JSON line a run")
    parser.add_argument("--bases", type=Path, default=Path("outputs/learning/bases"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where learning.md and the figures are")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="that shows the short table")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--test_size", type=int, default=TEST_SIZE, help="held-out walks of each length")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=list(LEARNING_RATES), help="to choose from")
    parser.add_argument("--conditions", nargs="+", help="only these (validation runs come along)")
    parser.add_argument("--methods", nargs="+", choices=ALL, help="only these")
    parser.add_argument("--report", action="store_true", help="no runs: table and figures from what the log has")
    args = parser.parse_args(argv)
    runs = grid(tuple(args.seeds), tuple(args.learning_rates))
    known = sorted({run.condition for run in runs})
    for condition in args.conditions or []:
        if condition not in known:
            parser.error(f"--conditions {condition!r} is not one of {', '.join(map(repr, known))}.")
    for seed in set(args.seeds) & set(VALIDATION_SEEDS):
        parser.error(f"--seeds {seed} is one of those on which learning rates are chosen. Take another.")
    if args.workers < 1 or args.steps < 2 or args.test_size < 1:
        parser.error("--workers and --test_size must be 1 or more, --steps 2 or more.")
    runs = selected(runs, args.conditions or known, args.methods or ALL)
    log = args.log
    if not args.report:
        try:
            run_grid(runs, args.steps, args.test_size, args.workers, args.bases, log)
        except KeyboardInterrupt:
            sys.exit(f"Stopped. {len(read_runs(log))} runs are in {log}; the same command goes on from there.")
    done = read_runs(log)
    results = {
        "dates": sorted({done[run.key]["date"] for run in runs if run.key in done}),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, one thread a run",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "seeds": args.seeds,
        "validation_seeds": VALIDATION_SEEDS,
        "steps": args.steps,
        "learning_rates": [[*key, rate] for key, rate in sorted(chosen_rates(done).items())],
        "missing": sorted(run.key for run in runs if run.key not in done),
        "runs": [done[run.key] for run in runs if run.key in done],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rounded(results)) + "\n")
    write_report(results, args.docs, args.readme)


if __name__ == "__main__":
    main()
