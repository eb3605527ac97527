"""From a problem's answers to its demonstrations: each answer is kept, or rejected for one reason."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ..demonstrations.agreement import CLOSING, OPENING
from ..evaluation.grading import Grade
from .answers import TeacherAnswer


class Rejection(StrEnum):
    """Why an answer is no demonstration, in the order in which it is looked for."""

    FAILED = "question refused"
    UNFINISHED = "unfinished"
    FILTERED = "filtered by the teacher"
    EMPTY = "empty"
    TEMPLATE = "not as the student writes"
    DUPLICATE = "duplicate"
    UNGRADED = "not graded"
    NO_ANSWER = "no answer found"
    WRONG = "wrong"
    SURPLUS = "right, not selected"


# What servers say of an answer that came to its end
FINISHED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")

ALL, SHORTEST, PROBABLE = "all", "shortest", "probable"
SELECTIONS = (ALL, SHORTEST, PROBABLE)


@dataclass
class Draft:
    """
    Attributes:
        text: as the policy should write it.
        ids: the student's tokens, where there is a student.
        rejected, detail: why it is no demonstration; None where it is one.
        score: mean log-prob of its tokens under the student, where that is asked for.
    """

    answer: TeacherAnswer
    text: str = ""
    ids: list[int] = field(default_factory=list)
    grade: Grade | None = None
    rejected: Rejection | None = None
    detail: str | None = None
    score: float | None = None
    logps: list[float] | None = None

    def reject(self, reason: Rejection, detail: str | None = None) -> None:
        self.rejected, self.detail = reason, detail


def draft(answer: TeacherAnswer) -> Draft:
    """An answer as a demonstration would be written, or already rejected."""
    made = Draft(answer, written(answer))
    if answer.finish == "error":
        made.reject(Rejection.FAILED, answer.error)
    elif answer.finish == "length":
        made.reject(Rejection.UNFINISHED, f"{answer.completion_tokens} tokens")
    elif answer.finish not in FINISHED:
        made.reject(Rejection.FILTERED, answer.finish)
    elif not answer.text.strip():
        made.reject(Rejection.EMPTY, "a thought without an answer" if answer.thought else None)
    return made


def written(answer: TeacherAnswer) -> str:
    """The answer as the policy should write it, its thought in front.

    A server may give the thought apart, or leave out its opening, which the teacher's own template has written.
    """
    if answer.thought:
        return f"{OPENING}\n{answer.thought.strip()}\n{CLOSING}\n\n{answer.text.lstrip()}"
    if CLOSING in answer.text and OPENING not in answer.text:
        return f"{OPENING}\n{answer.text.lstrip()}"
    return answer.text


def reject_duplicates(drafts: Sequence[Draft]) -> None:
    """Of one problem's graded answers: the same text again, whoever wrote it, right or wrong."""
    first: dict[str, Draft] = {}
    for one in drafts:
        if one.grade is not None:
            before = first.setdefault(one.text.strip(), one)
            if before is not one:
                one.reject(Rejection.DUPLICATE, f"of answer {before.answer.repeat} by {before.answer.teacher}")


def settle(one: Draft, grade: Grade) -> None:
    """Take over what the rewards say."""
    one.grade = grade
    if grade.solved is None:
        one.reject(Rejection.UNGRADED, "no reward applied; the gold answer may be unreadable")
    elif not grade.solved:
        one.reject(Rejection.NO_ANSWER if grade.answer == "" else Rejection.WRONG)


def select(
    drafts: Sequence[Draft],
    how: str,
    maximum: int | None,
    score: Callable[[Draft], float] | None = None,
) -> list[Draft]:
    """Of one problem's right answers those that are kept, best first; the others are rejected.

    Args:
        how: of `SELECTIONS`.
        maximum: None: all.
        score: for "probable", the mean log-prob under the student.
    """
    right = [one for one in drafts if one.rejected is None]
    if how == SHORTEST:
        right.sort(key=length)
    if how == PROBABLE and score is not None:
        for one in right:
            one.score = score(one)
        right.sort(key=lambda one: -(one.score or 0.0))
    for one in right[maximum:] if maximum is not None else []:
        one.reject(Rejection.SURPLUS)
    return right[:maximum]


def length(one: Draft) -> int:
    """In the student's tokens, or else in characters: teachers count in tokens of their own."""
    return len(one.ids) or len(one.text)


def rejected_row(row: int, one: Draft, prompt: Any) -> dict[str, Any]:
    """A line of the file of rejected answers."""
    answer, grade = one.answer, one.grade
    return {
        "row": row,
        "teacher": answer.teacher,
        "repeat": answer.repeat,
        "reason": one.rejected,
        "detail": one.detail,
        "rewards": grade and grade.rewards,
        "answer": grade and grade.answer,
        "prompt": prompt,
        "text": one.text,
    }
