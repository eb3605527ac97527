"""From judged answers to the rows of the dataset: duplicates go, demonstrations are selected, all is counted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..demonstrations.encoding import as_completion
from .answers import AnswerStore, TeacherAnswer
from .judging import Judge
from .problems import Problem
from .selection import PROBABLE, Draft, Rejection, reject_duplicates, rejected_row, select
from .student import Student


@dataclass
class Account:
    """What became of the answers."""

    problems: int = 0
    solved: int = 0  # problems with a demonstration
    answers: Counter = field(default_factory=Counter)  # by teacher
    kept: Counter = field(default_factory=Counter)  # demonstrations, by teacher
    right: Counter = field(default_factory=Counter)  # by teacher, also those that were not selected
    rejected: Counter = field(default_factory=Counter)  # by reason
    prompt_tokens: Counter = field(default_factory=Counter)  # by teacher
    completion_tokens: Counter = field(default_factory=Counter)
    with_logps: int = 0
    without_logps: Counter = field(default_factory=Counter)  # by why
    first: dict[str, str] = field(default_factory=dict)  # reason -> the first answer rejected for it

    def add(self, row: int, drafts: Sequence[Draft], kept: Sequence[Draft]) -> None:
        self.problems += 1
        self.solved += bool(kept)
        for one in drafts:
            teacher, reason = one.answer.teacher, one.rejected
            self.answers[teacher] += 1
            self.kept[teacher] += reason is None
            self.right[teacher] += reason in (None, Rejection.SURPLUS)
            self.prompt_tokens[teacher] += one.answer.prompt_tokens
            self.completion_tokens[teacher] += one.answer.completion_tokens
            if reason is not None:
                self.rejected[reason] += 1
                if one.detail:
                    self.first.setdefault(reason, f"row {row}, by {teacher}: {one.detail}")

    def table(self) -> list[list[str]]:
        """Rows of a table: what, how many answers."""
        lines = [["answers", f"{sum(self.answers.values()):,}"]]
        lines += [[reason, f"{self.rejected[reason]:,}"] for reason in Rejection if self.rejected[reason]]
        return [*lines, ["kept as demonstrations", f"{sum(self.kept.values()):,}"]]

    def by_teacher(self) -> list[list[str]]:
        """Rows of a table: teacher, answers, right, kept, tokens of prompts and of answers."""
        counters = (self.answers, self.right, self.kept, self.prompt_tokens, self.completion_tokens)
        return [[teacher, *(f"{counter[teacher]:,}" for counter in counters)] for teacher in self.answers]


@dataclass
class Selector:
    """
    Args:
        store: where the answers' tokens are.
        how, maximum: which right answers of a problem are kept: see `select`.
        student: None: no log-probs.
        logprobs: whether the teachers' log-probs come along, with the one demonstration of a problem.
        order: the teachers' names: at equal rank the first comes first.
    """

    store: AnswerStore
    judge: Judge
    how: str
    maximum: int | None
    student: Student | None
    logprobs: bool
    order: Sequence[str]
    account: Account = field(default_factory=Account)

    def finish(
        self, problems: Sequence[Problem], answers: dict[str, list[TeacherAnswer]]
    ) -> Iterator[tuple[list[Draft], list[dict[str, Any]]]]:
        """Of each problem its demonstrations, best first, and lines on what was rejected.

        Args:
            answers: by problem, judged.
        """
        for problem in problems:
            own = sorted(answers.get(problem.key, []), key=self._rank)
            drafts = [self.judge.drafts[problem.row, answer.key] for answer in own]
            reject_duplicates(drafts)
            kept = select(drafts, self.how, self.maximum, partial(self._score, problem))
            if self.logprobs:
                for one in kept:
                    self._take_logps(one)
            self.account.add(problem.row, drafts, kept)
            rejected = [one for one in drafts if one.rejected is not None]
            yield kept, [rejected_row(problem.row, one, problem.prompt) for one in rejected]

    def _rank(self, answer: TeacherAnswer) -> tuple[int, int]:
        """Teachers side by side: the first answer of each, then the second of each."""
        return answer.repeat, self.order.index(answer.teacher)

    def _score(self, problem: Problem, one: Draft) -> float:
        """Mean log-prob of its tokens under the student."""
        assert self.student is not None
        assert self.how == PROBABLE
        logps = self.student.logps(problem.prompt, one.ids)
        return sum(logps) / len(logps)

    def _take_logps(self, one: Draft) -> None:
        assert self.student is not None
        key = one.answer.key
        answer = self.store.whole(key) if key in self.store.answers else one.answer  # or the dataset's
        one.logps, why = self.student.teachers_logps(answer, one.ids)
        if one.logps is None:
            self.account.without_logps[why] += 1
        else:
            self.account.with_logps += 1


def row_of(problem: Problem, kept: Sequence[Draft], several: bool, logprobs: bool) -> dict[str, Any]:
    """The made columns of one row of the data contract."""
    completions = [as_completion(problem.prompt, one.text) for one in kept]
    teachers = [one.answer.teacher for one in kept]
    if several:
        return {"demonstrations": completions, "teacher": teachers}
    row = {"completion": next(iter(completions), None), "teacher": next(iter(teachers), None)}
    return row | ({"completion_logps": kept[0].logps if kept else None} if logprobs else {})
