"""Reward functions whose answers are looked at: a NaN or an infinity would be in the weights a step later."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from trl.trainer.utils import is_async_callable


LARGEST = torch.finfo(torch.float32).max  # TRL makes float32 of rewards: beyond it they are infinite


def checked(function: Callable, name: str) -> Callable:
    """The reward function, with a word on its name to what it raises, and an error for what is no reward.

    Raises:
        ValueError: from the function returned, naming the function, the row and the value, where it does not return a
            finite number or None for each completion, or gives `log_extra` another number of values.
    """
    if is_async_callable(function):

        @functools.wraps(function)
        async def checked_function(**kwargs):
            with _named(name):
                rewards = await function(**_with_checked_log(kwargs, name))
            return _check(rewards, name, len(kwargs["completions"]))

    else:

        @functools.wraps(function)
        def checked_function(**kwargs):
            with _named(name):
                rewards = function(**_with_checked_log(kwargs, name))
            return _check(rewards, name, len(kwargs["completions"]))

    return checked_function


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised by the reward function {name!r}.")
        raise


def _with_checked_log(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    if "log_extra" not in kwargs:
        return kwargs
    log_extra, count = kwargs["log_extra"], len(kwargs["completions"])

    def checked_log_extra(column: str, values: list) -> None:
        if not _is_series(values) or len(values) != count:
            given = f"{len(values)} values" if _is_series(values) else _shown(values)
            raise ValueError(
                f"The reward function {name!r} gave log_extra {given} for column {column!r}, but there are {count} "
                "completions. Give a list with one value for each."
            )
        log_extra(column, list(values))

    return kwargs | {"log_extra": checked_log_extra}


def _check(rewards: Any, name: str, count: int) -> list[float | None]:
    """As many floats or None. TRL takes generators too, and tensors."""
    if not _is_series(rewards) and not isinstance(rewards, Iterator):
        raise ValueError(
            f"The reward function {name!r} returned {_shown(rewards)} for {count} completions. Return a list with a "
            "number for each, or None where it does not apply."
        )
    rewards = list(rewards)
    if len(rewards) != count:
        raise ValueError(
            f"The reward function {name!r} returned {len(rewards)} rewards, but {count} were expected. Return a list "
            "with a number for each completion, or None where it does not apply."
        )
    return [None if reward is None else _finite(reward, name, row) for row, reward in enumerate(rewards)]


def _finite(reward: Any, name: str, row: int) -> float:
    value = math.nan
    if not isinstance(reward, str | bytes):  # float("1") is a number
        try:
            value = float(reward)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
            value = math.nan
    if not abs(value) <= LARGEST:
        raise ValueError(
            f"The reward function {name!r} returned {_shown(reward)} for row {row}. Return a finite number, or None "
            "where it does not apply; float32, which TRL makes of it, ends at 3.4e38."
        )
    return value


def _is_series(values: Any) -> bool:
    if isinstance(values, torch.Tensor) or type(values).__module__ == "numpy":
        return values.ndim > 0
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set | Iterator)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}... ({type(value).__name__})"
