"""What is logged, from six numbers."""

import math

import pytest
import torch

from luffy_trl.advantages import Outcome
from luffy_trl.demonstrations import Demonstration
from luffy_trl.demonstrations.placement import Generation, Placement
from luffy_trl.metrics import (
    ColdStart,
    Means,
    Stopwatch,
    group_metrics,
    length_sums,
    objective_sums,
    source_sums,
    token_sums,
)


CPU = torch.device("cpu")
NAN = float("nan")


def means(reduce=lambda tensor: tensor) -> Means:
    return Means(reduce, CPU)


def test_means_are_over_what_was_added_since_they_were_taken():
    logged = means()
    logged.add({"a": (3.0, 2), "b": (torch.tensor(1), torch.tensor(4))})
    logged.add({"a": (5.0, 2), "b": (torch.tensor(1.0), 0)})
    logged.add({"c": (0.0, 0)})
    assert logged.take() == {"a": 2.0, "b": 0.5}  # nothing to report of c
    assert logged.take() == {}
    logged.add({"a": (1.0, 1)})
    assert logged.take() == {"a": 1.0}


def test_all_sums_of_a_micro_batch_are_one_collective():
    reduced = []

    def two_processes(tensor: torch.Tensor) -> torch.Tensor:
        reduced.append(tuple(tensor.shape))
        return 2 * tensor

    logged = means(two_processes)
    logged.add({"a": (3.0, 2), "b": (1.0, 4), "c": (6.0, 1)})
    assert reduced == [(3, 2)]
    assert logged.take() == {"a": 1.5, "b": 0.25, "c": 6.0}


def test_tokens_of_rollouts_and_demonstrations_are_told_apart():
    # two rows of three tokens: a rollout with padding, and a demonstration
    logps = torch.tensor([[0.5, 0.25, NAN], [0.5, 0.5, 1.0]]).log()
    entropies = torch.tensor([[1.0, 2.0, NAN], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    off_policy = torch.tensor([[False] * 3, [True] * 3])
    behavior = torch.tensor([[NAN] * 3, [0.5, 0.5, 1e-20]]).log()
    sums = {
        name: (float(total), int(count))
        for name, (total, count) in token_sums(logps, entropies, mask, off_policy, behavior).items()
    }
    assert sums["on_policy/entropy"] == (3.0, 2)
    assert sums["on_policy/prob"] == pytest.approx((0.75, 2))
    assert sums["off_policy/entropy"] == (15.0, 3)
    assert sums["off_policy/prob"] == pytest.approx((2.0, 3))
    assert sums["off_policy/ratio"] == pytest.approx((2 + math.exp(20), 3))  # a ratio above e^20 counts as that
    assert sums["off_policy/token_fraction"] == (3.0, 5)
    assert "off_policy/below_gamma" not in sums
    rare = token_sums(logps, entropies, mask, off_policy, behavior, gamma=1.5)["off_policy/below_gamma"]
    assert tuple(map(int, rare)) == (2, 3)  # ratios of 1, 1 and 1e20
    certain = token_sums(logps, entropies, mask, off_policy)
    assert certain["off_policy/ratio"][0] == certain["off_policy/prob"][0]


def test_push_and_pull_are_weights_times_what_a_token_can_still_move():
    # a cold group of a rollout, with padding, and a demonstration; a row of a group that is not cold
    logps = torch.tensor([[0.5, 0.25, NAN], [0.1, 0.9, 1.0], [0.5, 0.5, 0.5]]).log()
    batch = {
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]),
        "off_policy_mask": torch.tensor([[False] * 3, [True] * 3, [False] * 3]),
        "advantages": torch.tensor([-0.5, 0.5, -0.5]),
        "on_policy_weight": torch.tensor([0.4, 0.4, 1.0]),
        "off_policy_weight": torch.tensor([0.0, 2.0, 0.0]),
        "is_cold": torch.tensor([True, True, False]),
    }
    pull = torch.tensor([[9.0] * 3, [0.3, 0.2, 0.1], [9.0] * 3])
    on, off = torch.tensor([[2.0], [3.0], [2.0]]), torch.tensor([[5.0], [4.0], [5.0]])
    sums = objective_sums(torch.tensor(1.5), logps, pull, batch, on, off)
    pushed, pulled = sums["groups/push_to_pull"]
    assert float(pushed) == pytest.approx(0.4 * 0.5 * (0.5 + 0.75) / 2)
    assert float(pulled) == pytest.approx(2 * (0.3 * 0.9 + 0.2 * 0.1 + 0.0) / 4)
    assert sums["off_policy/loss"] == (1.5, 1.0)

    # a micro-batch of three rows, where TRL's have four: two of those became three
    dealt = objective_sums(torch.tensor(1.5), logps, pull, batch | {"share": 0.75, "in_place_of": 2 / 3}, on, off)
    assert dealt["groups/push_to_pull"] == (pytest.approx(0.75 * float(pushed)), pytest.approx(0.75 * float(pulled)))
    assert dealt["off_policy/loss"] == (1.125, 2 / 3)


def test_a_cold_start_is_said_once_it_has_lasted():
    watch = ColdStart()
    assert not watch.look(500, solve_none=1.0, push_to_pull=10.0)  # the first since a resumption
    assert not watch.look(519, solve_none=1.0, push_to_pull=10.0)
    assert watch.look(520, solve_none=1.0, push_to_pull=10.0)
    watch = ColdStart()
    assert not watch.look(0, solve_none=1.0, push_to_pull=10.0)
    assert not watch.look(19, solve_none=1.0, push_to_pull=10.0)
    assert watch.look(20, solve_none=1.0, push_to_pull=10.0)
    assert not watch.look(20, solve_none=1.0, push_to_pull=2.0)
    assert not watch.look(30, solve_none=0.9, push_to_pull=10.0)  # one was right
    assert not watch.look(40, solve_none=1.0, push_to_pull=10.0)
    assert watch.look(50, solve_none=1.0, push_to_pull=10.0)


def test_bfloat16_is_summed_in_float32():
    values = torch.full((1, 1000), 0.001, dtype=torch.bfloat16)
    mask = torch.ones(1, 1000, dtype=torch.bool)
    total, count = token_sums(values, values, mask, ~mask)["on_policy/entropy"]
    assert float(total) == pytest.approx(float(values[0, 0]) * 1000, rel=1e-5)
    assert int(count) == 1000


def test_lengths_truncation_and_overflow():
    placement = Placement([{}] * 3, [None, None, Demonstration([5, 6])], dropped=1, truncated=4)
    generation = Generation(placement, completion_ids=[[7, 8, 9], [7, 1], [5, 6]])
    assert length_sums(generation, ends=[1]) == {
        "on_policy/length": (5, 2),
        "off_policy/length": (2, 1),
        "on_policy/clipped_ratio": (1, 2),
    }
    logged = means(lambda tensor: 2 * tensor)  # two processes, alike
    for _ in range(3):  # generations
        logged.add(source_sums(placement, {"replay/size": 7.0}, processes=2))
    assert logged.take() == {"off_policy/dropped": 2.0, "off_policy/truncated": 8.0, "replay/size": 7.0}


def test_groups_by_hand():
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, NAN, 1.0])
    held = torch.tensor([False, False, True, False, False, True])
    assert group_metrics(Outcome.of(rewards, held, 3, gate=0.5)) == {
        "on_policy/reward": pytest.approx(2 / 3),
        "off_policy/reward": 0.5,
        "groups/solve_none": 0.5,
        "groups/solve_all": 0.5,
        "groups/guided": 1.0,
        "groups/gate_open": 0.5,
    }
    alone = group_metrics(Outcome.of(rewards, torch.zeros(6, dtype=torch.bool), 3, gate=None))
    assert "off_policy/reward" not in alone  # a mean over nothing
    assert alone["groups/guided"] == 0.0


def test_a_stopwatch_gives_seconds_a_step_and_begins_anew():
    watch = Stopwatch()
    with watch("rewards"):
        pass
    taken = watch.take(steps=2)
    assert list(taken) == ["time/rewards"]
    assert taken["time/rewards"] >= 0
    assert watch.take(steps=1) == {}
