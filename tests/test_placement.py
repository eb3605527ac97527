"""Where demonstrations stand in a generation, by hand."""

import math

import torch

from luffy_trl.demonstrations import Demonstration
from luffy_trl.demonstrations.placement import (
    Placement,
    behavior_logps,
    cut_to_prefixes,
    demonstration_lengths,
    merge_completions,
    off_policy_mask,
)


CPU = torch.device("cpu")
WHOLE = Demonstration([5, 6, 7, 8], [-1.0, -2.0, -3.0, -4.0])
BEGINNING = Demonstration([5, 6], continued=True)


def test_the_policy_samples_where_it_has_something_to_write():
    assert Placement([{}] * 3, [None, WHOLE, BEGINNING]).rows_to_sample() == [0, 2]


def test_prefixes_have_a_ratio_each_or_one_for_their_group():
    placed = [None, WHOLE, WHOLE, None, WHOLE, WHOLE]
    ratios = iter([0.5, 0.25, 1.0, 0.0])
    cut = cut_to_prefixes(placed, 3, lambda: next(ratios), shared=False)
    assert [d and d.token_ids for d in cut] == [None, [5, 6], [5], None, [5, 6, 7, 8], None]
    assert cut[1] == Demonstration([5, 6], [-1.0, -2.0], continued=True)
    assert cut[4] is WHOLE
    ratios = iter([0.5, 0.25])
    cut = cut_to_prefixes(placed, 3, lambda: next(ratios), shared=True)
    assert [d and len(d.token_ids) for d in cut] == [None, 2, 2, None, 1, 1]


def test_completions_are_the_demonstration_then_what_was_sampled():
    # the last answer is a surplus that another process needed
    ids, logps = merge_completions(
        [None, WHOLE, BEGINNING], [0, 2], [[1, 2], [3, 4, 9], [1, 2]], [[-0.1, -0.2], [-0.3, -0.4, -0.5], [0, 0]], 4
    )
    assert ids == [[1, 2], [5, 6, 7, 8], [5, 6, 3, 4]]
    assert logps[0] == [-0.1, -0.2]
    assert all(map(math.isnan, logps[1] + logps[2][:2]))
    assert logps[2][2:] == [-0.3, -0.4]
    assert merge_completions([None, WHOLE], [0], [[1]], None, 4) == ([[1], [5, 6, 7, 8]], None)
    assert WHOLE.token_ids == [5, 6, 7, 8]  # left as it was


def test_the_mask_and_the_behavior_policy_end_with_the_demonstration():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    placed = [None, WHOLE, BEGINNING, WHOLE]  # the last one is masked out for being cut
    lengths = demonstration_lengths(placed, CPU)
    assert lengths.tolist() == [0, 4, 2, 4]
    assert off_policy_mask(lengths, mask).int().tolist() == [[0] * 4, [1] * 4, [1, 1, 0, 0], [0] * 4]
    assert behavior_logps(placed[:3], mask[:3]).tolist() == [[0] * 4, [-1, -2, -3, -4], [0] * 4]
