"""reasoning-gym's own scorers as a reward function, in worker processes with hard limits."""

import re
from collections.abc import Sequence
from typing import Any

from ..rewards.answers import last_boxes
from ..rewards.completions import LONGEST_ANSWER, answer_part, completion_text
from .gym_splits import ask


IN_TEXT = re.compile(r"\\text\s?\{([^{}]*)\}")


class ReasoningGymReward:
    """
    The score, 0 to 1, that the task's own scorer gives to what stands in the last box, or between `<answer>` tags.

    A completion without either gets 0, as does an answer that no scorer can read, or that is too much for it. Of a
    completion with a thought, what follows `</think>` counts.

    Args:
        partial: False: 0 for whatever is not wholly right. Many scorers give a part for an answer in which the right
            one occurs ("14" for "4"), which a policy can learn to collect.
    """

    columns = ("task", "task_index")  # of the dataset, without which it is an error to call it

    def __init__(self, partial: bool = True):
        self.partial = partial
        self.__name__ = "reasoning_gym_reward" if partial else "reasoning_gym_solved_reward"

    def __call__(
        self,
        completions: list,
        task: Sequence[str] | None = None,
        task_index: Sequence[int] | None = None,
        log_extra: Any = None,
        **kwargs: Any,
    ) -> list[float]:
        """
        Args:
            task, task_index: the columns that a dataset named `reasoning_gym:...` has.

        Raises:
            ValueError: without these columns, or if they name no problem.
        """
        if task is None or task_index is None:
            raise ValueError(
                f"{self.__name__} needs the columns `task` and `task_index`: of datasets named reasoning_gym:TASK."
            )
        for row, (source, index) in enumerate(zip(task, task_index, strict=True)):
            if not isinstance(source, str) or type(index) is not int or index < 0:
                raise ValueError(
                    f"Row {row}: task={source!r} with task_index={index!r} is no problem of reasoning-gym: a dataset "
                    "named reasoning_gym:TASK has its name in the one and a whole number of 0 or more in the other."
                )
        answers = [final_answer(completion_text(completion)) for completion in completions]
        given = [i for i, answer in enumerate(answers) if answer is not None]
        replies = ask([{"source": task[i], "index": task_index[i], "answer": answers[i]} for i in given])
        for i, reply in zip(given, replies, strict=True):
            if "failed" in reply:
                raise ValueError(
                    f"Row {i}: reasoning-gym makes no problem of task={task[i]!r} with task_index={task_index[i]!r} "
                    f"({reply['failed']}): both must be those of the dataset that it made."
                )
        verdicts = dict(zip(given, replies, strict=True))
        if log_extra is not None:
            outcomes = [verdicts[i]["outcome"] if i in verdicts else "no answer" for i in range(len(answers))]
            log_extra("reasoning_gym_outcome", outcomes)
        scores = [float(verdicts[i].get("score", 0.0)) if i in verdicts else 0.0 for i in range(len(answers))]
        return scores if self.partial else [float(score >= 1.0) for score in scores]


def final_answer(text: str) -> str | None:
    """What stands in the last box, None if there is none."""
    boxes = last_boxes((answer_part(text, mode="optional") or "")[-LONGEST_ANSWER:])
    if not boxes:
        return None
    inner = IN_TEXT.fullmatch(boxes[-1].strip())
    return inner[1] if inner else boxes[-1].strip()


reasoning_gym_reward = ReasoningGymReward()
reasoning_gym_solved_reward = ReasoningGymReward(partial=False)
