"""From kept samples to the paper's tables: means, standard errors, comparison."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..reporting.tables_and_curves import text_table
from . import EvaluationError
from .samples import Sample


RESULTS = "results.json"
PAPER = "paper"


@dataclass(frozen=True)
class Summary:
    """One benchmark's result. Shares are of all responses; `score` and `stderr` are 0 to 1."""

    score: float
    stderr: float | None  # None for a single problem
    problems: int
    samples: int  # per problem
    truncated: float
    unanswered: float
    tokens: float  # mean length of a response


@dataclass(frozen=True)
class ModelRow:
    """One line of the tables, in percent: benchmark or group -> score, and standard error where known."""

    name: str
    scores: Mapping[str, float]
    stderrs: Mapping[str, float]


def summarize(samples: Sequence[Sample]) -> Summary:
    """
    Mean over problems of each problem's mean over its samples, and the standard error of that mean.

    The problems are what the benchmark drew, so the error is between problems: the sample standard deviation of their
    means over the square root of their number. More samples a problem make it smaller only as far as sampling noise is
    part of it.

    Args:
        samples: scored, as many for each problem.
    """
    by_problem: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        assert sample.score is not None
        by_problem[sample.doc_id].append(sample.score)
    means = [sum(scores) / len(scores) for scores in by_problem.values()]
    n = len(means)
    score = sum(means) / n
    variance = sum((mean - score) ** 2 for mean in means) / (n - 1) if n > 1 else None
    return Summary(
        score=score,
        stderr=None if variance is None else math.sqrt(variance / n),
        problems=n,
        samples=len(samples) // n,
        truncated=sum(sample.truncated for sample in samples) / len(samples),
        unanswered=sum(sample.answer is None for sample in samples) / len(samples),
        tokens=sum(sample.tokens for sample in samples) / len(samples),
    )


def row(name: str, summaries: Mapping[str, Summary], groups: Mapping[str, Sequence[str]]) -> ModelRow:
    """A model's line. A group's average counts each benchmark the same; it is there when all of them are.

    Its standard error takes the benchmarks for independent.
    """
    scores = {task: 100 * summary.score for task, summary in summaries.items()}
    stderrs = {task: 100 * s.stderr for task, s in summaries.items() if s.stderr is not None}
    for group, tasks in groups.items():
        if all(task in scores for task in tasks):
            scores[group] = sum(scores[task] for task in tasks) / len(tasks)
        if all(task in stderrs for task in tasks):
            stderrs[group] = math.sqrt(sum(stderrs[task] ** 2 for task in tasks)) / len(tasks)
    return ModelRow(name, scores, stderrs)


# Comparison


def paper_rows() -> list[ModelRow]:
    published = yaml.safe_load((files("luffy_trl") / "evaluation" / "paper.yaml").read_text())
    return [
        ModelRow(name, {f"luffy_{task}": score for task, score in scores.items()} | published["averages"][name], {})
        for name, scores in published["rows"].items()
    ]


def compared_rows(sources: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[ModelRow]:
    """
    Args:
        sources: "paper", or output directories of other evaluations.

    Raises:
        EvaluationError: for a directory without results, or with another program's.
    """
    rows: list[ModelRow] = []
    for source in sources:
        if source == PAPER:
            rows += paper_rows()
            continue
        path = Path(source) / RESULTS
        if not path.is_file():
            raise EvaluationError(
                f"--compare {source}: there is no {RESULTS} in it; an evaluation writes it at its end."
            )
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            summaries = {task: _summary(fields) for task, fields in results["tasks"].items()}
            rows.append(row(f"{' '.join(results['name'].split())} ({source})", summaries, groups))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EvaluationError(
                f"--compare {source}: its {RESULTS} is not, or no longer, as luffy-trl eval writes it. Give an "
                "--output_dir of that command."
            ) from error
    return rows


def _summary(fields: Mapping[str, Any]) -> Summary:
    """Raises TypeError if they are not a summary's."""
    summary = Summary(**fields)
    if not all(isinstance(value, int | float) for name, value in fields.items() if (name, value) != ("stderr", None)):
        raise TypeError("a summary's fields are numbers")
    return summary


# Output


def score_table(
    title: str, rows: Sequence[ModelRow], tasks: Sequence[str], group: str, labels: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one group's table: rows that have none of its benchmarks are left out."""
    columns = [*tasks, group]
    header = [title, *(labels[task] for task in tasks), "Avg."]
    cells = [[r.name, *(_cell(r, column) for column in columns)] for r in rows if set(tasks) & set(r.scores)]
    return header, cells


def response_table(summaries: Mapping[str, Summary], labels: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    header = ["Responses", "problems", "samples each", "truncated", "no answer", "mean tokens"]
    cells = [
        [
            labels[task],
            str(s.problems),
            str(s.samples),
            _percent(s.truncated),
            _percent(s.unanswered),
            f"{s.tokens:.0f}",
        ]
        for task, s in summaries.items()
    ]
    return header, cells


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def render(tables: Sequence[tuple[list[str], list[list[str]]]], notes: Sequence[str], markdown: bool) -> str:
    table = markdown_table if markdown else text_table
    return "\n\n".join(
        [*(table(header, cells) for header, cells in tables), ("  \n" if markdown else "\n").join(notes)]
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _cell(r: ModelRow, column: str) -> str:
    if column not in r.scores:
        return "-"
    error = f" ± {r.stderrs[column]:.1f}" if column in r.stderrs else ""
    return f"{r.scores[column]:.1f}{error}"
