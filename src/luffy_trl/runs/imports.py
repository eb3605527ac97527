"""Functions of the user's, named by their dotted path."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping


def named_function(name: str, known: Mapping[str, Callable], option: str, otherwise: str) -> Callable:
    """The function of a known name, or at a dotted path.

    Args:
        otherwise: what to say of a name that is neither.

    Raises:
        ValueError: if there is no such function.
    """
    if name in known:
        return known[name]
    if "." in name:
        return import_function(name, option)
    raise ValueError(otherwise)


def import_function(path: str, option: str) -> Callable:
    """The function at `path`, "package.module.function", found from the working directory or among the packages.

    Args:
        option: what the path was given for, to begin messages with.

    Raises:
        ValueError: if there is no such module or function.
    """
    module_name, _, function_name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{option} {path}: {error}. It is looked for in {os.getcwd()} and among the installed packages."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{option} {path}: {module_name} has no function {function_name}.")
    return function
