"""A prepared dataset on disk: parquet, a card, a list of what was dropped; all of it at once, or nothing."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features


DROPPED_FILE = "dropped.jsonl"
OWN_FILES = re.compile(rf"README\.md|{re.escape(DROPPED_FILE)}|data|data/train-\d{{5,}}\.parquet")
# Of text in memory; about a third of it on disk. Many readers, and the Hub's viewer, take whole files.
SHARD_BYTES = 1_000_000_000


def check_output(directory: Path, overwrite: bool) -> None:
    """Raises ValueError if the output cannot go there, or something stands there that must not be replaced."""
    if directory.is_file():
        raise ValueError(f"--output-dir {directory} is a file; give a directory.")
    real = directory.resolve()
    if Path.cwd().is_relative_to(real) or os.path.ismount(real):
        raise ValueError(
            f"--output-dir {directory} is a mount point, or the working directory is in it: it cannot be replaced as "
            "a whole. Give a directory inside it."
        )
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    foreign = next((path for path in directory.rglob("*") if not _is_own(path.relative_to(directory))), None)
    if foreign is not None:
        raise ValueError(
            f"--output-dir {directory} holds {foreign.relative_to(directory)}, which prepare-data did not write: it "
            "is not replaced, even with --overwrite. Choose another one."
        )
    if not (directory / DROPPED_FILE).is_file():
        raise ValueError(
            f"--output-dir {directory} is not empty, and without {DROPPED_FILE} it is not known to be prepare-data's: "
            "it is not replaced, even with --overwrite. Choose another one."
        )
    if not overwrite:
        raise ValueError(f"--output-dir {directory} is not empty. Choose another one, or replace it with --overwrite.")


def _is_own(path: Path) -> bool:
    return OWN_FILES.fullmatch(path.as_posix()) is not None


@contextmanager
def all_or_nothing(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` to write into, which takes its name in the end; after an error it is removed."""
    directory = directory.resolve()  # a link stays, and what it leads to is replaced
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.unfinished-", dir=directory.parent))
    try:
        result = work / "result"
        result.mkdir()
        yield result
        if directory.exists():
            directory.rename(work / "replaced")
        result.rename(directory)
    finally:
        shutil.rmtree(work)


class ParquetShards:
    """Writes batches of rows to `directory`/train-00000.parquet and so on, with one batch in memory at a time.

    Args:
        features: of the rows; `load_dataset` finds them again.
    """

    def __init__(self, directory: Path, features: Features):
        self.directory = directory
        self.schema = features.arrow_schema
        self.shards = 0
        self._writer: pq.ParquetWriter | None = None
        self._bytes = 0

    def __enter__(self) -> "ParquetShards":
        self.directory.mkdir()
        self._open()  # a dataset of no rows has a file too
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        if self._bytes > SHARD_BYTES:
            self._open()
        table = pa.Table.from_pylist(rows, schema=self.schema)
        assert self._writer is not None
        self._writer.write_table(table)
        self._bytes += table.nbytes

    def _open(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = pq.ParquetWriter(self.directory / f"train-{self.shards:05d}.parquet", self.schema)
        self.shards, self._bytes = self.shards + 1, 0
