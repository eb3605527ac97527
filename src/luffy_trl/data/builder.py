"""Data files as a `datasets.Dataset` in its cache, or as a stream, whatever their names are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset
from datasets.builder import Key
from datasets.fingerprint import Hasher
from datasets.table import table_cast

from .columns import HalfCharacterError, cell_value, csv_features, fitted, json_features, to_table
from .files import ROWS_AT_ONCE, TYPED, csv_rows, ending, json_rows, typed_batches, typed_schema
from .numbers import plain


# Raise it with every change of what the readers produce: part of the name in the datasets cache
READER_VERSION = 1
STREAM_LOOKS_AT = 1000  # rows, after which a streamed CSV's columns of numbers are known


def dataset_of(files: Sequence[Path], split: str) -> Dataset:
    """The rows of files of one format, in the order of the files; from the cache, if they are as they were.

    Raises:
        ValueError: for what cannot be read, naming file, line or row.
        DatasetGenerationError: with such a one as its cause.
    """
    builder = _builder(files, split)
    builder.download_and_prepare()
    dataset = builder.as_dataset(split=split)
    if len(dataset) == 0:
        raise ValueError(_no_rows(files))
    return dataset


def stream_of(files: Sequence[Path], split: str) -> IterableDataset:
    """As [`dataset_of`], read as it is needed. Rows of JSON and CSV have what types they have."""
    if ending(files[0].name) in TYPED:
        return _builder(files, split).as_streaming_dataset(split=split)
    rows = _stream_csv if ending(files[0].name) in (".csv", ".tsv") else _stream_json
    return IterableDataset.from_generator(rows, gen_kwargs={"files": [str(path) for path in files]})


def _builder(files: Sequence[Path], split: str) -> "FilesBuilder":
    paths = [path.resolve() for path in files]
    stamps = [(path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) for path in paths]
    names = [str(path) for path in paths]
    # Files that were written again are other files
    config_id = Hasher.hash((READER_VERSION, split, names, stamps, [path.name for path in files]))
    return FilesBuilder(dataset_name="data_files", config_id=config_id, files=names, split=split)


@dataclass
class FilesConfig(datasets.BuilderConfig):
    files: list[str] | None = None
    split: str = "train"


class FilesBuilder(datasets.ArrowBasedBuilder):
    """One split of files of one format."""

    BUILDER_CONFIG_CLASS = FilesConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        paths = [Path(name) for name in self.config.files]
        suffix = ending(paths[0].name)
        if suffix in TYPED:
            features = Features.from_arrow_schema(typed_schema(paths[0]))
        elif suffix in (".csv", ".tsv"):
            features = csv_features(chain.from_iterable(map(csv_rows, paths)))
        else:
            features = json_features(chain.from_iterable(map(json_rows, paths)))
        if not features:
            raise ValueError(_no_rows(paths))
        self.info.features = features
        return [datasets.SplitGenerator(name=self.config.split, gen_kwargs={"files": self.config.files})]

    def _generate_shards(self, files: list[str]) -> Iterator[str]:
        yield from files

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pa.Table]]:
        features = self.info.features
        for i, path in enumerate(map(Path, files)):
            suffix = ending(path.name)
            if suffix in TYPED:
                tables = (_as_first(table, features, path) for table in typed_batches(path))
            elif suffix in (".csv", ".tsv"):
                tables = _csv_tables(path, features)
            else:
                tables = _json_tables(path, features)
            for j, table in enumerate(tables):
                yield Key(i, j), table


def _no_rows(files: Sequence[Path]) -> str:
    return "it holds no rows" if len(files) == 1 else f"{', '.join(path.name for path in files)} hold no rows"


def _as_first(table: pa.Table, features: Features, path: Path) -> pa.Table:
    if set(table.column_names) != set(features):
        raise ValueError(
            f"{path.name} has the columns {', '.join(table.column_names)}, but the first file has "
            f"{', '.join(features)}"
        )
    return table_cast(table, features.arrow_schema)


def _json_tables(path: Path, features: Features) -> Iterator[pa.Table]:
    rows = json_rows(path)
    done = 0
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        columns = {name: [fitted(row.get(name), feature) for row in batch] for name, feature in features.items()}
        yield _table(columns, features, path, done)
        done += len(batch)


def _csv_tables(path: Path, features: Features) -> Iterator[pa.Table]:
    rows = csv_rows(path)
    done = 0
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        columns = {name: [cell_value(row.get(name), feature) for row in batch] for name, feature in features.items()}
        yield _table(columns, features, path, done)
        done += len(batch)


def _table(columns: dict[str, list], features: Features, path: Path, done: int) -> pa.Table:
    try:
        return to_table(columns, features)
    except HalfCharacterError as error:
        raise ValueError(
            f"row {done + error.row} of {path.name}: {error}, which is no text: mend or remove it"
        ) from error


def _stream_json(files: list[str]) -> Iterator[dict[str, Any]]:
    for name in files:
        yield from map(plain, json_rows(Path(name)))


def _stream_csv(files: list[str]) -> Iterator[dict[str, Any]]:
    for name in files:
        rows = csv_rows(Path(name))
        head = list(islice(rows, STREAM_LOOKS_AT))
        features = csv_features(head)
        for row in chain(head, rows):
            yield {column: cell_value(text, features[column]) for column, text in row.items()}
