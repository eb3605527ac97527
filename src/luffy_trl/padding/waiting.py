"""Numbers of a log that nothing waits for until it is written.

TRL's loss reads each of its metrics off the device as it goes (`.item()`), which stops the host until the device has
done all it was given, several times a micro-batch. In here those numbers stay tensors, and are read all at once.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from trl.trainer import grpo_trainer


class Later(TorchFunctionMode):
    """In here `.item()` gives the tensor itself, without its graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.item:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


@contextmanager
def read_later() -> Iterator[None]:
    """In here TRL's metrics are tensors of one element."""
    waiting = grpo_trainer.nanmin, grpo_trainer.nanmax
    grpo_trainer.nanmin, grpo_trainer.nanmax = nan_min, nan_max
    try:
        with Later():
            yield
    finally:
        grpo_trainer.nanmin, grpo_trainer.nanmax = waiting


def read(metrics: Mapping[str, list[Any]]) -> None:
    """Make numbers of all tensors in the lists, with one wait."""
    places = [
        (values, i) for values in metrics.values() for i, value in enumerate(values) if isinstance(value, torch.Tensor)
    ]
    if places:
        numbers = torch.stack([values[i].float() for values, i in places]).tolist()
        for (values, i), number in zip(places, numbers, strict=True):
            values[i] = number


def nan_min(values: torch.Tensor) -> torch.Tensor:
    """TRL's `nanmin`, which waits to know whether all are NaN: the least of the others, or NaN."""
    return -nan_max(-values)


def nan_max(values: torch.Tensor) -> torch.Tensor:
    """TRL's `nanmax`: the greatest of what is not NaN, or NaN."""
    is_nan = values.isnan()
    greatest = values.masked_fill(is_nan, -torch.inf).max()
    return greatest.masked_fill(is_nan.all(), torch.nan)
