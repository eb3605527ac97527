"""Rewards by the flags that `eval` and `make-demonstrations` share: what is graded, and what is called solved."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ..advantages import deciding_reward, solved_rollouts, total_rewards
from ..checks import reward_name
from ..evaluation.grading import Grader, Rewards


def named_rewards(functions: Sequence[Callable]) -> dict[str, Callable]:
    named = {reward_name(function): function for function in functions}
    if len(named) < len(functions):
        raise ValueError(f"--reward_funcs: two of {', '.join(map(reward_name, functions))} have one name.")
    return named


def make_grader(args: argparse.Namespace, functions: Mapping[str, Callable], where: str) -> Grader:
    """Grades as the trainer does, and calls solved what it calls solved."""
    names, threshold = list(functions), 1.0 if args.solved_threshold is None else args.solved_threshold
    if not math.isfinite(threshold):
        raise ValueError(f"--solved_threshold {threshold} must be a finite number.")
    if args.reward_weights is not None and len(args.reward_weights) != len(names):
        raise ValueError(
            f"--reward_weights has {len(args.reward_weights)} weights for {len(names)} reward functions: give one for "
            "each."
        )
    weights = torch.tensor(args.reward_weights or [1.0] * len(names))
    deciding = deciding_reward(names, args.solved_reward)

    def solved(rewards: Sequence[Rewards]) -> list[bool | None]:
        values = [[math.nan if v is None else v for v in of_one.values()] for of_one in rewards]
        per_func = torch.tensor(values, dtype=torch.float32)  # (N, F)
        judged = total_rewards(per_func, weights) if deciding is None else per_func[:, deciding]  # (N,)
        right = solved_rollouts(judged, torch.zeros(len(judged), dtype=torch.bool), 1, threshold).squeeze(1)
        return [
            None if nothing else is_right
            for nothing, is_right in zip(judged.isnan().tolist(), right.tolist(), strict=True)
        ]

    return Grader(functions, None if deciding is None else names[deciding], solved, where)
