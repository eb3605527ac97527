"""Responses graded by reward functions as the trainer calls them, and each error told with its row."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerState
from trl.trainer.utils import is_async_callable

from ..rewards.checked import checked
from . import EvaluationError


Rewards = dict[str, float | None]  # by the function's name; None where it does not apply
# Of a batch of one, what a message says of the place in it
PLACE_IN_BATCH = re.compile(r",? (?:for|in) row 0(?: of the batch)?")


@dataclass(frozen=True)
class Answer:
    """A response as reward functions are given it, and the dataset's row that it answers."""

    number: int  # of the row
    row: Mapping[str, Any]  # the columns that reward functions are given
    prompt: str | list[dict[str, Any]]
    completion: str | list[dict[str, Any]]
    token_ids: list[int]


@dataclass(frozen=True)
class Grade:
    """`solved`: None where the reward that decides does not apply. `answer`: what it took for it, None if not said."""

    rewards: Rewards
    solved: bool | None
    answer: str | None


class Grader:
    """
    Args:
        functions: by name.
        deciding: the one whose value says whether a response is solved; None: their total does.
        solved: whether responses with these rewards are.
        where: what to call the dataset in messages.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable],
        deciding: str | None,
        solved: Callable[[Sequence[Rewards]], list[bool | None]],
        where: str,
    ):
        self.functions = {name: checked(function, name) for name, function in functions.items()}
        self.deciding, self.solved, self.where = deciding, solved, where

    def grade(self, responses: Sequence[Answer]) -> list[Grade]:
        """
        Raises:
            EvaluationError: naming the row and the function that raised or returned what is no reward.
        """
        columns: dict[str, list[float | None]] = {}
        answers: list[str | None] = [None] * len(responses)
        for name in self.functions:
            columns[name], logged = self._call(name, responses)
            if name == self.deciding and logged is not None:
                answers = [str(answer or "") for answer in logged]
        rewards = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [Grade(*grade) for grade in zip(rewards, self.solved(rewards), answers, strict=True)]

    def _call(self, name: str, responses: Sequence[Answer]) -> tuple[list[float | None], list | None]:
        """The function's rewards, and the column with the answers that it found, where it logs one."""
        try:
            return self._called(name, responses)
        except Exception as error:  # a user's function may raise anything
            for response in responses:
                try:
                    self._called(name, [response])
                except Exception as own:
                    raise EvaluationError(self._failure(name, f", row {response.number}", own)) from own
            raise EvaluationError(self._failure(name, "", error)) from error

    def _called(self, name: str, responses: Sequence[Answer]) -> tuple[list[float | None], list | None]:
        extra: dict[str, list] = {}
        function = self.functions[name]
        rewards = function(
            prompts=[response.prompt for response in responses],
            completions=[response.completion for response in responses],
            completion_ids=[response.token_ids for response in responses],
            trainer_state=TrainerState(),
            log_extra=extra.__setitem__,
            log_metric=lambda metric, value: None,  # of a step: there is none
            **{column: [response.row[column] for response in responses] for column in responses[0].row},
        )
        rewards = asyncio.run(rewards) if is_async_callable(function) else rewards
        return rewards, next((values for column, values in extra.items() if column.endswith("answer")), None)

    def _failure(self, name: str, row: str, error: Exception) -> str:
        says = PLACE_IN_BATCH.sub("", " ".join(str(error).split()))
        return (
            f"{self.where}{row}: --reward_funcs {name}: {type(error).__name__}: {says} All samples are kept: the same "
            "command grades them once this is put right."
        )
