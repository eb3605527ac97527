"""Which runs a directory holds: its own, those that were there before, or those of the directories in it."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..runs.checkpoints import checkpoints, damage
from ..runs.earlier import EARLIER, holds_a_run
from ..runs.identity import Identity, read_identity
from ..runs.manifest import MANIFEST, read_manifest, run_of
from . import ReportError
from .logs import COMPLETIONS, STATE, Run, State, UnreadableStateError, read_state, run_of_state, versions_in


def find_runs(directories: Sequence[Path], latest: bool = False) -> list[Run]:
    """The runs of the directories, each with a name that tells it apart.

    Args:
        directories: the output_dir of a run, or a directory with such directories in it.
        latest: of each output_dir only the run whose it is, without those that were there before.

    Raises:
        ReportError: for a directory that holds nothing of a run, or that is given twice.
    """
    names = run_names(directories)
    runs: list[Run] = []
    for directory, name in zip(directories, names, strict=True):
        if not directory.is_dir():
            raise ReportError(f"{directory} is no directory. Give the output_dir of one run or several.")
        inside = [] if holds_a_run(directory) else _directories_of_runs(directory)
        prefix = f"{name}/" if len(directories) > 1 else ""
        for path in inside:
            runs += _all_runs(path, f"{prefix}{path.name}", latest)
        if not inside:
            runs += _all_runs(directory, name, latest)
    return runs


def run_names(directories: Sequence[Path]) -> list[str]:
    """A short name for each: its last part, with as many of the parts before as tell them apart."""
    parts = [path.resolve().parts for path in directories]
    if len(set(parts)) < len(parts):
        raise ReportError("The same directory is given twice.")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def _directories_of_runs(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir() and holds_a_run(path))


def _all_runs(directory: Path, name: str, latest: bool) -> list[Run]:
    """The run of an output_dir, then those that were there before, the newest first."""
    runs = read_runs(directory, name)
    if latest:
        return runs[:1]
    for folder in sorted(directory.glob(f"{EARLIER}*"), key=_number, reverse=True):
        if holds_a_run(folder):
            runs += read_runs(folder, f"{name}/{folder.name}")
    return runs


def _number(folder: Path) -> int:
    digits = re.search(r"\d+$", folder.name)
    return int(digits[0]) if digits else 0


def read_runs(directory: Path, name: str) -> list[Run]:
    """The runs that have written into an output_dir, the one whose it is first; of each the newest whole state.

    That is `output_dir`'s at the end of a run, before that the newest checkpoint's.

    Raises:
        ReportError: if the directory holds nothing of a run.
    """
    identity, notes = read_identity(directory), list[str]()
    found = [max(states, key=lambda state: state.step) for states in _by_run(_states(directory, identity, notes))]
    if identity is None:  # nobody says whose it is: the last one's that has written
        found.sort(key=lambda state: state.path.stat().st_mtime, reverse=True)
    owner = next((state for state in found if identity is None or state.run == identity.run), None)
    runs = []
    if owner is not None:
        runs = [run_of_state(owner, directory, name)]
    elif any((directory / COMPLETIONS).glob("*.parquet")):
        runs = [Run(name, directory, notes=["no checkpoint so far, hence no curves"])]
    elif not found:
        said = "".join(f" {note}" for note in notes)
        raise ReportError(
            f"{directory} has neither a {STATE} nor a whole checkpoint nor completions.{said} Is it the output_dir "
            "of a run, or does it hold such? While one is going, its curves are those of its newest checkpoint "
            "(save_steps)."
        )
    for run in runs:
        run.has_completions, run.versions = True, versions_in(directory / "README.md")
    others = [state for state in found if state is not owner]
    runs += [run_of_state(state, directory, f"{name}/{_label(state, directory)}") for state in others]
    runs[0].notes[:0] = notes
    return runs


def _states(directory: Path, identity: Identity | None, notes: list[str]) -> list[State]:
    """`output_dir`'s; of the whole checkpoints the newest of each run, and all whose run nothing tells."""
    found: list[State] = []
    seen: set[str] = set()
    if (directory / STATE).is_file():
        state = _read(directory / STATE, identity.run if identity else None, directory, notes)
        found += [state] if state else []
    for checkpoint in checkpoints(directory):
        run = run_of(read_manifest(checkpoint))
        if identity is not None and identity.owns(run):
            run = identity.run
        if run in seen:
            continue
        # other trainers' checkpoints have no manifest, and are welcome for a comparison
        problem = damage(checkpoint) if (checkpoint / MANIFEST).exists() else None
        if problem is None and not (checkpoint / STATE).is_file():
            problem = f"it has no {STATE}"
        if problem is not None:
            notes.append(f"{checkpoint.name} was skipped: {problem}.")
        elif state := _read(checkpoint / STATE, run, directory, notes):
            found.append(state)
            seen |= {run} if run else set()
    return found


def _read(path: Path, run: str | None, directory: Path, notes: list[str]) -> State | None:
    try:
        return read_state(path, run)
    except UnreadableStateError as error:
        notes.append(f"{path.relative_to(directory)} {error}")
        return None


def _by_run(states: list[State]) -> list[list[State]]:
    """The states of each run: those of one name, and those without a name whose logs begin alike."""
    groups: list[list[State]] = []
    for state in states:
        group = next((group for group in groups if _is_one_run(group[0], state)), None)
        if group is None:
            groups.append([state])
        else:
            group.append(state)
    return groups


def _is_one_run(one: State, other: State) -> bool:
    if one.run and other.run:
        return one.run == other.run
    return None in (one.beginning, other.beginning) or one.beginning == other.beginning


def _label(state: State, directory: Path) -> str:
    return state.path.name if state.path.parent == directory else state.path.parent.name
