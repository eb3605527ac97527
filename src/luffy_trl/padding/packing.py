"""Sequences without padding in one row, and their values back in their places."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad


def pack(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens where `mask` is True, as one row, and their positions, which restart at each sequence: both (1, N).

    Args:
        input_ids: (B, S).
        mask: (B, S), True on tokens, each row's in one run.
    """
    mask = mask.bool()
    positions = mask.long().cumsum(1) - 1  # (B, S)
    return input_ids[mask].unsqueeze(0), positions[mask].unsqueeze(0)


def boundaries(mask: torch.Tensor) -> dict[str, Any]:
    """Where the sequences of a packed row begin and end, under the names that transformers' layers read.

    Flash attention and linear attention go by `cu_seq_lens_*` (sequences + 1,) int32 and `max_length_*`, convolutions
    and state spaces by `seq_idx` (1, N) int32. transformers' `DataCollatorWithFlattening` makes the same of lists.

    Args:
        mask: (B, S), as for `pack`. Rows without a token are no sequence.
    """
    lengths = mask.bool().sum(1)  # (B,)
    lengths = lengths[lengths > 0]
    ends = pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max()) if len(lengths) > 0 else 0
    sequences = torch.arange(len(lengths), device=mask.device, dtype=torch.int32)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": sequences.repeat_interleave(lengths).unsqueeze(0),
    }


def accepted(forward: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a model's `forward` takes: one from elsewhere may have no `**kwargs`."""
    parameters = inspect.signature(forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def unpack(packed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of a packed row (1, N) back in their places, zeros elsewhere: (B, S), like `mask`."""
    return packed.new_zeros(mask.shape).masked_scatter(mask.bool(), packed)
