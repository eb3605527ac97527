"""Tables and the figure of docs/learning.md and the README, from the runs of `lm.py`. Only what was measured."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from learning_report import grouped, insert

from luffy_trl.comparing.methods import known_methods


Result = dict[str, Any]
WRITER = "benchmarks/lm.py"
LONG_LABELS = {"sft_long": "SFT, LUFFY's seconds", "sft_then_rl_long": "SFT, then RL, LUFFY's seconds"}
TESTS = {"held_out": "sums of three", "longer_sums": "sums of four", "reversal": "reversal (not trained)"}
REGIMES = {"warm": "Warm", "cold": "Cold", "warm2": "Second warm"}
# Of the short table
SHOWN = {"warm": TESTS, "cold": ("held_out", "longer_sums"), "warm2": ("held_out",)}
COLUMNS: dict[str, Callable[[Result], float | None]] = {
    "sums of three, sampled": lambda run: 100 * run["accuracy"]["held_out"],
    "sums of four, sampled": lambda run: 100 * run["accuracy"]["longer_sums"],
    "reversal, sampled": lambda run: 100 * run["accuracy"]["reversal"],
    "other text, nats": lambda run: run["text_nll"],
    "entropy": lambda run: run["entropy"],
    "tokens": lambda run: run["tokens"] or None,
    "CPU s": lambda run: run["cpu_seconds"] or None,
}
FORMATS = {"other text, nats": ".2f", "entropy": ".2f", "tokens": ",.0f", "CPU s": ",.0f"}


def label_of(method: str) -> str:
    methods = known_methods()
    return LONG_LABELS.get(method) or (methods[method].label if method in methods else method)


def cell(values: list[float | None], spec: str) -> str:
    """Mean, ± the standard deviation over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {stdev(known):{spec}}" if len(known) > 1 else ""
    return f"{fmean(known):{spec}}{spread}"


def measured(runs: list[Result], regime: str) -> dict[str, list[Result]]:
    """Method -> its runs, without those that chose rates, in the order of the most right answers."""
    of_regime = [run for run in runs if run["regime"] == regime and not run["chooses_rate"]]
    by_method = grouped(of_regime, lambda run: run["method"])
    base = {"base": by_method.pop("base")} if "base" in by_method else {}
    return base | dict(sorted(by_method.items(), key=lambda item: -mean_of(item[1], "held_out")))


def mean_of(runs: list[Result], test: str) -> float:
    return fmean(run["accuracy"][test] for run in runs)


def table(runs: list[Result], regime: str) -> str:
    lines = ["| method | seeds | rate | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 3) + "|"]
    for method, own in measured(runs, regime).items():
        rate = own[0]["learning_rate"]
        cells = [cell([column(run) for run in own], FORMATS.get(name, ".0f")) for name, column in COLUMNS.items()]
        start = [label_of(method), str(len(own)), "-" if rate is None else f"{rate:g}"]
        lines.append(f"| {' | '.join(start + cells)} |")
    return "\n".join(lines)


def trials(runs: list[Result]) -> str:
    """The runs by which rates were chosen: right sampled answers in percent."""
    chosen = [run for run in runs if run["chooses_rate"]]
    rates = sorted({run["learning_rate"] for run in chosen})
    lines = ["| method, base | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "| --- " * (len(rates) + 1) + "|"]
    for (method, regime), own in grouped(chosen, lambda run: (run["method"], run["regime"])).items():
        shares = [[100 * run["accuracy"]["held_out"] for run in own if run["learning_rate"] == rate] for rate in rates]
        cells = [cell(list(values), ".0f") for values in shares]
        lines.append(f"| {label_of(method)}, {regime} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(runs: list[Result]) -> list[str]:
    """The bases from which a method was measured."""
    return [regime for regime in REGIMES if any(method != "base" for method in measured(runs, regime))]


def short_table(runs: list[Result]) -> str:
    """For the README: a line a method, sampled answers from each base that methods were measured from."""
    both = {regime: measured(runs, regime) for regime in compared(runs)}
    shown = [(regime, test) for regime in both for test in SHOWN[regime]]
    header = " | ".join(f"{REGIMES[regime].lower()}: {TESTS[test]}" for regime, test in shown)
    lines = [f"| method | {header} | CPU s |", "| --- " * (len(shown) + 2) + "|"]
    for method in dict.fromkeys(method for of_regime in both.values() for method in of_regime):
        own = both["warm"].get(method, [])
        cells = [
            cell([100 * run["accuracy"][test] for run in both[regime].get(method, [])], ".0f")
            for regime, test in shown
        ]
        seconds = cell([run["cpu_seconds"] or None for run in own], ",.0f")
        lines.append(f"| {label_of(method)} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def draw(runs: list[Result], path: Path) -> None:
    """A row of panels a regime: sampled answers by method, a dot a seed, the base as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    regimes = compared(runs)
    figure, axes = plt.subplots(
        len(regimes), len(TESTS), figsize=(12, 3.6 * len(regimes)), constrained_layout=True, squeeze=False
    )
    for row, regime in zip(axes, regimes, strict=True):
        title, by_method = REGIMES[regime], measured(runs, regime)
        base = by_method.pop("base", [])
        names = list(by_method)[::-1]
        for ax, (test, test_title) in zip(row, TESTS.items(), strict=True):
            for y, method in enumerate(names):
                values = [100 * run["accuracy"][test] for run in by_method[method]]
                ax.plot([0, fmean(values)], [y, y], color="#cbd5e0", linewidth=6, zorder=1)
                ax.scatter(values, [y] * len(values), s=22, color="#2b6cb0", zorder=2)
            for run in base:
                ax.axvline(100 * run["accuracy"][test], color="#c05621", linestyle="--", linewidth=1)
            ax.set_title(f"{title} base: {test_title}", fontsize="medium")
            ax.set(xlim=(0, 100), xlabel="right sampled answers, %")
            ax.set_yticks(range(len(names)), [label_of(name) for name in names] if ax is row[0] else [""] * len(names))
            ax.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(results: dict[str, Any], docs: Path, readme: Path, missing: list[str]) -> None:
    """The README's table comes when there is something to compare.

    Args:
        missing: names of runs that are not in the results.
    """
    runs, versions = results["runs"], results["versions"]
    told = "; ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl"))
    parts = [f"Measured on {results['device']}; {told}.", "Rates, by right sampled answers of seed 7:", trials(runs)]
    for regime, title in REGIMES.items():
        parts += [f"**{title} base**:", table(runs, regime)]
    if missing:
        parts.append(f"**Not measured yet**: {len(missing)} of {len(missing) + len(runs)} runs.")
    insert(docs / "learning.md", "\n\n".join(parts), WRITER)
    if "warm" in compared(runs):
        insert(readme, short_table(runs), WRITER)
        draw(runs, docs / "learning_lm.png")
