"""Datasets from where users keep them: the Hub, a file, a directory; or made on the spot by reasoning-gym."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from ..tasks.gym import is_gym_task
from ..tasks.gym_splits import gym_splits
from .builder import FilesBuilder
from .directories import has_rules_of_its_own, split_files
from .files import CELLS, TYPED, ending, expected_endings, looks_like_a_file
from .tables import no_rows, streamed_csv, streamed_json


# Raise it with every change of what the readers produce: part of a file's name in the datasets cache
READER_VERSION = 1


def check_file(name: str, where: str) -> None:
    """Raises ValueError if `name` is meant as a file, and is none, or none that is read."""
    path = Path(name)
    if path.is_dir() or is_gym_task(name):
        return
    if not path.exists() and looks_like_a_file(name):
        raise ValueError(f"{where}: there is no such file.")
    if path.exists() and ending(name) is None:
        what = f"a {path.suffix} file" if path.suffix else "a file whose name has no ending"
        raise ValueError(f"{where} is {what}, which is not read: expected a file that ends in {expected_endings()}.")


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what `datasets` raises for broken and for empty files into one sentence that begins with `where`."""
    try:
        yield
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        text = "it holds no rows" if isinstance(error, StopIteration) else " ".join(str(cause).split())
        raise ValueError(f"{where} cannot be read: {text}") from error


def load_splits(
    name: str, where: str, config: str | None = None, streaming: bool = False, only_split: str = "train"
) -> Mapping[str, Dataset | IterableDataset]:
    """All splits of a file, a directory (of files, or from `save_to_disk`), a reasoning-gym task or a Hub dataset.

    Args:
        where: what to call the dataset in messages, such as "--dataset_name data.jsonl".
        config: of a Hub dataset that has several.
        streaming: read files as they are needed. A directory written by `save_to_disk` is mapped into memory anyway.
        only_split: the name for a dataset that was saved without splits.

    Raises:
        ValueError: for a file that is missing, broken or empty, and for a configuration that does not exist (only
            datasets of the Hub have any).
        OSError: for a dataset that cannot be found or reached.
    """
    check_file(name, where)
    if is_gym_task(name):
        return gym_splits(name)
    path = Path(name)
    if config is not None and path.exists():
        raise ValueError(f"{where} is not on the Hub, so it has no configuration {config!r} to choose.")
    with reading(where):
        if path.is_file():
            return {"train": _read([path], "train", streaming)}
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            if "::" in name:
                raise ValueError("`datasets` takes `::` in its name for a link into an archive: rename the directory")
            saved = datasets.load_from_disk(name)
            return saved if isinstance(saved, DatasetDict) else {only_split: saved}
    if path.is_dir() and not has_rules_of_its_own(path) and (files := split_files(path, where)):
        with reading(where):
            return {split: _read(paths, split, streaming) for split, paths in files.items()}
    with reading(where):
        return datasets.load_dataset(name, config, streaming=streaming)


def _read(files: Sequence[Path], split: str, streaming: bool) -> Dataset | IterableDataset:
    """The rows of files of one format, in the order of the files; from the cache, if they are as they were."""
    paths = [path.absolute() for path in files]
    names, suffix = [str(path) for path in paths], ending(files[0].name)
    if streaming and suffix not in TYPED:
        rows = streamed_csv if suffix in CELLS else streamed_json
        return IterableDataset.from_generator(rows, gen_kwargs={"files": names})
    stats = [path.stat() for path in paths]
    stamps = [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats]  # of files that were written again
    config_id = Hasher.hash((READER_VERSION, split, names, stamps))
    builder = FilesBuilder(dataset_name="data_files", config_id=config_id, files=names, split=split)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    if builder.info.splits[split].num_examples == 0:
        raise ValueError(no_rows(files))
    return builder.as_dataset(split=split)


def choose_split(
    splits: Mapping[str, Dataset | IterableDataset], split: str, where: str, options: str
) -> Dataset | IterableDataset:
    """One of the splits.

    Raises:
        ValueError: if there is no such split, naming those that exist and the `options` to choose with.
    """
    if split not in splits:
        raise ValueError(
            f"{where} has no split {split!r}, only {', '.join(map(repr, splits))}. Choose with {options}."
        )
    return splits[split]


def first_rows(dataset: Dataset | IterableDataset, count: int, where: str) -> list[dict[str, Any]]:
    """The first rows, at least one.

    Raises:
        ValueError: if there are none, or they cannot be read.
    """
    with reading(where):
        rows = list(islice(dataset, count))
        if not rows:
            raise StopIteration
    return rows


def batches(dataset: Dataset | IterableDataset, size: int, where: str) -> Iterator[dict[str, list]]:
    """The dataset's rows as batches of columns.

    Raises:
        ValueError: where a stream cannot be read any further.
    """
    iterator = iter(dataset.iter(batch_size=size))
    while True:
        with reading(where):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch
