"""What `luffy-trl eval` is told of a model, so that it loads and asks it as its training did."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from . import ComparisonError
from .plan import Recipe, is_true


THINKING = "enable_thinking"  # the one argument of chat templates that `luffy-trl eval` knows
# Of model_init_kwargs: they choose other weights
OTHER_WEIGHTS = ("revision", "subfolder", "variant", "gguf_file")


def with_model_args(recipe: Recipe, is_base: bool, flags: Sequence[str]) -> list[str]:
    """The user's flags of `luffy-trl eval`, and in --model_args what the recipe says; theirs come last, and hold.

    Args:
        is_base: whether the model that is loaded is the recipe's own.

    Raises:
        ComparisonError: for what it cannot be told, and would be evaluated otherwise without.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_args", nargs="?", const="", default="")
    own, others = parser.parse_known_args(list(flags))
    parts = [f"{name}={value}" for name, value in _model_args(recipe, is_base).items()]
    both = ",".join([*parts, *filter(None, [own.model_args])])
    return [*others, "--model_args", both] if both else others


def _model_args(recipe: Recipe, is_base: bool) -> dict[str, Any]:
    asked = _mapping(recipe, "chat_template_kwargs")
    for name in set(asked) - {THINKING}:
        raise ComparisonError(
            f"chat_template_kwargs: luffy-trl eval cannot be told of {name}, and would ask otherwise than the "
            "training. Write it into the chat template, with luffy-trl prepare-model."
        )
    for name in _mapping(recipe, "model_init_kwargs").keys() & set(OTHER_WEIGHTS):
        raise ComparisonError(
            f"model_init_kwargs: luffy-trl eval cannot be told of {name}, and would load other weights. Take "
            "model_revision, or a directory with that model."
        )
    arguments: dict[str, Any] = {}
    if asked.get(THINKING) is not None:
        arguments[THINKING] = is_true(asked[THINKING])
    if is_true(recipe.get("trust_remote_code")):
        arguments["trust_remote_code"] = True
    if is_base and recipe.get("model_revision"):
        arguments["revision"] = repr(str(recipe["model_revision"]))  # quoted: 1.0 is a name here
    return arguments


def _mapping(recipe: Recipe, name: str) -> Mapping[str, Any]:
    """As a recipe has it, or a flag's text."""
    value = recipe.get(name)
    read = yaml.safe_load(value) if isinstance(value, str) else value
    if read is not None and not isinstance(read, Mapping):
        raise ComparisonError(f"{name}: {value!r} is no mapping.")
    return read or {}
