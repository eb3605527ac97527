"""From kept samples to tables: means, and standard errors."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..reporting.tables_and_curves import text_table
from . import EvaluationError
from .at_k import RIGHT, mean_majority_at_k, mean_pass_at_k
from .lines import Sample


LEGEND = "Scores in percent, ± one standard error over problems."

Table = tuple[list[str], list[list[str]]]  # header and cells


@dataclass(frozen=True)
class Mean:
    """Of the problems' means, with the error between problems; None where there is nothing to take it of."""

    mean: float | None
    stderr: float | None
    not_applicable: int = 0  # samples without a value


@dataclass(frozen=True)
class Summary:
    """One benchmark's result. Shares are of all responses; `score` and `stderr` are 0 to 1."""

    score: float
    stderr: float | None  # None for a single problem
    problems: int
    samples: int  # per problem
    truncated: float
    unanswered: float | None  # None where no reward function says what it took for the answer
    tokens: float  # mean length of a response
    # Of a user's own problems: each reward function's, and the samples for which the deciding one gave nothing
    rewards: Mapping[str, Mean] = field(default_factory=dict)
    ungraded: int = 0
    # k -> share, for each k that was asked for and that the samples are enough for
    pass_at: Mapping[str, float] = field(default_factory=dict)
    majority_at: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRow:
    """One line of the tables, in percent: benchmark or group -> score, and standard error where known."""

    name: str
    scores: Mapping[str, float]
    stderrs: Mapping[str, float]


def mean_over_problems(values: Sequence[tuple[int, float | None]]) -> Mean:
    """
    Mean over problems of each problem's mean over its samples, and the standard error of that mean.

    The problems are what the benchmark drew, so the error is between problems: the sample standard deviation of their
    means over the square root of their number. More samples a problem make it smaller only as far as sampling noise is
    part of it.

    Args:
        values: each with its problem; None where there is no value, which is counted and not averaged.
    """
    by_problem: dict[int, list[float]] = defaultdict(list)
    for problem, value in values:
        if value is not None:
            by_problem[problem].append(value)
    means = [sum(of_problem) / len(of_problem) for of_problem in by_problem.values()]
    n = len(means)
    missing = sum(value is None for _, value in values)
    if n == 0:
        return Mean(None, None, missing)
    mean = sum(means) / n
    variance = sum((of_problem - mean) ** 2 for of_problem in means) / (n - 1) if n > 1 else None
    return Mean(mean, None if variance is None else math.sqrt(variance / n), missing)


def summarize(samples: Sequence[Sample], ks: Sequence[int] = ()) -> Summary:
    """
    Args:
        samples: scored, as many for each problem.
        ks: for which pass@k and maj@k are wanted.

    Raises:
        EvaluationError: if no sample has a score.
    """
    scores = mean_over_problems([(sample.doc_id, sample.score) for sample in samples])
    if scores.mean is None:
        raise EvaluationError(
            f"none of the {len(samples)} responses has a score: the reward that decides gave None for all, as it does "
            "for gold answers that it cannot read. All samples are kept; the same command grades them anew."
        )
    problems = len({sample.doc_id for sample in samples})
    rewards = list(samples[0].rewards or {})
    said_nothing = bool(rewards) and all(sample.answer is None for sample in samples)
    return Summary(
        score=scores.mean,
        stderr=scores.stderr,
        problems=problems,
        samples=len(samples) // problems,
        truncated=sum(sample.truncated for sample in samples) / len(samples),
        unanswered=None if said_nothing else sum(not sample.answer for sample in samples) / len(samples),
        tokens=sum(sample.tokens for sample in samples) / len(samples),
        rewards={r: mean_over_problems([(s.doc_id, (s.rewards or {})[r]) for s in samples]) for r in rewards},
        ungraded=scores.not_applicable,
        pass_at=_known({k: mean_pass_at_k(_by_problem(samples, _is_right), k) for k in ks}),
        majority_at={}
        if said_nothing
        else _known({k: mean_majority_at_k(_by_problem(samples, _vote), k) for k in ks}),
    )


def _by_problem(samples: Sequence[Sample], of: Callable[[Sample], Any]) -> list[list[Any]]:
    """A value of each sample that was graded, problem by problem."""
    by_problem = defaultdict(list)
    for sample in samples:
        if sample.score is not None:
            by_problem[sample.doc_id].append(of(sample))
    return list(by_problem.values())


def _is_right(sample: Sample) -> bool:
    return sample.score == 1


def _vote(sample: Sample) -> Any:
    """The graders found right answers equal, and write others that are equal alike."""
    return RIGHT if _is_right(sample) else sample.answer or None


def _known(values: Mapping[int, float | None]) -> dict[str, float]:
    return {str(k): value for k, value in values.items() if value is not None}


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


# Output


def score_table(
    title: str, rows: Sequence[ModelRow], tasks: Sequence[str], group: str, labels: Mapping[str, str]
) -> Table:
    """Header and cells of one group's table: rows that have none of its scores are left out."""
    columns = [*tasks, group]
    header = [title, *(labels[task] for task in tasks), "Avg."]
    cells = [[r.name, *(_cell(r, column) for column in columns)] for r in rows if set(columns) & set(r.scores)]
    return header, cells


def own_table(label: str, summaries: Mapping[str, Summary]) -> Table:
    """Models side by side on a user's own problems: the share solved, and each reward's mean.

    Args:
        label: of the problems.
        summaries: a model's name -> its results.
    """
    rewards = list(dict.fromkeys(reward for summary in summaries.values() for reward in summary.rewards))
    cells = [
        [
            name,
            _with_error(Mean(100 * s.score, None if s.stderr is None else 100 * s.stderr), 1),
            *(_with_error(s.rewards.get(reward, Mean(None, None)), 3) for reward in rewards),
        ]
        for name, s in summaries.items()
    ]
    return [label, "solved", *rewards], cells


def response_table(summaries: Mapping[str, Summary], labels: Mapping[str, str]) -> Table:
    header = ["Responses", "problems", "samples each", "truncated", "no answer", "mean tokens"]
    cells = [
        [
            labels[task],
            str(s.problems),
            str(s.samples),
            _percent(s.truncated),
            "-" if s.unanswered is None else _percent(s.unanswered),
            f"{s.tokens:.0f}",
        ]
        for task, s in summaries.items()
    ]
    return header, cells


def at_k_table(summaries: Mapping[str, Summary]) -> list[Table]:
    """pass@k and maj@k, if any was asked for; a line for each name of a summary."""
    ks = sorted({int(k) for s in summaries.values() for k in s.pass_at})
    if not ks:
        return []
    cells = [
        [name, *(_share(values.get(str(k))) for values in (s.pass_at, s.majority_at) for k in ks)]
        for name, s in summaries.items()
    ]
    return [(["At k samples", *(f"pass@{k}" for k in ks), *(f"maj@{k}" for k in ks)], cells)]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def ungraded_notes(summaries: Mapping[str, Summary]) -> list[str]:
    """A sentence on each reward that did not apply to some responses."""
    notes = [
        f"Note: {reward} gave nothing (None) for {mean.not_applicable} responses of {name}: they are not in its mean."
        for name, summary in summaries.items()
        for reward, mean in summary.rewards.items()
        if mean.not_applicable
    ]
    return notes + [
        f"Note: {summary.ungraded} responses of {name} are neither solved nor not, and left out of the share solved."
        for name, summary in summaries.items()
        if summary.ungraded
    ]


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def render(tables: Sequence[Table], notes: Sequence[str], markdown: bool) -> str:
    table = markdown_table if markdown else text_table
    return "\n\n".join(
        [*(table(header, cells) for header, cells in tables), ("  \n" if markdown else "\n").join(notes)]
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _cell(r: ModelRow, column: str) -> str:
    return _with_error(Mean(r.scores.get(column), r.stderrs.get(column)), 1)


def _with_error(value: Mean, digits: int) -> str:
    if value.mean is None:
        return "-"
    error = "" if value.stderr is None else f" ± {value.stderr:.{digits}f}"
    return f"{value.mean:.{digits}f}{error}"
