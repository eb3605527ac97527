"""One kept sample as a line of JSON, and back: what is no sample is said."""

import hashlib
from dataclasses import dataclass

from ..runs.kept_lines import record_from, shown


# What each line begins with
LINE_START = b'{"task": "'


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


def sample_of(line: bytes, task: str) -> Sample:
    """The sample that a line of a task's file holds. Raises ValueError or RecursionError if it is none."""
    sample = record_from(line, Sample, "sample")
    if sample.task != task:
        raise ValueError(f"`task` is {shown(sample.task)}, in the file of {task!r}")
    return sample
