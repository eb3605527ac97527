"""Data files of one format as Arrow tables of one type, or as rows that are read as they are needed."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features
from datasets.table import table_cast

from .columns import cell_value, csv_features, fitted, json_features, to_table
from .files import CELLS, ROWS_AT_ONCE, TYPED, csv_rows, ending, json_rows, typed_batches, typed_schema
from .numbers import plain


STREAM_LOOKS_AT = 1000  # rows, after which a streamed CSV's columns of numbers are known


def features_of(names: Sequence[str]) -> Features:
    """The types of the columns: a table's own, of the first file; of JSON and CSV, after a look at every row.

    Raises:
        ValueError: for what cannot be read, naming file, line or row; and if it holds no rows.
    """
    paths = [Path(name) for name in names]
    suffix = ending(names[0])
    if suffix in TYPED:
        return Features.from_arrow_schema(typed_schema(paths[0]))
    if suffix in CELLS:
        features = csv_features(chain.from_iterable(map(csv_rows, paths)))
    else:
        features = json_features(chain.from_iterable(map(json_rows, paths)))
    if not features:
        raise ValueError(no_rows(paths))
    return features


def no_rows(paths: Sequence[Path]) -> str:
    return "it holds no rows" if len(paths) == 1 else f"{', '.join(path.name for path in paths)} hold no rows"


def tables_of(name: str, features: Features) -> Iterator[pa.Table]:
    """A file's rows in these types, some at a time."""
    path, suffix = Path(name), ending(name)
    if suffix in TYPED:
        for table in typed_batches(path):
            yield _as_first(table, features, path)
        return
    rows = csv_rows(path) if suffix in CELLS else json_rows(path)
    in_type = cell_value if suffix in CELLS else fitted
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        yield to_table({c: [in_type(row.get(c), kind) for row in batch] for c, kind in features.items()}, features)


def _as_first(table: pa.Table, features: Features, path: Path) -> pa.Table:
    if set(table.column_names) != set(features):
        raise ValueError(
            f"{path.name} has the columns {', '.join(table.column_names)}, but the first file has "
            f"{', '.join(features)}"
        )
    return table_cast(table, features.arrow_schema)


def streamed_json(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each row with the types that it has."""
    for name in files:
        yield from map(plain, json_rows(Path(name)))


def streamed_csv(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Cells as numbers in columns that begin with numbers, where they are some."""
    for name in files:
        rows = csv_rows(Path(name))
        head = list(islice(rows, STREAM_LOOKS_AT))
        features = csv_features(head)
        for row in chain(head, rows):
            yield {column: cell_value(text, features[column]) for column, text in row.items()}
