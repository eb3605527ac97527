"""Where the demonstrations of a group come from: the dataset, the policy's own past, or a function of the user's.

A source decides, before a generation, which rows of its groups hold a demonstration. One that draws on the rollouts of
the run (`uses_rollouts`) is also told what they were worth and how the policy saw them, and is saved with every
checkpoint.
"""

import json
import math
import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from ..runs.imports import named_function
from .encoding import (
    DROPPED_COLUMN,
    ENCODED_COLUMNS,
    PROMPT_OF_ENVIRONMENTS,
    ROW_COLUMN,
    TRUNCATED_COLUMN,
    Demonstration,
    DemonstrationEncoder,
    column_names,
    encode_dataset,
)
from .placement import Placement, Row, fill_groups, place_demonstrations
from .replay import ReplayBuffer, Trajectory


if TYPE_CHECKING:
    from ..config import LuffyConfig


# From a row of the dataset to its demonstrations: each a str, a list of messages, or a `Demonstration`
SourceFunction = Callable[[Row], list[Any] | None]

SOURCES = ("dataset", "replay")
FUNCTIONS: dict[str, SourceFunction] = {}


def register_source(function: SourceFunction) -> str:
    """Make a function known by its name, for a config that is saved by name; the later one of a name counts.

    Raises:
        ValueError: if it has no name of its own (a lambda, a partial) or that of a built-in source.
    """
    name = getattr(function, "__name__", "")
    if not name.isidentifier() or name in SOURCES:
        raise ValueError(f"demonstration_source={function!r} needs a name of its own: define it with `def`.")
    FUNCTIONS[name] = function
    return name


def get_source_function(name: str) -> SourceFunction:
    """The function behind a registered name or a dotted path.

    Raises:
        ValueError: if there is none.
    """
    return named_function(
        name,
        FUNCTIONS,
        "demonstration_source",
        f"demonstration_source={name!r} is not one of {', '.join(map(repr, SOURCES))}, nor the dotted path of a "
        "function of yours, such as my_demonstrations.of.",
    )


class DemonstrationSource(ABC):
    """What the trainer asks of a source. One that only places demonstrations needs only `place`."""

    uses_rollouts = False
    gives_logps = True  # whether any of its demonstrations may bring the behavior policy's log-probs
    overflow_is_known = False  # whether it was counted before training which demonstrations are too long

    # What a source does not need does nothing
    # ruff: noqa: B027

    @abstractmethod
    def place(self, rows: list[Row], group_size: int, per_group: int) -> Placement:
        """Choose the demonstrations of a generation, at most `per_group` in each group.

        Args:
            rows: of the dataset, whole groups of `group_size` copies of one of them, one after another. A source may
                put rows of its own in their place.
        """

    def record(self, rows: list[int], solved: list[int], rollouts: list[int]) -> None:
        """What came out of a generation: one value a group of all processes, the same on each of them."""

    def remember(self, row: int, token_ids: np.ndarray, logps: np.ndarray, entropy: float) -> None:
        """A solved rollout of this process, with the log-probs of the policy that sampled it and its mean entropy."""

    def metrics(self) -> dict[str, float]:
        """To be logged after each generation as means over the processes; the same names on all of them."""
        return {}

    def save(self, checkpoint: Path, process: int, processes: int) -> None:
        """Write what is needed to go on; each process calls it."""

    def load(self, checkpoint: Path, process: int, processes: int) -> None:
        """Go on from a checkpoint, of the same or another number of processes."""


class NoSource(DemonstrationSource):
    """No demonstration for any prompt: GRPO."""

    gives_logps = False

    def place(self, rows: list[Row], group_size: int, per_group: int) -> Placement:
        return Placement(rows, [None] * len(rows))


def remember_solved(
    source: DemonstrationSource, batch: dict[str, Any], logps: torch.Tensor, entropies: torch.Tensor
) -> None:
    """Hand the solved rollouts of a micro-batch to the source, the first time that they are seen.

    Args:
        batch: with `row_to_remember` `(B,)`, the rollout's row in the dataset, -1 for what is not to be remembered;
            -1 everywhere afterwards, for with `num_iterations` the batch comes again.
        logps, entropies: of the policy, `(B, T)`.
    """
    # TRL leaves the sampling policy's log-probs out where the policy has not moved since: then they are `logps`
    sampling_logps = batch.get("old_per_token_logps", logps)
    for i in (batch["row_to_remember"] >= 0).nonzero().flatten().tolist():
        mask = batch["completion_mask"][i].bool()  # (T,)
        if not mask.any():  # mask_truncated_completions: nothing of it is trained, now or later
            continue
        source.remember(
            int(batch["row_to_remember"][i]),
            batch["completion_ids"][i][mask].cpu().numpy(),
            sampling_logps[i][mask].float().cpu().numpy(),
            entropies[i][mask].float().mean().item(),
        )
    batch["row_to_remember"].fill_(-1)


class DatasetSource(DemonstrationSource):
    """The demonstrations that the dataset brings, encoded before training.

    Args:
        gives_logps: whether it has `completion_logps`.
        overflow_is_known: whether it is no stream.
    """

    def __init__(self, gives_logps: bool, overflow_is_known: bool):
        self.gives_logps, self.overflow_is_known = gives_logps, overflow_is_known

    def place(self, rows: list[Row], group_size: int, per_group: int) -> Placement:
        prompts = rows[::group_size]
        return Placement(
            rows,
            place_demonstrations(rows, group_size, per_group),
            dropped=sum(row[DROPPED_COLUMN] for row in prompts),
            truncated=sum(row[TRUNCATED_COLUMN] for row in prompts),
        )


class FunctionSource(DemonstrationSource):
    """What a function of the user's returns for each prompt, encoded as the dataset's demonstrations are.

    The function is called once a group, with the dataset's row.

    Raises:
        ValueError: from `place`, naming the function and the prompt, for what is no demonstration.
    """

    def __init__(self, function: SourceFunction, name: str, encoder: DemonstrationEncoder):
        self.function = function
        self.name = name
        self.encoder = encoder

    def place(self, rows: list[Row], group_size: int, per_group: int) -> Placement:
        available, dropped, truncated = [], 0, 0
        for row in rows[::group_size]:
            encoded = self._encoded({key: value for key, value in row.items() if key not in ENCODED_COLUMNS})
            fitting = [self.encoder.fitting(*pair) for pair in encoded]
            kept = [demonstration for demonstration in fitting if demonstration is not None]
            available.append(kept)
            dropped += len(encoded) - len(kept)
            truncated += sum(
                short is not None and len(short.token_ids) < len(whole.token_ids)
                for short, (whole, _) in zip(fitting, encoded, strict=True)
            )
        return Placement(rows, fill_groups(available, group_size, per_group), dropped, truncated)

    def _encoded(self, row: Row) -> list[tuple[Demonstration, str]]:
        """Each demonstration, and what messages call it."""
        prompt = row.get("prompt", PROMPT_OF_ENVIRONMENTS)
        try:
            values = self.function(row)
        except Exception as error:
            error.add_note(f"Raised by demonstration_source {self.name!r} for the prompt {prompt!r:.200}")
            raise
        where = f"demonstration_source {self.name!r}, prompt {prompt!r:.200}: what it returned"
        if values is not None and not isinstance(values, list):
            raise ValueError(
                f"{where} is a {type(values).__name__}, expected a list of completions (each a str, a list with one "
                "assistant message or a trajectory, or a luffy_trl.demonstrations.Demonstration), or None."
            )
        named = [(value, f"{where}[{i}]") for i, value in enumerate(values or [])]
        return [(self.encoder.encode(value, {"prompt": prompt} | row, name), name) for value, name in named]


class ReplaySource(DemonstrationSource):
    """ExGRPO: some groups of a generation are of prompts that the policy has solved before, with a past solution.

    Success and retirement are of all processes; each keeps the trajectories that it has sampled itself.

    Args:
        dataset: what the rows come from. `self.dataset` is the same with the column `ROW_COLUMN`.
        ratio: share of a generation's groups that are replayed, where the buffer has as many prompts. A fraction of a
            group is left to chance.
    """

    uses_rollouts = True

    def __init__(self, dataset: Dataset, buffer: ReplayBuffer, ratio: float):
        self.dataset = dataset.add_column(ROW_COLUMN, list(range(len(dataset))))
        self.buffer = buffer
        self.ratio = ratio
        self._replayed = 0.0  # share of the latest generation's groups

    def place(self, rows: list[Row], group_size: int, per_group: int) -> Placement:
        groups = len(rows) // group_size
        replayed: dict[int, int] = {}  # group -> row of the dataset
        if self.buffer.started:
            number = int(self.ratio * groups + random.random())
            prompts = self.buffer.sample(number, leave_out={row[ROW_COLUMN] for row in rows})
            replayed = dict(zip(random.sample(range(groups), len(prompts)), prompts, strict=True))
        self._replayed = len(replayed) / groups
        new_rows: list[Row] = []
        available: list[list[Demonstration]] = []
        for group in range(groups):
            if group in replayed:
                row = replayed[group]
                new_rows += [self.dataset[row]] * group_size
                available.append([Demonstration(*t.unpacked()) for t in self.buffer.best(row, per_group)])
            else:
                new_rows += rows[group * group_size : (group + 1) * group_size]
                available.append([])
        return Placement(new_rows, fill_groups(available, group_size, per_group))

    def record(self, rows: list[int], solved: list[int], rollouts: list[int]) -> None:
        self.buffer.record(rows, solved, rollouts)

    def remember(self, row: int, token_ids: np.ndarray, logps: np.ndarray, entropy: float) -> None:
        self.buffer.add(Trajectory.of(row, token_ids, logps, entropy))

    def metrics(self) -> dict[str, float]:
        return {
            "replay/size": float(len(self.buffer)),
            "replay/prompts": float(len(self.buffer.prompts)),
            "replay/retired": float(len(self.buffer.retired)),
            "replay/groups": self._replayed,
        }

    def save(self, checkpoint: Path, process: int, processes: int) -> None:
        self.buffer.save(checkpoint, process, processes, _identity(self.dataset))

    def load(self, checkpoint: Path, process: int, processes: int) -> None:
        self.buffer.load(checkpoint, process, processes, _identity(self.dataset))


def open_source(
    dataset: Dataset | IterableDataset,
    encoder: DemonstrationEncoder,
    args: "LuffyConfig",
    processes: int,
    first: AbstractContextManager,
) -> tuple[DemonstrationSource, Dataset | IterableDataset]:
    """The source that `demonstration_source` names, and the dataset with the columns that it needs.

    Args:
        processes: that share the replay buffer's capacity.
        first: see `encode_dataset`.
    """
    if args.demonstration_source == "dataset":
        gives_logps, is_table = "completion_logps" in column_names(dataset), isinstance(dataset, Dataset)
        return DatasetSource(gives_logps, overflow_is_known=is_table), encode_dataset(dataset, encoder, first)
    if args.demonstration_source == "replay":
        capacity = math.ceil(args.replay_capacity / processes)
        buffer = ReplayBuffer(capacity, args.replay_start, args.num_generations, encoder.max_length)
        source = ReplaySource(dataset, buffer, args.replay_ratio)
        return source, source.dataset
    function = get_source_function(args.demonstration_source)
    return FunctionSource(function, args.demonstration_source, encoder), dataset


def _identity(dataset: Dataset) -> str:
    """The number of rows, and a checksum of up to about 1000 prompts among them."""
    prompts = dataset.select(range(0, len(dataset), max(len(dataset) // 1000, 1)))["prompt"]
    texts = json.dumps(list(prompts), default=lambda image: type(image).__name__)
    return f"{len(dataset)}-{zlib.crc32(texts.encode()):08x}"
