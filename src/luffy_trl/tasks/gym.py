"""A task of reasoning-gym by its name, with its own fields as options.

    reasoning_gym:chain_sum,min_terms=3,max_terms=3,max_digits=1,size=1000,test_size=100,seed=0

`size` and `test_size` are problems of the two splits, which share none; each `seed` (below 2**31) has others. Every
other option is a field of the task's configuration in reasoning-gym. Lists are written in brackets:
`operators=["+","-"]`.
"""

import json
import re
from dataclasses import dataclass
from typing import Any


PREFIX = "reasoning_gym:"
SIZES = {"size": 1000, "test_size": 100}
# Not within brackets
COMMA = re.compile(r",(?![^\[]*\])")
TASK_NAME = re.compile(r"[a-z0-9_]+")
# reasoning-gym's problem i of seed s is often problem 0 of seed s + i: its seeds are far apart for ours that are near.
# Odd, so that no two are the same; 0 stays 0; what numpy takes is left for the problems' numbers.
SEED_FACTOR, SEEDS = 2654435761, 2**31


@dataclass(frozen=True)
class GymTask:
    """`source` is what a problem is made of, beside its number: name, options and reasoning-gym's seed."""

    name: str
    options: dict[str, Any]
    size: int
    test_size: int

    @property
    def source(self) -> str:
        options = self.options | {"seed": self.options["seed"] * SEED_FACTOR % SEEDS}
        written = (f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in sorted(options.items()))
        return ",".join([PREFIX + self.name, *written])


def is_gym_task(name: str) -> bool:
    return name.startswith(PREFIX)


def parse_task(text: str) -> GymTask:
    """
    Raises:
        ValueError: for what is not written as above. Whether there is such a task is not looked at.
    """
    name, *written = COMMA.split(text.removeprefix(PREFIX))
    if not TASK_NAME.fullmatch(name):
        raise ValueError(f"{text!r} names no task: write {PREFIX}chain_sum, for example.")
    options: dict[str, Any] = {"seed": 0}
    for option in written:
        key, equals, value = option.partition("=")
        if not equals or not TASK_NAME.fullmatch(key):
            raise ValueError(f"{text!r}: {option!r} is no option, which is written as min_terms=3.")
        options[key] = _value(value)
    sizes = {key: options.pop(key, default) for key, default in SIZES.items()}
    for key, value in (sizes | {"seed": options["seed"]}).items():
        if type(value) is not int or value < (1 if key == "size" else 0):
            raise ValueError(f"{text!r}: {key}={value} must be a whole number of {int(key == 'size')} or more.")
    return GymTask(name, options, **sizes)


def _value(written: str) -> Any:
    try:
        return json.loads(written.lower() if written in ("True", "False") else written)
    except ValueError:
        return written
