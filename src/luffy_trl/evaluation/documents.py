"""Benchmark datasets as documents of one form: `index`, `problem` (the user's message) and `answer`.

The functions that task definitions name in `process_docs` turn a Hub dataset's own columns into that; `read_local`
reads files in the original LUFFY code's schema, whose documents also have `system`.
"""

import hashlib
import json
import string
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.loading import check_file, load_splits
from ..data.numbers import exact_text, is_number
from . import EvaluationError


# The order of shuffled options comes from a hash of this and the question, not from a random generator: the same in
# every process and Python version
OPTIONS_SEED = "luffy_trl 0"

LOCAL_COLUMNS = ("data_source", "prompt", "reward_model")


def problem_and_answer(dataset: Dataset) -> Dataset:
    return _documents(dataset, ("problem", "answer"), lambda row: (row["problem"], str(row["answer"])))


def question_and_answer(dataset: Dataset) -> Dataset:
    return _documents(dataset, ("question", "answer"), lambda row: (row["question"], str(row["answer"])))


def olympiadbench(dataset: Dataset) -> Dataset:
    def convert(row: dict[str, Any]) -> tuple[str, str]:
        return row["question"], ", ".join(answer.strip().strip("$") for answer in row["final_answer"])

    return _documents(dataset, ("question", "final_answer"), convert)


def arc(dataset: Dataset) -> Dataset:
    def convert(row: dict[str, Any]) -> tuple[str, str]:
        right = row["choices"]["label"].index(row["answerKey"])  # labels are A-E or 1-4
        return shuffled_choices(row["question"], row["choices"]["text"], right)

    return _documents(dataset, ("question", "choices", "answerKey"), convert)


def gpqa(dataset: Dataset) -> Dataset:
    columns = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

    def convert(row: dict[str, Any]) -> tuple[str, str]:
        return shuffled_choices(row["Question"], [row[column] for column in columns], 0)

    return _documents(dataset, ("Question", *columns), convert)


def mmlu_pro(dataset: Dataset) -> Dataset:
    def convert(row: dict[str, Any]) -> tuple[str, str]:
        return shuffled_choices(row["question"], row["options"], row["answer_index"])

    return _documents(dataset, ("question", "options", "answer_index"), convert)


def shuffled_choices(question: str, options: Sequence[str], right: int) -> tuple[str, str]:
    """The question with its options in an order that depends on nothing but the question, and the right one's letter.

    Args:
        right: index of the right option in `options`.
    """

    def place(i: int) -> str:
        return hashlib.sha256(f"{OPTIONS_SEED}\n{question}\n{i}".encode()).hexdigest()

    order = sorted(range(len(options)), key=place)
    lines = [f"{letter}) {options[i].strip()}" for letter, i in zip(string.ascii_uppercase, order, strict=False)]
    # The layout of the original code's ARC file
    return f"{question.strip()}\n\n" + "\n".join(lines) + "\n", string.ascii_uppercase[order.index(right)]


def _documents(
    dataset: Dataset, columns: tuple[str, ...], convert: Callable[[dict[str, Any]], tuple[str, str]]
) -> Dataset:
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise EvaluationError(
            f"the dataset has no column {missing[0]!r}, only {', '.join(dataset.column_names)}. It may have changed "
            "on the Hub: give the problems with --data_files instead."
        )
    rows = [convert(row) for row in dataset]
    return to_documents([problem for problem, _ in rows], [answer for _, answer in rows])


def to_documents(problems: list[str], answers: list[str], systems: list[str] | None = None) -> Dataset:
    columns: dict[str, list] = {"index": list(range(len(problems))), "problem": problems, "answer": answers}
    if systems is not None:
        columns["system"] = systems
    return Dataset.from_dict(columns)


def fingerprint(documents: Dataset) -> str:
    """Changes with any problem, answer or their order."""
    rows = list(zip(documents["problem"], documents["answer"], strict=True))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# Local files


def read_local(paths: Sequence[str]) -> tuple[dict[str, Dataset], dict[str, int]]:
    """Problems of files in the original LUFFY code's schema, by `data_source`.

    A problem that is there several times, as AIME's and AMC's are in the original's own file, is taken once: repeats
    are sampled, not read.

    Args:
        paths: .parquet, .json, .jsonl or .arrow files with the columns `data_source`, `prompt` (a list of messages,
            one of them the user's) and `reward_model` (with a `ground_truth`).

    Returns:
        Documents by data source, and how many repeated rows were left out, by data source.

    Raises:
        EvaluationError: naming file, row and column.
    """
    rows: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    repeated: dict[str, int] = defaultdict(int)
    for path in paths:
        for i, row in enumerate(_read_file(path)):
            source, problem, answer, system = _local_row(row, f"--data_files {path}, row {i}")
            repeated[source] += (problem, answer) in rows[source]
            rows[source].setdefault((problem, answer), system)
    documents = {
        source: to_documents([p for p, _ in found], [a for _, a in found], list(found.values()))
        for source, found in rows.items()
    }
    return documents, {source: count for source, count in repeated.items() if count}


def _read_file(path: str) -> Dataset:
    where = f"--data_files {path}"
    if not Path(path).is_file():
        raise EvaluationError(f"{where}: there is no such file.")
    try:
        check_file(path, where)
        dataset = load_splits(path, where)["train"]
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    for column in LOCAL_COLUMNS:
        if column not in dataset.column_names:
            raise EvaluationError(
                f"--data_files {path} has no column {column!r}, only {', '.join(dataset.column_names)}. Expected is "
                f"the original LUFFY code's schema: {', '.join(LOCAL_COLUMNS)}."
            )
    return dataset


def _local_row(row: dict[str, Any], where: str) -> tuple[str, str, str, str]:
    """(data source, problem, answer, system prompt) of a row."""
    messages = row["prompt"]
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise EvaluationError(
            f"{where}: `prompt` is {type(messages).__name__}, expected a list of messages with a role and "
            "content, both texts."
        )
    by_role = {message.get("role"): message["content"] for message in messages}
    if "user" not in by_role or set(by_role) - {"user", "system"} or len(by_role) != len(messages):
        roles = [message.get("role") for message in messages]
        raise EvaluationError(
            f"{where}: `prompt` has the roles {roles}, expected one user message, after a system message."
        )
    reward_model = row["reward_model"] or {}
    if not isinstance(reward_model, dict):
        raise EvaluationError(
            f"{where}: `reward_model` is {type(reward_model).__name__}, expected an object with the right answer as "
            "`ground_truth`."
        )
    answer = reward_model.get("ground_truth")
    if is_number(answer):
        answer = exact_text(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise EvaluationError(
            f"{where}: `reward_model.ground_truth` is {answer!r}, expected the right answer as text."
        )
    return str(row["data_source"]), by_role["user"], answer, by_role.get("system", "")


def _is_message(value: Any) -> bool:
    keys = ("role", "content")
    return isinstance(value, dict) and all(isinstance(value.get(key), str) and value[key] for key in keys)
