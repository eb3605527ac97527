"""The dataset on disk: parquet, what was rejected, a card. What was there before stays until all of it is whole.

OUTPUT_DIR/data/train-*.parquet   the data contract
OUTPUT_DIR/rejected.jsonl         an answer a line that is no demonstration, with the reason
OUTPUT_DIR/README.md              the card
OUTPUT_DIR/_answers/              all answers, as they came
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset, Features, List, Value

from ..data.problems import MESSAGES
from ..data.writing import REJECTED_FILE, SHARD_BYTES, all_or_nothing, finish_killed
from ..runs.lock import LOCK
from .answers import ANSWERS_DIR
from .problems import MADE, TEACHER_COLUMN


DATA_DIR, README = "data", "README.md"
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


def with_demonstrations(dataset: Dataset, rows: Iterable[dict[str, Any]], several: bool) -> Dataset:
    """The problems with the made columns in place of those that they brought."""
    kept = dataset.remove_columns([name for name in MADE if name in dataset.column_names])
    rows = list(rows)
    text: Any = Value("string") if isinstance(dataset[0]["prompt"], str) else MESSAGES
    features: dict[str, Any] = {"completion": text, TEACHER_COLUMN: Value("string")}
    if several:
        features = {"demonstrations": List(text), TEACHER_COLUMN: List(Value("string"))}
    if "completion_logps" in rows[0]:
        features["completion_logps"] = List(Value("float64"))
    for name, feature in features.items():
        kept = kept.add_column(name, [row[name] for row in rows], feature=Features({name: feature})[name])
    return kept


def write_split(dataset: Dataset, directory: Path, split: str = "train") -> None:
    """The rows as parquet files of some GB at most."""
    shards = max(1, -(-dataset.data.nbytes // SHARD_BYTES))
    for i in range(shards):
        shard = dataset.shard(shards, i, contiguous=True)
        shard.to_parquet(directory / f"{split}-{i:05d}.parquet")


def write(directory: Path, dataset: Dataset, rejected: Path, card: str) -> None:
    """All of it; the data last but for the card, in one move.

    Args:
        rejected: the file of rejected answers, which is moved into its place.
    """
    with all_or_nothing(directory / DATA_DIR) as result:
        write_split(dataset, result)
    os.replace(rejected, directory / REJECTED_FILE)
    unfinished = directory / f".{README}.unfinished"
    unfinished.write_text(card, encoding="utf-8")
    os.replace(unfinished, directory / README)


def write_rejected(file: TextIO, rows: Iterable[dict[str, Any]]) -> None:
    # What a reward function logs may be of any kind
    file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
