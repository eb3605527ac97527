"""Which completions count, and against what: total rewards, solved prompts, the gate, another baseline and scale.

An advantage compares a completion with its group, the G completions of one prompt, rollouts and demonstrations:

    A_i = (R_i - mean of R over the rows in the baseline) / scale

TRL computes it over the whole group, which is LUFFY's (arXiv 2504.14945), with scale 1 by default. Where the baseline
is to be the rollouts' own, or a group's demonstrations are not to count, `credit` moves TRL's advantages there.

Tensors are of the N completions of all processes, whole groups of G one after another. A row "has a demonstration"
where its completion is one, or begins with one. Rewards are NaN where no reward function applied: such rows take part
in nothing.
"""

from dataclasses import dataclass

import torch


# A completion of this total reward is right, as in the paper's released code
SOLVED_REWARD = 1.0 - 1e-6  # float32 sums of weights that make 1 can be a little less

# TRL adds it to each standard deviation that it divides by
SCALE_EPSILON = 1e-4


def total_rewards(rewards_per_func: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over the reward functions that applied, `(N,)`; NaN where none did.

    Args:
        rewards_per_func: `(N, F)`, NaN where a function did not apply.
        weights: `(F,)`.
    """
    rewards = (rewards_per_func * weights.to(rewards_per_func.device)).nansum(dim=1)  # (N,)
    return rewards.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)


def solved_rollouts(rewards: torch.Tensor, has_demonstration: torch.Tensor, group_size: int) -> torch.Tensor:
    """Which rollouts are right, `(groups, G)`; False for rows with a demonstration, whole or in part.

    Args:
        rewards: `(N,)`.
        has_demonstration: `(N,)`.
    """
    return ((rewards >= SOLVED_REWARD) & ~has_demonstration).view(-1, group_size)


def open_groups(solved: torch.Tensor, has_demonstration: torch.Tensor, gate: float | None) -> torch.Tensor:
    """The groups whose demonstrations count: at most the share `gate` of the rollouts is solved. `(groups,)`

    Args:
        solved: `(groups, G)`, of `solved_rollouts`.
        has_demonstration: `(N,)`. Each group has at least one rollout.
        gate: from 0 to 1; None opens all groups.
    """
    if gate is None:
        return torch.ones(len(solved), dtype=torch.bool, device=solved.device)
    rollouts = ~has_demonstration.view_as(solved)
    return solved.sum(1) / rollouts.sum(1) <= gate


@dataclass(frozen=True)
class Outcome:
    """What came out of a generation.

    Attributes:
        rewards: total, `(N,)`.
        has_demonstration: `(N,)`.
        solved: `(groups, G)`, of `solved_rollouts`.
        is_open: `(groups,)`, of `open_groups`.
    """

    rewards: torch.Tensor
    has_demonstration: torch.Tensor
    solved: torch.Tensor
    is_open: torch.Tensor

    @classmethod
    def of(
        cls, rewards: torch.Tensor, has_demonstration: torch.Tensor, group_size: int, gate: float | None
    ) -> "Outcome":
        """From `rewards` and `has_demonstration`, and what `success_gate` is."""
        solved = solved_rollouts(rewards, has_demonstration, group_size)
        return cls(rewards, has_demonstration, solved, open_groups(solved, has_demonstration, gate))

    @property
    def counts(self) -> torch.Tensor:
        """The rows whose demonstration counts, in the loss and in the baseline, `(N,)`."""
        return self.has_demonstration & self.is_open.repeat_interleave(self.solved.size(1))


def credit(
    advantages: torch.Tensor, outcome: Outcome, baseline: str, scale: str, graded: torch.Tensor
) -> torch.Tensor:
    """TRL's advantages on the baseline and the scale of the rows that count; 0 for rows without an advantage. `(N,)`

    Args:
        advantages: `(N,)`, of the whole group.
        baseline: whose mean reward it is, that of the "group"'s rows that count, or of the "on_policy" ones.
        scale: whose deviation TRL has divided by: "none", the "group"'s, the "batch"'s.
        graded: `(N,)`, rows with a demonstration that have an advantage, if the demonstration counts.
    """
    rollouts, group_size = ~outcome.has_demonstration, outcome.solved.size(1)
    in_baseline = rollouts if baseline == "on_policy" else rollouts | outcome.counts
    has_advantage = rollouts | (outcome.counts & graded)
    advantages = rebase(advantages, outcome.rewards, in_baseline, group_size)
    return advantages * scale_ratio(outcome.rewards, has_advantage, group_size, scale) * has_advantage


def rebase(
    advantages: torch.Tensor, rewards: torch.Tensor, in_baseline: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Advantages against the mean reward of some rows of each group, `(N,)`; 0 for rows without a reward.

    Args:
        advantages: `(N,)`, against the mean of the whole group, on any scale that a group shares.
        rewards: `(N,)`.
        in_baseline: `(N,)`, the rows whose mean is the baseline.
    """
    scorable = ~rewards.isnan()
    grouped = advantages.view(-1, group_size)  # (groups, G)
    counted = (scorable & in_baseline).view_as(grouped)
    # An advantage is (reward - mean) / scale: taking the mean advantage of these rows away moves the baseline to them
    baseline = (grouped * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    return (grouped - baseline).flatten() * scorable


def scale_ratio(rewards: torch.Tensor, in_scale: torch.Tensor, group_size: int, scale: str) -> torch.Tensor:
    """What to multiply TRL's advantages by, for their scale to be the deviation of some rows' rewards. `(N,)`

    Args:
        rewards: `(N,)`.
        in_scale: `(N,)`, the rows whose standard deviation is the scale.
        scale: "none", or whose deviation TRL has divided by: the "group"'s, the "batch"'s.
    """
    if scale == "none":
        return torch.ones_like(rewards)
    grouped = rewards.view(-1, group_size)  # (groups, G)
    kept = grouped.masked_fill(~in_scale.view_as(grouped), torch.nan)
    dim = (1,) if scale == "group" else (0, 1)
    before, after = (_deviation(values, dim) + SCALE_EPSILON for values in (grouped, kept))
    # NaN: of a single row, which is its own baseline
    return (before / after).nan_to_num(1.0).expand_as(grouped).flatten()


def _deviation(values: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
    """Standard deviation of a sample, without its NaNs; NaN of a single value."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    mean = values.nansum(dim, keepdim=True) / count
    return ((values - mean).square().nansum(dim, keepdim=True) / (count - 1)).sqrt()
