"""Answers become drafts: written as the student would, and graded; in the background, while others still come."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from datasets import Dataset
from tqdm.auto import tqdm

from ..demonstrations.encoding import as_completion, without_demonstrations
from ..evaluation.grading import Answer, Grader
from .answers import Key, TeacherAnswer
from .problems import Problem
from .selection import Draft, Rejection, draft, settle
from .student import Student


# Drafts graded in one call of the reward functions
JUDGED_AT_ONCE = 64

Place: TypeAlias = tuple[int, Key]


class Judge:
    """
    Args:
        grader: the rewards.
        student: whose template and tokens demonstrations have to fit; None: they are not looked at.
        dataset: the problems' rows, whose columns the rewards read.
    """

    def __init__(self, grader: Grader, student: Student | None, problems: Sequence[Problem], dataset: Dataset):
        self.grader, self.student = grader, student
        self.drafts: dict[Place, Draft] = {}  # by row and answer
        self.right = self.graded = 0
        self._columns = dataset.remove_columns("prompt")
        self._rows: dict[str, list[Problem]] = {}
        for problem in problems:
            self._rows.setdefault(problem.key, []).append(problem)

    def judge(self, answers: Iterable[TeacherAnswer], tell: Callable[[int], None] = lambda count: None) -> None:
        """Make drafts of answers, one for each row that asks their question.

        Args:
            tell: is called with the number of drafts that have just been judged.
        """
        places = [(problem, answer) for answer in answers for problem in self._rows.get(answer.problem, [])]
        new = [place for place in places if (place[0].row, place[1].key) not in self.drafts]
        for start in range(0, len(new), JUDGED_AT_ONCE):
            chunk = new[start : start + JUDGED_AT_ONCE]
            self._judge_together(chunk)
            tell(len(chunk))

    def _judge_together(self, places: Sequence[tuple[Problem, TeacherAnswer]]) -> None:
        made = [(problem, self._made(problem, answer)) for problem, answer in places]
        graded = [(problem, one) for problem, one in made if one.rejected is None]
        if graded:
            grades = self.grader.grade([self._as_sample(*one) for one in graded])
            for (_, one), grade in zip(graded, grades, strict=True):
                settle(one, grade)
        self.graded += len(made)
        self.right += sum(one.rejected is None for _, one in made)
        self.drafts |= {(problem.row, one.answer.key): one for problem, one in made}

    def _as_sample(self, problem: Problem, one: Draft) -> Answer:
        """As the trainer hands a completion and its row to the rewards."""
        [row] = without_demonstrations([self._columns[problem.row]])
        return Answer(problem.row, row, problem.prompt, as_completion(problem.prompt, one.text), one.ids)

    def _made(self, problem: Problem, answer: TeacherAnswer) -> Draft:
        made = draft(answer)
        if made.rejected is None and self.student is not None:
            try:
                made.ids = self.student.token_ids(problem.prompt, made.text)
            except ValueError as error:
                made.reject(Rejection.TEMPLATE, str(error))
        return made


class InBackground:
    """A judge in a thread of its own, for answers while they arrive.

    Where a reward function fails, that is said at once, and raised at the end: the answers that still come are paid
    for, and can be graded later.
    """

    def __init__(self, judge: Judge):
        self.judge = judge
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._failed: ValueError | None = None

    def __enter__(self) -> "InBackground":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._thread.shutdown(wait=kind is None, cancel_futures=kind is not None)
        if kind is None and self._failed is not None:
            raise self._failed

    def take(self, answers: Sequence[TeacherAnswer]) -> None:
        self._thread.submit(self._judge, list(answers))

    def _judge(self, answers: list[TeacherAnswer]) -> None:
        if self._failed is not None:
            return
        try:
            self.judge.judge(answers)
        except ValueError as error:
            self._failed = error
            tqdm.write(f"{error} The answers that still come are kept too.")
