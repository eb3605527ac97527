"""The card of a prepared dataset, and its way to the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..runs.hub_client import HTTPError
from ..runs.recipe import shown_command
from ..runs.redaction import known_secrets
from ..tasks.gym import is_gym_task


VERSIONS_OF = ("luffy_trl", "math-verify", "transformers", "datasets")
DATASET_CARD = """
# {name}

Problems with demonstrations for reinforcement learning with LUFFY (arXiv 2504.14945), prepared from {source} by
`luffy-trl prepare-data`.

| column | meaning |
| --- | --- |
{columns}

```python
from datasets import load_dataset

dataset = load_dataset("{load}", split="train")
```

## What was kept and dropped

{counts}

Each dropped row, its reason and what was found are in `dropped.jsonl`; `row` counts the rows of {source} from 0.

## How it was made

```bash
{command}
```

With {versions}. {licence}
"""
COLUMNS = {
    "prompt": "the problem",
    "completion": "the demonstration; null: there is none",
    "demonstrations": "the demonstrations, if there are any",
    "solution": "the gold answer",
    "source": "where the source says the problem is from",
    "id": "the source's own name of the row",
}


@dataclass(frozen=True)
class Source:
    """Where the rows come from. Licence and revision are the Hub's; None where it is not known."""

    name: str
    licence: str | None = None
    revision: str | None = None

    @property
    def title(self) -> str:
        """The Hub's name, or a file's without its folders."""
        return Path(self.name).name if Path(self.name).exists() else self.name

    @property
    def text(self) -> str:
        if Path(self.name).exists():
            return f"`{self.title}`"
        revision = "" if self.revision is None else f" (revision {self.revision})"
        return f"[{self.name}](https://huggingface.co/datasets/{self.name}){revision}"


def look_up(name: str) -> Source:
    """What the Hub says of a dataset. A file, a task, or a Hub that cannot be reached, says nothing."""
    if Path(name).exists() or is_gym_task(name):
        return Source(name)
    try:
        info = HfApi().dataset_info(name, timeout=20)
    except (OSError, HTTPError):
        return Source(name)
    return Source(name, info.card_data.get("license") if info.card_data else None, info.sha)


def dataset_card(
    name: str, load: str, source: Source, columns: Sequence[str], table: list[list[str]], argv: Sequence[str]
) -> DatasetCard:
    """The card: what is in the dataset, what was left out and how it was made.

    Args:
        load: what `load_dataset` takes to load it.
        table: what, rows and demonstrations; see `Tally.table`.
        argv: the command's arguments. Absolute paths are shortened to their last part: a machine's folders are no
            one's business.
    """
    # No `configs` here: `data/train-*` is found without them, and with them datasets 5.2 takes two directories of one
    # name, or one that was written again, for the same dataset, and loads the older from its cache.
    data = DatasetCardData(license=source.licence, tags=["luffy_trl", "reasoning"])
    header = [["", "rows", "demonstrations"], ["---", "---:", "---:"]]
    licence = f"The licence is that of {source.title}: {source.licence}."
    if source.licence is None:
        licence = f"The licence of {source.title} is not known here: look it up before you share this."
    text = DATASET_CARD.format(
        name=name,
        load=load,
        source=source.text,
        columns="\n".join(f"| `{column}` | {COLUMNS[column]} |" for column in columns),
        counts="\n".join(f"| {' | '.join(row)} |" for row in header + table),
        command=shown_command(["luffy-trl", "prepare-data", *argv], known_secrets()),
        versions=", ".join(f"{package} {version(package)}" for package in VERSIONS_OF),
        licence=licence,
    )
    return DatasetCard(f"---\n{data}\n---\n{text}")


def push(
    directory: Path,
    repo_id: str,
    private: bool,
    made_by: str = "prepared by luffy-trl prepare-data",
    left_out: Sequence[str] = (),
) -> str:
    """Upload the dataset; returns its address.

    Args:
        made_by: for the commit's message.
        left_out: patterns of files that stay here.

    Raises:
        ValueError: if the Hub refuses it or cannot be reached.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=directory,
            repo_type="dataset",
            commit_message=f"Add the dataset {made_by}",
            ignore_patterns=list(left_out),
        )
    except (OSError, ValueError, HTTPError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"The push to {repo_id} failed: {first}") from error
    return str(url)
