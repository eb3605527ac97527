"""What teachers are asked: the rows of a dataset, whatever its columns were called, and the demonstrations in them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from datasets import Dataset, Value

from ..data.contract import to_contract, with_system
from ..data.problems import ANSWER_COLUMNS, WORKING, ProblemColumns, problems_to_contract, recognise_problems
from ..data.rows import checked_rows
from ..demonstrations.encoding import demonstration_text


Prompt: TypeAlias = str | list[dict[str, Any]]

TEACHER_COLUMN = "teacher"
# The teacher of demonstrations that are in the dataset already
IN_THE_DATASET = "dataset"
# Columns that are made anew
MADE = ("completion", "demonstrations", "completion_logps", TEACHER_COLUMN)


@dataclass(frozen=True)
class Problem:
    """One row: its prompt as the policy reads it, and as the teachers are asked. Equal questions are one `key`."""

    row: int
    prompt: Prompt
    asked: Prompt
    key: str


@dataclass(frozen=True)
class Found:
    """A demonstration that is in the dataset already."""

    key: str
    teacher: str
    text: str


def in_contract(dataset: Dataset, where: str, prompt_column: str | None, solution_column: str | None) -> Dataset:
    """The dataset in the columns of the data contract, its prompts and gold answers checked.

    Raises:
        ValueError: for a column that is not there, naming those that are, and for a row that cannot be used.
    """
    for flag, column in (("--prompt_column", prompt_column), ("--solution_column", solution_column)):
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"{flag} {column}: {where} has only the columns {', '.join(dataset.column_names)}.")
    table = recognise_problems(dataset.column_names)
    if prompt_column is None and solution_column is not None and table is not None:
        prompt_column = table.question
    if prompt_column in (None, "prompt"):
        dataset = to_contract(_with_solution(dataset, solution_column), where)
    else:
        dataset = _with_prompt(dataset, str(prompt_column), solution_column, where)
    return checked_rows(dataset, where)


def _with_solution(dataset: Dataset, column: str | None) -> Dataset:
    if column in (None, "solution"):
        return dataset
    if "solution" in dataset.column_names:
        dataset = dataset.rename_column("solution", WORKING)
    return dataset.rename_column(str(column), "solution")


def _with_prompt(dataset: Dataset, column: str, solution_column: str | None, where: str) -> Dataset:
    """A text in a column of another name is a question, the user's message."""
    if "prompt" in dataset.column_names:
        raise ValueError(f"--prompt_column {column}: {where} has a column `prompt` beside it. Take one of them out.")
    if not isinstance(dataset.features[column], Value):
        return _with_solution(dataset, solution_column).rename_column(column, "prompt")
    answers = [name for name in (solution_column, *ANSWER_COLUMNS) if name in dataset.column_names]
    if not answers:
        raise ValueError(f"{where} has no column `solution`, only {', '.join(dataset.column_names)}: name the gold "
                         "answers' with --solution_column.")  # fmt: skip
    return problems_to_contract(dataset, dataset.column_names, ProblemColumns(column, str(answers[0])), where)


def with_system_prompt(dataset: Dataset, system_prompt: str | None, where: str) -> Dataset:
    """The dataset with this system message before each conversation, in place of its own.

    Raises:
        ValueError: if the prompts are texts.
    """
    if system_prompt is None:
        return dataset
    if isinstance(dataset[0]["prompt"], str):
        raise ValueError(f"--system_prompt needs messages, and the prompts of {where} are texts.")
    return dataset.map(_Systematic(system_prompt), desc="System prompt")


@dataclass(frozen=True)
class _Systematic:
    system_prompt: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": with_system(row["prompt"], self.system_prompt)}


def problems_of(dataset: Dataset, teacher_system_prompt: str | None, where: str) -> list[Problem]:
    """
    Raises:
        ValueError: if teachers are to have a system prompt, and prompts are texts.
    """
    prompts = dataset["prompt"][:]
    if teacher_system_prompt is not None and isinstance(prompts[0], str):
        raise ValueError(f"--teacher_system_prompt needs messages, and the prompts of {where} are texts.")
    return [_problem(row, prompt, teacher_system_prompt) for row, prompt in enumerate(prompts)]


def _problem(row: int, prompt: Prompt, teacher_system_prompt: str | None) -> Problem:
    asked = prompt if isinstance(prompt, str) else [_given(message) for message in prompt]
    if teacher_system_prompt is not None and isinstance(asked, list):
        asked = with_system(asked, teacher_system_prompt)
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    return Problem(row, prompt, asked, digest.hexdigest()[:16])


def _given(message: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that only other rows' messages have."""
    return {key: value for key, value in message.items() if value is not None}


# Demonstrations in the dataset


def found_in(dataset: Dataset, problems: Sequence[Problem], where: str) -> list[Found]:
    """The demonstrations that are there already, with their teachers' names, if a column says them.

    Raises:
        ValueError: naming row and column, for one that is no demonstration.
    """
    columns = [name for name in MADE[:2] if name in dataset.column_names]
    if len(columns) == 2:
        raise ValueError(f"{where} has both `completion` and `demonstrations`: take one of them out.")
    if not columns:
        if TEACHER_COLUMN in dataset.column_names:
            raise ValueError(f"{where} has a column {TEACHER_COLUMN!r}, where the teachers' names go: rename it.")
        return []
    [column] = columns
    teachers = dataset[TEACHER_COLUMN][:] if TEACHER_COLUMN in dataset.column_names else [None] * len(dataset)
    found: list[Found] = []
    for problem, value, names in zip(problems, dataset[column][:], teachers, strict=True):
        found += _found_in_row(problem, value, names, f"{where}, row {problem.row}: `{column}`", column)
    return found


def _found_in_row(problem: Problem, value: Any, names: Any, where: str, column: str) -> Iterator[Found]:
    values = value if column == "demonstrations" else [value]
    if not isinstance(values, list | None):
        raise ValueError(f"{where} is no list of demonstrations.")
    names = names if isinstance(names, list) else [names] * len(values or [])
    for i, one in enumerate(values or []):
        if one is not None:
            name = names[i] if i < len(names) and isinstance(names[i], str) else IN_THE_DATASET
            yield Found(problem.key, name, demonstration_text(one, where))
