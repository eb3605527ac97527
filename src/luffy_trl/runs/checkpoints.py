"""Checkpoints that are whole or not there, and the newest one to resume from.

A checkpoint is written into a directory of its own beside the others and moved to its final name when everything is on
disk. A list of its files and their sizes, the manifest, goes in last: what has been damaged since is told by it. It
also says which run the checkpoint is of, and how that was set up.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub import snapshot_download
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .identity import read_identity
from .manifest import MANIFEST, CannotResumeError, read_manifest, run_of
from .untrusted import DOWNLOADED, allowed_part


logger = get_logger(__name__)

# Beside the checkpoints: where one is written, no name that `checkpoint-*` finds
UNFINISHED_DIR = ".unfinished"
# In there, a damaged checkpoint, until the one that takes its place has its name
REPLACED = "replaced-"
UNLISTED = ("training_args.bin", "README.md")
# What asks for the newest checkpoint; a flag brings its value as text
NEWEST = (True, "auto", "True", "true")
NONE = (None, False, "False", "false", "")


def publish(unfinished: Path, final: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Move a checkpoint that is written to its final name, in place of a damaged one if there is.

    A kill in between loses neither of the two: see [`recover`].

    Args:
        facts: for the manifest, beside the files: plain values.
    """
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    # What is for people, and not pushed to the Hub, is not needed to resume
    sizes = {str(path.relative_to(unfinished)): path.stat().st_size for path in files if path.name not in UNLISTED}
    manifest = unfinished / MANIFEST
    manifest.write_text(json.dumps({"files": sizes, **(facts or {})}, indent=1) + "\n")
    for path in [*files, manifest, unfinished]:
        _flush(path)
    replaced = unfinished.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(output_dir: str | Path) -> None:
    """Finish what a kill has interrupted while one checkpoint took the place of another."""
    for replaced in (Path(output_dir) / UNFINISHED_DIR).glob(f"{REPLACED}*"):
        name = replaced.name.removeprefix(REPLACED)
        new, final = replaced.with_name(name), Path(output_dir) / name
        if not final.exists():
            (new if damage(new) is None else replaced).rename(final)
        shutil.rmtree(replaced, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the system write it to the disk, for it to be there after a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole."""
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    sizes = read_manifest(checkpoint).get("files")
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


def newest_complete(output_dir: str | Path, without_manifest: bool = False) -> Path | None:
    """The newest checkpoint of the directory's run that is whole. Says which ones are not, or are another run's.

    Args:
        without_manifest: take those, too, that were written by a trainer without manifests.
    """
    identity = read_identity(output_dir)
    for checkpoint in checkpoints(output_dir):
        problem = damage(checkpoint)
        if problem is not None and without_manifest and not (checkpoint / MANIFEST).exists():
            # The trainer state is written last
            is_there = (checkpoint / TRAINER_STATE_NAME).is_file()
            problem = None if is_there else f"it has no {TRAINER_STATE_NAME}"
        if problem is None and identity is not None and not identity.owns(run_of(read_manifest(checkpoint))):
            problem = "it is another run's"
        if problem is None:
            return checkpoint
        logger.warning(f"{checkpoint} is skipped: {problem}.")
    return None


def find_checkpoint(name: str | bool | None, output_dir: str | Path, without_manifest: bool = False) -> str | None:
    """The directory to resume from.

    Args:
        name: "auto", the newest complete checkpoint of `output_dir`, None if there is none; a checkpoint's directory;
            or `USER/REPO` or `USER/REPO@REVISION` on the Hub, where `hub_strategy="checkpoint"` keeps the last one.
        output_dir: the run's.
        without_manifest: as for [`newest_complete`].

    Raises:
        CannotResumeError: a ValueError, if there is no such checkpoint, or a damaged one.
    """
    if name in NONE:
        return None
    if name in NEWEST:
        found = newest_complete(output_dir, without_manifest)
        return str(found) if found else None
    path = Path(str(name))
    if not path.is_dir():
        return str(_from_hub(str(name)))
    if checkpoints(path) or path.resolve() == Path(output_dir).resolve():
        raise CannotResumeError(
            f"--resume_from_checkpoint {name} is an output directory and no checkpoint. Give one of its checkpoints, "
            "such as OUTPUT_DIR/checkpoint-100, or 'auto', which takes the newest of --output_dir."
        )
    problem = damage(path)
    # One that another program saved has no manifest; the user chose it
    if problem is not None and (path / MANIFEST).exists():
        raise CannotResumeError(
            f"--resume_from_checkpoint {name} is damaged: {problem}. 'auto' takes the newest whole one."
        )
    if not (path / TRAINER_STATE_NAME).is_file():
        raise CannotResumeError(
            f"--resume_from_checkpoint {name} is no checkpoint: it has no {TRAINER_STATE_NAME}. Give a directory such "
            "as OUTPUT_DIR/checkpoint-100, or 'auto', which takes the newest of the output directory."
        )
    return str(path)


def _from_hub(name: str) -> Path:
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise CannotResumeError(
            f"--resume_from_checkpoint {name}: there is no such directory, and it is no USER/REPO on the Hub. 'auto' "
            "takes the newest complete checkpoint of the output directory."
        )
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as error:  # the Hub's errors are such
        raise CannotResumeError(
            f"--resume_from_checkpoint {name}: no directory, and not to be had from the Hub: {error}"
        ) from error
    last = folder / "last-checkpoint"  # where hub_strategy="checkpoint" puts it
    return allowed_part(last if last.is_dir() else folder, name)
