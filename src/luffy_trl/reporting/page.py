"""The page: one HTML file without any address in it. Curves are drawn here, completions by the page when asked for."""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from .completions import Completion, KeptStep, prompt_text, shortened
from .logs import Run
from .panels import Panel, Series, bounds, ticks


# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart with any kind of colour vision
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
DASHES = ("", "6 4", "2 3", "8 3 2 3")
# Of a panel, in units of its view box
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 220, 52, 8, 8, 26
SUMMARY = (
    ("on_policy/reward", "rollout reward"),
    ("off_policy/reward", "demonstration reward"),
    ("on_policy/entropy", "entropy"),
    ("off_policy/prob", "demonstration probability"),
    ("groups/solve_none", "no rollout solved"),
    ("step_time", "s a step"),
)

Filled = Sequence[tuple[Panel, Sequence[Series]]]


def write_page(
    path: Path, runs: Sequence[Run], panels: Filled, kept: Sequence[list[KeptStep]], token_note: str = ""
) -> None:
    """Write the page of the runs; `kept` holds the kept steps of each, `token_note` says what colours stand for."""
    folder = files("luffy_trl") / "reporting"
    script = (folder / "report.js").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "report.html").read_text(encoding="utf-8"))
    html = template.render(
        runs=[(run, color(i)) for i, run in enumerate(runs)],
        table=_table(runs),
        versions=_versions(runs),
        panels=[_panel(panel, series, runs) for panel, series in panels],
        completions=[
            {"run": i, "step": step.step, "data": _json(_step(step))} for i, steps in enumerate(kept) for step in steps
        ],
        opened=_first_with_demonstrations(kept),
        token_note=token_note,
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # only this script runs, whatever else should ever get into the page
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path.write_bytes(html.encode("utf-8", "replace"))


def color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def look(series: Series, runs: int) -> tuple[str, str]:
    """(colour, dashes): colour tells runs apart, dashes metrics; a single run's metrics have colours, too."""
    return color(series.run if runs > 1 else series.metric), DASHES[series.metric % len(DASHES)]


def _key(metric: int, runs: int) -> tuple[str, str]:
    """What tells a metric apart in the legend, as [`look`]; where colours are the runs', in the text's."""
    return color(metric) if runs == 1 else "currentColor", DASHES[metric % len(DASHES)]


def number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def _table(runs: Sequence[Run]) -> dict[str, Any]:
    """Last logged values, in the columns that any run has something for."""
    columns = [(metric, title) for metric, title in SUMMARY if any(run.curve(metric) for run in runs)]
    rows = []
    for run in runs:
        curves = [run.curve(metric) for metric, _ in columns]
        rows.append([number(curve[-1][1]) if curve else "-" for curve in curves])
    return {"columns": [title for _, title in columns], "rows": rows}


def _versions(runs: Sequence[Run]) -> list[str]:
    """A line for each set of versions, with the runs that have it unless all have."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run.versions:
            names.setdefault(", ".join(f"{name} {v}" for name, v in run.versions.items()), []).append(run.name)
    return [text if len(of) == len(runs) else f"{text} ({', '.join(of)})" for text, of in names.items()]


def _panel(panel: Panel, series: Sequence[Series], runs: Sequence[Run]) -> dict[str, Any]:
    x0, x1, y0, y1 = bounds(series)
    values = ticks(y0, y1)
    y0, y1 = values[0], values[-1]

    def x(step: float) -> float:
        return round(LEFT + (step - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for one in series:
        stroke, dashes = look(one, len(runs))
        points = [(x(step), y(value)) for step, value in one.points]
        lines.append(
            {
                "path": "M" + "L".join(f"{px:g} {py:g}" for px, py in points),
                "dot": points[0] if len(points) == 1 else None,
                "color": stroke,
                "dashes": dashes,
                # thinner and later ones on top, so that lines which coincide all show
                "width": max(1.6, 3.6 - one.run) if len(runs) > 1 else 2,
            }
        )
    metrics = sorted({one.metric for one in series})
    data = {
        "x": [x0, x1],
        "box": [LEFT, WIDTH - RIGHT, WIDTH],
        "lines": [
            [one.run, metrics.index(one.metric), [[s, float(f"{v:.4g}")] for s, v in one.points]] for one in series
        ],
    }
    last = {(one.run, one.metric): number(one.last) for one in series}
    return {
        "panel": panel,
        "lines": lines,
        "columns": [(panel.metrics[metric][1], *_key(metric, len(runs))) for metric in metrics],
        # a row a run, whatever it has: the legends of all panels have one height
        "legend": [[last.get((run, metric), "-") for metric in metrics] for run in range(len(runs))],
        "data": _json(data),
        "thinned": any(one.logged > len(one.points) for one in series),
        "y_ticks": [(y(value), number(value)) for value in values],
        "x_ticks": [(x(step), f"{step:,.0f}") for step in (x0, round((x0 + x1) / 2), x1)],
    }


def _first_with_demonstrations(kept: Sequence[list[KeptStep]]) -> int:
    """The run whose completions are open at first."""
    shown = [[row for step in steps for group in step.groups for row in group.completions] for steps in kept]
    return next((i for i, rows in enumerate(shown) if any(row.demonstration for row in rows)), 0)


def _step(step: KeptStep) -> list[dict[str, Any]]:
    return [
        {"prompt": shortened(prompt_text(group.prompt)), "rows": [_shown_completion(row) for row in group.completions]}
        for group in step.groups
    ]


def _shown_completion(row: Completion) -> dict[str, Any]:
    known = {"text": shortened(row.text), "rewards": row.rewards, "demonstration": row.demonstration}
    if row.advantage is not None:
        known["advantage"] = row.advantage
    return known | ({"tokens": row.tokens} if row.tokens else {})


def _json(value: Any) -> Markup:
    """JSON that stands inside a script element whatever text is in it: no `<`, so no end of the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
