"""What every teacher is: a name, how it samples, and answers to questions."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..runs.seeds import derived_seed
from .answers import TeacherAnswer
from .problems import Prompt


# Half of a surrogate pair, which JSON can hold and no file of text: `\ud83d` alone
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
# Servers take the 31 bits of a positive C int
SEED_BITS = 31


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    logprobs: bool


@dataclass(frozen=True)
class Question:
    """One answer to be sampled: the `repeat`-th of a teacher to a prompt."""

    teacher: str
    problem: str
    repeat: int
    prompt: Prompt

    def seed(self, seed: int) -> int:
        """No two answers are drawn from the same random numbers, and none from others after a restart."""
        return derived_seed(seed, [self.teacher, self.problem, self.repeat]) >> (63 - SEED_BITS)

    def refused(self, error: str) -> TeacherAnswer:
        """What is kept of a question that a teacher will never answer."""
        return TeacherAnswer(self.teacher, self.problem, self.repeat, "error", "", 0, 0, error=error)


Keep = Callable[[Sequence[TeacherAnswer]], None]


class Teacher(Protocol):
    """
    Attributes:
        name: by which its answers are kept, and its demonstrations known.
    """

    name: str

    def settings(self) -> dict[str, Any]:
        """What its answers depend on, by flag."""


class LocalTeacher(Teacher, Protocol):
    """A model in this process."""

    def answer(self, questions: Sequence[Question], keep: Keep) -> None:
        """Load the model, answer all, and hand over answers as soon as they are there."""


def readable(text: str) -> str:
    """The text without what cannot be written to a file."""
    return LONE_SURROGATE.sub("\ufffd", text)


def repeated(names: Iterable[str]) -> str | None:
    """The first name that is there twice."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]
