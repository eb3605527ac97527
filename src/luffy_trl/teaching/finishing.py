"""From judged answers to the rows of the dataset: duplicates go, demonstrations are selected, all is counted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .answers import Answer
from .grading import as_completion
from .judging import Judge
from .problems import Problem
from .selection import PROBABLE, REJECTIONS, SURPLUS, Candidate, reject_duplicates, rejected_row, select
from .student import Student


@dataclass
class Tally:
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

    def add(self, row: int, candidates: Sequence[Candidate], kept: Sequence[Candidate]) -> None:
        self.problems += 1
        self.solved += bool(kept)
        for one in candidates:
            teacher, reason = one.answer.teacher, one.rejected
            self.answers[teacher] += 1
            self.kept[teacher] += reason is None
            self.right[teacher] += reason in (None, SURPLUS)
            self.prompt_tokens[teacher] += one.answer.prompt_tokens
            self.completion_tokens[teacher] += one.answer.completion_tokens
            if reason is not None:
                self.rejected[reason] += 1
                if one.detail:
                    self.first.setdefault(reason, f"row {row}, by {teacher}: {one.detail}")

    def table(self) -> list[list[str]]:
        """Rows of a table: what, how many answers."""
        lines = [["answers", f"{sum(self.answers.values()):,}"]]
        lines += [[reason, f"{self.rejected[reason]:,}"] for reason in REJECTIONS if self.rejected[reason]]
        return [*lines, ["kept as demonstrations", f"{sum(self.kept.values()):,}"]]

    def by_teacher(self) -> list[list[str]]:
        """Rows of a table: teacher, answers, right, kept, tokens of prompts and of answers."""
        counters = (self.answers, self.right, self.kept, self.prompt_tokens, self.completion_tokens)
        return [[teacher, *(f"{counter[teacher]:,}" for counter in counters)] for teacher in self.answers]


@dataclass
class Finisher:
    """
    Args:
        how, maximum: which right answers of a problem are kept: see `select`.
        student: None: no log-probs.
        logprobs: whether the teachers' log-probs come along, with the one demonstration of a problem.
        order: the teachers' names: at equal rank the first comes first.
    """

    judge: Judge
    how: str
    maximum: int | None
    student: Student | None
    logprobs: bool
    order: Sequence[str]
    tally: Tally = field(default_factory=Tally)

    def finish(
        self, problems: Sequence[Problem], answers: dict[str, list[Answer]]
    ) -> Iterator[tuple[list[Candidate], list[dict[str, Any]]]]:
        """Of each problem its demonstrations, best first, and lines on what was rejected.

        Args:
            answers: by problem, judged.
        """
        for problem in problems:
            own = sorted(answers.get(problem.key, []), key=self._rank)
            candidates = [self.judge.candidates[problem.row, answer.key] for answer in own]
            reject_duplicates(candidates)
            kept = select(candidates, self.how, self.maximum, partial(self._score, problem))
            if self.logprobs:
                for one in kept:
                    self._take_logps(one)
            self.tally.add(problem.row, candidates, kept)
            rejected = [one for one in candidates if one.rejected is not None]
            yield kept, [rejected_row(problem.row, one, problem.prompt) for one in rejected]

    def _rank(self, answer: Answer) -> tuple[int, int]:
        """Teachers side by side: the first answer of each, then the second of each."""
        return answer.repeat, self.order.index(answer.teacher) if answer.teacher in self.order else -1

    def _score(self, problem: Problem, one: Candidate) -> float:
        """Mean log-prob of its tokens under the student."""
        assert self.student is not None
        assert self.how == PROBABLE
        logps = self.student.logps(problem.prompt, one.ids)
        return sum(logps) / len(logps)

    def _take_logps(self, one: Candidate) -> None:
        assert self.student is not None
        one.logps, why = self.student.teachers_logps(one.answer, one.ids)
        if one.logps is None:
            self.tally.without_logps[why] += 1
        else:
            self.tally.with_logps += 1


def row_of(problem: Problem, kept: Sequence[Candidate], several: bool, logprobs: bool) -> dict[str, Any]:
    """The made columns of one row of the data contract."""
    completions = [as_completion(problem.prompt, one.text) for one in kept]
    teachers = [one.answer.teacher for one in kept]
    if several:
        return {"demonstrations": completions, "teacher": teachers}
    row = {"completion": next(iter(completions), None), "teacher": next(iter(teachers), None)}
    return row | ({"completion_logps": kept[0].logps if kept else None} if logprobs else {})
