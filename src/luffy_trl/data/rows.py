"""What is looked at in every row of a split before a model is loaded: its prompt, and its gold answer.

A stream is looked at as it is read, its beginning before a model is loaded.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Json, Value

from ..demonstrations.encoding import column_names
from ..demonstrations.rendering import brief
from .numbers import exact_text, is_finite, is_number


CHECKED_AT_ONCE, STREAMED_AT_ONCE = 1000, 100  # rows
NUMBER_TYPES = ("int", "uint", "float", "decimal")
# Python's float has more digits than these, all of them made up
SHORT_FLOATS = {"float16": np.float16, "float32": np.float32}
EXPECTED_PROMPT = "expected a text, or a list of messages"


def checked_rows(dataset: Dataset | IterableDataset, where: str) -> Dataset | IterableDataset:
    """The dataset, with the numbers in `solution` as exact text.

    Raises:
        ValueError: naming the first row whose `prompt` is neither a text nor messages, or not like the other rows', or
            whose `solution` is a number that is none; for a stream also later, as it is read.
    """
    columns = column_names(dataset)
    if columns and "prompt" not in columns:
        raise ValueError(
            f"{where} has no column `prompt`, only {', '.join(columns)}: rename yours, or convert the dataset with "
            "luffy-trl prepare-data --prompt_column."
        )
    if isinstance(dataset, Dataset):
        if len(dataset) == 0:
            raise ValueError(f"{where} holds no rows.")
        _check_all_prompts(dataset, where)
        return with_text_answers(dataset, "solution", where)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{where} holds no rows.")
    features, dtype = dataset.features, None
    if features is not None and _may_hold_numbers(features.get("solution")):
        dtype = _dtype(features["solution"])
        features = Features(features | {"solution": Value("string")})
    check = StreamCheck(
        where,
        conversational=isinstance(first["prompt"], list),
        has_solution="solution" in columns,
        dtype=dtype,
        scalars_only=not isinstance(first.get("solution"), list | dict | bool),
    )
    checked = dataset.map(check, batched=True, batch_size=STREAMED_AT_ONCE, with_indices=True, features=features)
    next(iter(checked))
    return checked


def _check_all_prompts(dataset: Dataset, where: str) -> None:
    row, conversational = 0, None
    for prompts in _column_batches(dataset, "prompt"):
        if conversational is None:
            conversational = isinstance(prompts[0], list)
        for prompt in prompts:
            check_prompt(prompt, conversational, f"{where}, row {row}")
            row += 1


def _column_batches(dataset: Dataset, column: str) -> Iterator[list[Any]]:
    """A column's values, some at a time; images in them are not decoded."""
    is_json = isinstance(dataset.features[column], Json)
    for table in dataset.select_columns([column]).with_format("arrow").iter(CHECKED_AT_ONCE):
        values = table[column].to_pylist()
        yield [json.loads(v) if isinstance(v, str) else v for v in values] if is_json else values


@dataclass
class StreamCheck:
    """[`checked_rows`] of a batch of a stream, for `map(batched=True)`."""

    where: str
    conversational: bool
    has_solution: bool
    dtype: str | None
    scalars_only: bool

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        for row, prompt in zip(indices, batch["prompt"], strict=True):
            check_prompt(prompt, self.conversational, f"{self.where}, row {row}")
        if not self.has_solution:
            return {}
        answers = zip(indices, batch["solution"], strict=True)
        return {"solution": [self._text_answer(value, row) for row, value in answers]}

    def _text_answer(self, value: Any, row: int) -> Any:
        return _text_answer(value, self.dtype, f"{self.where}, row {row}: `solution`", self.scalars_only)


# Prompts


def check_prompt(prompt: Any, conversational: bool, where: str) -> None:
    """
    Args:
        conversational: whether the other rows' prompts are lists of messages.

    Raises:
        ValueError: starting with `where`, if the prompt is no text and no list of messages, or unlike the others.
    """
    if not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"{where}: `prompt` is {brief(prompt)}, {EXPECTED_PROMPT}.")
    for i, message in enumerate(prompt if isinstance(prompt, list) else []):
        _check_message(message, f"{where}: `prompt[{i}]`")
    if isinstance(prompt, list) is not conversational:
        others = "lists of messages" if conversational else "texts"
        raise ValueError(
            f"{where}: `prompt` is {brief(prompt)}, but the prompts before it are {others}: give all rows one form."
        )


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {brief(message)}, expected a message with a role and content.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        advice = ""
        if message.get("from") is not None and message.get("value") is not None:
            advice = " Rename `from` to role (human is user, gpt is assistant) and `value` to content."
        raise ValueError(f"{where} is {brief(_given(message))} without a role, expected role and content.{advice}")
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, str | list):
        raise ValueError(f"{where} has the content {brief(content)}, expected a text.")
    for j, part in enumerate(content if isinstance(content, list) else []):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or (kind == "text" and not isinstance(part.get("text"), str)):
            raise ValueError(
                f"{where} has the content[{j}] {brief(part)}, expected a part such as "
                "{'type': 'text', 'text': '...'}, or one text in place of the list."
            )


def _given(message: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that only other rows' messages have."""
    return {key: value for key, value in message.items() if value is not None}


# Gold answers


def with_text_answers(dataset: Dataset, column: str, where: str, missing_if_bad: bool = False) -> Dataset:
    """Numbers of a column, which no verifier reads, as exact text; nothing is done to a column without any.

    Args:
        missing_if_bad: None in place of an error, in a column of numbers; columns of several kinds stay as they are.

    Raises:
        ValueError: naming the row, for an infinity, and for lists and objects among numbers and texts.
    """
    feature = dataset.features.get(column)
    if not _may_hold_numbers(feature) or (missing_if_bad and isinstance(feature, Json)):
        return dataset
    dtype = _dtype(feature)
    texts: list[str | None] = []
    for values in _column_batches(dataset, column):
        for value in values:
            try:
                texts.append(_text_answer(value, dtype, f"{where}, row {len(texts)}: `{column}`", True))
            except ValueError:
                if not missing_if_bad:
                    raise
                texts.append(None)
    # A new column beside the old table, which is not written again
    names = dataset.column_names
    replaced = dataset.remove_columns(column).add_column(column, texts, feature=Value("string"))
    return replaced.select_columns(names)


def _may_hold_numbers(feature: Any) -> bool:
    return isinstance(feature, Json) or (isinstance(feature, Value) and feature.dtype.startswith(NUMBER_TYPES))


def _dtype(feature: Any) -> str | None:
    return feature.dtype if isinstance(feature, Value) else None


def _text_answer(value: Any, dtype: str | None, where: str, scalars_only: bool) -> Any:
    if is_number(value):
        if value != value:
            return None
        if not is_finite(value):
            raise ValueError(f"{where} is {value}, expected a number or a text.")
        return exact_text(Decimal(str(SHORT_FLOATS[dtype](value))) if dtype in SHORT_FLOATS else value)
    if scalars_only and not isinstance(value, str | None):
        raise ValueError(f"{where} is {brief(value)}, but other rows have a number or a text: give all rows one form.")
    return value
