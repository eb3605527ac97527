"""Which answers are right: the trainer's reward functions, called as it calls them, and what it counts as solved."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerState
from trl.trainer.utils import is_async_callable

from ..advantages import deciding_reward, solved_rollouts, total_rewards
from ..demonstrations.encoding import as_completion, without_demonstrations
from ..rewards.checked import checked
from .problems import Problem


# Of what a reward function logs beside its rewards, a column that says what was taken for the answer
ANSWER_SUFFIX = "_answer"


@dataclass(frozen=True)
class Grade:
    """
    Attributes:
        solved: None where the reward that decides did not apply.
        rewards: by function; None where it did not apply.
        found: what the functions say beside, such as `math_answer`.
    """

    solved: bool | None
    rewards: dict[str, float | None]
    found: dict[str, Any]

    @property
    def has_no_answer(self) -> bool:
        answers = [value for name, value in self.found.items() if name.endswith(ANSWER_SUFFIX)]
        return bool(answers) and not any(answers)


@dataclass
class Grader:
    """
    Args:
        functions, names: the reward functions.
        weights: of their sum; None: 1 each.
        solved_reward, solved_threshold: which value makes an answer right, and from what on: `LuffyConfig`'s.
        dataset: whose columns the functions read.

    Raises:
        ValueError: if there is no such solved_reward.
    """

    functions: Sequence[Callable]
    names: Sequence[str]
    weights: Sequence[float] | None
    solved_reward: str | None
    solved_threshold: float
    dataset: Dataset
    deciding: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.deciding = deciding_reward(self.names, self.solved_reward)
        self.checked = [checked(function, name) for function, name in zip(self.functions, self.names, strict=True)]
        self.state = TrainerState()
        self.read = self.dataset.remove_columns("prompt")

    def grade(self, problems: Sequence[Problem], texts: Sequence[str], ids: Sequence[list[int]]) -> list[Grade]:
        """Grades on one text for each problem.

        Args:
            ids: the texts as tokens, for functions that read them.

        Raises:
            ValueError: naming the function that has raised something.
        """
        logged: dict[str, list] = {}
        arguments = self._arguments(problems, texts, ids)
        arguments["log_extra"] = lambda name, values: logged.update({name: values})
        arguments["log_metric"] = lambda name, value: None
        columns = [self._call(*named, arguments) for named in zip(self.checked, self.names, strict=True)]
        values = [[torch.nan if reward is None else reward for reward in column] for column in columns]
        per_func = torch.tensor(values, dtype=torch.float32).T  # (N, F)
        rewards = [dict(zip(self.names, row, strict=True)) for row in zip(*columns, strict=True)]
        found = [{name: values[i] for name, values in logged.items()} for i in range(len(texts))]
        grades = zip(self._solved(per_func), rewards, found, strict=True)
        return [Grade(*grade) for grade in grades]

    def _arguments(self, problems: Sequence[Problem], texts: Sequence[str], ids: Sequence[list[int]]) -> dict:
        rows = without_demonstrations([self.read[problem.row] for problem in problems])
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return columns | {
            "prompts": [problem.prompt for problem in problems],
            "completions": [as_completion(p.prompt, text) for p, text in zip(problems, texts, strict=True)],
            "completion_ids": list(ids),
            "trainer_state": self.state,
        }

    def _call(self, function: Callable, name: str, arguments: dict[str, Any]) -> list[float | None]:
        try:
            rewards = function(**arguments)
            return asyncio.run(rewards) if is_async_callable(function) else rewards
        except Exception as error:  # a function of the user's may raise anything
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"--reward_funcs {name} failed ({type(error).__name__}: {said.rstrip('.')}). All answers are kept: "
                "the same command grades them again."
            ) from error

    def _solved(self, per_func: torch.Tensor) -> list[bool | None]:
        weights = torch.tensor(self.weights or [1.0] * len(self.names))
        judged = total_rewards(per_func, weights) if self.deciding is None else per_func[:, self.deciding]  # (N,)
        no_demonstrations = torch.zeros_like(judged, dtype=torch.bool)
        solved = solved_rollouts(judged, no_demonstrations, 1, self.solved_threshold).flatten()
        applied = ~judged.isnan()
        return [bool(is_right) if known else None for is_right, known in zip(solved, applied, strict=True)]
