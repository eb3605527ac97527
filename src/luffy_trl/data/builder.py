"""Data files for `datasets`: its cache on disk, and its streams, without its way of finding files.

`datasets` replaces `open` and `Path` in the module of a builder by its own, to which `::` in a name is a link into an
archive: everything that opens a file is in `tables.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
from datasets.builder import Key

from .tables import features_of, tables_of


@dataclass
class FilesConfig(datasets.BuilderConfig):
    files: list[str] | None = None
    split: str = "train"


class FilesBuilder(datasets.ArrowBasedBuilder):
    """One split of files of one format."""

    BUILDER_CONFIG_CLASS = FilesConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.info.features = features_of(self.config.files)
        return [datasets.SplitGenerator(name=self.config.split, gen_kwargs={"files": self.config.files})]

    def _generate_shards(self, files: list[str]) -> Iterator[str]:
        yield from files

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Key, pa.Table]]:
        for i, name in enumerate(files):
            for j, table in enumerate(tables_of(name, self.info.features)):
                yield Key(i, j), table
