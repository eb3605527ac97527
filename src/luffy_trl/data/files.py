"""The rows of a data file, found under exactly the name given. What is wrong with it is said with its line or row.

Nothing here takes a name for a pattern or an address, as `datasets.load_dataset` does with `*`, `[`, `?` and `::`.
"""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .numbers import real_number, whole_number


# The ends of names, in any case, of files that are read
TYPED = (".parquet", ".arrow")
READABLE = (".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".arrow")
CELLS = (".csv", ".tsv")
COMPRESSED: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Those of files that people have data in, and that are not read
UNREADABLE = (
    ".feather", ".hdf5", ".h5", ".npy", ".npz", ".orc", ".pickle", ".pkl", ".pt", ".rar", ".sqlite", ".tar", ".tgz",
    ".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml", ".zip", ".7z", ".zst", *COMPRESSED,
)  # fmt: skip
ROWS_AT_ONCE = 1000
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def ending(name: str) -> str | None:
    """The readable end of a file's name in lower case, without a compression's; None if it is not readable."""
    path = Path(name.lower())
    suffix = path.suffix
    if suffix in COMPRESSED:
        suffix = Path(path.stem).suffix
        return suffix if suffix in READABLE and suffix not in TYPED else None
    return suffix if suffix in READABLE else None


def looks_like_a_file(name: str) -> bool:
    """Whether a name can hardly be meant as a Hub id."""
    return ending(name) is not None or name.lower().endswith(UNREADABLE)


def expected_endings() -> str:
    return f"{', '.join(READABLE)} (JSON and CSV also with {', '.join(COMPRESSED)})"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the readers raise into a ValueError of one sentence."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path.name} is cut off or damaged: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path.name} has lists or objects that are nested too deeply") from error
    except (OSError, NotImplementedError, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{path.name}: {reason}") from error


# Tables that say their types


def typed_schema(path: Path) -> pa.Schema:
    """Of a parquet or Arrow file."""
    with explained(path), open(path, "rb") as file:
        if path.stat().st_size == 0:
            raise ValueError(f"it holds no rows: {path.name} has 0 bytes")
        if ending(path.name) == ".parquet":
            return pq.read_schema(file)
        return _arrow_reader(file).schema


def typed_batches(path: Path) -> Iterator[pa.Table]:
    """A parquet or Arrow file, some rows at a time."""
    with explained(path), open(path, "rb") as file:
        if ending(path.name) == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches(batch_size=ROWS_AT_ONCE):
                yield pa.Table.from_batches([batch])
            return
        reader = _arrow_reader(file)
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(reader)
        for batch in batches:
            batch.validate(full=True)
            yield pa.Table.from_batches([batch])


def _arrow_reader(file: IO[bytes]) -> Any:
    """Of either of Arrow's two formats."""
    magic = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)


# Texts


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of one object a line, or of one JSON list of objects, or one object of columns.

    Numbers are int and float where these hold every digit of the file, else Decimal.
    """
    with explained(path), _opened(path) as file:
        lines = _lines(file, path)
        first = next((pair for pair in lines if pair[1].strip()), None)
        if first is None:
            return
        number, line = first
        if line.lstrip().startswith("[") or line.strip() == "{":
            whole = line + "".join(text for _, text in lines)
            is_suspect = _may_hold_half_characters(whole)
            for i, row in enumerate(_objects(_parse(whole, path, number), path)):
                yield _checked(row, is_suspect, f"row {i} of {path.name}")
            return
        for number, line in chain([first], lines):
            if line.strip():
                row = _parse(line, path, number)
                yield _checked(row, _may_hold_half_characters(line), f"line {number} of {path.name}")


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text, parse_int=whole_number, parse_float=real_number, parse_constant=_constant)
    except json.JSONDecodeError as error:
        at = f"line {line + error.lineno - 1} of {path.name}, column {error.colno}"
        raise ValueError(f"JSON parse error in {at}: {error.msg}, or the file is cut off there") from error


def _checked(row: Any, is_suspect: bool, where: str) -> dict[str, Any]:
    """A row that is an object, whose texts are texts."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object, expected one with the columns as its keys")
    for key, value in row.items() if is_suspect else ():
        try:
            json.dumps({key: value}, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: `{key}` holds half a character (such as \\ud83d alone), which is no text: mend or remove it"
            ) from error
    return row


def _may_hold_half_characters(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def _constant(text: str) -> float | None:
    """NaN is how tables write a number that is missing."""
    return None if text == "NaN" else float(text)


def _objects(value: Any, path: Path) -> Iterator[Any]:
    """The rows of a whole file's JSON."""
    if isinstance(value, list):
        yield from value
        return
    columns = {key: list(v.values()) if isinstance(v, dict) else v for key, v in value.items()}
    lengths = {len(column) if isinstance(column, list) else None for column in columns.values()}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"{path.name} is one JSON object with the keys {', '.join(value)}, expected an object a line, or a list "
            "of objects"
        )
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def csv_rows(path: Path) -> Iterator[dict[str, str | None]]:
    """The rows of a file with a header. An empty cell is None."""
    csv.field_size_limit(sys.maxsize)  # a trace is longer than the module's 128 kB
    delimiter = "\t" if ending(path.name) == ".tsv" else ","
    with explained(path), _opened(path) as file:
        reader = csv.reader((text for _, text in _lines(file, path)), delimiter=delimiter, strict=True)
        try:
            header = next(filter(None, reader), [])
            names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
            twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
            if twice is not None:
                raise ValueError(f"{path.name} has two columns named {twice!r}")
            for row, cells in enumerate(filter(None, reader)):
                if len(cells) != len(names):
                    raise ValueError(
                        f"row {row} of {path.name} (up to line {reader.line_num}) has {len(cells)} cells, but the "
                        f"header has {len(names)}: the file is cut off there, or a cell with a comma has no quotes"
                    )
                yield dict(zip(names, (cell or None for cell in cells), strict=True))
        except csv.Error as error:
            reason = "EOF inside string, a quote that nothing closes" if "end of data" in str(error) else str(error)
            raise ValueError(f"line {reader.line_num} of {path.name}: {reason}") from error


def _opened(path: Path) -> Any:
    suffix = path.suffix.lower()
    return COMPRESSED[suffix](path, "rb") if suffix in COMPRESSED else open(path, "rb")


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of a file in UTF-8."""
    for number, line in enumerate(file, start=1):
        if number == 1 and line.startswith(UTF16):
            raise ValueError(f"{path.name} is UTF-16 text: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"line {number} of {path.name} is not UTF-8 text (byte 0x{line[error.start]:02x}): save it as UTF-8, "
                "such as with `iconv -f CP1252 -t UTF-8` for a file of Windows, or it is damaged"
            ) from error
