"""Tables and figures of docs/learning.md and the README, from the runs of `learning.py`. Only what was measured."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any


Result = dict[str, Any]
SAME_RATE = 1e-4  # where methods are compared at one learning rate
BEGIN, END = "<!-- measured: written by benchmarks/learning.py -->", "<!-- end of measured -->"
COLUMNS: dict[str, Callable[[Result], float]] = {
    "5 letters": lambda run: run["accuracy"]["5"],
    "3": lambda run: run["accuracy"]["3"],
    "6": lambda run: run["accuracy"]["6"],
    "7": lambda run: run["accuracy"]["7"],
    "sampled": lambda run: run["sampled"]["5"]["right"],
    "pass@8 on 7": lambda run: run["sampled"]["7"]["pass@8"],
    "distinct of 16": lambda run: run["sampled"]["5"]["distinct"],
    "tokens": lambda run: run["sampled"]["5"]["length"],
    "entropy": lambda run: statistics.mean(run["curves"]["entropy"]),
    "demonstration": lambda run: run["curves"]["demonstration"][-1],
    "steps to rare 0.5": lambda run: steps_to(run, "rare", 0.5),
    "generated": lambda run: run["generated_tokens"],
    "CPU s": lambda run: run["train_cpu_seconds"],
}
FORMATS = {"tokens": ".1f", "distinct of 16": ".1f", "steps to rare 0.5": ".0f", "generated": ".0f", "CPU s": ".1f"}
# Of the short table: column -> (condition, what of it)
SHORT: dict[str, tuple[str, str]] = {
    "trained length": ("clean", "sampled"),
    "7 letters": ("clean", "7"),
    "30% faulty": ("30% faulty", "sampled"),
    "60% faulty": ("60% faulty", "sampled"),
    "5% demonstrated": ("5% demonstrated", "sampled"),
    "CPU s": ("clean", "CPU s"),
}


def steps_to(run: Result, metric: str, value: float) -> float:
    """The first measured step at which the metric is at least this high; infinity if it never is."""
    curves = run["curves"]
    return next((step for step, x in zip(curves["step"], curves[metric], strict=True) if x >= value), math.inf)


def cell(values: list[float], spec: str = ".3f") -> str:
    """Mean (min to max); how many got there where some never did."""
    if not values or any(math.isnan(value) for value in values):
        return "-"
    low, high = min(values), max(values)
    if math.isinf(high):
        reached = sum(math.isfinite(value) for value in values)
        return "never" if math.isinf(low) else f"{low:{spec}} to never ({reached} of {len(values)})"
    middle = f"{statistics.mean(values):{spec}}"
    low_text, high_text = f"{low:{spec}}", f"{high:{spec}}"
    return middle if low_text == high_text else f"{middle} ({low_text} to {high_text})"


def table(runs: list[Result]) -> str:
    """One row a method (and setting): learning rate, number of seeds, then the columns."""
    lines = ["| method | lr | seeds | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 3) + "|"]
    for (method, label), group in grouped(runs, lambda run: (run["method"], run["label"])).items():
        name = f"{method}, {label}" if label else method
        cells = [cell([column(run) for run in group], FORMATS.get(key, ".3f")) for key, column in COLUMNS.items()]
        seeds = ", ".join(str(run["seed"]) for run in sorted(group, key=lambda run: run["seed"]))
        lines.append(f"| {name} | {group[0]['learning_rate']:g} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def grouped(runs: list[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    """Runs by key, in order of first appearance."""
    groups: dict[Any, list[Result]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def short_table(runs: list[Result]) -> str:
    """One row a method of the clean condition, one column a condition: what a reader looks for first."""
    lines = ["| method | " + " | ".join(SHORT) + " |", "| --- " * (len(SHORT) + 1) + "|"]
    for method, of_method in grouped(runs, lambda run: run["method"]).items():
        by_condition = grouped(of_method, lambda run: run["condition"])
        if "clean" not in by_condition:
            continue
        cells = [
            cell([COLUMNS[column](run) for run in by_condition[condition]], FORMATS.get(column, ".2f"))
            if condition in by_condition
            else "-"
            for condition, column in SHORT.values()
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rates_table(runs: list[Result], chosen: dict[str, float]) -> str:
    """Share of right sampled answers by method and learning rate; the chosen rate is bold."""
    rates = sorted({run["learning_rate"] for run in runs})
    lines = ["| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "| --- " * (len(rates) + 1) + "|"]
    for method, of_method in grouped(runs, lambda run: run["method"]).items():
        by_rate = grouped(of_method, lambda run: run["learning_rate"])
        cells = [cell([COLUMNS["sampled"](run) for run in by_rate.get(rate, [])]) for rate in rates]
        marked = [
            f"**{text}**" if chosen.get(method) == rate else text for rate, text in zip(rates, cells, strict=True)
        ]
        lines.append(f"| {method} | " + " | ".join(marked) + " |")
    return "\n".join(lines)


def markdown(results: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    parts = [
        f"Measured {results['date']} on {results['device']}; {versions}; {results['steps']} optimizer steps a run."
    ]
    for condition, runs in grouped(results["runs"], lambda run: run["condition"]).items():
        title = f"### {condition[0].upper()}{condition[1:]}"
        if condition.startswith("validation"):
            chosen = {method: rate for task, method, rate in results["learning_rates"] if task == runs[0]["task"]}
            parts += [title, rates_table(runs, chosen)]
        else:
            parts += [title, table(runs)]
    if results["missing"]:
        missing: dict[str, int] = {}
        for key in results["missing"]:
            missing[key.split(" | ")[0]] = missing.get(key.split(" | ")[0], 0) + 1
        listed = ", ".join(f"{condition} ({count} runs)" for condition, count in missing.items())
        parts.append(f"**Not measured**: {listed}.")
    return "\n\n".join(parts)


def insert(path: Path, text: str) -> None:
    """Put the text between the page's marks, which it must have.

    Raises:
        ValueError: if the page has no marks.
    """
    page = path.read_text()
    if BEGIN not in page or END not in page:
        raise ValueError(f"{path} has no lines {BEGIN!r} and {END!r} between which the tables go.")
    path.write_text(page[: page.index(BEGIN) + len(BEGIN)] + f"\n\n{text}\n\n" + page[page.index(END) :])


def write_report(results: Result, docs: Path, readme: Path) -> None:
    insert(docs / "learning.md", markdown(results))
    runs = results["runs"]
    insert(readme, short_table(runs))

    def of(*conditions: str) -> list[Result]:
        return [run for run in runs if run["condition"] in conditions]

    same_rate = [run for run in of("validation: letter walk") if run["learning_rate"] == SAME_RATE]
    curves(docs / "learning_zero_reward.png", of("clean"), ("GRPO", "LUFFY", "SFT"), ("reward", "rare"))
    curves(docs / "learning_shaping.png", same_rate, ("mixed policy", "LUFFY"), ("rare", "entropy"))
    curves(docs / "learning_diversity.png", of("free order"), None, ("reward", "entropy", "demonstration"))
    bars(docs / "learning_faulty.png", of("clean", "30% faulty", "60% faulty"), "sampled", "right answers, sampled")
    curves(docs / "learning_clip.png", of("four steps a generation"), None, ("reward", "rare"))
    sweeps(docs / "learning_sweeps.png", of("gamma", "demonstrations", "initial probability"))


def pyplot():
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    return plt


TITLES = {
    "reward": "reward of sampled answers",
    "entropy": "entropy of sampled tokens (nats)",
    "demonstration": "probability of the demonstration",
    "rare": "probability of its rare tokens",
}


def curves(path: Path, runs: list[Result], methods: tuple[str, ...] | None, metrics: tuple[str, ...]) -> None:
    """Mean over seeds as a line, all of them within the band; no picture without runs."""
    by_name: dict[str, list[Result]] = {}
    for run in runs:
        if methods is None or run["method"] in methods:
            by_name.setdefault(f"{run['method']} {run['label']}".strip(), []).append(run)
    if not by_name:
        return
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4.8 * len(metrics), 3.6), squeeze=False, constrained_layout=True
    )
    for ax, metric in zip(axes[0], metrics, strict=True):
        for name, group in by_name.items():
            steps = group[0]["curves"]["step"]
            series = list(zip(*(run["curves"][metric] for run in group), strict=True))
            (line,) = ax.plot(steps, [statistics.mean(values) for values in series], label=name)
            ax.fill_between(steps, list(map(min, series)), list(map(max, series)), color=line.get_color(), alpha=0.15)
        scale = "log" if metric in ("rare", "demonstration") else "linear"
        ax.set(title=TITLES[metric], xlabel="optimizer step", yscale=scale)
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def bars(path: Path, runs: list[Result], column: str, title: str) -> None:
    if not runs:
        return
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(8, 3.6), constrained_layout=True)
    conditions = list(dict.fromkeys(run["condition"] for run in runs))
    methods = list(dict.fromkeys(run["method"] for run in runs))
    for i, condition in enumerate(conditions):
        for j, method in enumerate(methods):
            values = [COLUMNS[column](r) for r in runs if r["condition"] == condition and r["method"] == method]
            if values:
                x, mean = j + 0.27 * (i - (len(conditions) - 1) / 2), statistics.mean(values)
                error = [[mean - min(values)], [max(values) - mean]]
                ax.bar(x, mean, 0.25, yerr=error, capsize=2, color=f"C{i}", label=condition)
    ax.set_xticks(range(len(methods)), methods, rotation=20)
    ax.set(title=title, ylim=(0, 1.05))
    handles = {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    ax.legend(handles.values(), handles.keys())
    figure.savefig(path, dpi=90)
    plt.close(figure)


def sweeps(path: Path, runs: list[Result]) -> None:
    """Mean sampled reward over the run, which is both how far and how fast, against each setting."""
    if not runs:
        return
    plt = pyplot()
    conditions = list(dict.fromkeys(run["condition"] for run in runs))
    figure, axes = plt.subplots(
        1, len(conditions), figsize=(4.6 * len(conditions), 3.6), squeeze=False, constrained_layout=True
    )
    for ax, condition in zip(axes[0], conditions, strict=True):
        group = [run for run in runs if run["condition"] == condition]
        labels = sorted({run["label"] for run in group}, key=float)
        for method in dict.fromkeys(run["method"] for run in group):
            points = [(labels.index(r["label"]), statistics.mean(r["curves"]["reward"])) for r in group
                      if r["method"] == method]  # fmt: skip
            ax.scatter(*zip(*points, strict=True), label=method, alpha=0.7)
        ax.set_xticks(range(len(labels)), labels)
        ax.set(title=f"{condition}: mean reward over the run", ylim=(-0.02, 1.02))
        ax.legend(fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)
