"""What `luffy-trl eval --dataset_name` evaluates on: the dataset and the rewards as `train` reads them."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ..advantages import deciding_reward, solved_rollouts, total_rewards
from ..checks import RESERVED_COLUMNS, check_reward_inputs, reward_name
from ..demonstrations.encoding import SOURCE_COLUMNS
from ..evaluation import EvaluationError
from ..evaluation.grading import Grader, Rewards
from ..evaluation.own_problems import OwnProblems
from .inputs import LuffyScriptArguments, load_dataset_splits, load_reward_funcs, load_split


TEST = "test"
IMAGES = ("image", "images")


def load_own_problems(args: argparse.Namespace, model_args: Mapping[str, Any]) -> OwnProblems:
    """
    Raises:
        EvaluationError: for data, rewards and prompts that do not go together, before the model is loaded.
    """
    where = f"--dataset_name {args.dataset_name}"
    try:
        functions = named_rewards(load_reward_funcs(args.reward_funcs, args.dataset_name))
        grader = make_grader(args, functions, where)
        dataset = _load(args)
        check_reward_inputs(list(functions.values()), dataset, "--reward_funcs", where, SOURCE_COLUMNS)
    except (ValueError, OSError, ImportError) as error:
        raise EvaluationError(" ".join(str(error).split())) from error
    return OwnProblems(args, model_args, dataset, where, grader)


def named_rewards(functions: Sequence[Callable]) -> dict[str, Callable]:
    named = {reward_name(function): function for function in functions}
    if len(named) < len(functions):
        raise ValueError(f"--reward_funcs: two of {', '.join(map(reward_name, functions))} have one name.")
    return named


def _load(args: argparse.Namespace) -> Dataset:
    splits = load_dataset_splits(
        args.dataset_name, LuffyScriptArguments(args.dataset_name, args.dataset_config), args.seed
    )
    split = args.dataset_split or _split(args.dataset_name, splits)
    dataset = load_split(splits, split, args.dataset_name, "--dataset_split")
    assert isinstance(dataset, Dataset)  # nothing is streamed
    for column in (*RESERVED_COLUMNS, *IMAGES):
        if column in dataset.column_names:
            why = "images are not evaluated" if column in IMAGES else "reward functions get the responses' own by it"
            raise ValueError(f"--dataset_name {args.dataset_name} has a column {column!r}: {why}. Rename it.")
    return dataset


def _split(name: str, splits: Mapping[str, Dataset | IterableDataset]) -> str:
    if TEST in splits or len(splits) == 1:
        return TEST if TEST in splits else next(iter(splits))
    raise ValueError(
        f"--dataset_name {name} has the splits {', '.join(map(repr, splits))}, and none is {TEST!r}: name one with "
        "--dataset_split."
    )


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
