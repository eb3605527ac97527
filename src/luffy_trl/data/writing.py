"""A prepared dataset on disk: parquet, a card, a list of what was dropped; all of it at once, or nothing."""

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from filelock import FileLock, Timeout


# Lists of what was left out, of prepare-data and of make-demonstrations: no data
DROPPED_FILE, REJECTED_FILE = "dropped.jsonl", "rejected.jsonl"
OWN_FILES = re.compile(rf"README\.md|{re.escape(DROPPED_FILE)}|data|data/(train|test)-\d{{5,}}\.parquet")
# Of text in memory; about a third of it on disk. Many readers, and the Hub's viewer, take whole files.
SHARD_BYTES = 1_000_000_000
COPIED_AT_ONCE = 500


def check_output(directory: Path, overwrite: bool) -> None:
    """Raises ValueError if the output cannot go there, or something stands there that must not be replaced."""
    if directory.is_file():
        raise ValueError(f"--output_dir {directory} is a file; give a directory.")
    real = directory.resolve()
    if Path.cwd().is_relative_to(real) or os.path.ismount(real):
        raise ValueError(
            f"--output_dir {directory} is a mount point, or the working directory is in it: it cannot be replaced as "
            "a whole. Give a directory inside it."
        )
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    foreign = next((path for path in directory.rglob("*") if not _is_own(path.relative_to(directory))), None)
    if foreign is not None:
        raise ValueError(
            f"--output_dir {directory} holds {foreign.relative_to(directory)}, which prepare-data did not write: it "
            "is not replaced, even with --overwrite. Choose another one."
        )
    if not (directory / DROPPED_FILE).is_file():
        raise ValueError(
            f"--output_dir {directory} is not empty, and without {DROPPED_FILE} it is not known to be prepare-data's: "
            "it is not replaced, even with --overwrite. Choose another one."
        )
    if not overwrite:
        raise ValueError(f"--output_dir {directory} is not empty. Choose another one, or replace it with --overwrite.")


def _is_own(path: Path) -> bool:
    return OWN_FILES.fullmatch(path.as_posix()) is not None


# A run writes into `.NAME.unfinished-*/result` beside its output `NAME`; at the end `NAME` moves to `replaced` beside
# `result`, and `result` takes its name. Between any two of these steps everything is on disk, and `finish_killed` of
# the next run can tell how far a run that was killed has come.
RESULT, REPLACED, COMPLETE, LOCK = "result", "replaced", "complete", "lock"


@contextmanager
def all_or_nothing(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` to write into, which takes its name in the end; after an error it is removed."""
    directory = directory.resolve()  # a link stays, and what it leads to is replaced
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=_prefix(directory), dir=directory.parent))
    with FileLock(work / LOCK):
        try:
            result = work / RESULT
            result.mkdir()
            yield result
        except BaseException:
            _remove(work)
            raise
        (work / COMPLETE).touch()
        try:
            if directory.exists():
                directory.rename(work / REPLACED)
            result.rename(directory)
        except BaseException:  # Ctrl-C between the two moves; whatever else it is, both stay on disk
            if result.exists() and not directory.exists():
                result.rename(directory)
            raise
        _remove(work)


def finish_killed(directory: Path) -> list[str]:
    """Put right what killed runs with this output left behind; returns a sentence on each dataset that was found.

    A dataset that was complete takes its name, if nothing has it by now. One that was not is removed.
    """
    directory = directory.resolve()
    sentences = []
    for work in sorted(directory.parent.glob(glob.escape(_prefix(directory)) + "*")):
        if not (work / LOCK).is_file() and not (work / REPLACED).is_dir():
            continue  # a run that has just started
        try:
            with FileLock(work / LOCK, timeout=0):
                complete = (work / RESULT).is_dir() and ((work / COMPLETE).is_file() or (work / REPLACED).is_dir())
                if complete and directory.exists() and not _is_empty(directory):
                    sentences.append(
                        f"A run that was killed at its end left a complete dataset in {work / RESULT}: move it where "
                        f"you want it, or delete {work}."
                    )
                    continue
                if complete:
                    (work / RESULT).rename(directory)
                    sentences.append(f"{directory} holds the complete dataset of a run that was killed at its end.")
                _remove(work)
        except Timeout:  # it still runs
            continue
    return sentences


def _remove(work: Path) -> None:
    """The lock last: what is left of it after a kill is known to be left."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    shutil.rmtree(work)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _prefix(directory: Path) -> str:
    return f".{directory.name}.unfinished-"


class ParquetShards:
    """Writes batches of rows to `directory`/train-00000.parquet and so on, with one batch in memory at a time.

    Args:
        features: of the rows; `load_dataset` finds them again.
        split: "train" or "test".
    """

    def __init__(self, directory: Path, features: Features, split: str = "train"):
        self.directory, self.split = directory, split
        self.schema = features.arrow_schema
        self.shards = 0
        self._writer: pq.ParquetWriter | None = None
        self._bytes = 0

    def __enter__(self) -> "ParquetShards":
        self.directory.mkdir(exist_ok=True)
        self._open()  # a dataset of no rows has a file too
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            self.write_table(pa.Table.from_pylist(rows, schema=self.schema))

    def write_table(self, table: pa.Table) -> None:
        if self._bytes > SHARD_BYTES:
            self._open()
        assert self._writer is not None
        self._writer.write_table(table.cast(self.schema))
        self._bytes += table.nbytes

    def _open(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = pq.ParquetWriter(self.directory / f"{self.split}-{self.shards:05d}.parquet", self.schema)
        self.shards, self._bytes = self.shards + 1, 0


def kept_rows(directory: Path, columns: list[str] | None = None) -> Iterator[list[dict[str, Any]]]:
    """The rows of all shards in a directory, some at a time."""
    for path in sorted(directory.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(COPIED_AT_ONCE, columns=columns):
            yield batch.to_pylist()


def write_splits(kept: Path, directory: Path, features: Features, test: Set[int]) -> None:
    """The rows of `kept` as two splits in `directory`: those whose numbers are in `test`, and the others."""
    row = 0
    with ParquetShards(directory, features) as train_split, ParquetShards(directory, features, "test") as test_split:
        for rows in kept_rows(kept):
            numbered = list(enumerate(rows, row))
            train_split.write([values for number, values in numbered if number not in test])
            test_split.write([values for number, values in numbered if number in test])
            row += len(rows)
