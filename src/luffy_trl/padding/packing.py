"""Sequences without padding in one row, and their values back in their places."""

import torch


def pack(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens where `mask` is True, as one row, and their positions, which restart at each sequence: both (1, N).

    Args:
        input_ids: (B, S).
        mask: (B, S), True on tokens, each row's in one run.
    """
    mask = mask.bool()
    positions = mask.long().cumsum(1) - 1  # (B, S)
    return input_ids[mask].unsqueeze(0), positions[mask].unsqueeze(0)


def unpack(packed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of a packed row (1, N) back in their places, zeros elsewhere: (B, S), like `mask`."""
    return packed.new_zeros(mask.shape).masked_scatter(mask.bool(), packed)
