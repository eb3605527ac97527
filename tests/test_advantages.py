"""Credit by hand: two groups of three, the last row of each with a demonstration."""

import pytest
import torch

from luffy_trl.advantages import Outcome, credit, open_groups, rebase, scale_ratio, solved_rollouts, total_rewards


NAN = float("nan")
HAS_DEMONSTRATION = torch.tensor([False, False, True] * 2)
REWARDS = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5, 1.0])


def whole_group(rewards: torch.Tensor) -> torch.Tensor:
    """TRL's, without a scale: reward less the group's mean."""
    grouped = rewards.view(-1, 3)
    return (grouped - grouped.nanmean(1, keepdim=True)).nan_to_num(0.0).flatten()


def test_total_rewards_leave_out_what_does_not_apply():
    per_func = torch.tensor([[1.0, 0.0], [NAN, 1.0], [NAN, NAN], [0.5, 0.5], [0.0, 2.0], [1.0, NAN]])
    totals = total_rewards(per_func, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(totals, torch.tensor([1.0, 0.5, NAN, 0.75, 1.0, 1.0]), equal_nan=True)


def test_a_demonstration_solves_nothing():
    assert solved_rollouts(REWARDS, HAS_DEMONSTRATION, 3).tolist() == [[False, True, False], [False, False, False]]
    # 0.15 + 0.65 + 0.2 in float32 is a little less than 1
    nearly = torch.tensor([0.99999994] * 6)
    assert solved_rollouts(nearly, HAS_DEMONSTRATION, 3).tolist() == [[True, True, False]] * 2
    assert not solved_rollouts(torch.full((6,), NAN), HAS_DEMONSTRATION, 3).any()


@pytest.mark.parametrize(
    ("gate", "expected"), [(None, [True, True]), (1.0, [True, True]), (0.5, [True, True]), (0.4, [False, True])]
)
def test_a_group_is_open_up_to_the_gate(gate, expected):
    solved = solved_rollouts(REWARDS, HAS_DEMONSTRATION, 3)  # a half and none of the rollouts
    assert open_groups(solved, HAS_DEMONSTRATION, gate).tolist() == expected
    outcome = Outcome.of(REWARDS, HAS_DEMONSTRATION, 3, gate)
    assert outcome.counts.tolist() == [False, False, expected[0], False, False, expected[1]]


def test_a_baseline_of_some_rows():
    moved = rebase(whole_group(REWARDS), REWARDS, ~HAS_DEMONSTRATION, 3)
    assert moved.tolist() == pytest.approx([-0.5, 0.5, 0.5, -0.25, 0.25, 0.75])


def test_a_row_without_a_reward_is_in_no_baseline_and_has_no_advantage():
    rewards = torch.tensor([0.0, NAN, 1.0, 0.0, 1.0, 1.0])
    moved = rebase(whole_group(rewards), rewards, ~HAS_DEMONSTRATION, 3)
    assert moved.tolist() == pytest.approx([0.0, 0.0, 1.0, -0.5, 0.5, 0.5])


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_a_scale_of_some_rows_takes_the_place_of_trls(scale):
    deviation = REWARDS.view(2, 3).std(1).repeat_interleave(3) if scale == "group" else REWARDS.std()
    kept = REWARDS.view(2, 3)[:, :2]
    kept_deviation = kept.std(1).repeat_interleave(3) if scale == "group" else kept.std()
    ratio = scale_ratio(REWARDS, ~HAS_DEMONSTRATION, 3, scale)
    torch.testing.assert_close(ratio / (deviation + 1e-4), 1 / (kept_deviation + 1e-4).expand(6))


def test_no_scale_is_left_alone_and_a_single_row_has_none():
    assert scale_ratio(REWARDS, HAS_DEMONSTRATION, 3, "none").tolist() == [1.0] * 6
    assert scale_ratio(REWARDS, HAS_DEMONSTRATION, 3, "group").tolist() == [1.0] * 6


def test_a_closed_group_is_graded_as_rollouts_alone():
    outcome = Outcome.of(REWARDS, HAS_DEMONSTRATION, 3, gate=0.0)
    everything = torch.ones(6, dtype=torch.bool)
    credited = credit(whole_group(REWARDS), outcome, "group", "none", graded=everything)
    assert credited.tolist() == pytest.approx([-0.5, 0.5, 0.0, -0.5, 0.0, 0.5])


def test_a_demonstration_that_nobody_grades_has_no_advantage():
    outcome = Outcome.of(REWARDS, HAS_DEMONSTRATION, 3, gate=None)
    nothing = torch.zeros(6, dtype=torch.bool)
    credited = credit(whole_group(REWARDS), outcome, "on_policy", "none", graded=nothing)
    assert credited.tolist() == pytest.approx([-0.5, 0.5, 0.0, -0.25, 0.25, 0.0])


def test_the_whole_group_is_trls_own():
    outcome = Outcome.of(REWARDS, HAS_DEMONSTRATION, 3, gate=None)
    everything = torch.ones(6, dtype=torch.bool)
    credited = credit(whole_group(REWARDS), outcome, "group", "group", graded=everything)
    torch.testing.assert_close(credited, whole_group(REWARDS))
