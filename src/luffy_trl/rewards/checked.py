"""Reward functions whose answers are looked at: a NaN or an infinity would be in the weights a step later."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from trl.trainer.utils import is_async_callable


def checked(function: Callable, name: str) -> Callable:
    """The reward function, with a word on its name to what it raises, and an error for what is no reward.

    Raises:
        ValueError: from the function returned, naming the row and the value, where a reward is neither a finite number
            nor None. Their number is checked by TRL.
    """
    if is_async_callable(function):

        @functools.wraps(function)
        async def checked_function(**kwargs):
            with _named(name):
                rewards = await function(**kwargs)
            return _check(rewards, name)

    else:

        @functools.wraps(function)
        def checked_function(**kwargs):
            with _named(name):
                rewards = function(**kwargs)
            return _check(rewards, name)

    return checked_function


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised by the reward function {name!r}.")
        raise


def _check(rewards: Iterable[Any], name: str) -> list[Any]:
    rewards = list(rewards)  # TRL takes generators too
    for row, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(
                f"The reward function {name!r} returned {reward} for row {row}. Return a finite number, or None where "
                "it does not apply."
            )
    return rewards
