"""What k samples a problem are worth: pass@k and maj@k, from all samples that there are, without drawing any.

Both are means over every choice of k of a problem's n samples. pass@k, that one of them is right, is the unbiased
estimator of arXiv 2107.03374. maj@k is that the most frequent answer is right; of several that are as frequent each
counts its share, and a response without an answer has no vote.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from math import comb


RIGHT = object()  # the class of all right answers, however they are written


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The share of the choices of `k` of `samples` in which one is right."""
    return 1 - comb(samples - right, k) / comb(samples, k)


def majority_at_k(votes: Sequence[Hashable | None], k: int) -> float:
    """The share of the choices of `k` of the votes in which `RIGHT` has most of them.

    Args:
        votes: a class of equal answers each; None: no vote.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    right = counts.pop(RIGHT, 0)
    abstaining = len(votes) - right - counts.total()
    won = 0.0
    for most in range(1, min(right, k) + 1):  # votes for the right answer
        ways = _ways_of_others(list(counts.values()), most, k - most)
        others = sum(
            number * comb(abstaining, k - most - chosen) / (ties + 1)
            for (chosen, ties), number in ways.items()
            if k - most - chosen <= abstaining
        )
        won += comb(right, most) * others
    return won / comb(len(votes), k)


def _ways_of_others(sizes: Sequence[int], most: int, limit: int) -> Mapping[tuple[int, int], int]:
    """(votes chosen, classes with `most` of them) -> in how many ways, with no class above `most`."""
    ways = {(0, 0): 1}
    for size in sizes:
        after: dict[tuple[int, int], int] = defaultdict(int)
        for (chosen, ties), number in ways.items():
            for more in range(min(size, most, limit - chosen) + 1):
                after[chosen + more, ties + (more == most)] += number * comb(size, more)
        ways = after
    return ways


def mean_pass_at_k(problems: Sequence[Sequence[bool]], k: int) -> float | None:
    """The mean over problems; None where one has fewer samples than `k`."""
    if not problems or min(map(len, problems)) < k:
        return None
    return sum(pass_at_k(len(of_one), sum(of_one), k) for of_one in problems) / len(problems)


def mean_majority_at_k(problems: Sequence[Sequence[Hashable | None]], k: int) -> float | None:
    """As [`mean_pass_at_k`], of votes."""
    if not problems or min(map(len, problems)) < k:
        return None
    return sum(majority_at_k(votes, k) for votes in problems) / len(problems)
