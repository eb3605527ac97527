"""One kept sample as a line of JSON, and back: what is no sample is said, and what a kill left is told from it."""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any


# Bytes of the longest line that is read, and of run.json: a response of a million tokens has some ten million
LONGEST_LINE = 1 << 26
# What each line begins with, as `line_of` writes it
LINE_START = b'{"task": "'
# Of what a message shows of a damaged file, so many characters
SHOWN = 200


Key = tuple[str, int, int]  # of a sample: task, doc_id, repeat


@dataclass
class Sample:
    """One response. `tokens` counts its end-of-sequence token; `truncated`: it reached max_new_tokens instead."""

    task: str
    doc_id: int
    repeat: int
    prompt_hash: str
    response: str
    tokens: int
    truncated: bool
    # Known once scored
    problem: str | None = None
    gold: str | None = None
    answer: str | None = None  # what was taken for it; stays None where there is none
    score: float | None = None
    # Of a user's own problems: the prompt as it stood in front of the model, and every reward by its function's name
    prompt: str | None = None
    rewards: dict | None = None

    @property
    def key(self) -> Key:
        return self.task, self.doc_id, self.repeat


def prompt_hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def line_of(sample: Sample) -> str:
    # ensure_ascii: no response can hold a line break of its own, nor a lone surrogate that cannot be written
    return json.dumps({name: value for name, value in asdict(sample).items() if value is not None}) + "\n"


def sample_of(line: bytes, task: str) -> Sample:
    """The sample that a line of a task's file holds. Raises ValueError or RecursionError if it is none."""
    if len(line) == LONGEST_LINE:
        raise ValueError(f"it has {LONGEST_LINE} bytes and more")
    values = json.loads(line.decode())
    if not isinstance(values, dict):
        raise ValueError(f"it is {shown(values)}, expected an object")
    known = {field.name: field for field in fields(Sample)}
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in values]:
        raise ValueError(f"it has no `{missing[0]}`")
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"it has {shown(name)}, which no sample has")
        if not _is_of(known[name].type, value):
            raise ValueError(f"`{name}` is {shown(value)}, expected {EXPECTED[known[name].type]}")
    if values["task"] != task:
        raise ValueError(f"`task` is {shown(values['task'])}, in the file of {task!r}")
    return Sample(**values)


EXPECTED: dict[Any, str] = {
    str: "a text", int: "a whole number, 0 or more", bool: "true or false", str | None: "a text",
    float | None: "a number", dict | None: "an object of numbers",
}  # fmt: skip


def _is_of(kind: Any, value: Any) -> bool:
    if kind is int:
        return type(value) is int and value >= 0
    if isinstance(value, dict):
        return kind == dict | None and all(isinstance(item, float | int | None) for item in value.values())
    return isinstance(value, kind) or (kind == float | None and type(value) is int)


def is_half_written(line: bytes) -> bool:
    """Whether a line without an end is the beginning of a sample, or what a loss of power has left of it."""
    written = line.rstrip(b"\0")
    return not line.endswith(b"\n") and len(line) < LONGEST_LINE and written.startswith(LINE_START[: len(written)])


def shown(value: Any) -> str:
    """On one line, and cut: nobody knows what stands in a damaged file."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
