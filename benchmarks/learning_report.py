"""Tables and figures of docs/learning.md and the README, from the runs of `learning.py`. Only what was measured."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any


Result = dict[str, Any]
# Methods in the figures, by claim
ALL: tuple[str, ...] = ()
A, B, C = ("GRPO", "LUFFY", "SFT"), ("mixed policy", "LUFFY"), ("mixed policy", "LUFFY", "RL + SFT loss", "SFT")
METHODS = ("GRPO", "mixed policy", "LUFFY", "RL + SFT loss", "SFT", "SFT then RL", "prefixes", "success gate")
SHADES = ("#2b6cb0", "#90cdf4", "#e2e8f0")  # clean, and more and more faulty
TITLES = {
    "reward": "reward",
    "entropy": "entropy (nats)",
    "demonstration": "P(demonstration)",
    "rare": "P(rare tokens)",
}
SAME_RATE = 1e-4  # where methods are compared at one learning rate
WRITER, END = "benchmarks/learning.py", "<!-- end of measured -->"
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
    "rare at the start": lambda run: run["curves"]["rare"][0],
    "steps to rare 0.5": lambda run: steps_to(run, "rare", 0.5),
    "generated": lambda run: run["generated_tokens"],
    "CPU s": lambda run: run["train_cpu_seconds"],
}
FORMATS = {
    "rare at the start": ".0e",
    "tokens": ".1f",
    "distinct of 16": ".1f",
    "steps to rare 0.5": ".0f",
    "generated": ".0f",
    "CPU s": ".1f",
}
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
    dates = " to ".join(dict.fromkeys([results["dates"][0], results["dates"][-1]]))
    parts = [f"Measured {dates} on {results['device']}; {versions}; {results['steps']} optimizer steps a run."]
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


def insert(path: Path, text: str, writer: str = WRITER) -> None:
    """Put the text between the page's marks of the benchmark, which it must have.

    Raises:
        ValueError: if the page has no marks.
    """
    begin = f"<!-- measured: written by {writer} -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"{path} has no lines {begin!r} and {END!r} between which the tables go.")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{END}{after}")


def write_report(results: Result, docs: Path, readme: Path) -> None:
    insert(docs / "learning.md", markdown(results))
    runs = results["runs"]
    insert(readme, short_table(runs))

    def of(*conditions: str) -> list[Result]:
        return [run for run in runs if run["condition"] in conditions]

    same_rate = [run for run in of("validation: letter walk") if run["learning_rate"] == SAME_RATE]
    clean, free_order = of("clean"), of("free order")
    faulty = [*clean, *of("30% faulty"), *of("60% faulty")]
    draw(docs / "learning_zero_reward.png", [(curves, clean, "reward", A), (curves, clean, "rare", A)])
    draw(docs / "learning_shaping.png", [(curves, same_rate, "rare", B), (curves, free_order, "entropy", B)])
    ways = [(curves, free_order, metric, ALL) for metric in ("entropy", "demonstration")]
    draw(docs / "learning_diversity.png", ways, width=6)
    draw(docs / "learning_faulty.png", [(bars, faulty, "sampled", ALL)], width=8)
    clip = of("four steps a generation")
    draw(docs / "learning_clip.png", [(curves, clip, metric, ALL) for metric in ("reward", "rare")])
    sweeps = [of(condition) for condition in ("gamma", "demonstrations", "initial probability")]
    draw(docs / "learning_sweeps.png", [(dots, runs, "reward", ALL) for runs in sweeps])
    draw(
        docs / "learning.png",
        [(curves, clean, "reward", A), (bars, faulty, "sampled", C), (curves, free_order, "entropy", C)],
    )


Panel = tuple[Callable[..., None], list[Result], str, tuple[str, ...]]


def draw(path: Path, panels: list[Panel], width: float = 4.6) -> None:
    """A picture of the panels that have runs, (function, runs, what of them, methods); none without."""
    chosen = [
        (panel, [run for run in runs if not methods or run["method"] in methods], what)
        for panel, runs, what, methods in panels
    ]
    chosen = [one for one in chosen if one[1]]
    if not chosen:
        return
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    size = (width * len(chosen), 3.6)
    figure, axes = plt.subplots(1, len(chosen), figsize=size, squeeze=False, constrained_layout=True)
    for ax, (panel, runs, what) in zip(axes[0], chosen, strict=True):
        panel(ax, runs, what)
        ax.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def color(method: str) -> str:
    """The same in every picture."""
    return f"C{METHODS.index(method)}"


def curves(ax, runs: list[Result], metric: str) -> None:
    """Mean over seeds as a line, all of them within the band."""
    groups = grouped(runs, lambda run: (run["method"], run["label"]))
    several = len({method for method, _ in groups}) > 1
    for i, ((method, label), group) in enumerate(groups.items()):
        steps = group[0]["curves"]["step"]
        series = list(zip(*(run["curves"][metric] for run in group), strict=True))
        shade = color(method) if several else f"C{i}"
        ax.plot(steps, [statistics.mean(values) for values in series], label=f"{method} {label}".strip(), color=shade)
        ax.fill_between(steps, list(map(min, series)), list(map(max, series)), color=shade, alpha=0.15)
    scale = "log" if metric in ("rare", "demonstration") else "linear"
    ax.set(title=f"{TITLES[metric]}, {runs[0]['task']}", xlabel="optimizer step", yscale=scale)
    ax.legend(fontsize="small" if len(groups) < 6 else "x-small")


def bars(ax, runs: list[Result], column: str) -> None:
    """Mean over seeds, and all of them within the line, by condition."""
    groups = grouped(runs, lambda run: (run["condition"], run["method"]))
    conditions = list(dict.fromkeys(condition for condition, _ in groups))
    methods = sorted({method for _, method in groups}, key=METHODS.index)
    for (condition, method), group in groups.items():
        i, values = conditions.index(condition), [COLUMNS[column](run) for run in group]
        x, mean = methods.index(method) + 0.27 * (i - (len(conditions) - 1) / 2), statistics.mean(values)
        label = condition if method == methods[0] else None
        error = [[mean - min(values)], [max(values) - mean]]
        ax.bar(x, mean, 0.25, yerr=error, capsize=2, color=SHADES[i], edgecolor="black", linewidth=0.5, label=label)
    ax.set_xticks(range(len(methods)), methods, rotation=15)
    ax.set(title="share of sampled answers that are right", ylim=(0, 1.25), yticks=(0, 0.25, 0.5, 0.75, 1))
    ax.legend(fontsize="small", ncols=3, loc="upper left", title="demonstrations", title_fontsize="small")


def dots(ax, runs: list[Result], metric: str) -> None:
    """Mean over the run, which is both how far and how fast, against each setting: a dot a seed."""
    labels = sorted({run["label"] for run in runs}, key=float)
    by_method = grouped(runs, lambda run: run["method"])
    for i, (method, group) in enumerate(by_method.items()):
        offset = 0.12 * (i - (len(by_method) - 1) / 2)
        points = [(labels.index(run["label"]) + offset, statistics.mean(run["curves"][metric])) for run in group]
        ax.scatter(*zip(*points, strict=True), label=method, color=color(method), alpha=0.7)
    ax.set_xticks(range(len(labels)), labels)
    ax.set(title=f"{runs[0]['condition']}: mean {metric} over the run", ylim=(-0.02, 1.02))
    ax.legend(fontsize="small")
