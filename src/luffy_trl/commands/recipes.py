"""A recipe, `--config FILE.yaml`, read field by field: each value as the flag of that name would read it.

YAML makes truths of `no`, fractions of `1.0` and text of `1e-6`. A field knows better what it is: it takes what was
written, or says what it cannot take.
"""

import dataclasses
import difflib
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Iterable
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import string_to_bool
from trl import TrlParser


ENVIRONMENT = "env"  # TRL's key for environment variables
TRUTHS = {"on": "yes", "off": "no"}  # YAML's, beside those of flags
NULLS = ("", "~", "null", "Null", "NULL")


def apply_recipe(parser: TrlParser, path: str) -> None:
    """Make the recipe's values the defaults of the parser's fields, and set its environment variables.

    Raises:
        ValueError: naming the key and its value, for a key that is no field or there twice, and for a value that the
            field cannot take.
        OSError: if there is no such file.
    """
    root = compose_recipe(path)
    types = {
        name: hint
        for dataclass_type in parser.dataclass_types
        for name, hint in get_type_hints(dataclass_type).items()
        if name in {field.name for field in dataclasses.fields(dataclass_type) if field.init}
    }
    values = {}
    for key, node in _merged(root):
        if key == ENVIRONMENT:
            os.environ.update(_environment(node, path))
        elif key not in types:
            near = difflib.get_close_matches(key.replace("-", "_"), types, n=1)
            hint = f"Did you mean {near[0]}?" if near else "--help lists every field."
            raise ValueError(f"{path}: there is no field {key}. {hint}")
        else:
            values[key] = _value(node, types[key], f"{path}: {key}")
    parser.set_defaults_with_config(**values)


def compose_recipe(path: str) -> yaml.MappingNode:
    """The recipe's fields, as they were written.

    Raises:
        ValueError: for a file that is no YAML, or no mapping, or has a key twice.
        OSError: if there is no such file.
    """
    with open(path, encoding="utf-8") as file:
        try:
            root = yaml.compose(file, Loader=RecipeLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must hold a mapping, a field and its value a line, such as num_demonstrations: 1.")
    _refuse_duplicates(root, path, set())
    return root


def written_fields(path: str) -> dict[str, Any]:
    """The recipe's fields for another recipe: by YAML's rules, but truths as the text that a field may take them for.

    Raises:
        ValueError, OSError: as [`compose_recipe`].
    """
    return {key: _written(node, f"{path}: {key}") for key, node in _merged(compose_recipe(path))}


def written_value(text: str, where: str) -> Any:
    """As [`written_fields`], of one value. Raises ValueError, starting with `where`."""
    try:
        node = yaml.compose(text, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    return None if node is None else _written(node, where)


def _written(node: yaml.Node, where: str) -> Any:
    value = _construct(node, where)
    return node.value if isinstance(value, bool) else value


class RecipeLoader(yaml.SafeLoader):
    """Takes 1e-6 for a number, as YAML 1.2 does, and PyYAML does not."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+"), list("-+.0123456789")
)


def _construct(node: yaml.Node, where: str) -> Any:
    """What is under a node, by YAML's rules."""
    try:
        return RecipeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error


def _refuse_duplicates(node: yaml.Node, path: str, seen: set[int]) -> None:
    """PyYAML silently takes the last of two."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, path, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                first = lines[key.value]
                raise ValueError(f"{path}: {key.value} is there twice, in lines {first} and {line}. Keep one of them.")
            lines[str(key.value)] = line
            _refuse_duplicates(value, path, seen)


def _merged(root: yaml.MappingNode) -> Iterable[tuple[str, yaml.Node]]:
    """Keys and values, those of `<<` included."""
    yaml.SafeLoader("").flatten_mapping(root)
    return {key.value if isinstance(key, yaml.ScalarNode) else "[...]": value for key, value in root.value}.items()


def _environment(node: yaml.Node, path: str) -> dict[str, str]:
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(v, yaml.ScalarNode) for _, v in node.value):
        raise ValueError(f"{path}: {ENVIRONMENT} must hold names of environment variables with a value each.")
    return {key.value: value.value for key, value in node.value}


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
            return _construct(node, where)
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
                return string_to_bool(TRUTHS.get(written.lower(), written))
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
