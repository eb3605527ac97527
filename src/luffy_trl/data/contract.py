"""Examples in the columns that the trainer reads, and the published schemas converted as `train.py` loads them."""

from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, List, Value

from .loading import first_rows
from .problems import MESSAGES, problems_to_contract, recognise_problems
from .schemas import Candidate, Example, Message, Schema, UnusableRowError, recognise


logger = get_logger(__name__)
# Raise it with every change of what conversion produces: part of the datasets cache's fingerprint
CONVERSION_VERSION = 1


def contract_features(conversational: bool, several: bool) -> Features:
    """The columns of the data contract, beside where each row came from."""
    text = MESSAGES if conversational else Value("string")
    demonstrations = {"demonstrations": List(text)} if several else {"completion": text}
    labels = dict.fromkeys(("solution", "source", "id"), Value("string"))
    return Features({"prompt": text} | demonstrations | labels)


def contract_row(example: Example, conversational: bool, several: bool) -> dict[str, Any]:
    """An example and its remaining demonstrations as a row of the data contract."""
    texts = [candidate.text for candidate in example.candidates if candidate.lost is None]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
    demonstrations = {"demonstrations": completions} if several else {"completion": next(iter(completions), None)}
    labels = {"solution": example.solution, "source": example.source, "id": example.id}
    return {"prompt": as_messages(example.prompt) if conversational else example.prompt} | demonstrations | labels


def as_messages(prompt: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The conversation with this system message, in place of its own."""
    return [{"role": "system", "content": text}, *(m for m in messages if m["role"] != "system")]


@dataclass(frozen=True)
class ToContract:
    """Rows of a published schema -> rows of the contract, for `datasets.map(batched=True)`.

    The source's verdicts are taken as they are: demonstrations that it calls wrong or unfinished are left out, and a
    prompt may be left without one. Rows that cannot be used at all become None, with the reason in `unusable`.
    """

    schema: Schema
    version: int = CONVERSION_VERSION

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        names = [*contract_features(True, self.schema.several), "unusable"]
        columns: dict[str, list] = {name: [] for name in names}
        for i, index in enumerate(indices):
            row = self._row({name: values[i] for name, values in batch.items()}, index)
            for name, values in columns.items():
                values.append(row.get(name))
        return columns

    def _row(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            example = self.schema.convert(row)
        except UnusableRowError as error:
            return {"unusable": f"row {index}: {error}"}
        example.candidates = [c for c in example.candidates if _is_right(c)]
        return contract_row(example, True, self.schema.several)


def _is_right(candidate: Candidate) -> bool:
    return candidate.lost is None and candidate.verified is not False


def to_contract(dataset: Dataset | IterableDataset, where: str) -> Dataset | IterableDataset:
    """A dataset in a published schema, or a table of problems, in the columns of the contract; any other as it is.

    One line says so. Rows that cannot be used are left out: counted in that line, or, of a stream, warned of one
    by one.
    """
    columns = dataset.column_names or list(first_rows(dataset, 1, where)[0])
    schema = recognise(columns)
    if schema is None:
        problems = recognise_problems(columns)
        return dataset if problems is None else problems_to_contract(dataset, columns, problems, where)
    features = contract_features(True, schema.several)
    target = "demonstrations" if schema.several else "completion"
    says = f"{where} has the columns of {schema.name}: read as prompt, {target} and solution"
    options = {
        "batched": True,
        "batch_size": 100,
        "with_indices": True,
        "remove_columns": columns,
        "features": Features(features | {"unusable": Value("string")}),
    }
    state = PartialState()
    if isinstance(dataset, IterableDataset):
        state.print(f"{says}, as it is streamed.")
        return dataset.map(ToContract(schema), **options).filter(_is_usable).remove_columns("unusable")
    with state.main_process_first():  # the others read its cache
        converted = dataset.map(ToContract(schema), desc=f"Converting {schema.name}", **options)
        reasons = [reason for reason in converted["unusable"] if reason is not None]
        if reasons:
            converted = converted.filter(lambda reason: reason is None, input_columns="unusable")
    left_out = f"; {len(reasons)} of {len(dataset)} rows left out, the first of them {reasons[0]}" if reasons else ""
    state.print(f"{says}{left_out}.")
    return converted.remove_columns("unusable")


def _is_usable(row: dict[str, Any]) -> bool:
    if row["unusable"] is not None:
        logger.warning(f"Left out {row['unusable']}", main_process_only=False)
    return row["unusable"] is None
