"""The replay buffer of ExGRPO (arXiv 2510.02245): the policy's own solutions, kept to learn from again.

A trajectory is a rollout that earned its reward, with the log-prob of each token under the policy that sampled it. Of
all prompts, those are worth replaying that the policy solves about half of the time, and of a prompt's trajectories
the one that the policy was surest of:

    P(bucket) ~ exp(-(success - 1/2)^2 / (2 sigma^2)), sigma = 1    over the buckets that hold a prompt, one for each
                                                                    number of solved rollouts in a group
    P(prompt | bucket) uniform
    trajectory = argmin of the mean token entropy

A prompt whose rollouts are all solved is retired: its trajectories are forgotten, and it is not replayed again.
"""

import logging
import math
import random
from bisect import bisect, insort
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np


logger = logging.getLogger(__name__)

# ExGRPO's weights of the buckets: the density of a normal distribution
CENTER, SIGMA = 0.5, 1.0

# The least log-prob that 16 bits hold
LEAST_FLOAT16 = -65504.0

# One directory a process in each checkpoint, and what is in it
DIRECTORY = "replay-{process}-of-{processes}"
INDEX, TOKEN_IDS, LOGPS = "index.npz", "token_ids.npy", "logps.npy"
INDEX_ARRAYS = ("rows", "lengths", "entropies", "success_rows", "success", "retired", "started", "dataset")


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One rollout, as bytes: Python's lists would take six times the memory.

    6 bytes a token. A log-prob is off by at most 0.05% of itself in 16 bits.
    """

    row: int  # of the dataset
    entropy: float  # mean over the tokens, in nats
    token_ids: bytes  # int32
    logps: bytes  # float16

    @classmethod
    def of(cls, row: int, token_ids: np.ndarray, logps: np.ndarray, entropy: float) -> "Trajectory":
        logps = np.maximum(logps, LEAST_FLOAT16).astype(np.float16)
        return cls(row, entropy, token_ids.astype(np.int32).tobytes(), logps.tobytes())

    def unpacked(self) -> tuple[list[int], list[float]]:
        """Token ids and log-probs."""
        return np.frombuffer(self.token_ids, np.int32).tolist(), np.frombuffer(self.logps, np.float16).tolist()


class ReplayBuffer:
    """Past solutions by prompt, and how often each prompt is solved. Prompts are rows of the dataset.

    Where it is full the oldest trajectory goes: the policy has moved away from it the farthest.

    Args:
        capacity: trajectories, 1 or more.
        start: mean share of solved rollouts that a generation must reach once before anything is replayed.
        group_size: rollouts of a prompt at a time, which is the number of buckets.
        longest: tokens of a trajectory that `load` takes; a run may be resumed with a smaller limit.
    """

    def __init__(self, capacity: int, start: float, group_size: int, longest: float = math.inf):
        self.longest = longest
        self.capacity = capacity
        self.start = start
        self.group_size = group_size
        self.clear()

    def clear(self) -> None:
        self.started = False
        self.success: dict[int, float] = {}  # row -> share of its latest rollouts that were solved
        self.retired: set[int] = set()
        self._trajectories: OrderedDict[int, Trajectory] = OrderedDict()  # by number, the oldest first
        self._numbers: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)  # row -> (entropy, number)
        self._next = 0

    def __len__(self) -> int:
        return len(self._trajectories)

    @property
    def prompts(self) -> Collection[int]:
        """Rows that have a trajectory."""
        return self._numbers.keys()

    def record(self, rows: Iterable[int], solved: Iterable[int], rollouts: Iterable[int]) -> None:
        """How many of its rollouts each prompt of a generation has solved; all arguments are one value a group."""
        counts = list(zip(rows, solved, rollouts, strict=True))
        for row, number_solved, number in counts:
            self.success[row] = number_solved / number
            if number_solved == number:
                self._retire(row)
        mean = sum(count[1] for count in counts) / sum(count[2] for count in counts)
        self.started = self.started or mean >= self.start

    def _retire(self, row: int) -> None:
        self.retired.add(row)
        for _, number in self._numbers.pop(row, []):
            del self._trajectories[number]

    def add(self, trajectory: Trajectory) -> None:
        """Keep a solution, unless its prompt is retired."""
        if trajectory.row in self.retired:
            return
        self._trajectories[self._next] = trajectory
        insort(self._numbers[trajectory.row], (trajectory.entropy, self._next))
        self._next += 1
        while len(self._trajectories) > self.capacity:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        number, trajectory = self._trajectories.popitem(last=False)
        numbers = self._numbers[trajectory.row]
        del numbers[bisect(numbers, (trajectory.entropy, number)) - 1]
        if not numbers:
            del self._numbers[trajectory.row]

    def sample(self, number: int, leave_out: Collection[int] = ()) -> list[int]:
        """So many different prompts to replay, or all there are; none before the start.

        Drawn from Python's generator, which the trainer seeds and saves with every checkpoint.
        """
        if not self.started or number == 0:
            return []
        buckets: defaultdict[int, list[int]] = defaultdict(list)
        for row in sorted(self._numbers.keys() - set(leave_out)):
            buckets[round(self.success[row] * self.group_size)].append(row)
        chosen: list[int] = []
        while buckets and len(chosen) < number:
            bucket = self._draw_bucket(sorted(buckets))
            rows = buckets[bucket]
            chosen.append(rows.pop(random.randrange(len(rows))))
            if not rows:
                del buckets[bucket]
        return chosen

    def _draw_bucket(self, buckets: list[int]) -> int:
        weights = [math.exp(-((b / self.group_size - CENTER) ** 2) / (2 * SIGMA**2)) for b in buckets]
        thresholds = list(accumulate(weights))
        return buckets[min(bisect(thresholds, random.random() * thresholds[-1]), len(buckets) - 1)]

    def best(self, row: int, number: int) -> list[Trajectory]:
        """The prompt's trajectories of the lowest entropy, so many or all there are."""
        return [self._trajectories[key] for _, key in self._numbers.get(row, [])[:number]]

    # Checkpoints

    def save(self, checkpoint: Path, process: int, processes: int, dataset: str) -> None:
        """Write this process's buffer, a trajectory at a time: nothing is in memory twice.

        Args:
            dataset: what the dataset is told by, when the buffer is loaded.
        """
        directory = checkpoint / DIRECTORY.format(process=process, processes=processes)
        directory.mkdir(parents=True, exist_ok=True)
        kept = self._trajectories.values()
        np.savez(
            directory / INDEX,
            rows=np.array([t.row for t in kept], np.int64),
            lengths=np.array([len(t.token_ids) // 4 for t in kept], np.int64),
            entropies=np.array([t.entropy for t in kept], np.float64),
            success_rows=np.array(list(self.success), np.int64),
            success=np.array(list(self.success.values()), np.float64),
            retired=np.array(sorted(self.retired), np.int64),
            started=np.array(self.started),
            dataset=np.array(dataset),
        )
        _write_array(directory / TOKEN_IDS, np.dtype(np.int32), [t.token_ids for t in kept])
        _write_array(directory / LOGPS, np.dtype(np.float16), [t.logps for t in kept])

    def load(self, checkpoint: Path, process: int, processes: int, dataset: str) -> None:
        """Take the place of what is there. From another number of processes, trajectories are dealt out by row.

        Raises:
            ValueError: if what is there cannot be read, or belongs to another dataset.
        """
        own = checkpoint / DIRECTORY.format(process=process, processes=processes)
        directories = [own] if own.is_dir() else sorted(checkpoint.glob(DIRECTORY.format(process="*", processes="*")))
        if not directories:
            logger.warning(f"{checkpoint} has no replay buffer: replay starts with an empty one.")
        self.clear()
        too_long = 0
        for directory in directories:
            too_long += self._load(directory, dataset, lambda row: own.is_dir() or row % processes == process)
        if too_long:
            logger.warning(
                f"{too_long} trajectories of more than {self.longest} tokens were left out of the replay buffer."
            )

    def _load(self, directory: Path, dataset: str, is_ours: Callable[[int], bool]) -> int:
        """How many of this process's trajectories are too long."""
        try:
            with np.load(directory / INDEX) as file:  # without pickle
                index = {name: file[name] for name in INDEX_ARRAYS}
            token_ids = np.load(directory / TOKEN_IDS, mmap_mode="r")
            logps = np.load(directory / LOGPS, mmap_mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"The replay buffer in {directory} cannot be read: {error}") from error
        if str(index["dataset"]) != dataset:
            raise ValueError(
                f"The replay buffer in {directory} is of another dataset: trajectories are kept by row. Resume with "
                "the same dataset, or remove the directory to start with an empty buffer."
            )
        self.started = bool(index["started"])
        self.success = dict(zip(index["success_rows"].tolist(), index["success"].tolist(), strict=True))
        self.retired = set(index["retired"].tolist())
        end = too_long = 0
        for row, length, entropy in zip(*(index[name].tolist() for name in INDEX_ARRAYS[:3]), strict=True):
            start, end = end, end + length
            if is_ours(row) and length > self.longest:
                too_long += 1
            elif is_ours(row):
                self.add(Trajectory(row, entropy, token_ids[start:end].tobytes(), logps[start:end].tobytes()))
        return too_long


def _write_array(path: Path, dtype: np.dtype, parts: list[bytes]) -> None:
    """One flat array of NumPy's own format."""
    size = sum(map(len, parts)) // dtype.itemsize
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
    file: BinaryIO
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.writelines(parts)
