"""A recipe, `--config FILE.yaml`, read field by field: each value as the flag of that name would read it.

YAML makes truths of `no`, fractions of `1.0` and text of `1e-6`. A field knows better what it is: it takes what was
written, or says what it cannot take.
"""

import dataclasses
import difflib
import os
from argparse import ArgumentTypeError
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import string_to_bool
from trl import TrlParser

from ..runs.written import ENVIRONMENT, compose, construct, entries, environment


SPELLED = {"on": "yes", "off": "no"}  # YAML's, beside those of flags
NULLS = ("", "~", "null", "Null", "NULL")


def apply_recipe(parser: TrlParser, path: str) -> None:
    """Make the recipe's values the defaults of the parser's fields, and set its environment variables.

    Raises:
        ValueError: naming the key and its value, for a key that is no field or there twice, and for a value that the
            field cannot take.
        OSError: if there is no such file.
    """
    with open(path, encoding="utf-8") as file:
        root = compose(file, path)
    types = {
        name: hint
        for dataclass_type in parser.dataclass_types
        for name, hint in get_type_hints(dataclass_type).items()
        if name in {field.name for field in dataclasses.fields(dataclass_type) if field.init}
    }
    values = {}
    for key, node in entries(root).items():
        if key == ENVIRONMENT:
            os.environ.update(environment(node, path))
        elif key not in types:
            near = difflib.get_close_matches(key.replace("-", "_"), types, n=1)
            hint = f"Did you mean {near[0]}?" if near else "--help lists every field."
            raise ValueError(f"{path}: there is no field {key}. {hint}")
        else:
            values[key] = _value(node, types[key], f"{path}: {key}")
    parser.set_defaults_with_config(**values)


# One field's value


def _value(node: yaml.Node, hint: Any, where: str) -> Any:
    """The node's value as the field's type takes it.

    Raises:
        ValueError: starting with `where`.
    """
    kinds = _alternatives(hint)
    if isinstance(node, yaml.ScalarNode) and _is_null(node):
        if NoneType in kinds:
            return None
        raise ValueError(f"{where} has no value, expected {_expected(kinds)}.")
    if isinstance(node, yaml.MappingNode):
        if any((get_origin(kind) or kind) is dict for kind in kinds):
            return construct(node, where)
        raise ValueError(f"{where} has fields of its own, expected {_expected(kinds)}.")
    lists = [kind for kind in kinds if get_origin(kind) is list]
    if isinstance(node, yaml.SequenceNode):
        if not lists:
            raise ValueError(f"{where} is a list, expected {_expected(kinds)}.")
        [of] = get_args(lists[0])
        return [_value(item, of, f"{where}[{i}]") for i, item in enumerate(node.value)]
    if lists and str not in kinds:  # one value for a list of one
        return [_value(node, get_args(lists[0])[0], where)]
    return _scalar(node.value, kinds, where)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_null(node: yaml.ScalarNode) -> bool:
    return node.style is None and node.value in NULLS


def _scalar(written: str, kinds: tuple[Any, ...], where: str) -> Any:
    """What was written, as the first of the kinds that can take it."""
    for kind in sorted(kinds, key=lambda kind: kind is str):  # anything is a text: that comes last
        if isinstance(kind, type) and issubclass(kind, Enum):
            names = [member.value for member in kind]
            if written.lower() in names:
                return written.lower()
            near = difflib.get_close_matches(written, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{where}: {written} is not one of {', '.join(names)}{hint}.")
        try:
            if kind is bool:
                return string_to_bool(SPELLED.get(written.lower(), written))
            if kind in (int, float):
                return _number(written, kind)
        except (ValueError, ArgumentTypeError):
            continue
        if kind is str:
            return written
        if get_origin(kind) is Literal and False in get_args(kind) and written.lower() in ("false", "no", "off"):
            return False
    raise ValueError(f"{where}: {written!r} is not {_expected(kinds)}.")


def _number(written: str, kind: type) -> int | float:
    """Raises ValueError for what is no number of the kind; 1.0 and 1e3 are whole numbers."""
    try:
        return kind(int(written, 0))
    except ValueError:
        number = float(written.replace(".inf", "inf").replace(".nan", "nan"))  # as YAML writes them
    if kind is float:
        return number
    if not number.is_integer():
        raise ValueError
    return int(number)


def _expected(kinds: tuple[Any, ...]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}
    named = [names.get(get_origin(kind) or kind, "a list" if get_origin(kind) is list else "") for kind in kinds]
    return " or ".join(dict.fromkeys(name for name in named if name))
