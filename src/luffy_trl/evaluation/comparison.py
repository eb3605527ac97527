"""Other results, to stand beside an evaluation's own: the paper's, and those in other evaluations' directories."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from . import EvaluationError
from .tables import Mean, ModelRow, Summary, row


RESULTS = "results.json"
PAPER = "paper"


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
        else:
            other = read_results(source)
            rows.append(row(other.name, other.summaries, groups))
    return rows


@dataclass(frozen=True)
class OtherResults:
    """Of another evaluation: its name in tables, its results, and the fingerprints of its problems."""

    name: str
    summaries: Mapping[str, Summary]
    data: Mapping[str, str]


def read_results(directory: str) -> OtherResults:
    """
    Raises:
        EvaluationError: for a directory without results, or with another program's.
    """
    path = Path(directory) / RESULTS
    if not path.is_file():
        raise EvaluationError(
            f"--compare {directory}: there is no {RESULTS} in it; an evaluation writes it at its end."
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        summaries = {task: _summary(fields) for task, fields in results["tasks"].items()}
        name = f"{' '.join(results['name'].split())} ({directory})"
        return OtherResults(name, summaries, dict(results["settings"]["data"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(
            f"--compare {directory}: its {RESULTS} is not, or no longer, as luffy-trl eval writes it. Give an "
            "--output_dir of that command."
        ) from error


def _summary(fields: Mapping[str, Any]) -> Summary:
    """Raises TypeError if they are not a summary's."""
    rewards = {str(name): _mean(of_reward) for name, of_reward in fields.get("rewards", {}).items()}
    passed, majority = _shares(fields.get("pass_at", {})), _shares(fields.get("majority_at", {}))
    tables = ("rewards", "pass_at", "majority_at")
    numbers = {name: value for name, value in fields.items() if name not in tables}
    unknown = [name for name in ("stderr", "unanswered") if fields.get(name) is None]
    if not all(isinstance(value, int | float) for name, value in numbers.items() if name not in unknown):
        raise TypeError("a summary's fields are numbers")
    return Summary(**numbers, rewards=rewards, pass_at=passed, majority_at=majority)


def _shares(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(int(k)): float(value) for k, value in values.items()}


def _mean(fields: Mapping[str, Any]) -> Mean:
    if not all(isinstance(value, int | float | None) for value in fields.values()):
        raise TypeError("a mean's fields are numbers")
    return Mean(**fields)
