"""The filters that look at one row at a time: what `datasets.map` spreads over processes."""

from dataclasses import dataclass, replace
from typing import Any

from datasets import Features, List, Value

from ..demonstrations.encoding import USABLE_COLUMN, DemonstrationEncoder
from ..demonstrations.prompts import render
from .contract import as_messages
from .filters import BenchmarkIndex, problem_key
from .problems import MESSAGES
from .schemas import (
    BAD_DEMONSTRATION,
    BAD_PROMPT,
    Candidate,
    Example,
    Schema,
    UnusableRowError,
    user_text,
)


CONTAMINATED = "contaminated"
TOO_LONG = "too long"


def screened_features(conversational: bool) -> Features:
    """What is known of a row after screening. `reason` is None unless the whole row is dropped."""
    return Features(
        {
            "row": Value("int64"),
            "id": Value("string"),
            "source": Value("string"),
            "prompt": MESSAGES if conversational else Value("string"),
            "solution": Value("string"),
            "key": Value("binary"),
            "candidates": List(
                {
                    "text": Value("string"),
                    "lost": Value("string"),
                    "detail": Value("string"),
                    "verified": Value("bool"),
                }
            ),
            "reason": Value("string"),
            "detail": Value("string"),
        }
    )


@dataclass
class Screener:
    """Converts rows, and drops those that are malformed, contaminated or too long; for `datasets.map(batched=True)`.

    Dropped rows stay, without their texts, to be counted.

    Args:
        schema: what the rows look like.
        conversational: whether prompts become messages or stay texts.
        system_prompt: None leaves the dataset's own, "" removes it, another text replaces it. Needs messages.
        benchmarks: where no training problem may be found; None: not compared.
        encoder: counts tokens as the trainer does, with `overflow="drop"`; None: no limit.
    """

    schema: Schema
    conversational: bool
    system_prompt: str | None
    benchmarks: BenchmarkIndex | None
    encoder: DemonstrationEncoder | None

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in screened_features(self.conversational)}
        for i, index in enumerate(indices):
            row = {"row": index} | self.screen({name: values[i] for name, values in batch.items()})
            for name, values in columns.items():
                values.append(row.get(name))
        return columns

    def screen(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            example = self._as_asked(self.schema.convert(row))
            self._check_template(example, "it")
        except UnusableRowError as error:
            return {"reason": error.reason, "detail": str(error), "candidates": []}
        problem = user_text(example.prompt)
        found = self.benchmarks.find(problem) if self.benchmarks is not None else None
        if found is None and self.encoder is not None:
            example.candidates = [self._measured(candidate, example) for candidate in example.candidates]
        candidates = [replace(c, text="") if found or c.lost else c for c in example.candidates]
        return {
            "id": example.id,
            "source": example.source,
            "prompt": None if found else example.prompt,
            "solution": example.solution,
            "key": problem_key(problem),
            "candidates": [vars(candidate) for candidate in candidates],
            "reason": CONTAMINATED if found else None,
            "detail": found,
        }

    def _as_asked(self, example: Example) -> Example:
        if not self.conversational:
            if not isinstance(example.prompt, str):
                raise UnusableRowError(BAD_PROMPT, "the prompt is a list of messages, the first prompts are texts")
            return example
        messages = as_messages(example.prompt)
        if self.system_prompt is not None:
            messages = [message for message in messages if message["role"] != "system"]
        if self.system_prompt:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return replace(example, prompt=messages)

    def check_head(self, rows: list[dict[str, Any]], source: str) -> None:
        """Raises ValueError if the tokenizer's chat template refuses all prompts at the beginning, and so the rest."""
        refusals = []
        for i, row in enumerate(rows):
            try:
                example = self._as_asked(self.schema.convert(row))
            except UnusableRowError:
                continue
            try:
                self._check_template(example, f"{source}, row {i}")
                return
            except UnusableRowError as error:
                refusals.append(str(error))
        if refusals:
            raise ValueError(refusals[0])

    def _check_template(self, example: Example, where: str) -> None:
        """Raises UnusableRowError, starting with `where`, if the trainer could not render the prompt."""
        if self.encoder is None:
            return
        try:
            render(self.encoder.processing_class, {"prompt": example.prompt}, self.encoder.chat_template_kwargs, where)
        except ValueError as error:
            raise UnusableRowError(BAD_PROMPT, str(error)) from error

    def _measured(self, candidate: Candidate, example: Example) -> Candidate:
        if candidate.lost is not None:
            return candidate
        assert self.encoder is not None
        try:
            encoded = self.encoder({"prompt": [example.prompt], "completion": [candidate.text]}, [0])
        except ValueError as error:  # an EOS inside
            text = str(error).removeprefix("Row 0: ")
            return replace(candidate, lost=BAD_DEMONSTRATION, detail=text)
        if encoded[USABLE_COLUMN] == [0]:
            return replace(candidate, lost=TOO_LONG, detail=f"more than {self.encoder.max_length} tokens")
        return candidate
