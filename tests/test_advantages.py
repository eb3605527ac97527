"""Credit by hand: two groups of three, the last row of each with a demonstration."""

import math
import statistics

import pytest
import torch

from luffy_trl.advantages import (
    Outcome,
    credit,
    credit_each,
    deciding_reward,
    open_groups,
    rebase,
    scale_ratio,
    solved_rollouts,
    total_rewards,
)


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


# Each reward function normalized, then summed: TRL's "normalize_then_sum"

ANSWERS = torch.tensor([0, 1, 1, 0, 0.5, 1, 1, 0, 0.25, 0, 0, 1])  # four groups of three
PER_FUNC = torch.stack([ANSWERS, torch.linspace(-1, 1, 12).sin(), torch.arange(12) % 2.0], dim=1)
WEIGHTS = torch.tensor([1.0, 0.5, -0.25])


def by_hand(per_func, weights, baseline, counted, group_size):
    """TRL's documentation, row by row, in Python's numbers: means over `baseline`, deviations over `counted`."""

    def standardized(values, center, spread):
        center, spread = [[v for v in some if not math.isnan(v)] for some in (center, spread)]
        if not center or len(spread) < 2:
            return [NAN for _ in values]
        return [(v - statistics.fmean(center)) / (statistics.stdev(spread) + 1e-4) for v in values]

    sums = [0.0] * len(per_func)
    for start in range(0, len(per_func), group_size):
        rows = range(start, start + group_size)
        for k, weight in enumerate(weights.tolist()):
            column = per_func[:, k].tolist()
            values = standardized(
                [column[i] for i in rows],
                [column[i] for i in rows if baseline[i]],
                [column[i] for i in rows if counted[i]],
            )
            for i, value in zip(rows, values, strict=True):
                sums[i] += 0.0 if math.isnan(value) else weight * value
    sums = [NAN if row.isnan().all() else total for total, row in zip(sums, per_func, strict=True)]
    advantages = standardized(
        sums,
        [total for total, is_in in zip(sums, baseline, strict=True) if is_in],
        [total for total, is_in in zip(sums, counted, strict=True) if is_in],
    )
    return [a if is_in and not math.isnan(a) else 0.0 for a, is_in in zip(advantages, counted, strict=True)]


@pytest.mark.parametrize("missing", [[], [(0, 0), (4, 1)], [(3, 0), (3, 1), (3, 2)], [(0, 0), (1, 0)]])
@pytest.mark.parametrize(("baseline", "is_graded"), [("group", True), ("on_policy", True), ("on_policy", False)])
@pytest.mark.parametrize("gate", [None, 0.0, 0.5])
def test_normalized_over_the_rows_that_count(gate, is_graded, baseline, missing):
    per_func = PER_FUNC.clone()
    for place in missing:
        per_func[place] = NAN
    has_demonstration = torch.tensor([False, False, True] * 4)
    totals = total_rewards(per_func, WEIGHTS)
    outcome = Outcome.of(totals, has_demonstration, 3, gate, judged=per_func[:, 0])
    if gate == 0.0:
        assert 0 < outcome.counts.sum() < 4
    counted = ~has_demonstration | (outcome.counts & is_graded)
    in_baseline = ~has_demonstration | (outcome.counts & (baseline == "group"))
    credited = credit_each(per_func, WEIGHTS, outcome, baseline, torch.full((12,), is_graded))
    expected = by_hand(per_func, WEIGHTS, in_baseline, counted, 3)
    torch.testing.assert_close(credited, torch.tensor(expected), rtol=1e-4, atol=1e-5)


# Which reward decides


@pytest.mark.parametrize(
    ("names", "solved_reward", "expected"),
    [
        (["anything"], None, 0),
        (["format_reward", "math_reward"], None, 1),
        (["format_reward", "choice_reward", "math_reward"], None, 1),
        (["think_format_reward", "accuracy_reward"], None, 1),
        (["length", "style"], None, None),
        ([], None, None),
        (["format_reward", "math_reward"], "format_reward", 0),
        (["format_reward", "math_reward"], "total", None),
        (["anything"], "total", None),
    ],
)
def test_which_reward_decides(names, solved_reward, expected):
    assert deciding_reward(names, solved_reward) == expected


def test_a_reward_that_is_not_there_decides_nothing():
    with pytest.raises(ValueError, match=r"solved_reward='math' is not the name of .* 'math_reward', 'f', or 'total'"):
        deciding_reward(["math_reward", "f"], "math")
    with pytest.raises(ValueError, match="solved_reward='f' is the name of 2 reward functions"):
        deciding_reward(["f", "g", "f"], "f")


@pytest.mark.parametrize(
    ("threshold", "expected"), [(1.0, [False, True]), (0.5, [True, True]), (-1.0, [True] * 2), (1.5, [False] * 2)]
)
def test_solved_from_a_threshold_on(threshold, expected):
    rewards = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 2.0])
    assert solved_rollouts(rewards, HAS_DEMONSTRATION, 3, threshold).tolist() == [[*expected, False]] * 2
