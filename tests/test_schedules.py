"""How much of a demonstration is given, and how much it weighs, over a run."""

import random
import statistics

import pytest

from luffy_trl.demonstrations.encoding import Demonstration
from luffy_trl.demonstrations.schedules import chord_mu, prefix_ratio, weight_factor


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("fixed", [0.8, 0.8, 0.8]),
        ("linear", [0.8, 0.65, 0.2]),
        ("reverse", [0.2, 0.35, 0.8]),
        ("cosine", [0.8, 0.2 + 0.6 * (2 + 2**0.5) / 4, 0.2]),
    ],
)
def test_prefix_ratio_over_a_run(strategy, expected):
    assert [prefix_ratio(strategy, progress, 0.2, 0.8) for progress in (0.0, 0.25, 1.0)] == pytest.approx(expected)


def test_uniform_prefix_ratio():
    random.seed(0)
    drawn = [prefix_ratio("uniform", 0.0, 0.2, 0.8) for _ in range(1000)]
    assert 0.2 <= min(drawn) < 0.21
    assert 0.79 < max(drawn) <= 0.8
    assert statistics.mean(drawn) == pytest.approx(0.5, abs=0.02)


def test_weight_over_a_run():
    assert [weight_factor("constant", p) for p in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert [weight_factor("linear", p) for p in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert [weight_factor("cosine", p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_chords_mu_warms_up_falls_and_stays():
    mu = [chord_mu(step, peak=0.5, valley=0.02, warmup_steps=2, decay_steps=4) for step in range(8)]
    early, late = 0.02 + 0.48 * (2 + 2**0.5) / 4, 0.02 + 0.48 * (2 - 2**0.5) / 4
    assert mu == pytest.approx([0.0, 0.25, 0.5, early, 0.26, late, 0.02, 0.02])
    assert [chord_mu(step, 0.1, 0.1, 0, 0) for step in (0, 5)] == [0.1, 0.1]  # a constant


def test_a_prefix_of_a_demonstration():
    whole = Demonstration([5, 6, 7, 8], [-0.1, -0.2, -0.3, -0.4])
    assert whole.prefix(1.0) is whole
    assert whole.prefix(0.7) == Demonstration([5, 6], [-0.1, -0.2], continued=True)
    assert Demonstration([5, 6, 7, 8]).prefix(0.25) == Demonstration([5], continued=True)
    assert whole.prefix(0.2) is None  # not a single token: a rollout
