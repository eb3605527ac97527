"""The methods that are compared, from `methods.yaml` and a user's own file of the same form."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import yaml

from ..runs.written import ENVIRONMENT, WORDS, compose, construct, entries, fields_of
from . import ComparisonError


STAGE_COMMANDS = ("train", "sft")
SAME_FOR_ALL = (ENVIRONMENT, "model_name_or_path", "output_dir", "seed", "resume_from_checkpoint")  # whatever it has
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
        with own.open(encoding="utf-8") as file:
            methods |= _read(file, f"--methods_file {own}")
    return methods


def chosen(names: Sequence[str], methods: Mapping[str, Method]) -> list[Method]:
    """
    Raises:
        ComparisonError: for a name that there is not, and for two methods that the table would call the same.
    """
    for name in names:
        if name not in methods and name != BASE_MODEL:
            raise ComparisonError(
                f"--methods {name}: there is no such method. There are {', '.join(methods)}; your own go into a file "
                "that --methods_file names."
            )
    found = [methods[name] for name in dict.fromkeys(names) if name != BASE_MODEL]
    labels = {BASE_MODEL: BASE_MODEL}
    for method in found:
        other = labels.setdefault(method.label, method.name)
        if other != method.name:
            raise ComparisonError(
                f"--methods {method.name} and {other} have one label, {method.label!r}, by which their rows could not "
                "be told apart: give one of them another."
            )
    return found


def _read(source: str | TextIO, where: str) -> dict[str, Method]:
    try:
        found = entries(compose(source, where))
        return {name: _method(name, node, f"{where}, {name}") for name, node in found.items()}
    except ValueError as error:
        raise ComparisonError(str(error)) from error


def _method(name: str, node: yaml.Node, where: str) -> Method:
    if not name.isidentifier() or name == BASE_MODEL:
        raise ComparisonError(f"{where}: a method's name is made of letters, digits and _, and not {BASE_MODEL!r}.")
    found = entries(node) if isinstance(node, yaml.MappingNode) else {}
    if set(found) - {"label", "stages"} or not isinstance(found.get("stages"), yaml.SequenceNode):
        raise ComparisonError(f"{where} must have a list of `stages`, and may have a `label`.")
    parts = [_stage(stage, f"{where}, stage {i}") for i, stage in enumerate(found["stages"].value, start=1)]
    if not parts:
        raise ComparisonError(f"{where} has no stage.")
    given = sum(share for _, _, share in parts if share is not None)
    open_stages = sum(share is None for _, _, share in parts)
    is_one = math.isclose(given, 1)
    if (is_one or given > 1) if open_stages else not is_one:
        raise ComparisonError(f"{where}: the shares of its stages add up to {given:g}, expected 1.")
    rest = (1 - given) / max(open_stages, 1)
    stages = tuple(Stage(command, fields, rest if share is None else share) for command, fields, share in parts)
    return Method(name, _label(found.get("label"), where) or name, stages)


def _label(node: yaml.Node | None, where: str) -> str | None:
    """As it was written: 0.10 and `no` are texts here."""
    if node is None or construct(node, where) is None:
        return None
    if not isinstance(node, yaml.ScalarNode):
        raise ComparisonError(f"{where}: label must be a text, which the table shows.")
    return " ".join(node.value.split())


def _stage(node: yaml.Node, where: str) -> tuple[str, dict[str, Any], float | None]:
    found = entries(node) if isinstance(node, yaml.MappingNode) else {}
    commands = [name for name in STAGE_COMMANDS if name in found]
    if len(commands) != 1 or set(found) - {commands[0], "share"}:
        raise ComparisonError(f"{where} must be `train` or `sft` with their fields, and may have a `share`.")
    of_command = found[commands[0]]
    fields: dict[str, Any] = {}
    if isinstance(of_command, yaml.MappingNode):
        fields = fields_of(of_command, where, texts=WORDS)
    elif construct(of_command, where) is not None:
        raise ComparisonError(f"{where}: {commands[0]} must hold fields of the recipe, such as {{shaping: log}}.")
    for name in SAME_FOR_ALL:
        if name in fields:
            raise ComparisonError(f"{where}: {name} is no field of a stage: it is the comparison's, for all methods.")
    share = construct(found["share"], where) if "share" in found else None
    if share is not None and (not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1):
        raise ComparisonError(f"{where}: share {share!r} must be above 0 and at most 1.")
    return commands[0], fields, share
