"""pass@k and maj@k against every choice of k samples, one by one."""

import random
from collections import Counter
from fractions import Fraction
from itertools import combinations

import pytest

from luffy_trl.evaluation.at_k import RIGHT, majority_at_k, pass_at_k
from luffy_trl.evaluation.lines import Sample
from luffy_trl.evaluation.tables import at_k_table, summarize


def wins(chosen: tuple) -> Fraction:
    """Of one choice: whether the right answer is the most frequent, or its share of a tie."""
    counts = Counter(vote for vote in chosen if vote is not None)
    best = [vote for vote, count in counts.items() if count == max(counts.values())]
    return Fraction(RIGHT in best, max(len(best), 1))


@pytest.mark.parametrize("seed", range(8))
def test_both_equal_an_enumeration(seed):
    rng = random.Random(seed)
    votes = [rng.choice([RIGHT, RIGHT, "a", "b", "c", None]) for _ in range(9)]
    right = votes.count(RIGHT)
    for k in range(1, 10):
        choices = list(combinations(votes, k))
        assert pass_at_k(9, right, k) == pytest.approx(sum(RIGHT in c for c in choices) / len(choices))
        assert majority_at_k(votes, k) == pytest.approx(float(sum(map(wins, choices)) / len(choices)))


def test_by_hand():
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of 6 pairs hold the right one
    assert pass_at_k(4, 4, 4) == 1
    assert pass_at_k(4, 0, 4) == 0
    assert majority_at_k([RIGHT, RIGHT, "a"], 3) == 1
    assert majority_at_k([RIGHT, "a"], 2) == 0.5
    assert majority_at_k([RIGHT, "a", "a"], 3) == 0
    assert majority_at_k([RIGHT, None, None], 3) == 1  # two had nothing to say
    assert majority_at_k([None, None], 1) == 0


def sample(doc_id: int, repeat: int, score: float | None, answer: str | None) -> Sample:
    return Sample("t", doc_id, repeat, "hash", "text", 10, False, score=score, answer=answer)


def test_the_table_is_the_mean_over_problems_and_leaves_out_what_cannot_be_told():
    graded = [(1, "2"), (1, "2.0"), (0, "3"), (0, "3")], [(0, "1"), (0, None), (0, "1"), (0, "")]
    samples = [sample(i, j, *pair) for i, row in enumerate(graded) for j, pair in enumerate(row)]
    found = summarize(samples, [1, 2, 4, 8])
    # of the pairs of the first problem 5 of 6 have a right one; 1 of 6 is right twice, and 4 tie
    assert found.pass_at == pytest.approx({"1": 0.25, "2": 5 / 12, "4": 0.5})
    assert found.majority_at == pytest.approx({"1": 0.25, "2": (1 / 6 + 4 / 6 / 2) / 2, "4": 0.25})
    [(header, cells)] = at_k_table({"T": found, "U": summarize(samples)})
    assert header == ["At k samples", "pass@1", "pass@2", "pass@4", "maj@1", "maj@2", "maj@4"]
    assert cells == [["T", "25.0", "41.7", "50.0", "25.0", "25.0", "25.0"], ["U", *["-"] * 6]]
    assert at_k_table({"U": summarize(samples)}) == []
    for s in samples:  # of a reward function that does not say what it took for the answer
        s.answer, s.rewards = None, {"r": s.score}
    assert summarize(samples, [2]).majority_at == {}
