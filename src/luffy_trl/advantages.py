"""Which completions count, and against what: total rewards, solved prompts, the gate, another baseline and scale.

An advantage compares a completion with its group, the G completions of one prompt, rollouts and demonstrations:

    A_i = (R_i - mean of R over the rows in the baseline) / scale

TRL computes it over the whole group, which is LUFFY's (arXiv 2504.14945), with scale 1 by default. Where the baseline
is to be the rollouts' own, or a group's demonstrations are not to count, `credit` moves TRL's advantages there. Where
each reward function is normalized before they are summed (GDPO's, "normalize_then_sum"), `credit_each` starts anew.

Tensors are of the N completions of all processes, whole groups of G one after another. A row "has a demonstration"
where its completion is one, or begins with one. Rewards are NaN where no reward function applied: such rows take part
in nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


# Reward functions, by name, whose value is 1 for a right answer and 0 for a wrong one: these packages' and TRL's
ANSWER_REWARDS = (
    "math_reward", "math_reward_optional_thought", "choice_reward", "accuracy_reward", "reasoning_accuracy_reward",
    "letter_walk_reward",
)  # fmt: skip
TOTAL = "total"  # `solved_reward` for the weighted sum of all

# Float32 sums of weights that make the threshold can be a little less
SOLVED_SLACK = 1e-6

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


def deciding_reward(names: Sequence[str], solved_reward: str | None) -> int | None:
    """Which reward function's value, without its weight, makes a completion solved; None: the weighted total does.

    Args:
        names: of the reward functions.
        solved_reward: one of them, or `TOTAL`. None: the only one, or else the first of `ANSWER_REWARDS`, or else the
            total.

    Raises:
        ValueError: if no function has the name, or several have.
    """
    if solved_reward is None:
        answers = [i for i, name in enumerate(names) if name in ANSWER_REWARDS or len(names) == 1]
        return answers[0] if answers else None
    if solved_reward == TOTAL:
        return None
    count = list(names).count(solved_reward)
    if count == 0:
        raise ValueError(
            f"solved_reward={solved_reward!r} is not the name of a reward function. Give one of "
            f"{', '.join(map(repr, names))}, or {TOTAL!r}, their weighted sum."
        )
    if count > 1:
        raise ValueError(
            f"solved_reward={solved_reward!r} is the name of {count} reward functions. Rename the others."
        )
    return list(names).index(solved_reward)


def solved_rollouts(
    judged: torch.Tensor, has_demonstration: torch.Tensor, group_size: int, threshold: float = 1.0
) -> torch.Tensor:
    """Which rollouts are right, `(groups, G)`; False for rows with a demonstration, whole or in part.

    Args:
        judged: `(N,)`, the reward that decides; NaN where it did not apply, which is not right.
        has_demonstration: `(N,)`.
        threshold: from what value on a completion is right.
    """
    slack = SOLVED_SLACK * max(1.0, abs(threshold))
    return ((judged >= threshold - slack) & ~has_demonstration).view(-1, group_size)


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
        cls,
        rewards: torch.Tensor,
        has_demonstration: torch.Tensor,
        group_size: int,
        gate: float | None,
        judged: torch.Tensor | None = None,
        threshold: float = 1.0,
    ) -> "Outcome":
        """From `rewards` and `has_demonstration`, and what `success_gate` is.

        Args:
            judged, threshold: which reward `(N,)` makes a rollout solved, from what value; None: `rewards`.
        """
        solved = solved_rollouts(rewards if judged is None else judged, has_demonstration, group_size, threshold)
        return cls(rewards, has_demonstration, solved, open_groups(solved, has_demonstration, gate))

    @property
    def counts(self) -> torch.Tensor:
        """The rows whose demonstration counts, in the loss and in the baseline, `(N,)`."""
        return self.has_demonstration & self.is_open.repeat_interleave(self.solved.size(1))

    @property
    def is_cold(self) -> torch.Tensor:
        """The rows of groups without a right rollout, `(N,)`."""
        return (~self.solved.any(1)).repeat_interleave(self.solved.size(1))

    def in_baseline(self, baseline: str) -> torch.Tensor:
        """The rows whose mean reward is the baseline, `(N,)`: the "group"'s that count, or the "on_policy" ones."""
        rollouts = ~self.has_demonstration
        return rollouts if baseline == "on_policy" else rollouts | self.counts

    def has_advantage(self, graded: torch.Tensor) -> torch.Tensor:
        """The rows that have an advantage, and are in the scale, `(N,)`.

        Args:
            graded: `(N,)`, rows with a demonstration that have an advantage, if the demonstration counts.
        """
        return ~self.has_demonstration | (self.counts & graded)


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
    group_size, has_advantage = outcome.solved.size(1), outcome.has_advantage(graded)
    advantages = rebase(advantages, outcome.rewards, outcome.in_baseline(baseline), group_size)
    return advantages * scale_ratio(outcome.rewards, has_advantage, group_size, scale) * has_advantage


def credit_each(
    rewards_per_func: torch.Tensor, weights: torch.Tensor, outcome: Outcome, baseline: str, graded: torch.Tensor
) -> torch.Tensor:
    """Advantages of TRL's "normalize_then_sum", of the rows that count; 0 for rows without an advantage. `(N,)`

    Args:
        rewards_per_func: `(N, F)`, NaN where a function did not apply.
        weights: `(F,)`.
        baseline, graded: as in `credit`.
    """
    has_advantage = outcome.has_advantage(graded)
    advantages = normalize_then_sum(
        rewards_per_func, weights, outcome.in_baseline(baseline), has_advantage, outcome.solved.size(1)
    )
    return advantages * has_advantage


def normalize_then_sum(
    rewards_per_func: torch.Tensor,
    weights: torch.Tensor,
    in_baseline: torch.Tensor,
    in_scale: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """TRL's advantages of that name (GDPO, arXiv 2601.05242), from the statistics of some rows; all rows get one.

    Each function's rewards are normalized in their group, then weighted and summed, then the sums in the batch:

        s_i = sum over k of w_k (R_ik - mean_k of the group) / (deviation_k of the group + epsilon)
        A_i = (s_i - mean of the batch) / (deviation of the batch + epsilon)

    Args:
        rewards_per_func: `(N, F)`, NaN where a function did not apply.
        weights: `(F,)`.
        in_baseline: `(N,)`, the rows of the means.
        in_scale: `(N,)`, the rows of the deviations.
        group_size: G.
    """
    grouped = rewards_per_func.view(-1, group_size, len(weights))  # (groups, G, F)
    sums = total_rewards(
        _normalized(grouped, in_baseline.view(-1, group_size, 1), in_scale.view(-1, group_size, 1), (1,)).flatten(
            0, 1
        ),
        weights,
    )
    # As in TRL: a row that some function has graded has a sum, of 0 where its group gives it nothing to compare with
    unscorable = rewards_per_func.isnan().all(1)
    sums = sums.nan_to_num(0.0).masked_fill(unscorable, torch.nan)
    return _normalized(sums, in_baseline, in_scale, (0,)).nan_to_num(0.0)


def _normalized(
    values: torch.Tensor, in_mean: torch.Tensor, in_deviation: torch.Tensor, dim: tuple[int, ...]
) -> torch.Tensor:
    """Values less the mean of some of them, over the deviation of some."""
    mean = values.masked_fill(~in_mean, torch.nan).nanmean(dim, keepdim=True)
    return (values - mean) / (_deviation(values.masked_fill(~in_deviation, torch.nan), dim) + SCALE_EPSILON)


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
