"""The methods that are compared, from `methods.yaml` and a user's own file of the same form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from . import ComparisonError


STAGE_COMMANDS = ("train", "sft")
BASE_MODEL = "base"  # evaluated as it is


@dataclass(frozen=True)
class Stage:
    """`fields` go over the recipe's; `share` is of the optimizer steps."""

    command: str
    fields: Mapping[str, Any]
    share: float


@dataclass(frozen=True)
class Method:
    name: str
    label: str
    stages: tuple[Stage, ...]


def stage_steps(stages: Sequence[Stage], steps: int) -> list[int]:
    """Optimizer steps of each stage, rounded, so that they add up."""
    shares = [stage.share for stage in stages]
    ends = [0, *(round(steps * sum(shares[: i + 1])) for i in range(len(shares)))]
    return [end - start for start, end in pairwise(ends)]


def known_methods(own: Path | None = None) -> dict[str, Method]:
    """All methods by name; a user's own stand in for ours of the same name.

    Raises:
        ComparisonError: for a file that is not of the form of `methods.yaml`.
        OSError: if it cannot be read.
    """
    text = (files("luffy_trl") / "comparing" / "methods.yaml").read_text(encoding="utf-8")
    methods = _read(text, "methods.yaml")
    if own is not None:
        methods |= _read(own.read_text(encoding="utf-8"), f"--methods_file {own}")
    return methods


def chosen(names: Sequence[str], methods: Mapping[str, Method]) -> list[Method]:
    """
    Raises:
        ComparisonError: for a name that there is not.
    """
    for name in names:
        if name not in methods and name != BASE_MODEL:
            raise ComparisonError(
                f"--methods {name}: there is no such method. There are {', '.join(methods)}; your own go into a file "
                "that --methods_file names."
            )
    return [methods[name] for name in dict.fromkeys(names) if name != BASE_MODEL]


def _read(text: str, where: str) -> dict[str, Method]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ComparisonError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ComparisonError(f"{where} must hold a mapping: a method's name, and its stages.")
    return {name: _method(name, value, f"{where}, {name}") for name, value in found.items()}


def _method(name: str, value: Any, where: str) -> Method:
    if not name.isidentifier() or name == BASE_MODEL:
        raise ComparisonError(f"{where}: a method's name is made of letters, digits and _, and not {BASE_MODEL!r}.")
    if not isinstance(value, dict) or set(value) - {"label", "stages"} or not isinstance(value.get("stages"), list):
        raise ComparisonError(f"{where} must have a list of `stages`, and may have a `label`.")
    parts = [_stage(stage, f"{where}, stage {i}") for i, stage in enumerate(value["stages"], start=1)]
    if not parts:
        raise ComparisonError(f"{where} has no stage.")
    given = sum(share for _, _, share in parts if share is not None)
    open_stages = sum(share is None for _, _, share in parts)
    if given > 1 or (open_stages == 0 and given != 1) or (open_stages and given == 1):
        raise ComparisonError(f"{where}: the shares of its stages add up to {given:g}, expected 1.")
    rest = (1 - given) / max(open_stages, 1)
    stages = tuple(Stage(command, fields, rest if share is None else share) for command, fields, share in parts)
    return Method(name, str(value.get("label", name)), stages)


def _stage(value: Any, where: str) -> tuple[str, dict[str, Any], float | None]:
    commands = [name for name in STAGE_COMMANDS if isinstance(value, dict) and name in value]
    if len(commands) != 1 or set(value) - {commands[0], "share"}:
        raise ComparisonError(f"{where} must be `train` or `sft` with their fields, and may have a `share`.")
    fields, share = value[commands[0]] or {}, value.get("share")
    if not isinstance(fields, dict):
        raise ComparisonError(f"{where}: {commands[0]} must hold fields of the recipe, such as {{shaping: log}}.")
    if share is not None and (not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1):
        raise ComparisonError(f"{where}: share {share!r} must be above 0 and at most 1.")
    return commands[0], fields, share
