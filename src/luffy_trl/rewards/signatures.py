"""Whether a function can be a reward function, from its arguments and its source: it is not called."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator


NUMBER, TEXT, DICT, NOTHING = "a number", "a text", "a dict", "nothing"
# What these return whatever they are given
KIND_OF_CALL = dict.fromkeys(("float", "int", "len", "bool", "any", "all"), NUMBER) | {"str": TEXT, "repr": TEXT}
KIND_OF_ANNOTATION = {"float": NUMBER, "int": NUMBER, "bool": NUMBER, "str": TEXT, "dict": DICT, "None": NOTHING}
FORM = "a function of (completions, **kwargs) that returns a list with one number for each completion"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def misfit(function: Callable, given: set[str]) -> str | None:
    """What is wrong with the function as a reward function, to follow its name; None if nothing is known to be.

    Args:
        given: the names of the arguments that it will be called with.
    """
    if inspect.isclass(function):
        return f"is a class. Name an object of it, or {FORM}."
    try:
        # of the function itself: what it may wrap is called by it, and not by the trainer
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except ValueError:  # compiled code: nobody knows what it takes
        return None
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            return f"takes {parameter.name!r} by position alone, and is given it by name. Write {FORM}."
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        missing = sorted(given - {parameter.name for parameter in parameters})
        if missing:
            return (
                f"does not take {', '.join(map(repr, missing))}, which the trainer gives to every reward function. "
                "End its arguments with **kwargs."
            )
    kind = returned_kind(function)
    return f"returns {kind}, and a list with one number for each completion is expected." if kind else None


def returned_kind(function: Callable) -> str | None:
    """What it returns, where its source leaves no doubt that it is no list; None otherwise."""
    tree = _source(function)
    if tree is None:
        return None
    body = list(_own_nodes(tree))
    if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in body):
        return None
    returned = [node.value for node in body if isinstance(node, ast.Return)]
    if not returned:
        return None if any(isinstance(node, ast.Raise) for node in body) else NOTHING
    kinds = {_kind(value, body, frozenset()) if value is not None else NOTHING for value in returned}
    if len(kinds) == 1 and None not in kinds:
        return kinds.pop()
    annotated = KIND_OF_ANNOTATION.get(ast.unparse(tree.returns).strip("'\"")) if tree.returns else None
    # An annotation may be careless, where a name or a list is returned
    return None if any(isinstance(value, ast.Name | ast.List | ast.ListComp) for value in returned) else annotated


def _source(function: Callable) -> Function | None:
    """Of a plain function; not of one that wraps another, whose source would be the other's."""
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        return None
    try:
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, ValueError):  # a lambda within something, or typed at a prompt
        return None
    # What a decorator makes of it is not known
    return tree if isinstance(tree, Function) and not tree.decorator_list else None


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, without those of functions and classes within."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            yield child
            yield from _own_nodes(child)


def _kind(node: ast.expr, body: list[ast.AST], seen: frozenset[str]) -> str | None:
    match node:
        case ast.Constant(value=None):
            return NOTHING
        case ast.Constant(value=bool() | int() | float()):
            return NUMBER
        case ast.Constant(value=str()) | ast.JoinedStr():
            return TEXT
        case ast.Dict() | ast.DictComp():
            return DICT
        case ast.UnaryOp(operand=operand):
            return _kind(operand, body, seen)
        case ast.BinOp(left=left, right=right):
            return NUMBER if _kind(left, body, seen) == _kind(right, body, seen) == NUMBER else None
        case ast.IfExp(body=one, orelse=other):
            kind = _kind(one, body, seen)
            return kind if kind == _kind(other, body, seen) else None
        case ast.Call(func=ast.Name(id="sum"), args=[ast.GeneratorExp(elt=element) | ast.ListComp(elt=element)]):
            return NUMBER if _kind(element, body, seen) == NUMBER else None
        case ast.Call(func=ast.Name(id=name)):
            return KIND_OF_CALL.get(name)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="math"))):
            return NUMBER
        case ast.Name(id=name) if name not in seen:
            return _kind_of_name(name, body, seen | {name})
    return None


def _kind_of_name(name: str, body: list[ast.AST], seen: frozenset[str]) -> str | None:
    """Of a name that only ever is given values of one kind, one by one."""
    stored = [
        node for node in body if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
    ]
    values = []
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                values.append(value)
            case ast.AugAssign(target=ast.Name(id=target), value=value) if target == name:
                values.append(value)
    kinds = {_kind(value, body, seen) for value in values}
    return kinds.pop() if len(kinds) == 1 and len(values) == len(stored) > 0 else None
