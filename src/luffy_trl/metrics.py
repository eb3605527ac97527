"""What is logged beside TRL's metrics (docs/metrics.md says what each name means).

A metric that is a mean over tokens or rows is kept as a sum and a count. The sums of a micro-batch are masked,
stacked, added up over the processes by one collective, and stay on the device until the log is written: training never
waits for a number that only a reader needs.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .advantages import Outcome
from .demonstrations.placement import Generation, Placement
from .objective import counted


# Of the log of an importance ratio, for its mean to stay finite: e^20 is as telling as more
LARGEST_LOG_RATIO = 20.0
# Optimizer steps without any right rollout, and push for pull, that are worth a warning. A base that is sure of its
# wrong answer is pushed by nothing, and learns within some tens of steps (docs/learning.md).
COLD_STEPS, HARD_PUSH = 20, 3.0

# name -> (sum, count): numbers, or tensors of one element
Sums = Mapping[str, tuple[torch.Tensor | float, torch.Tensor | float]]


class Means:
    """Means since they were last taken, over all processes.

    Args:
        reduce: adds a tensor up over the processes.
        device: where the sums are kept.
    """

    def __init__(self, reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device):
        self._reduce, self._device = reduce, device
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}  # names added together -> (names, 2)

    def add(self, sums: Sums) -> None:
        """Collective: the same names on each process, whatever rows it holds."""
        flat = [_on_device(value, self._device) for pair in sums.values() for value in pair]
        reduced = self._reduce(torch.stack(flat).view(-1, 2))
        names = tuple(sums)
        self._sums[names] = self._sums[names] + reduced if names in self._sums else reduced

    def take(self) -> dict[str, float]:
        """The means, and a new beginning. A name with nothing to report is left out."""
        if not self._sums:
            return {}
        names = [name for added in self._sums for name in added]
        pairs = torch.cat(list(self._sums.values())).tolist()
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count > 0}


def token_sums(
    logps: torch.Tensor,
    entropies: torch.Tensor,
    mask: torch.Tensor,
    off_policy_mask: torch.Tensor,
    behavior_logps: torch.Tensor | None = None,
    gamma: float | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the policy makes of a micro-batch's tokens.

    Args:
        logps, entropies: of the policy, `(B, T)`, in nats.
        mask: True on the tokens that count, `(B, T)`.
        off_policy_mask: True on those of demonstrations, `(B, T)`.
        behavior_logps: `(B, T)`; None where the behavior policy was certain.
        gamma: of f(r) = r / (r + gamma), whose weight f'(r) r is greatest at r = gamma; None: f is another.
    """
    on_policy = mask & ~off_policy_mask  # (B, T)
    log_ratio = logps if behavior_logps is None else logps - behavior_logps  # (B, T)
    on_count, off_count = on_policy.sum(), off_policy_mask.sum()
    probs, ratio = logps.exp(), log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    rare = {} if gamma is None else {"off_policy/below_gamma": (_sum(ratio < gamma, off_policy_mask), off_count)}
    return rare | {
        "on_policy/entropy": (_sum(entropies, on_policy), on_count),
        "on_policy/prob": (_sum(probs, on_policy), on_count),
        "off_policy/entropy": (_sum(entropies, off_policy_mask), off_count),
        "off_policy/prob": (_sum(probs, off_policy_mask), off_count),
        "off_policy/ratio": (_sum(ratio, off_policy_mask), off_count),
        "off_policy/token_fraction": (off_count, on_count + off_count),
    }


def objective_sums(
    term: torch.Tensor,
    logps: torch.Tensor,
    pull: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    on: torch.Tensor,
    off: torch.Tensor,
) -> Sums:
    """The demonstrations' loss, and how much the rollouts of groups without a right one push down, for what their
    demonstrations pull up.

    A token's logit moves by its weight on grad log pi times 1 - pi: one of which the policy is sure hardly moves.

    Args:
        term: the demonstrations' part of the micro-batch's loss, a scalar.
        logps: of the policy, `(B, T)`, in nats.
        pull: a demonstration token's weight, without the factor of its row, `(B, T)`. A rollout's is its advantage.
        batch: `completion_mask`, `off_policy_mask`, `tool_mask` where there are tools `(B, T)`; `advantages`,
            `on_policy_weight`, `off_policy_weight`, `is_cold` `(B,)`; where it is none of TRL's `share`, how many of
            those its rows are worth, and `in_place_of`, how many it stands for.
        on, off: what the loss divides a rollout token's and a demonstration token's by, `(B, 1)`.
    """
    share, stands_for = batch.get("share", 1.0), batch.get("in_place_of", 1.0)
    cold, off_policy = batch["is_cold"].unsqueeze(1), batch["off_policy_mask"]  # (B, 1), (B, T)
    on_policy = counted(batch) & ~off_policy  # (B, T)
    room = 1 - logps.exp()  # (B, T)
    push = -(batch["on_policy_weight"] * batch["advantages"]).unsqueeze(1).clamp(max=0.0) * share / on  # (B, 1)
    pull = batch["off_policy_weight"].unsqueeze(1) * pull.clamp(min=0.0) * share / off  # (B, T)
    return {
        "off_policy/loss": (term * share, stands_for),
        "groups/push_to_pull": (_sum(push * room, on_policy & cold), _sum(pull * room, off_policy & cold)),
    }


def _on_device(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """One float, which the device makes itself of a number: a copy from the host would wait for the device."""
    if isinstance(value, torch.Tensor):  # bool.sum() is an integer, which stack would not mix with floats
        return value.to(device, torch.float32)
    return torch.full((), value, dtype=torch.float32, device=device)


def _sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values.float().masked_fill(~mask, 0.0).sum()  # a product would keep the NaN of a token that does not count


def length_sums(generation: Generation, ends: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Lengths, without what tools and users wrote, and truncation of this process's completions.

    Args:
        ends: ids of the tokens that end a completion.
    """
    ids, placed = generation.completion_ids, generation.placement.demonstrations
    lengths = [len(row) for row in ids] if generation.tool_mask is None else [sum(row) for row in generation.tool_mask]
    rollouts = [i for i, demonstration in enumerate(placed) if demonstration is None]
    demonstrated = [i for i, demonstration in enumerate(placed) if demonstration is not None]
    return {
        "on_policy/length": (sum(lengths[i] for i in rollouts), len(rollouts)),
        "off_policy/length": (sum(lengths[i] for i in demonstrated), len(demonstrated)),
        "on_policy/clipped_ratio": (sum(ids[i][-1] not in ends for i in rollouts), len(rollouts)),
    }


def source_sums(
    placement: Placement, of_source: Mapping[str, float], processes: int
) -> dict[str, tuple[float, float]]:
    """What a source counts, as means over generations: overflow of all processes, its own metrics of a process.

    Args:
        of_source: its own metrics, the same names on all processes.
    """
    share = 1 / processes
    overflow = {"off_policy/dropped": placement.dropped, "off_policy/truncated": placement.truncated}
    return {name: (count, share) for name, count in overflow.items()} | {
        name: (value * share, share) for name, value in of_source.items()
    }


def group_metrics(outcome: Outcome) -> dict[str, float]:
    """Rewards, and what groups hold; a mean over nothing is left out. Of all processes, the same on each of them."""
    held = outcome.has_demonstration
    demonstrated = held.view_as(outcome.solved)  # (groups, G)
    guided = demonstrated.any(1)  # (groups,)
    values = {
        "on_policy/reward": outcome.rewards.masked_fill(held, torch.nan).nanmean(),
        "off_policy/reward": outcome.rewards.masked_fill(~held, torch.nan).nanmean(),
        "groups/solve_none": (~outcome.solved.any(1)).float().mean(),
        "groups/solve_all": (outcome.solved | demonstrated).all(1).float().mean(),
        "groups/guided": guided.float().mean(),
        "groups/gate_open": (guided & outcome.is_open).float().mean(),
    }
    numbers = zip(values, torch.stack(list(values.values())).tolist(), strict=True)
    return {name: number for name, number in numbers if not math.isnan(number)}


@dataclass
class ColdStart:
    """Whether a run goes on without a right rollout while its rollouts are pushed down harder than it is led up.

    Attributes:
        since: the optimizer step after which no rollout has been right; None before the first look.
    """

    since: int | None = None

    def look(self, step: int, solve_none: float, push_to_pull: float) -> bool:
        """Whether that has lasted long enough to be said, after the optimizer step `step`.

        The steps before the first look, as those before a resumption, are of unknown rollouts.

        Args:
            solve_none: share of the groups without a right rollout.
            push_to_pull: of `objective_sums`, 0 where nothing pulls.
        """
        if solve_none < 1 or self.since is None:
            self.since = step
        return push_to_pull > HARD_PUSH and step - self.since >= COLD_STEPS


class Stopwatch:
    """Where an optimizer step's time goes. TRL times its phases too, but for trackers alone, not for the log."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - start

    def take(self, steps: int) -> dict[str, float]:
        """Seconds of each phase a step, on this process, since they were last taken."""
        seconds = {f"time/{phase}": total / steps for phase, total in self._seconds.items()}
        self._seconds.clear()
        return seconds
