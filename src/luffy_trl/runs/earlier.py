"""An output directory that holds another run: what of it is whose, and how a new run gets it for itself.

What another run has left is moved into a folder there, never removed. So no checkpoint of it is resumed from, rotated
away or written over, and no log of it is reported with the new run's.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from .checkpoints import checkpoints
from .identity import Identity, new_name, read_identity, write_identity
from .manifest import read_manifest, run_of


# The underscore keeps it out of pushes
EARLIER = "_earlier-"
# What a run logs, and what is made of it: TRL's completions, an evaluation's results, the card with its picture
COMPLETIONS_DIR = "completions"
LOGS = (TRAINER_STATE_NAME, COMPLETIONS_DIR, "eval", "README.md", "curves.png")
SAVED_MODEL = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*")


@dataclass(frozen=True)
class Moved:
    """Where another run is now, and the names of its checkpoints."""

    folder: Path
    checkpoints: list[str]


def holds_a_run(output_dir: Path) -> bool:
    completions = any((output_dir / COMPLETIONS_DIR).glob("*.parquet"))
    return completions or (output_dir / TRAINER_STATE_NAME).is_file() or bool(checkpoints(output_dir))


def start_anew(output_dir: Path, run: str, keep: Path | None = None) -> Moved | None:
    """Name a new run. What another has left is moved away.

    Args:
        run: its name. Nothing is done where the directory has it already.
        keep: a checkpoint that stays, because the new run's model is read from there.
    """
    identity = read_identity(output_dir)
    if identity is not None and identity.run == run:
        return None
    moved = Moved(_free_folder(output_dir), _names(checkpoints(output_dir))) if holds_a_run(output_dir) else None
    # In this order a kill in between never leaves a log or a checkpoint that could be taken for the new run's
    if moved is not None:
        _move([output_dir / name for name in LOGS], moved.folder)
    write_identity(output_dir, Identity(run))
    if moved is not None:
        _move([path for path in checkpoints(output_dir) if not _is_same(path, keep)], moved.folder)
    return moved


def start_again(output_dir: Path, run: str, keep: Path | None = None) -> Moved | None:
    """As [`start_anew`]; a run that has not come to its first checkpoint keeps its name and its logs."""
    identity = read_identity(output_dir)
    if identity is None or (output_dir / TRAINER_STATE_NAME).is_file() or of_run(output_dir, identity):
        return start_anew(output_dir, run, keep)
    others = [path for path in checkpoints(output_dir) if not _is_same(path, keep)]
    moved = Moved(_free_folder(output_dir), _names(others)) if others else None
    if moved is not None:
        _move(others, moved.folder)
    return moved


def go_on(output_dir: Path, checkpoint: Path) -> Moved | None:
    """Name the run that goes on from the checkpoint. What another has left is moved away, as by [`start_anew`]."""
    run, identity = run_of(read_manifest(checkpoint)), read_identity(output_dir)
    is_inside = checkpoint.resolve().parent == output_dir.resolve()
    if identity is not None and identity.owns(run):
        return None
    moved = None
    if not is_inside and holds_a_run(output_dir):
        moved = start_anew(output_dir, new_name())
    write_identity(output_dir, Identity(run or new_name(), continues_unnamed=run is None))
    return moved


def of_run(output_dir: Path, identity: Identity | None) -> list[Path]:
    """The checkpoints that are this run's, the newest first. Without an identity nothing tells them apart."""
    found = checkpoints(output_dir)
    return [path for path in found if identity is None or identity.owns(run_of(read_manifest(path)))]


def has_model(output_dir: Path) -> bool:
    return any(next(output_dir.glob(pattern), None) is not None for pattern in SAVED_MODEL)


def _free_folder(output_dir: Path) -> Path:
    number = 1
    while (output_dir / f"{EARLIER}{number}").exists():
        number += 1
    return output_dir / f"{EARLIER}{number}"


def _names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def _is_same(path: Path, other: Path | None) -> bool:
    return other is not None and path.resolve() == other.resolve()


def _move(paths: list[Path], folder: Path) -> None:
    for path in paths:
        if path.name == COMPLETIONS_DIR:  # TRL has made the folder for this run, and writes into it
            _move(sorted(path.glob("*.parquet")), folder / COMPLETIONS_DIR)
        elif path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            path.rename(folder / path.name)
