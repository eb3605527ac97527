"""What `luffy-trl compare` refuses before anything is trained: flags, fields, and data that a stage would refuse."""

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from trl import ModelConfig, TrlParser

from ..comparing import ComparisonError
from ..comparing.plan import Recipe, TestSet, is_true
from ..config import LuffyConfig
from ..runs.redaction import known_secrets, redact_command, redact_values
from ..runs.seeds import GREATEST_SEED
from ..runs.written import ENVIRONMENT, written_value
from ..tasks.gym import is_gym_task
from .inputs import LuffyScriptArguments, check_arguments, load_dataset_splits
from .packages import check_packages
from .recipes import apply_recipe
from .sft import LuffySFTConfig, check_sft_arguments, check_sft_metric, load_rows
from .train import load_data


HELD_OUT = "held_out"  # the recipe's own test split
CHECKS = {"train": (LuffyConfig, check_arguments), "sft": (LuffySFTConfig, check_sft_arguments)}
ONE_PLACE = ("push_to_hub", "hub_model_id", "log_completions_hub_repo")  # fields that name one place for all runs


# Flags


def check_flags(args: argparse.Namespace) -> None:
    """Raises ComparisonError naming the flag and its value."""
    if find_spec("lm_eval") is None:
        raise ComparisonError("It evaluates with luffy-trl eval, which needs: pip install 'luffy_trl[eval]'.")
    for flag in ("workers", "n_samples", "token_budget"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ComparisonError(f"--{flag} {value} must be 1 or more.")
    for flag in ("config", "accelerate_config"):
        path = getattr(args, flag)
        if path is not None and not Path(path).is_file():
            raise ComparisonError(f"--{flag} {path}: there is no such file.")
    _check_seeds_and_rates(args)
    _refuse_repeated("answers", args.answers)
    evaluate = args.eval_args.split()
    if redact_command(evaluate, known_secrets()) != evaluate:
        raise ComparisonError("--eval_args: arguments are written down, and no secret belongs there. Set HF_TOKEN.")
    if any(part.partition("=")[0] == "--push_to_hub" for part in evaluate):
        raise ComparisonError("--eval_args --push_to_hub: all runs would push to one place. Push the best afterwards.")


def _check_seeds_and_rates(args: argparse.Namespace) -> None:
    for flag in ("seeds", "rate_seeds"):
        for seed in getattr(args, flag) or ():
            if not 0 <= seed <= GREATEST_SEED:
                raise ComparisonError(f"--{flag} {seed} must be from 0 to {GREATEST_SEED}.")
        _refuse_repeated(flag, getattr(args, flag) or ())
    for rate in args.learning_rates or ():
        if not (math.isfinite(rate) and rate > 0):
            raise ComparisonError(f"--learning_rates {rate:g} must be a number above 0.")
    _refuse_repeated("learning_rates", [f"{rate:g}" for rate in args.learning_rates or ()])  # as in directories' names
    if bool(args.learning_rates) != bool(args.rate_seeds):
        raise ComparisonError("--learning_rates and --rate_seeds belong together: rates are chosen on other seeds.")
    shared = sorted(set(args.rate_seeds or []) & set(args.seeds))
    if shared:
        raise ComparisonError(
            f"--rate_seeds {shared[0]} is one of --seeds: a rate chosen on it would favour the method."
        )


def _refuse_repeated(flag: str, values: Sequence[Any]) -> None:
    repeated = [value for value, times in Counter(values).items() if times > 1]
    if repeated:
        raise ComparisonError(f"--{flag} {repeated[0]} is there twice: give it once.")


def as_fields(flags: Sequence[str]) -> Recipe:
    """`--field value` for the recipe: numbers as YAML reads them, several values as a list, none as true."""
    fields: dict[str, list[Any]] = {}
    name = None
    for part in flags:
        if part.startswith("--"):
            name, equals, value = part[2:].partition("=")
            fields[name] = [value] if equals else []
        elif name is None:
            raise ComparisonError(f"{part!r} belongs to no flag.")
        else:
            fields[name].append(part)
    if ENVIRONMENT in fields:
        raise ComparisonError(
            f"--{ENVIRONMENT} is no flag: set variables in the recipe's file, or before the command."
        )
    read = {name: [written_value(value, f"--{name}") for value in values] for name, values in fields.items()}
    return {name: True if not values else values[0] if len(values) == 1 else values for name, values in read.items()}


def read_test_sets(texts: Sequence[str]) -> list[TestSet]:
    found = []
    for text in texts:
        name, equals, dataset = text.partition("=")
        if not equals or not name.isidentifier() or not dataset or name == HELD_OUT:
            raise ComparisonError(f"--test_sets {text}: write a name and a dataset, such as harder=data/harder.jsonl.")
        found.append(TestSet(name, dataset))
    _refuse_repeated("test_sets", [test.name for test in found])
    return found


# Fields


def check_fields(fields: Mapping[str, Any], where: str = "") -> None:
    """Raises ComparisonError for a secret, which would be written down, and for one place of the Hub for all runs.

    Args:
        where: what to begin a message with.
    """
    secrets = known_secrets()
    for name, value in fields.items():
        if redact_values({name: value}, secrets) != {name: value}:
            raise ComparisonError(
                f"{where}{name}: recipes are written down, and no token or other secret belongs there. Set HF_TOKEN, "
                "or the variable that the library reads."
            )
        if name in ONE_PLACE and value is not None and (name != "push_to_hub" or is_true(value)):
            raise ComparisonError(
                f"{where}{name}: {value}: all runs would push to one place of the Hub. Leave it out, and push the run "
                "that you choose with luffy-trl push."
            )


def taken_budget(recipe: Recipe, flag: int | None) -> int | None:
    """Tokens of a run, which its stages share: the flag's, or the recipe's, which is taken out of it."""
    written = recipe.pop("token_budget", None)
    if flag is not None or written is None:
        return flag
    if isinstance(written, bool) or not isinstance(written, int | float) or written < 1 or written % 1 != 0:
        raise ComparisonError(f"token_budget: {written} must be a whole number of 1 or more.")
    return int(written)


@dataclass(frozen=True)
class StageArguments:
    """A stage's recipe as its command parses it. `where` is what messages begin with."""

    where: str
    command: str
    script_args: LuffyScriptArguments
    training_args: LuffyConfig | LuffySFTConfig
    model_args: ModelConfig


def parsed_stage(recipe: Recipe, command: str, where: str) -> StageArguments:
    """Raises ComparisonError for what the command would refuse before it loads anything."""
    config, check = CHECKS[command]
    parser = TrlParser((LuffyScriptArguments, config, ModelConfig))
    with TemporaryDirectory() as directory:
        path = Path(directory) / "recipe.yaml"
        try:
            path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            apply_recipe(parser, str(path))
            script_args, training_args, model_args = parser.parse_args_into_dataclasses([])
            check(script_args, model_args)
            check_packages(training_args, model_args)
        except (ValueError, ImportError) as error:
            raise ComparisonError(f"{where}: {str(error).removeprefix(f'{path}: ')}") from error
    return StageArguments(where, command, script_args, training_args, model_args)


# Data


def check_data(recipe: Recipe, stages: Sequence[StageArguments]) -> None:
    """Raises ComparisonError for a recipe's dataset that holds nothing out, and for what a stage could not train on.

    Args:
        stages: those that differ, each with a model that is there.
    """
    whole = LuffyScriptArguments(
        dataset_name=str(recipe["dataset_name"]),
        dataset_config=recipe.get("dataset_config"),
        dataset_train_split=recipe.get("dataset_train_split") or "train",
        dataset_test_split=recipe.get("dataset_test_split") or "test",
        dataset_streaming=is_true(recipe.get("dataset_streaming")),
    )
    loaded = {_source(whole): load_dataset_splits(str(whole.dataset_name), whole, seed=0)}
    _check_held_out(whole, loaded[_source(whole)])
    for stage in stages:
        own, source = stage.script_args, _source(stage.script_args)
        if own.dataset_name == whole.dataset_name and own.dataset_train_split == whole.dataset_test_split:
            raise ComparisonError(f"{stage.where}: dataset_train_split {own.dataset_train_split} is what is held out.")
        try:
            if source not in loaded:
                loaded[source] = load_dataset_splits(str(own.dataset_name), own, seed=0)
            if isinstance(stage.training_args, LuffySFTConfig):
                check_sft_metric(stage.training_args)
                load_rows(loaded[source], own, stage.training_args, stage.model_args)
            else:
                load_data(loaded[source], own, stage.training_args, stage.model_args)
        except (ValueError, OSError, ImportError) as error:
            raise ComparisonError(f"{stage.where}: {error}") from error


def _source(script_args: LuffyScriptArguments) -> tuple[Any, ...]:
    """What the splits that are loaded depend on."""
    names = ("dataset_name", "dataset_config", "dataset_streaming", "dataset_train_split")
    return tuple(getattr(script_args, name) for name in names)


def _check_held_out(script_args: LuffyScriptArguments, splits: Mapping[str, Any]) -> None:
    """Without a test split `eval` would take the only one that there is."""
    name, split = script_args.dataset_name, script_args.dataset_test_split
    if split in splits and split != script_args.dataset_train_split:
        return
    fault = f"no split {split!r}, only {', '.join(map(repr, splits))}"
    if split in splits:
        fault = f"one split, {split!r}, as dataset_train_split and dataset_test_split"
    make = f"luffy-trl prepare-data {name} --output_dir DIR --test_size 100 --no_length"
    if is_gym_task(str(name)):
        make = "test_size=100 in its name"
    raise ComparisonError(
        f"dataset_name {name} has {fault}: methods would be evaluated on what they were trained on. Make a test split "
        f"({make}), or name one with dataset_test_split."
    )
