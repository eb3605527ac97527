"""Which files of a directory hold its rows, and of which split each is."""

import re
from pathlib import Path

from datasets import Split
from datasets.data_files import DEFAULT_SPLITS, SPLIT_KEYWORDS
from huggingface_hub import DatasetCard

from .files import TYPED, UNREADABLE, ending, expected_endings
from .writing import DROPPED_FILE, REJECTED_FILE


# Beside the data: what `datasets` writes about it
ABOUT = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"}


def has_rules_of_its_own(directory: Path) -> bool:
    """Whether `datasets` knows better: a README that names the files, or a folder of images or sounds."""
    readme = directory / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    if text.startswith("---") and DatasetCard(text, ignore_metadata_errors=True).data.get("configs"):
        return True
    return any(path.stem == "metadata" and ending(path.name) for path in _files(directory))


def split_files(directory: Path, where: str) -> dict[str, list[Path]]:
    """The data files of a directory and those below it, by split, in the order of their names.

    A file's split is the one that its name or its folder's speaks of (train, validation, test and their like, as
    `datasets` has it); files that speak of none are the training split. Empty: there are no data files.

    Raises:
        ValueError: for files of several formats, or some with a split and some without: none is left out in silence.
    """
    files = [path for path in _files(directory) if path.name not in ABOUT]
    if any(path.parent.name == "data" for path in files):  # of our own, where lists of what was left out are no data
        files = [path for path in files if path not in (directory / DROPPED_FILE, directory / REJECTED_FILE)]
    formats: dict[str, Path] = {}
    for path in files:
        formats.setdefault(_format(path), path)
    if len(formats) > 1:
        names = ", ".join(str(path.relative_to(directory)) for path in formats.values())
        raise ValueError(
            f"{where} holds files of several formats ({names}), which are not read together: give one of the files, "
            "or a directory with those of one format."
        )
    if not files or files[0].suffix.lower() in (".tar", ".tgz"):
        return {}  # pictures or sounds, perhaps, which `datasets` reads itself
    if ending(files[0].name) is None:
        raise ValueError(
            f"{where} holds {files[0].relative_to(directory)}, which is not read: expected files that end in "
            f"{expected_endings()}."
        )
    splits: dict[str | None, list[Path]] = {}
    for path in files:
        splits.setdefault(_split(path.relative_to(directory)), []).append(path)
    unnamed = splits.pop(None, [])
    if unnamed and splits:
        known = next(iter(splits.values()))[0]
        raise ValueError(
            f"{where} holds {known.relative_to(directory)}, whose name says its split, and "
            f"{unnamed[0].relative_to(directory)}, whose name says none: rename it, or move it away."
        )
    order = map(str, DEFAULT_SPLITS)
    return {str(Split.TRAIN): unnamed} if unnamed else {split: splits[split] for split in order if split in splits}


def _files(directory: Path) -> list[Path]:
    """All that look like data, without what is hidden."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    shown = [path for path in paths if not any(part[:1] in (".", "_") for part in path.relative_to(directory).parts)]
    return sorted(path for path in shown if ending(path.name) or _is_foreign(path))


def _is_foreign(path: Path) -> bool:
    """Data that is not read; a text is more often a note."""
    return path.suffix.lower() in UNREADABLE and path.suffix.lower() not in (".txt", ".yaml", ".yml")


def _format(path: Path) -> str:
    """What can be read as one table."""
    suffix = ending(path.name)
    if suffix is None:
        return path.suffix.lower()
    return suffix if suffix in TYPED or suffix in (".csv", ".tsv") else ".json"


def _split(path: Path) -> str | None:
    """The split that a name speaks of, the file's before its folders'."""
    for name in (path.name, *reversed(path.parent.parts)):
        for split in DEFAULT_SPLITS:
            words = "|".join(SPLIT_KEYWORDS[split])
            if re.search(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)", name):
                return str(split)
    return None
