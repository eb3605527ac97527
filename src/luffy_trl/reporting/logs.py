"""What a run has logged: from its directory, finished or still going."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runs.checkpoints import checkpoints, damage
from ..runs.identity import read_identity
from ..runs.manifest import MANIFEST, read_manifest, run_of
from . import ReportError


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
        step, max_steps: optimizer steps done when the state was saved, and planned.
        history: the logged lines, numbers alone, each with its "step".
        versions: of libraries, by name, from the model card; empty where there is none.
        notes: what was skipped, and why.
    """

    name: str
    directory: Path
    source: str | None = None
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


def read_run(directory: Path, name: str) -> Run:
    """Read the newest whole state: `output_dir`'s at the end of a run, before that the newest checkpoint's.

    Raises:
        ReportError: if the directory holds nothing of a run.
    """
    if not directory.is_dir():
        raise ReportError(f"{directory} is no directory. Give the output_dir of one run or several.")
    run = Run(name, directory)
    # the one with the most steps: a run that was resumed has an old state in output_dir; of two the later
    states = [(path, state) for path in _state_files(run) if (state := _read_state(path, run)) is not None]
    if states:
        path, state = max(states, key=lambda item: item[1]["global_step"])
        run.source = str(path.relative_to(directory))
        run.step, run.max_steps = state["global_step"], state["max_steps"]
        lines = [line for line in state["log_history"] if isinstance(line, dict) and "step" in line]
        run.history = [numbers for line in lines if "step" in (numbers := _numbers(line))]
        undrawn = sum(abs(value) > LARGEST for line in lines for value in line.values() if _is_number(value))
        if undrawn:
            run.notes.append(f"{undrawn} logged values are infinite or beyond {LARGEST:g}, and left out.")
    elif not any((directory / COMPLETIONS).glob("*.parquet")):
        notes = "".join(f" {note}" for note in run.notes)
        raise ReportError(
            f"{directory} has neither a {STATE} nor a whole checkpoint nor completions.{notes} Is it the output_dir "
            "of a run? While one is going, its curves are those of its newest checkpoint (save_steps)."
        )
    else:
        run.notes.append("no checkpoint so far, hence no curves")
    card = directory / "README.md"
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as file:
            _, *below = VERSIONS.split(file.read(1_000_000), maxsplit=1)
        run.versions = dict(VERSION.findall("".join(below)))
    return run


def run_names(directories: list[Path]) -> list[str]:
    """A short name for each: its last part, with as many of the parts before as tell them apart."""
    parts = [path.resolve().parts for path in directories]
    if len(set(parts)) < len(parts):
        raise ReportError("The same directory is given twice.")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def _state_files(run: Run) -> list[Path]:
    """The states worth reading: output_dir's and the newest whole checkpoint's."""
    found = [path for path in [run.directory / STATE] if path.is_file()]
    identity = read_identity(run.directory)
    for checkpoint in checkpoints(run.directory):
        # other trainers' checkpoints have no manifest, and are welcome for a comparison
        problem = damage(checkpoint) if (checkpoint / MANIFEST).exists() else None
        if problem is None and not (checkpoint / STATE).is_file():
            problem = f"it has no {STATE}"
        if problem is None and identity is not None and not identity.owns(run_of(read_manifest(checkpoint))):
            problem = "it is another run's"
        if problem is None:
            return [*found, checkpoint / STATE]
        run.notes.append(f"{checkpoint.name} was skipped: {problem}.")
    return found


def _read_state(path: Path, run: Run) -> dict[str, Any] | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        ok = isinstance(state["global_step"], int) and isinstance(state["max_steps"], int)
        ok = ok and isinstance(state["log_history"], list)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        run.notes.append(f"{path.relative_to(run.directory)} cannot be read ({type(error).__name__}).")
        return None
    if not ok:
        run.notes.append(f"{path.relative_to(run.directory)} is no trainer state.")
        return None
    return state


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line that can be drawn: a metric may be None or NaN, and the file may be anyone's."""
    numbers = {key: value for key, value in line.items() if _is_number(value) and abs(value) <= LARGEST}
    return {key: float(value) if abs(value) >= SMALLEST else 0.0 for key, value in numbers.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
