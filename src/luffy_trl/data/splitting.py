"""A test split that shares no problem with the training split, near-duplicates included.

Two problems are near-duplicates if they are the same (`filters.problem_key`), or share a run of words as long as those
that count for being in a benchmark. What hangs together through near-duplicates, in any number of steps, is one
cluster, and a cluster goes to one side as a whole.
"""

import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .filters import NGRAM_SIZE, problem_key, word_ngrams


@dataclass(frozen=True)
class Split:
    """
    Attributes:
        test: rows of the test split.
        rows: of both.
        clustered: rows that have a near-duplicate.
        clusters: how many clusters these are.
        largest: rows of the largest one.
    """

    test: frozenset[int]
    rows: int
    clustered: int
    clusters: int
    largest: int

    def table(self) -> list[list[str]]:
        """Lines of a table: what, how many rows, how many demonstrations."""
        return [
            ["for training (`train`)", f"{self.rows - len(self.test):,}", "-"],
            ["for testing (`test`)", f"{len(self.test):,}", "-"],
        ]

    def says(self) -> str:
        """A sentence on both sides, and on what was kept together."""
        sides = f"{self.rows - len(self.test):,} rows are for training and {len(self.test):,} for testing"
        if self.clusters == 0:
            return f"{sides}; no two problems are near-duplicates."
        return (
            f"{sides}; {self.clustered:,} rows are near-duplicates of others, in {self.clusters:,} clusters of up to "
            f"{self.largest:,}, none of which is on both sides."
        )


def split_problems(problems: Iterable[str], test_size: float, seed: int = 0, ngram_size: int = NGRAM_SIZE) -> Split:
    """
    Args:
        problems: the text of each row's problem.
        test_size: rows of the test split, or a share of all, below 1. The split has as many as clusters allow.
        ngram_size: how many words in a row, shared by two problems, make them near-duplicates; 0: whole problems only.

    Raises:
        ValueError: if no test split leaves anything to train on.
    """
    labels = _clusters(problems, ngram_size)
    rows = len(labels)
    wanted = test_size if test_size >= 1 else max(1, round(test_size * rows))
    if wanted >= rows:
        raise ValueError(f"--test_size {test_size:g}: only {rows:,} rows are left, and some must stay for training.")
    clusters: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        clusters[label].append(row)
    if len(clusters) == 1:
        raise ValueError(
            f"--test_size {test_size:g}: all {rows:,} rows are near-duplicates of one another, and cannot be parted. "
            "A larger --ngram_size takes fewer problems for the same."
        )
    several = [len(cluster) for cluster in clusters.values() if len(cluster) > 1]
    test = _choose(list(clusters.values()), int(wanted), random.Random(seed))
    return Split(frozenset(test), rows, sum(several), len(several), max(several, default=1))


# Clusters


def _clusters(problems: Iterable[str], ngram_size: int) -> list[int]:
    """Each row's cluster, by the number of one of its rows."""
    marks, rows, count = array("q"), array("q"), 0
    for problem in problems:
        # 64 bits of each: two of some millions are equal by chance once in millions of datasets
        found = {hash(problem_key(problem))}
        if ngram_size:
            found.update(map(hash, word_ngrams(problem, ngram_size)))
        marks.extend(found)
        rows.extend([count] * len(found))
        count += 1
    parents = list(range(count))
    values, owners = np.frombuffer(marks, dtype=np.int64), np.frombuffer(rows, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    values, owners = values[order], owners[order]
    for i in np.flatnonzero(values[1:] == values[:-1]):
        _join(parents, int(owners[i]), int(owners[i + 1]))
    return [_root(parents, row) for row in range(count)]


def _root(parents: list[int], row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row


def _join(parents: list[int], one: int, other: int) -> None:
    one, other = sorted((_root(parents, one), _root(parents, other)))
    parents[other] = one


# The choice


def _choose(clusters: Sequence[list[int]], wanted: int, rng: random.Random) -> list[int]:
    """Rows of clusters at random, as near to `wanted` of them as can be, and not all."""
    shuffled = rng.sample(clusters, len(clusters))
    chosen: list[int] = []
    for cluster in shuffled:
        if len(chosen) + len(cluster) <= wanted:
            chosen += cluster
    if len(chosen) == wanted:
        return chosen
    # Those that are left are too large: now the sizes are chosen first, and then clusters of these sizes
    left, chosen = _sizes(Counter(map(len, clusters)), wanted), []
    for cluster in shuffled:
        if left[len(cluster)] > 0:
            left[len(cluster)] -= 1
            chosen += cluster
    return chosen


def _sizes(available: Counter[int], wanted: int) -> Counter[int]:
    """How many clusters of each size have, together, as near to `wanted` rows as can be: at least one, and not all."""
    rows = sum(size * count for size, count in available.items())
    parts = [(size, copies) for size, count in available.items() for copies in _powers(count)]
    reached = [1]  # bit n: so many rows can be had from the parts so far
    for size, copies in parts:
        reached.append(reached[-1] | reached[-1] << size * copies)
    nearest = sorted(range(1, rows), key=lambda n: abs(n - wanted))
    total = next(n for n in nearest if reached[-1] >> n & 1)
    taken: Counter[int] = Counter()
    for (size, copies), before in zip(reversed(parts), reversed(reached[:-1]), strict=True):
        if not before >> total & 1:
            taken[size] += copies
            total -= size * copies
    return taken


def _powers(count: int) -> list[int]:
    """1, 2, 4 and so on, and a rest: their sums are every number up to `count`, and none beyond."""
    powers = [1 << i for i in range((count + 1).bit_length() - 1)]
    return [*powers, count - sum(powers)] if sum(powers) < count else powers
