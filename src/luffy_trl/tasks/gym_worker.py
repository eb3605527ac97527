"""The worker that makes reasoning-gym's problems, and scores answers to them: `python -m luffy_trl.tasks.gym_worker`.

Both happen here, so that a problem is the same whenever it is made, that a generator or a scorer that hangs costs one
request, and that whoever trains does not import reasoning-gym. Some of its scorers evaluate the answer, which is a
model's, as Python: they are given an `eval` that knows literals and arithmetic alone.
"""

import ast
import difflib
import hashlib
import re
import sys
from dataclasses import fields
from functools import lru_cache
from typing import Any

import sympy
from reasoning_gym.factory import DATASETS, create_dataset

from ..rewards.serving import serve
from .gym import SIZES, parse_task
from .gym_oracles import worked_solution


# Some tasks are made of their dataset's size: it is the same for all, and of problems beyond it the seed moves on
AT_ONCE = 20_000
NUMBERS_AND_SIGNS = re.compile(r"\d+|[^\x00-\x7f]")

LITERALS = (
    ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load,
    ast.UnaryOp, ast.BinOp, ast.unaryop, ast.operator,
)  # fmt: skip
FORMULAS = (*LITERALS, ast.Name, ast.Call)
FUNCTIONS = {
    "Abs", "Integer", "Rational", "Symbol", "acos", "asin", "atan", "cos", "cosh", "cot", "csc", "exp", "factorial",
    "ln", "log", "oo", "pi", "sec", "sin", "sinh", "sqrt", "tan", "tanh",
}  # fmt: skip


def check_tree(text: str, allowed: tuple[type, ...]) -> None:
    """Raises ValueError or SyntaxError for a text that is more than literals, or a formula."""
    for node in ast.walk(ast.parse(text.strip(), mode="eval")):
        is_name = isinstance(node, ast.Name) and len(node.id) > 1 and node.id not in FUNCTIONS
        is_call = isinstance(node, ast.Call) and not isinstance(node.func, ast.Name)
        if not isinstance(node, allowed) or is_name or is_call:
            raise ValueError(f"{type(node).__name__} is not read.")


def literal_eval(text: str, *_: Any) -> Any:
    """In place of `eval`."""
    check_tree(text, LITERALS)
    return eval(text, {"__builtins__": {}}, {})


def disarm() -> None:
    """Take Python away from whatever reads an answer."""
    parse_expr = sympy.parse_expr

    def parse_formula(text: str, *args: Any, **kwargs: Any) -> Any:
        check_tree(text, FORMULAS)
        return parse_expr(text, *args, **kwargs)

    sympy.parse_expr = parse_formula
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym."):
            module.__dict__["eval"] = literal_eval
            if module.__dict__.get("parse_expr") is parse_expr:
                module.__dict__["parse_expr"] = parse_formula


@lru_cache(maxsize=8)
def dataset(source: str, chunk: int) -> Any:
    """
    Raises:
        ValueError: if there is no such task, or it does not take the options.
    """
    task = parse_task(source)
    if task.name not in DATASETS:
        near = difflib.get_close_matches(task.name, DATASETS, n=3)
        raise ValueError(f"reasoning-gym has no task {task.name}. " + (f"Is it {' or '.join(near)}?" if near else ""))
    known = {field.name for field in fields(DATASETS[task.name][1])} - {"size"}
    for key in task.options:
        if key not in known:
            raise ValueError(f"{task.name} has no option {key}. It has {', '.join(sorted(known | SIZES.keys()))}.")
    seed = task.options["seed"] + chunk * AT_ONCE
    try:
        return create_dataset(task.name, **task.options | {"seed": seed, "size": AT_ONCE})
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split()) or type(error).__name__}") from error


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """A problem, or the score of an answer to it; "error" if there is no such task, "failed" without a problem."""
    chunk, index = divmod(request["index"], AT_ONCE)
    try:
        problems = dataset(request["source"], chunk)
    except ValueError as error:
        return {"error": str(error)}
    try:
        entry = problems[index]
    except Exception as error:  # many hands' work: not every option that a task takes is one it can work with
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    if "answer" in request:
        return score(problems, entry, request["answer"])
    solution = entry["answer"] if isinstance(entry["answer"], str) else None
    working = None if solution is None else worked_solution(parse_task(request["source"]).name, entry)
    question = " ".join(entry["question"].split())
    keys = [question, *content(entry, question)]
    return {"question": entry["question"], "solution": solution, "working": working, "keys": keys}


def content(entry: dict[str, Any], question: str) -> list[str]:
    """What a problem has in common with itself in other words: what it is made of, its answer, numbers and signs.

    Nothing, where all that is said of it are numbers, which may be no more than sizes.
    """
    said = {key: value for key, value in entry["metadata"].items() if not key.startswith("source_")}
    said.pop("difficulty", None)
    if all(isinstance(value, int | float) for value in said.values()):
        return []
    made_of = repr((said, entry["answer"], NUMBERS_AND_SIGNS.findall(question)))
    return [hashlib.sha256(made_of.encode("utf-8", "surrogatepass")).hexdigest()]


def score(problems: Any, entry: dict[str, Any], text: str) -> dict[str, Any]:
    """The scorers are many hands' work, and some of them raise what they like for what they cannot read."""
    try:
        points = float(problems.score_answer(text, entry))
    except Exception as error:
        return {"score": 0.0, "outcome": f"not read: {type(error).__name__}"}
    return {"score": points, "outcome": "right" if points == 1 else "partly" if points > 0 else "wrong"}


if __name__ == "__main__":
    disarm()
    serve(answer)
