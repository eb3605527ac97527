"""Asking: what is missing, of each teacher, with a bar that shows what it costs and what comes of it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from .answers import AnswerStore, TeacherAnswer
from .judging import InBackground, Judge
from .problems import Problem
from .servers import Server, ask_servers
from .teachers import LocalTeacher, Question, Teacher


@dataclass
class Asking:
    """
    Args:
        servers, models: the teachers. Servers are asked at the same time, models in this process one after another.
        num_samples: answers to a problem by each teacher.
        judge: grades while answers come.
    """

    store: AnswerStore
    servers: Sequence[Server]
    models: Sequence[LocalTeacher]
    problems: Sequence[Problem]
    num_samples: int
    judge: Judge
    tokens: list[int] = field(default_factory=lambda: [0, 0])  # spent by this run, of prompts and of answers

    @property
    def teachers(self) -> list[Teacher]:
        return [*self.servers, *self.models]

    def questions(self, teacher: Teacher) -> list[Question]:
        """All of one teacher's, each once, however many rows ask it."""
        prompts = {problem.key: problem.asked for problem in self.problems}
        repeats = range(self.num_samples)
        return [Question(teacher.name, key, repeat, prompt) for key, prompt in prompts.items() for repeat in repeats]

    def missing(self, teacher: Teacher) -> list[Question]:
        kept = self.store.answers
        return [q for q in self.questions(teacher) if (q.teacher, q.problem, q.repeat) not in kept]

    def kept(self) -> str:
        wanted = sum(len(self.questions(teacher)) for teacher in self.teachers)
        missing = sum(len(self.missing(teacher)) for teacher in self.teachers)
        return f"{wanted - missing:,} of {wanted:,} answers are kept in {self.store.directory}."

    def ask(self) -> None:
        """Ask for what is missing; every answer is on the disk once it is there.

        Raises:
            ValueError: for a teacher that cannot answer, and of the rewards.
            ServerGoneError: for a server that has stopped answering.
        """
        missing = {teacher.name: self.missing(teacher) for teacher in self.teachers}
        count = sum(map(len, missing.values()))
        if count == 0:
            return
        with InBackground(self.judge) as judge, tqdm(total=count, desc="Answers", unit="") as bar:

            def keep(answers: Sequence[TeacherAnswer]) -> None:
                for teacher in dict.fromkeys(answer.teacher for answer in answers):
                    self.store.append(answer for answer in answers if answer.teacher == teacher)
                judge.take([self.store.answers[answer.key] for answer in answers])
                self._show(bar, answers)

            asyncio.run(ask_servers([(server, missing[server.name]) for server in self.servers], keep))
            for model in self.models:
                if missing[model.name]:
                    model.answer(missing[model.name], keep)

    def _show(self, bar: tqdm, answers: Sequence[TeacherAnswer]) -> None:
        self.tokens[0] += sum(answer.prompt_tokens for answer in answers)
        self.tokens[1] += sum(answer.completion_tokens for answer in answers)
        tokens = f"tokens {self.tokens[0]:,} in {self.tokens[1]:,} out"
        bar.set_postfix_str(f"{tokens}, right {self.judge.right:,} of {self.judge.graded:,}", refresh=False)
        bar.update(len(answers))
