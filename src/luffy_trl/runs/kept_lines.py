"""Files of records that grow while they are made: one JSON object a line, appended and synced to the disk.

A kill or a loss of power may leave the last line half written: it is told from a damaged file, and cut off before
more is appended.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar


# Bytes of the longest line that is read: a response of a million tokens has some ten million
LONGEST_LINE = 1 << 26
# Of what a message shows of a damaged file, so many characters
SHOWN = 200

# Of a field of a record: what it is called when a line has something else
EXPECTED: dict[Any, str] = {
    str: "a text", int: "a whole number, 0 or more", bool: "true or false", str | None: "a text",
    float | None: "a number", list[int] | None: "a list of whole numbers, 0 or more",
    list[float] | None: "a list of numbers", list[str] | None: "a list of texts",
    dict | None: "an object of numbers",
}  # fmt: skip
ELEMENTS: dict[Any, type] = {list[int] | None: int, list[float] | None: float, list[str] | None: str}

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class End:
    """Where a file's whole lines end, and what is missing behind them."""

    path: Path
    whole: int
    missing: bytes
    half_written: bool

    def mend(self) -> None:
        """Have the file end with a whole line, for others to be appended."""
        with open(self.path, "r+b") as file:
            file.truncate(self.whole)
            file.seek(self.whole)
            file.write(self.missing)


def read_lines(
    path: Path, read: Callable[[bytes, int], Kept], start: bytes, what: str
) -> tuple[list[Kept], End | None]:
    """The records of a file, and its end, if that has to be mended.

    Args:
        read: a record from its line, and where that begins in the file; raises ValueError or RecursionError for what
            is none.
        start: what each line begins with.
        what: a record is called in messages.

    Raises:
        ValueError: naming the line that is no record. Nothing is changed.
    """
    records: list[Kept] = []
    whole = 0
    with open(path, "rb") as file:
        # No more than a line at a time: a file of another program may be one line without an end
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            try:
                records.append(read(line, whole))
            except (ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and is_half_written(line, start):
                    return records, End(path, whole, b"", half_written=True)
                raise ValueError(
                    f"{path}, line {number} is no {what} ({error}). Remove the line, and it is generated again."
                ) from error
            whole += len(line)
            if not line.endswith(b"\n"):
                return records, End(path, whole, b"\n", half_written=False)
    return records, None


def append_lines(path: Path, records: Iterable[Any]) -> list[int]:
    """Safe from a kill, and from a loss of power, once this returns where each line begins."""
    lines = [line_of(record).encode() for record in records]
    with open(path, "ab") as file:
        starts = list(accumulate(map(len, lines), initial=file.tell()))
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())
    return starts[:-1]


def line_at(path: Path, start: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.readline(LONGEST_LINE)


def line_of(record: Any) -> str:
    # ensure_ascii: no response can hold a line break of its own, nor a lone surrogate that cannot be written
    return json.dumps({name: value for name, value in asdict(record).items() if value is not None}) + "\n"


def record_from(line: bytes, kind: type[Kept], what: str) -> Kept:
    """The record of a line. Raises ValueError or RecursionError if it is none."""
    if len(line) == LONGEST_LINE:
        raise ValueError(f"it has {LONGEST_LINE} bytes and more")
    values = json.loads(line.decode())
    if not isinstance(values, dict):
        raise ValueError(f"it is {shown(values)}, expected an object")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in values]:
        raise ValueError(f"it has no `{missing[0]}`")
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"it has {shown(name)}, which no {what} has")
        if not _is_of(known[name].type, value):
            raise ValueError(f"`{name}` is {shown(value)}, expected {EXPECTED[known[name].type]}")
    return kind(**values)


def shown(value: Any) -> str:
    """On one line, and cut: nobody knows what stands in a damaged file."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _is_of(kind: Any, value: Any) -> bool:
    if kind in ELEMENTS:
        return value is None or (isinstance(value, list) and all(_is_element(ELEMENTS[kind], item) for item in value))
    if isinstance(value, dict):
        return kind == dict | None and all(isinstance(item, float | int | None) for item in value.values())
    if kind is int:
        return type(value) is int and value >= 0
    return isinstance(value, kind) or (kind == float | None and type(value) is int)


def _is_element(kind: type, value: Any) -> bool:
    return _is_of(int, value) if kind is int else isinstance(value, kind) or (kind is float and type(value) is int)


def is_half_written(line: bytes, start: bytes) -> bool:
    """Whether a line without an end is the beginning of a record, or what a loss of power has left of it."""
    written = line.rstrip(b"\0")
    return not line.endswith(b"\n") and len(line) < LONGEST_LINE and written.startswith(start[: len(written)])
