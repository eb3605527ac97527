"""What `luffy-trl eval --dataset_name` evaluates on: the dataset and the rewards as `train` reads them."""

import argparse
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from ..checks import RESERVED_COLUMNS, check_reward_inputs
from ..demonstrations.encoding import SOURCE_COLUMNS
from ..evaluation import EvaluationError
from ..evaluation.own_problems import OwnProblems
from .grading import make_grader, named_rewards
from .inputs import LuffyScriptArguments, load_dataset_splits, load_reward_funcs, load_split


TEST = "test"


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


def _load(args: argparse.Namespace) -> Dataset:
    splits = load_dataset_splits(
        args.dataset_name, LuffyScriptArguments(args.dataset_name, args.dataset_config), args.seed
    )
    split = args.dataset_split or _split(args.dataset_name, splits)
    dataset = load_split(splits, split, args.dataset_name, "--dataset_split")
    assert isinstance(dataset, Dataset)  # nothing is streamed
    for column in RESERVED_COLUMNS:
        if column in dataset.column_names:
            raise ValueError(
                f"--dataset_name {args.dataset_name} has a column {column!r}: reward functions get the responses' own "
                "by it. Rename it."
            )
    return dataset


def _split(name: str, splits: Mapping[str, Dataset | IterableDataset]) -> str:
    if TEST in splits or len(splits) == 1:
        return TEST if TEST in splits else next(iter(splits))
    raise ValueError(
        f"--dataset_name {name} has the splits {', '.join(map(repr, splits))}, and none is {TEST!r}: name one with "
        "--dataset_split."
    )
