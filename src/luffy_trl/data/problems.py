"""A table of problems and gold answers in the columns of the data contract: the problem is the user's message."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value

from ..demonstrations.rendering import brief


QUESTION_COLUMNS = ("question", "problem")
ANSWER_COLUMNS = ("answer", "solution")
# Where a table has an answer and a solution, the answer is the gold one and the solution its working
WORKING = "worked_solution"
MESSAGES = List({"role": Value("string"), "content": Value("string")})


@dataclass(frozen=True)
class ProblemColumns:
    """Which column holds the problem, a text, and which the gold answer."""

    question: str
    answer: str


def recognise_problems(columns: Sequence[str]) -> ProblemColumns | None:
    """The columns of a table without a `prompt`, if they can be told by their names."""
    questions = [name for name in QUESTION_COLUMNS if name in columns]
    answers = [name for name in ANSWER_COLUMNS if name in columns]
    if "prompt" in columns or len(questions) != 1 or not answers:
        return None
    return ProblemColumns(questions[0], answers[0])


def problems_to_contract(
    dataset: Dataset | IterableDataset, columns: Sequence[str], chosen: ProblemColumns, where: str
) -> Dataset | IterableDataset:
    """The dataset with `prompt` and `solution` in place of the chosen columns, all others kept. One line says so.

    Args:
        columns: the dataset's.

    Raises:
        ValueError: for a row whose problem is no text; of a stream, as it is read.
    """
    says = f"{where} is a table of problems: `{chosen.question}` is read as the prompt, `{chosen.answer}` as solution"
    if chosen.answer != "solution":
        if "solution" in columns:
            says += f", `solution` as {WORKING}"
            dataset = dataset.rename_column("solution", WORKING)
        dataset = dataset.rename_column(chosen.answer, "solution")
    features = dataset.features
    if features is not None:
        kept = {name: feature for name, feature in features.items() if name != chosen.question}
        features = Features({"prompt": MESSAGES} | kept)
    options: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": [chosen.question]}
    to_prompt = ToPrompt(chosen.question, where)
    state = PartialState()
    state.print(f"{says}.")
    if isinstance(dataset, IterableDataset):
        return dataset.map(to_prompt, features=features, **options)
    with state.main_process_first():  # the others read its cache
        return dataset.map(to_prompt, features=features, desc="Reading problems", **options)


@dataclass(frozen=True)
class ToPrompt:
    """Texts -> messages, for `map(batched=True, with_indices=True)`."""

    question: str
    where: str

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        for row, text in zip(indices, batch[self.question], strict=True):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{self.where}, row {row}: `{self.question}` is {brief(text)}, expected a text.")
        return {"prompt": [[{"role": "user", "content": text}] for text in batch[self.question]]}
