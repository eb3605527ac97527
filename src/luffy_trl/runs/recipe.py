"""What a run was asked for, as the YAML that repeats it: no defaults, no secrets, no directories of this machine."""

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from .redaction import redact_command, redact_values


# Where a run was resumed from and pushed to is not part of what it does
NOT_IN_RECIPES = ("resume_from_checkpoint", "push_to_hub", "log_completions_hub_repo")


def given_fields(instance: Any) -> dict[str, Any]:
    """The dataclass's fields whose values are not the defaults. Of a config: asked before it derives others."""
    given = {}
    for field in dataclasses.fields(instance):
        if not field.init:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(instance, field.name)
        if value != default:
            given[field.name] = value
    return given


def as_yaml(fields: Mapping[str, Any], secrets: set[str]) -> str:
    """A recipe for `train.py --config`."""
    kept = {
        name: value
        for name, value in fields.items()
        if name not in NOT_IN_RECIPES and not name.startswith("hub_") and value is not None
    }
    return yaml.safe_dump(plain(redact_values(kept, secrets)), sort_keys=False, allow_unicode=True, width=110)


def shown_command(argv: Sequence[str], secrets: set[str]) -> str:
    """A command line as it can be shown to everyone."""
    return shlex.join(_without_directory_in_flag(argument) for argument in redact_command(argv, secrets))


def without_directory(text: str) -> str:
    """An absolute path's last name; any other text, such as the word `/no_think`, as it is."""
    path = Path(os.path.expanduser(text))
    return path.name if path.is_absolute() and len(path.parts) > 2 else text


def _without_directory_in_flag(argument: str) -> str:
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{equals}{without_directory(value)}"


def plain(value: Any) -> Any:
    """Values that YAML knows."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return without_directory(value)
    if isinstance(value, int | float | None):
        return value
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else str(value)


def with_values(recipe: str, values: Mapping[str, Any]) -> str:
    """The recipe with other values of some fields."""
    return yaml.safe_dump({**yaml.safe_load(recipe), **values}, sort_keys=False, allow_unicode=True, width=110)
