"""The card of a dataset of teachers' demonstrations."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ..data.publishing import COLUMNS, VERSIONS_OF, Source
from ..runs.recipe import plain, shown_command
from ..runs.redaction import known_secrets, redact_values
from .answers import MODEL_FILES
from .finishing import Account


CARD_TEXT = """
# {name}

Problems of {source} with demonstrations that {teachers} wrote, for reinforcement learning with LUFFY (arXiv
2504.14945), made by `luffy-trl make-demonstrations`. {solved}

| column | meaning |
| --- | --- |
{columns}

```python
from datasets import load_dataset

dataset = load_dataset("{load}", split="train")
```

## Teachers

| teacher | answers | right | kept | prompt tokens | answer tokens |
| --- | ---: | ---: | ---: | ---: | ---: |
{by_teacher}

{settings}

## What became of the answers

| | answers |
| --- | ---: |
{counts}

An answer is right if {right_if}. {logps}

## How it was made

```bash
{command}
```

With {versions}. {licence} What a model's licence says of training on its answers is for you to look up.
"""
MEANING = {
    **COLUMNS,
    "teacher": "which teacher wrote the demonstration, or each of them",
    "completion_logps": "the teacher's log-probs of the demonstration's tokens, its end included",
}


def dataset_card(
    name: str,
    load: str,
    source: Source,
    columns: Sequence[str],
    account: Account,
    settings: Mapping[str, Mapping[str, Any]],
    right_if: str,
    split: str,
    argv: Sequence[str],
    secrets: set[str],
) -> str:
    """
    Args:
        load: what `load_dataset` takes to load it.
        settings: by teacher, what its answers depend on.
        split: a sentence on the test split.
        argv: the command's arguments.
        secrets: of the teachers.
    """
    text = CARD_TEXT.format(
        name=name,
        load=load,
        source=source.text,
        teachers=", ".join(f"`{teacher}`" for teacher in settings) or "nobody",
        solved=f"{account.solved:,} of {account.problems:,} problems have one; the others stay without. {split}",
        columns="\n".join(f"| `{column}` | {MEANING.get(column, 'of the source')} |" for column in columns),
        by_teacher=rows(account.by_teacher()),
        settings="\n".join(_asked_with(teacher, made, secrets) for teacher, made in settings.items()),
        counts=rows(account.table()),
        right_if=right_if,
        logps=logps_sentence(account),
        command=shown_command(["luffy-trl", "make-demonstrations", *argv], secrets | known_secrets()),
        versions=", ".join(f"{package} {version(package)}" for package in VERSIONS_OF),
        licence=f"The licence of {source.title} is {source.licence or 'not known here: look it up'}.",
    )
    header = DatasetCardData(license=source.licence, tags=["luffy_trl", "reasoning", "synthetic"])
    return str(DatasetCard(f"---\n{header}\n---\n{text}"))


def rows(table: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def logps_sentence(account: Account) -> str:
    """How many demonstrations have their teacher's log-probs, and why others have not."""
    if not account.with_logps and not account.without_logps:
        return ""
    reasons = ", ".join(f"{count:,} because {why}" for why, count in account.without_logps.most_common())
    without = f"; left out were {reasons}" if reasons else ""
    return f"{account.with_logps:,} demonstrations have their teacher's log-probs{without}."


def _asked_with(teacher: str, made: Mapping[str, Any], secrets: set[str]) -> str:
    shown = plain(redact_values({k: v for k, v in made.items() if k != MODEL_FILES and v not in (None, {})}, secrets))
    return f"- `{teacher}`: " + ", ".join(f"{name} {value}" for name, value in shown.items())
