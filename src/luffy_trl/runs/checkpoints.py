"""Checkpoints that are whole or not there, and the newest one to resume from.

A checkpoint is written into a directory of its own beside the others and moved to its final name when everything is on
disk. A list of its files and their sizes, the manifest, goes in last: what has been damaged since is told by it.
"""

import json
import os
import re
import shutil
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import snapshot_download
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = get_logger(__name__)

# Beside the checkpoints: where one is written, no name that `checkpoint-*` finds
UNFINISHED_DIR = ".unfinished"
MANIFEST = "manifest.json"
UNLISTED = ("training_args.bin", "README.md")
# What asks for the newest checkpoint; a flag brings its value as text
NEWEST = (True, "auto", "True", "true")
NONE = (None, False, "False", "false", "")


def publish(unfinished: Path, final: Path) -> None:
    """Move a checkpoint that is written to its final name, in place of a damaged one if there is."""
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    # What is for people, and not pushed to the Hub, is not needed to resume
    sizes = {str(path.relative_to(unfinished)): path.stat().st_size for path in files if path.name not in UNLISTED}
    manifest = unfinished / MANIFEST
    manifest.write_text(json.dumps({"files": sizes}, indent=1) + "\n")
    for path in [*files, manifest, unfinished]:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    unfinished.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """Have the system write it to the disk, for it to be there after a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}"
    try:
        sizes = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        sizes = None
    if not isinstance(sizes, dict):
        return f"its {MANIFEST} cannot be read"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All directories named `checkpoint-STEP`, the newest first."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(int(match[1]), path) for path in Path(output_dir).glob("*") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def newest_complete(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is whole. Says which ones are not."""
    for checkpoint in checkpoints(output_dir):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning(f"{checkpoint} is skipped: {problem}.")
    return None


def find_checkpoint(name: str | bool | None, output_dir: str | Path) -> str | None:
    """The directory to resume from.

    Args:
        name: "auto", the newest complete checkpoint of `output_dir`, None if there is none; a checkpoint's directory;
            or `USER/REPO` or `USER/REPO@REVISION` on the Hub, where `hub_strategy="checkpoint"` keeps the last one.
        output_dir: the run's.

    Raises:
        ValueError: if there is no such checkpoint, or a damaged one.
    """
    if name in NONE:
        return None
    if name in NEWEST:
        found = newest_complete(output_dir)
        return str(found) if found else None
    path = Path(str(name))
    if not path.is_dir():
        path = _from_hub(str(name))
    problem = damage(path)
    # One that another program saved has no manifest; the user chose it
    if problem is not None and (path / MANIFEST).exists():
        raise ValueError(f"--resume_from_checkpoint {name} is damaged: {problem}. 'auto' takes the newest whole one.")
    if not (path / "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {name} is no checkpoint: it has no trainer_state.json.")
    return str(path)


def _from_hub(name: str) -> Path:
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(
            f"--resume_from_checkpoint {name}: there is no such directory, and it is no USER/REPO on the Hub. 'auto' "
            "takes the newest complete checkpoint of the output directory."
        )
    try:
        folder = Path(snapshot_download(repo, revision=revision or None))
    except OSError as error:  # the Hub's errors are such
        raise ValueError(
            f"--resume_from_checkpoint {name}: no directory, and not to be had from the Hub: {error}"
        ) from error
    last = folder / "last-checkpoint"  # where hub_strategy="checkpoint" puts it
    found = last if last.is_dir() else folder
    if any(found.glob("global_step*")):
        raise ValueError(
            f"--resume_from_checkpoint {name} is a checkpoint of DeepSpeed, which holds pickles: they run code when "
            "they are loaded. If you trust it, download it and give its directory."
        )
    return found
