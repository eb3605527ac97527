"""Rows of published datasets, and of the user's own columns, as one prompt, its demonstrations and the gold answer.

Two published schemas are recognised by their columns:

    Elliott/Openr1-Math-46k-8192   prompt (system and user message), target (one assistant message),
                                   reward_model.ground_truth, data_source, extra_info.index
    open-r1/OpenR1-Math-220k       problem, answer, generations (several traces), correctness_math_verify and
                                   is_reasoning_complete (a bool for each trace), source, uuid

Everything here is a pure function of one row. What cannot be used is said, never guessed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..demonstrations.encoding import demonstration_text
from ..demonstrations.rendering import brief
from .numbers import exact_text, is_finite, is_number


# What rows and demonstrations are dropped for, in the order in which it is looked at
BAD_PROMPT = "malformed prompt"
NO_GOLD = "gold answer missing"
NO_DEMONSTRATION = "no demonstration"
BAD_DEMONSTRATION = "malformed demonstration"
UNFINISHED = "unfinished reasoning"

Message = dict[str, str]


class UnusableRowError(ValueError):
    """A row that cannot be used at all: `reason` is what it is counted under, the message says why."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class Candidate:
    """One demonstration of a row: its text, and what it was dropped for, if it was."""

    text: str
    lost: str | None = None
    detail: str | None = None
    verified: bool | None = None  # the source's own verdict


@dataclass
class Example:
    """A row of any schema."""

    prompt: str | list[Message]
    solution: str
    candidates: list[Candidate] = field(default_factory=list)
    source: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Schema:
    """How rows of a dataset become examples.

    Args:
        name: for messages.
        columns: what it is recognised by.
        gold_column: the one with the gold answer, or an object that holds it.
        convert: row -> Example; raises UnusableRowError.
        conversational: whether prompts are messages. None: as the dataset's first prompts are.
        several: whether a row may have several demonstrations.
        has_verdicts: whether the source says which demonstrations are right.
    """

    name: str
    columns: tuple[str, ...]
    gold_column: str
    convert: Callable[[dict[str, Any]], Example]
    conversational: bool | None = True
    several: bool = False
    has_verdicts: bool = False


def recognise(columns: Iterable[str]) -> Schema | None:
    """The published schema that has these columns."""
    return next((schema for schema in PUBLISHED if set(schema.columns) <= set(columns)), None)


def own_columns(
    prompt: str, demonstration: str | None, solution: str, several: bool, conversational: bool | None = None
) -> Schema:
    """The schema of a dataset with one column each for prompt, demonstration (or several, or none) and gold answer."""
    convert = OwnColumns(prompt, demonstration, solution, several)
    columns = tuple(column for column in (prompt, demonstration, solution) if column is not None)
    return Schema("your columns", columns, solution, convert, conversational, several)


@dataclass(frozen=True)
class OwnColumns:
    prompt: str
    demonstration: str | None
    solution: str
    several: bool

    def __call__(self, row: dict[str, Any]) -> Example:
        value = None if self.demonstration is None else row.get(self.demonstration)
        values = [] if value is None else value if self.several else [value]
        return Example(
            prompt=_prompt(row.get(self.prompt), self.prompt),
            solution=_gold(row.get(self.solution), self.solution),
            candidates=_candidates(values, str(self.demonstration), named=self.several),
            source=_label(row.get("source")),
            id=_label(row.get("id")),
        )


def luffy_row(row: dict[str, Any]) -> Example:
    """A row of Elliott/Openr1-Math-46k-8192."""
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        raise UnusableRowError(BAD_PROMPT, f"`prompt` is {brief(prompt)}, expected a list of messages")
    target, extra_info = row.get("target"), row.get("extra_info")
    return Example(
        prompt=_prompt(prompt, "prompt"),
        solution=_gold(_field(row.get("reward_model"), "ground_truth"), "reward_model.ground_truth"),
        # A text alone is a demonstration in the data contract, but not in this schema
        candidates=_candidates([] if target is None else [target], "target", named=False, text_alone=False),
        source=_label(row.get("data_source")),
        id=_label(_field(extra_info, "index")),
    )


def openr1_row(row: dict[str, Any]) -> Example:
    """A row of open-r1/OpenR1-Math-220k. Traces that the source calls unfinished are lost."""
    problem = row.get("problem")
    if not isinstance(problem, str):
        raise UnusableRowError(BAD_PROMPT, f"`problem` is {brief(problem)}, expected a text")
    generations = row.get("generations")
    candidates = _candidates([] if generations is None else generations, "generations", named=True)
    complete = _flags(row, "is_reasoning_complete", len(candidates))
    verified = _flags(row, "correctness_math_verify", len(candidates))
    for candidate, is_complete, is_right in zip(candidates, complete, verified, strict=True):
        candidate.verified = is_right
        if candidate.lost is None and is_complete is False:
            candidate.lost, candidate.detail = UNFINISHED, "`is_reasoning_complete` is false"
    return Example(
        prompt=_prompt([{"role": "user", "content": problem}], "problem"),
        solution=_gold(row.get("answer"), "answer"),
        candidates=candidates,
        source=_label(row.get("source")),
        id=_label(row.get("uuid")),
    )


PUBLISHED = (
    Schema("Openr1-Math-46k-8192", ("prompt", "target", "reward_model"), "reward_model", luffy_row),
    Schema(
        "OpenR1-Math-220k",
        ("problem", "answer", "generations"),
        "answer",
        openr1_row,
        several=True,
        has_verdicts=True,
    ),
)


def user_text(prompt: str | list[Message]) -> str:
    """The problem itself: the prompt without system messages."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt if message["role"] != "system")


def _prompt(value: Any, column: str) -> str | list[Message]:
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not value:
        raise UnusableRowError(BAD_PROMPT, f"`{column}` is {brief(value)}, expected a text or a list of messages")
    messages = [_message(message, f"`{column}[{i}]`") for i, message in enumerate(value)]
    if not user_text(messages).strip():
        raise UnusableRowError(BAD_PROMPT, f"`{column}` asks nothing: it has no user message with a text")
    if messages[-1]["role"] == "assistant":
        raise UnusableRowError(BAD_PROMPT, f"`{column}` ends with an assistant message, expected the user's")
    return messages


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str) or not value["role"]:
        raise UnusableRowError(BAD_PROMPT, f"{where} is {brief(value)}, expected a message with role and content")
    content = value.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UnusableRowError(BAD_PROMPT, f"{where} has content {brief(content)}, expected a text")
    return {"role": value["role"], "content": content}


def _gold(value: Any, column: str) -> str:
    text = exact_text(value) if is_number(value) and is_finite(value) else value
    if not isinstance(text, str) or not text.strip():
        raise UnusableRowError(NO_GOLD, f"`{column}` is {brief(value)}, expected an answer")
    return text


def _candidates(values: Any, column: str, named: bool, text_alone: bool = True) -> list[Candidate]:
    if not isinstance(values, list):
        return [Candidate("", BAD_DEMONSTRATION, f"`{column}` is {brief(values)}, expected a list of demonstrations")]
    candidates = []
    for i, value in enumerate(values):
        where = f"`{column}[{i}]`" if named else f"`{column}`"
        try:
            if isinstance(value, str) and not text_alone:
                raise ValueError(f"{where} is {brief(value)}, expected a list with one assistant message")
            candidates.append(Candidate(demonstration_text(value, where)))
        except ValueError as error:
            candidates.append(Candidate("", BAD_DEMONSTRATION, str(error)))
    return candidates


def _flags(row: dict[str, Any], column: str, count: int) -> list[bool | None]:
    """One flag for each demonstration; None where the dataset says nothing."""
    flags = row.get(column)
    if flags is None:
        return [None] * count
    if not isinstance(flags, list) or len(flags) != count:
        raise UnusableRowError(
            BAD_DEMONSTRATION, f"`{column}` is {brief(flags)}, expected one flag for each of {count} `generations`"
        )
    return [flag if isinstance(flag, bool) else None for flag in flags]


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _label(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int) else None
