"""Fields in YAML as they were written: none twice, and `no` and `1e-6` as their field would take them."""

import re
from pathlib import Path
from typing import Any, TextIO

import yaml


ENVIRONMENT = "env"  # TRL's key for environment variables
DEEPEST = 50  # levels of lists and mappings
WORDS = ("yes", "no", "on", "off")  # truths of YAML 1.1 alone: `save_strategy: no`
TRUTHS = (*WORDS, "true", "false")


class RecipeLoader(yaml.SafeLoader):
    """Takes 1e-6 for a number, as YAML 1.2 does, and PyYAML does not."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+"), list("-+.0123456789")
)


def compose(source: str | TextIO, where: str) -> yaml.MappingNode:
    """The mapping in a text or an open file.

    Raises:
        ValueError: starting with `where`, for what is no YAML, or no mapping, has a key twice, or is too deep.
    """
    try:
        root = yaml.compose(source, Loader=RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{where} must hold a mapping, a field and its value a line, such as num_demonstrations: 1.")
    _check(root, where, set())
    return root


def entries(node: yaml.MappingNode) -> dict[str, yaml.Node]:
    """Keys and values, those of `<<` included."""
    yaml.SafeLoader("").flatten_mapping(node)
    return {key.value if isinstance(key, yaml.ScalarNode) else "[...]": value for key, value in node.value}


def construct(node: yaml.Node, where: str) -> Any:
    """What is under a node, by YAML's rules."""
    try:
        return RecipeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error


def written_fields(path: str | Path) -> dict[str, Any]:
    """A recipe's fields for another recipe.

    Raises:
        ValueError, OSError: as [`compose`], and if there is no such file.
    """
    with open(path, encoding="utf-8") as file:
        return fields_of(compose(file, str(path)), str(path))


def fields_of(node: yaml.MappingNode, where: str, texts: tuple[str, ...] = TRUTHS) -> dict[str, Any]:
    """By YAML's rules, but truths as the text that a field may take them for, and variables as they were written.

    Args:
        texts: which words are such truths.
    """
    return {
        key: environment(value, where) if key == ENVIRONMENT else _written(value, f"{where}: {key}", texts)
        for key, value in entries(node).items()
    }


def written_value(text: str, where: str) -> Any:
    """As [`fields_of`], of one value. Raises ValueError, starting with `where`."""
    try:
        node = yaml.compose(text, Loader=RecipeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    if node is None:
        return None
    _check(node, where, set())
    return _written(node, where)


def _written(node: yaml.Node, where: str, texts: tuple[str, ...] = TRUTHS) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_written(item, where, texts) for item in node.value]
    value = construct(node, where)
    return node.value if isinstance(value, bool) and node.value.lower() in texts else value


def environment(node: yaml.Node, where: str) -> dict[str, str]:
    """Raises ValueError, starting with `where`, for what are no environment variables."""
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(v, yaml.ScalarNode) for _, v in node.value):
        raise ValueError(f"{where}: {ENVIRONMENT} must hold names of environment variables with a value each.")
    return {key.value: value.value for key, value in node.value}


def _check(node: yaml.Node, where: str, seen: set[int], above: tuple[int, ...] = ()) -> None:
    """Refuses a key that is there twice, of which PyYAML silently takes the last, and what others could not walk."""
    if id(node) in above or len(above) > DEEPEST:
        line = node.start_mark.line + 1
        raise ValueError(f"{where}: line {line} is nested too deeply: expected at most {DEEPEST} levels.")
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, where, seen, above)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                first = lines[key.value]
                raise ValueError(
                    f"{where}: {key.value} is there twice, in lines {first} and {line}. Keep one of them."
                )
            lines[str(key.value)] = line
            _check(value, where, seen, above)
