"""From the runs' own files to one table: what each answered right, and what it cost."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..reporting.tables_and_curves import text_table
from . import ComparisonError
from .methods import BASE_MODEL, Method
from .plan import MODEL, PlannedRun
from .stages import GREEDY, SAMPLED, Commands, evaluation_directory
from .steps import Took


AS_GOOD = 0.01  # a rate is as good as the best if it has this share of right answers less


@dataclass(frozen=True)
class Measured:
    """
    Attributes:
        accuracy, greedy: test set -> share of right answers, sampled and greedy.
        entropy: of the policy on its rollouts, in nats, as logged last; None where nothing was sampled.
        tokens: trained on or sampled, prompts included.
        seconds, cpu_seconds: of training, over all attempts that were seen to end; of the clock, and of processors.
    """

    method: str
    seed: int
    learning_rate: float | None
    accuracy: dict[str, float] = field(default_factory=dict)
    greedy: dict[str, float] = field(default_factory=dict)
    entropy: float | None = None
    tokens: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    steps: int = 0


def result(run: PlannedRun, commands: Commands) -> Measured:
    """What a finished run's files say.

    Raises:
        ComparisonError: if one is missing or damaged.
    """
    logs = [_log(run.stage_directory(number) / MODEL / "trainer_state.json") for number in range(len(run.stages))]
    sampled = [line for lines in logs for line in lines if "on_policy/entropy" in line]
    took = [step.took() or Took() for step in commands.steps(run) if step.directory.parent == run.directory]
    return Measured(
        run.name,
        run.seed,
        run.learning_rate,
        accuracy={test.name: _score(run, test.name, SAMPLED) for test in commands.tests if SAMPLED in commands.ways},
        greedy={test.name: _score(run, test.name, GREEDY) for test in commands.tests if GREEDY in commands.ways},
        entropy=sampled[-1]["on_policy/entropy"] if sampled else None,
        tokens=sum(max((line.get("num_tokens") or 0.0 for line in lines), default=0.0) for lines in logs),
        seconds=sum(one.seconds for one in took),
        cpu_seconds=sum(one.cpu_seconds for one in took),
        steps=sum(max((int(line.get("step", 0)) for line in lines), default=0) for lines in logs),
    )


def _log(path: Path) -> list[dict[str, Any]]:
    lines = _json(path).get("log_history")
    if not isinstance(lines, list):
        raise ComparisonError(f"{path} holds no log: remove its run's directory, and it is done anew.")
    return lines


def _score(run: PlannedRun, test: str, way: str) -> float:
    path = evaluation_directory(run, test, way) / "results" / "results.json"
    try:
        [summary] = _json(path)["tasks"].values()
        return float(summary["score"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ComparisonError(f"{path} holds no score: remove {path.parent.parent}, and it is done anew.") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ComparisonError(
            f"{path} cannot be read: {error}. Remove its run's directory, and it is done anew."
        ) from error


def chosen_rates(results: Sequence[Measured], test: str) -> dict[str, float]:
    """Method -> the smallest rate that is as good as the best, by the mean share of right answers over seeds.

    Where all rates are equal, as for a method that learns nothing, the middle one.
    """
    by_method: dict[str, dict[float, list[float]]] = {}
    for one in results:
        assert one.learning_rate is not None
        scores = one.accuracy or one.greedy
        by_method.setdefault(one.method, {}).setdefault(one.learning_rate, []).append(scores[test])
    return {
        method: _best({rate: statistics.fmean(v) for rate, v in rates.items()}) for method, rates in by_method.items()
    }


def _best(scores: Mapping[float, float]) -> float:
    if len(set(scores.values())) == 1:
        return sorted(scores)[len(scores) // 2]
    return min(rate for rate, score in scores.items() if score >= max(scores.values()) - AS_GOOD)


# The table


def table(
    results: Sequence[Measured], methods: Sequence[Method], tests: Sequence[str], ways: Sequence[str]
) -> list[list[str]]:
    """Header and a row a method, in percent: the mean over seeds, ± their standard deviation."""
    header = ["method", "seeds"]
    header += [f"{test}, {way}" for test in tests for way in ways]
    header += ["entropy", "tokens", "seconds"]
    if any(one.learning_rate is not None for one in results):
        header.append("rate")
    labels = {BASE_MODEL: "base", **{method.name: method.label for method in methods}}
    return [
        header,
        *(
            _row(label, [r for r in results if r.method == name], tests, ways, header)
            for name, label in labels.items()
            if any(r.method == name for r in results)
        ),
    ]


def _row(
    label: str, of_method: Sequence[Measured], tests: Sequence[str], ways: Sequence[str], header: Sequence[str]
) -> list[str]:
    scores = [
        [(r.accuracy if way == SAMPLED else r.greedy)[test] for r in of_method] for test in tests for way in ways
    ]
    entropies = [r.entropy for r in of_method if r.entropy is not None]
    cells = [label, str(len(of_method)), *(_percent(values) for values in scores)]
    is_base = of_method[0].method == BASE_MODEL
    cells.append(f"{statistics.fmean(entropies):.2f}" if entropies else "-")
    cells.append("-" if is_base else f"{statistics.fmean(r.tokens for r in of_method):,.0f}")
    cells.append("-" if is_base else f"{statistics.fmean(r.seconds for r in of_method):,.0f}")
    if header[-1] == "rate":
        rate = of_method[0].learning_rate
        cells.append("-" if rate is None else f"{rate:g}")
    return cells


def _percent(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def write(results: Sequence[Measured], rows: list[list[str]], facts: Mapping[str, Any], output_dir: Path) -> str:
    """`results.json` and `results.md`; returns the table as text."""
    runs = {"runs": [asdict(one) for one in results]}
    (output_dir / "results.json").write_text(json.dumps({**facts, **runs}, indent=1) + "\n", encoding="utf-8")
    lines = ["| " + " | ".join(cells) + " |" for cells in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
    (output_dir / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return text_table(rows[0], rows[1:])
