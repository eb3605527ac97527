"""Where demonstrations stand in a generation: which rows hold one, how much of it, and what the batch says of it.

A generation is one process's rows, whole groups of `group_size` copies of one prompt, one after another. A group keeps
at least one row for a rollout.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .encoding import Demonstration, demonstrations_of


Row = dict[str, Any]
# One entry a row: its demonstration, or None where the policy samples all of it
Placed = Sequence[Demonstration | None]


@dataclass(frozen=True)
class Placement:
    """The rows of one process's generation, and which of them hold a demonstration."""

    rows: list[Row]
    demonstrations: Placed
    dropped: int = 0  # demonstrations that were too long
    truncated: int = 0

    def rows_to_sample(self) -> list[int]:
        """Those in which the policy writes something."""
        return [i for i, d in enumerate(self.demonstrations) if d is None or d.continued]


@dataclass
class Generation:
    """What is known of the generation under way, on this process.

    Attributes:
        placement: chosen before anything is sampled.
        prompts: one entry a row, as they are rendered: with their images, and what their environments say.
        completion_ids: what the reward functions were asked about, one entry a row; once they were.
        rewards_per_func: `(N, F)`, their answers for the completions of all processes; then, too.
        tool_mask: 0 on what tools and users wrote, one list a row; None where there is nothing of theirs.
    """

    placement: Placement
    prompts: list[Any] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    rewards_per_func: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    tool_mask: list[list[int]] | None = None


def place_demonstrations(rows: list[Row], group_size: int, per_group: int) -> list[Demonstration | None]:
    """Which rows hold a demonstration: the last ones of each group, up to `per_group` of them.

    A prompt with more demonstrations than that gets a random choice, drawn from Python's generator, which the trainer
    seeds and saves with every checkpoint. A prompt with fewer keeps more rows for rollouts.

    Args:
        rows: encoded rows.
    """
    return fill_groups([demonstrations_of(row) for row in rows[::group_size]], group_size, per_group)


def fill_groups(available: list[list[Demonstration]], group_size: int, per_group: int) -> list[Demonstration | None]:
    """As `place_demonstrations`, from what there is for each group."""
    placed: list[Demonstration | None] = []
    for demonstrations in available:
        chosen = random.sample(demonstrations, per_group) if len(demonstrations) > per_group else demonstrations
        placed += [None] * (group_size - len(chosen))
        placed += chosen
    return placed


def cut_to_prefixes(
    placed: Placed, group_size: int, ratio: Callable[[], float], shared: bool
) -> list[Demonstration | None]:
    """The first part of each demonstration.

    Args:
        ratio: the share of the tokens that is given; asked anew for each demonstration.
        shared: it is asked once a group.
    """
    cut: list[Demonstration | None] = []
    for start in range(0, len(placed), group_size):
        of_group = ratio() if shared else None
        for demonstration in placed[start : start + group_size]:
            if demonstration is not None:
                demonstration = demonstration.prefix(ratio() if of_group is None else of_group)
            cut.append(demonstration)
    return cut


def merge_completions(
    placed: Placed,
    sampled_rows: Sequence[int],
    sampled_ids: Sequence[list[int]],
    sampled_logps: Sequence[list[float]] | None,
    longest: int,
) -> tuple[list[list[int]], list[list[float]] | None]:
    """Token ids, and log-probs under the sampler, of every row: its demonstration, then what was sampled.

    The sampler has no log-prob of a demonstration's token: NaN, which TRL takes as an importance ratio of 1 in its
    correction for vLLM.

    Args:
        sampled_rows: which row each entry of `sampled_ids` belongs to; entries beyond them are left out.
        longest: tokens of a completion.
    """
    ids = [list(d.token_ids) if d else [] for d in placed]
    logps = [[float("nan")] * len(row) for row in ids]
    for k, row in enumerate(sampled_rows):
        ids[row] = (ids[row] + list(sampled_ids[k]))[:longest]
        if sampled_logps is not None:
            logps[row] = (logps[row] + list(sampled_logps[k]))[:longest]
    return ids, None if sampled_logps is None else logps


def tool_masks(
    placed: Placed, completion_ids: Sequence[list[int]], of_rollouts: list[list[int]] | None
) -> list[list[int]] | None:
    """TRL's mask of each row: 0 on what tools and users have written, in a demonstration or in a rollout.

    Args:
        of_rollouts: TRL's own; None where nothing acts.
    """
    if of_rollouts is None and not any(d is not None and d.context for d in placed):
        return None
    own = [[1] * len(ids) for ids in completion_ids] if of_rollouts is None else of_rollouts
    return [mask if d is None or d.continued else d.tool_mask() for d, mask in zip(placed, own, strict=True)]


def demonstration_lengths(placed: Placed, device: torch.device) -> torch.Tensor:
    """Tokens of each row that are a demonstration's, `(B,)`."""
    return torch.tensor([len(d.token_ids) if d else 0 for d in placed], device=device)


def off_policy_mask(lengths: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """True on the demonstrations' tokens, `(B, T)`.

    Args:
        lengths: `(B,)`, of `demonstration_lengths`.
        mask: True on the tokens that count, `(B, T)`.
    """
    positions = torch.arange(mask.size(1), device=mask.device)  # (T,)
    return mask & (positions < lengths.unsqueeze(1))


def behavior_logps(placed: Placed, completion_mask: torch.Tensor) -> torch.Tensor:
    """Log-probs of the behavior policy, `(B, T)`: 0, certainty, wherever nothing is known of it."""
    logps = torch.zeros(completion_mask.shape)
    for row, demonstration in zip(logps, placed, strict=True):
        if demonstration is not None and demonstration.logps is not None:
            row[: len(demonstration.logps)] = torch.tensor(demonstration.logps)
    return logps.to(completion_mask.device)
