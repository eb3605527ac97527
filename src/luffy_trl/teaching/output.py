"""The dataset on disk: parquet, what was rejected, a card. What was there before stays until all of it is whole.

OUTPUT_DIR/data/train-*.parquet   the data contract
OUTPUT_DIR/rejected.jsonl         an answer a line that is no demonstration, with the reason
OUTPUT_DIR/README.md              the card
OUTPUT_DIR/_answers/              all answers, as they came
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from ..data.problems import MESSAGES
from ..data.writing import REJECTED_FILE, ParquetShards, all_or_nothing, finish_killed
from ..runs.lock import LOCK
from ..runs.whole_files import write_whole
from .answers import ANSWERS_DIR
from .problems import MADE, TEACHER_COLUMN


DATA_DIR, README = "data", "README.md"
# Rows. A trace of 8,192 tokens is about 30 kB
WRITTEN_AT_ONCE = 500
# What is not pushed: answers as they came, and hidden files
STAY_HERE = (".*", f"{ANSWERS_DIR}/*", REJECTED_FILE)
# What a run has in its directory
WRITTEN_HERE = (DATA_DIR, REJECTED_FILE, README, ANSWERS_DIR, LOCK)


def check_place(directory: Path) -> None:
    """Put right what a killed run has left.

    Raises:
        ValueError: if something stands there that is not of make-demonstrations.
    """
    if directory.is_file():
        raise ValueError(f"--output_dir {directory} is a file; give a directory.")
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    foreign = sorted(name for name in names if name not in WRITTEN_HERE and not name.startswith("."))
    if foreign or (names & {DATA_DIR, README} and ANSWERS_DIR not in names):
        raise ValueError(
            f"--output_dir {directory} holds {(foreign or sorted(names))[0]}, which make-demonstrations did not "
            "write. Choose another one."
        )
    if directory.is_dir():
        finish_killed(directory / DATA_DIR)


def made_features(dataset: Dataset, rows: Sequence[dict[str, Any]]) -> Features:
    """The columns of the result: those of the problems, less what they brought of ours, and the made ones.

    Args:
        rows: the made columns' values.
    """
    text: Any = Value("string") if isinstance(dataset[0]["prompt"], str) else MESSAGES
    made: dict[str, Any] = {"completion": text, TEACHER_COLUMN: Value("string")}
    if "demonstrations" in rows[0]:
        made = {"demonstrations": List(text), TEACHER_COLUMN: List(Value("string"))}
    if "completion_logps" in rows[0]:
        made["completion_logps"] = List(Value("float64"))
    return Features({name: feature for name, feature in dataset.features.items() if name not in MADE} | made)


def write(
    directory: Path,
    dataset: Dataset,
    rows: Sequence[dict[str, Any]],
    test: Dataset | None,
    rejected: Path,
    card: str,
) -> None:
    """All of it; the data first, in one move.

    Args:
        rows: the made columns of each problem.
        test: the problems of a test split, which have no demonstrations.
        rejected: the file of rejected answers, which is moved into its place.
    """
    features = made_features(dataset, rows)
    with all_or_nothing(directory / DATA_DIR) as result:
        _write_split(ParquetShards(result, features), dataset, rows, features)
        if test is not None:
            nothing: dict[str, Any] = {name: [] if "demonstrations" in rows[0] else None for name in rows[0]}
            _write_split(ParquetShards(result, features, "test"), test, [nothing] * len(test), features)
    os.replace(rejected, directory / REJECTED_FILE)
    write_whole(directory / README, card)


def _write_split(shards: ParquetShards, dataset: Dataset, rows: Sequence[dict[str, Any]], features: Features) -> None:
    made = Features({name: feature for name, feature in features.items() if name in MADE})
    kept = dataset.select_columns([name for name in features if name not in MADE]).with_format("arrow")
    with shards:
        for start in range(0, len(rows), WRITTEN_AT_ONCE):
            part = slice(start, start + WRITTEN_AT_ONCE)
            shards.write_table(_beside(kept[part], rows[part], made))


def _beside(table: pa.Table, rows: Sequence[dict[str, Any]], made: Features) -> pa.Table:
    """The problems' columns and the made ones."""
    added = pa.Table.from_pylist(list(rows), schema=made.arrow_schema)
    for name in made:
        table = table.append_column(added.schema.field(name), added.column(name))
    return table


def write_rejected(file: TextIO, rows: Iterable[dict[str, Any]]) -> None:
    # What a reward function logs may be of any kind
    file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
