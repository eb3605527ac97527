"""What a run has logged: a trainer state, finished or still going, as the report wants it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


STATE = "trainer_state.json"  # transformers' TRAINER_STATE_NAME
COMPLETIONS = "completions"  # where TRL keeps them, in output_dir
# As model cards give them, ours and TRL's, from a line or heading that ends with "versions" or begins with it
VERSIONS = re.compile(r"^(?:#+ .*versions$|Versions:)", re.MULTILINE | re.IGNORECASE)
# Magnitudes that a curve can be drawn of: of larger ones, differences overflow; a smaller one is 0
LARGEST, SMALLEST = 1e200, 1e-200
VERSION = re.compile(r"\b(luffy_trl|trl|transformers|torch|pytorch):? (\d[\w.+-]{0,40}\w)", re.IGNORECASE)


@dataclass
class Run:
    """One run's logs.

    Attributes:
        name: told apart from the other runs of the report.
        directory: its output_dir.
        source: which trainer state it was read from, relative to the directory; None before the first checkpoint.
        has_completions: whether the completions that the directory keeps are this run's.
        step, max_steps: optimizer steps done when the state was saved, and planned.
        history: the logged lines, numbers alone, each with its "step".
        versions: of libraries, by name, from the model card; empty where there is none.
        notes: what was skipped, and why.
    """

    name: str
    directory: Path
    source: str | None = None
    has_completions: bool = False
    step: int = 0
    max_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of every line that has the metric; of a step that was logged twice, the later one."""
        return sorted({line["step"]: line[metric] for line in self.history if metric in line}.items())

    @property
    def finished(self) -> bool:
        return 0 < self.max_steps <= self.step


@dataclass
class State:
    """A trainer state on disk; `run` is the name of the run that wrote it, None where nothing tells."""

    path: Path
    run: str | None
    step: int
    max_steps: int
    lines: list[dict[str, Any]]

    @property
    def beginning(self) -> str | None:
        """The first line: a run that goes on keeps it, and no two runs have the same. None before there is one."""
        return json.dumps(self.lines[0], sort_keys=True) if self.lines else None


class UnreadableStateError(ValueError):
    """A file that is no trainer state, or not a whole one."""


def read_state(path: Path, run: str | None) -> State:
    """
    Raises:
        UnreadableStateError: with the end of a sentence that begins with the file's name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        step, max_steps, history = content["global_step"], content["max_steps"], content["log_history"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnreadableStateError(f"cannot be read ({type(error).__name__}).") from error
    if not (isinstance(step, int) and isinstance(max_steps, int) and isinstance(history, list)):
        raise UnreadableStateError("is no trainer state.")
    return State(path, run, step, max_steps, [line for line in history if isinstance(line, dict) and "step" in line])


def run_of_state(state: State, directory: Path, name: str) -> Run:
    """The run as it was when the state was saved."""
    history = [numbers for line in state.lines if "step" in (numbers := _numbers(line))]
    run = Run(name, directory, str(state.path.relative_to(directory)), False, state.step, state.max_steps, history)
    undrawn = sum(abs(value) > LARGEST for line in state.lines for value in line.values() if _is_number(value))
    if undrawn:
        run.notes.append(f"{undrawn} logged values are infinite or beyond {LARGEST:g}, and left out.")
    return run


def versions_in(card: Path) -> dict[str, str]:
    """Versions of libraries that a model card gives; empty without a card."""
    if not card.is_file():
        return {}
    with card.open(encoding="utf-8", errors="replace") as file:
        _, *below = VERSIONS.split(file.read(1_000_000), maxsplit=1)
    return dict(VERSION.findall("".join(below)))


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line that can be drawn: a metric may be None or NaN, and the file may be anyone's."""
    numbers = {key: value for key, value in line.items() if _is_number(value) and abs(value) <= LARGEST}
    return {key: float(value) if abs(value) >= SMALLEST else 0.0 for key, value in numbers.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
