"""Whether the reward functions find in the dataset what they read: said before anything is sampled."""

import inspect
from collections.abc import Callable, Sequence

from datasets import Dataset, IterableDataset
from trl.rewards import accuracy_reward, reasoning_accuracy_reward, think_format_reward

from .data.loading import first_rows


# What TRL gives to every reward function, beside the dataset's columns
ALWAYS_GIVEN = {
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments",
}  # fmt: skip
READ_MESSAGES = (accuracy_reward, reasoning_accuracy_reward, think_format_reward)


def check_reward_inputs(
    functions: Sequence[Callable], dataset: Dataset | IterableDataset, option: str, where: str
) -> None:
    """
    Args:
        option, where: what to call the functions and the dataset in messages.

    Raises:
        ValueError: naming a function that needs a column which is not there, or messages where there are texts.
    """
    [first] = first_rows(dataset, 1, where)
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        missing = [column for column in needed_columns(function) if column not in first]
        if missing:
            raise ValueError(
                f"{option} {name} needs the column {missing[0]!r}, and {where} has only {', '.join(first)}. Rename or "
                "add it."
            )
        if function in READ_MESSAGES and isinstance(first.get("prompt"), str):
            raise ValueError(
                f"{option} {name} reads conversations, and the prompts of {where} are plain texts. Make `prompt` and "
                "`completion` lists of messages (luffy-trl prepare-data --conversational does), or take math_reward "
                "or math_reward_optional_thought, which read both."
            )


def needed_columns(function: Callable) -> list[str]:
    """Those that it names in `columns`, and the arguments without a default, which TRL fills from columns."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return list(getattr(function, "columns", ())) + [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind in named and parameter.name not in ALWAYS_GIVEN
    ]
