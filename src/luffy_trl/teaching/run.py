"""One run, from checked arguments: ask, grade, select, write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..data.publishing import look_up
from ..evaluation.grading import Grader
from ..reporting.tables_and_curves import text_table
from .answers import AnswerStore, TeacherAnswer
from .asking import Asking
from .card import dataset_card, logps_sentence
from .finishing import Account, Selector, row_of
from .judging import Judge
from .output import made_features, write, write_rejected
from .problems import Found, Problem
from .selection import Rejection
from .servers import Server
from .student import Student
from .teachers import LocalTeacher


@dataclass
class Making:
    """
    Args:
        source: the dataset's name, as it was given.
        dataset: its rows in the data contract, `problems` what is asked, `found` the demonstrations that it brings.
        test: rows that nobody is asked, None without a test split; `split` says how they were chosen.
        servers, models: the teachers.
        shared: settings beside the teachers' own on which answers depend.
        how, maximum: see `select`; a maximum of 1 makes the column `completion`.
        logprobs: whether the teachers' log-probs come along.
        right_if: how the card says what is right.
        argv: the command's arguments, for the card, with `secrets` masked.
    """

    output_dir: Path
    source: str
    dataset: Dataset
    test: Dataset | None
    split: str
    problems: Sequence[Problem]
    found: Sequence[Found]
    servers: Sequence[Server]
    models: Sequence[LocalTeacher]
    shared: Mapping[str, Any]
    num_samples: int
    grader: Grader
    student: Student | None
    how: str
    maximum: int | None
    logprobs: bool
    right_if: str
    load: str
    argv: Sequence[str]
    secrets: set[str]

    def __post_init__(self) -> None:
        teachers = [*self.servers, *self.models]
        self.settings = {teacher.name: {**teacher.settings(), **self.shared} for teacher in teachers}
        self.store = AnswerStore(self.output_dir, self.settings)
        self.judge = Judge(self.grader, self.student, self.problems, self.dataset)
        self.asking = Asking(self.store, self.servers, self.models, self.problems, self.num_samples, self.judge)

    def run(self) -> Account:
        """
        Raises:
            ValueError: for teachers, rewards or a student that do not do what they should.
            ServerGoneError: for a server that has stopped answering.
        """
        if self.store.half_written:
            print(f"{self.store.half_written} half-written answers of a killed run are asked for again.", flush=True)
        print(self.asking.kept(), flush=True)
        self.asking.ask()
        answers = self._answers()
        self._judge([answer for of_problem in answers.values() for answer in of_problem])
        order = [*dict.fromkeys(found.teacher for found in self.found), *self.settings]
        selector = Selector(self.store, self.judge, self.how, self.maximum, self.student, self.logprobs, order)
        self._write(selector, answers)
        return selector.account

    def _answers(self) -> dict[str, list[TeacherAnswer]]:
        """By problem: those that the dataset brings, then those of this run's teachers and samples."""
        answers: dict[str, list[TeacherAnswer]] = {}
        for i, found in enumerate(self.found):  # numbers below 0: the first, and no sample's
            number = i - len(self.found)
            answers.setdefault(found.key, []).append(
                TeacherAnswer(found.teacher, found.key, number, "stop", found.text, 0, 0)
            )
        wanted = {problem.key for problem in self.problems}
        for answer in self.store.answers.values():
            if answer.problem in wanted and answer.teacher in self.settings and answer.repeat < self.num_samples:
                answers.setdefault(answer.problem, []).append(answer)
        return answers

    def _judge(self, answers: Sequence[TeacherAnswer]) -> None:
        with tqdm(total=len(answers), desc="Grading", unit="", leave=False) as bar:
            self.judge.judge(answers, lambda count: bar.update(count) and None)

    def _write(self, selector: Selector, answers: dict[str, list[TeacherAnswer]]) -> None:
        several, rows = self.maximum != 1, []
        rejected_file = self.output_dir / ".rejected.unfinished"
        with (
            open(rejected_file, "w", encoding="utf-8") as file,
            tqdm(total=len(self.problems), desc="Selecting", unit="", leave=False) as bar,
        ):
            finished = zip(self.problems, selector.finish(self.problems, answers), strict=True)
            for problem, (kept, rejected) in finished:
                write_rejected(file, rejected)
                rows.append(row_of(problem, kept, several, self.logprobs))
                bar.update()
        if not selector.account.with_logps:
            rows = [{name: value for name, value in row.items() if name != "completion_logps"} for row in rows]
        card = self._card(list(made_features(self.dataset, rows)), selector.account)
        write(self.output_dir, self.dataset, rows, self.test, rejected_file, card)

    def _card(self, columns: Sequence[str], account: Account) -> str:
        name, source = self.output_dir.resolve().name, look_up(self.source)
        settings = (self.settings, self.right_if, self.split, self.argv, self.secrets)
        return dataset_card(name, self.load, source, columns, account, *settings)


def summary(account: Account, missed: int) -> str:
    """What is printed at the end."""
    header = ["", "answers", "right", "kept", "tokens in", "tokens out"]
    lines = [text_table(["", "answers"], account.table()), "", text_table(header, account.by_teacher()), ""]
    lines.append(f"{account.solved:,} of {account.problems:,} problems have a demonstration.")
    lines += filter(None, [logps_sentence(account)])
    if Rejection.TEMPLATE in account.first:
        first = account.first[Rejection.TEMPLATE]
        lines.append(f"Answers that the student could not write, the first of them in {first}")
    if missed:
        lines.append(
            f"{missed:,} questions had no answer, for the server's reasons; the same command asks them again."
        )
    return "\n".join(lines)
