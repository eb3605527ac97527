"""The off-policy loss and its gradient against the closed forms, in float64."""

from functools import partial

import pytest
import torch

from luffy_trl.objective import (
    LOSS_TYPES,
    counted,
    demonstration_term,
    hide_demonstrations,
    off_policy_loss,
    token_denominator,
)
from luffy_trl.shaping import SHAPINGS, get_shaping, register_shaping


GAMMA, EXPONENT = 0.3, 0.7

# f(r), and the weight of a token on grad log pi: d f / d log pi = f'(r) r
CLOSED_FORMS = {
    "regularized": (lambda r: r / (r + GAMMA), lambda r: GAMMA * r / (r + GAMMA) ** 2),
    "identity": (lambda r: r, lambda r: r),
    "power": (lambda r: r**EXPONENT, lambda r: EXPONENT * r**EXPONENT),
    "log": (torch.log, torch.ones_like),
}


def test_every_shaping_has_a_closed_form_here():
    assert set(CLOSED_FORMS) == set(SHAPINGS)


@pytest.mark.parametrize("with_behavior", [False, True])
@pytest.mark.parametrize("advantage_dims", [1, 2])
@pytest.mark.parametrize("shaping", CLOSED_FORMS)
def test_loss_and_gradient_equal_the_closed_form(shaping, advantage_dims, with_behavior):
    generator = torch.Generator().manual_seed(0)
    shape = (5, 17)
    logps = (-6 * torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    behavior = -2 * torch.rand(shape, generator=generator, dtype=torch.float64) if with_behavior else None
    advantages = torch.randn(shape[:advantage_dims], generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.6

    loss = off_policy_loss(logps, advantages, shaping, GAMMA, EXPONENT, behavior)
    (loss * mask).sum().backward()

    ratio = logps.detach().exp() / (behavior.exp() if with_behavior else 1.0)
    f, weight = CLOSED_FORMS[shaping]
    a = advantages if advantage_dims == 2 else advantages[:, None].expand(shape)
    torch.testing.assert_close(loss.detach(), -a * f(ratio), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logps.grad, -a * weight(ratio) * mask, rtol=1e-10, atol=1e-10)


def test_one_hand_worked_token():
    # r = 0.1 = gamma: f = 0.1 / 0.2 = 0.5, and its weight 0.1 * 0.1 / 0.04 = 0.25 is the largest there is
    logps = torch.tensor([[0.1]], dtype=torch.float64).log().requires_grad_()
    loss = off_policy_loss(logps, torch.tensor([2.0], dtype=torch.float64))
    loss.sum().backward()
    assert loss.item() == pytest.approx(-1.0, abs=1e-12)
    assert logps.grad.item() == pytest.approx(-0.5, abs=1e-12)


def test_regularized_is_finite_where_the_ratio_is_not():
    logps = torch.tensor([[0.0, -1e4, 0.0]], requires_grad=True)
    behavior = torch.tensor([[-1e4, 0.0, 0.0]])  # r overflows, underflows, is 1
    loss = off_policy_loss(logps, torch.ones(1), behavior_logps=behavior)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([[-1.0, 0.0, -1 / 1.1]]))
    assert torch.isfinite(logps.grad).all()


def test_a_users_function_is_used_and_can_be_registered(tmp_path, monkeypatch):
    def halved(log_ratio, gamma, exponent):
        return log_ratio.exp() / 2

    def redefined(log_ratio, gamma, exponent):
        return log_ratio.exp() / 3

    monkeypatch.setattr("luffy_trl.shaping.SHAPINGS", dict(SHAPINGS))
    logps = torch.tensor([[-1.0, -2.0]])
    expected = off_policy_loss(logps, torch.ones(1), "identity") / 2
    torch.testing.assert_close(off_policy_loss(logps, torch.ones(1), halved), expected)
    assert register_shaping(halved) == "halved"
    assert get_shaping("halved") is halved
    register_shaping(redefined, name="halved")  # a notebook's cell, run again
    assert get_shaping("halved") is redefined
    assert register_shaping(partial(halved, gamma=1), name="mine") == "mine"

    (tmp_path / "my_shapings.py").write_text(
        "def doubled(log_ratio, gamma, exponent):\n    return 2 * log_ratio.exp()\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(off_policy_loss(logps, torch.ones(1), "my_shapings.doubled"), 4 * expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register_shaping(lambda log_ratio, gamma, exponent: log_ratio), "A shaping needs a name"),
        (lambda: register_shaping(partial(max)), "A shaping needs a name"),
        (lambda: register_shaping(max, name="log"), "'log' is a built-in shaping"),
        (lambda: get_shaping("halved"), "Unknown shaping 'halved'"),
        (lambda: get_shaping("no_such_module.f"), "shaping no_such_module.f: No module named 'no_such_module'"),
    ],
)
def test_shapings_that_are_none(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # rows of 3, 1 and 0 tokens; batch 3, max length 10, 7 tokens a step
        ("grpo", [9, 3, 3]),
        ("sapo", [9, 3, 3]),
        ("bnpo", [4, 4, 4]),
        ("dr_grpo", [30, 30, 30]),
        ("luspo", [3, 3, 3]),
        ("dapo", [7, 7, 7]),
        ("cispo", [7, 7, 7]),
        ("vespo", [7, 7, 7]),
    ],
)
def test_denominators_worked_by_hand(loss_type, expected):
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    denominator = token_denominator(loss_type, mask, max_completion_length=10, mean_tokens=torch.tensor(7))
    assert denominator.squeeze(1).tolist() == expected


def test_denominator_refuses_an_unknown_loss_type():
    with pytest.raises(ValueError, match="Unknown loss_type 'mean'"):
        token_denominator("mean", torch.ones(1, 1).bool(), 1, 1)
    assert len(LOSS_TYPES) == 8


def test_the_term_is_a_weighted_sum_over_the_demonstrations_tokens():
    loss = torch.tensor([[1.0, 2.0, torch.nan], [3.0, torch.inf, 4.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    term = demonstration_term(loss, mask, torch.tensor([1.0, 0.5]), torch.tensor([[10.0], [5.0]]))
    assert term.item() == pytest.approx((1 + 2) / 10 + 0.5 * 3 / 5)
    term.backward()
    torch.testing.assert_close(loss.grad, torch.tensor([[0.1, 0.1, 0.0], [0.1, 0.0, 0.0]]))


def test_without_demonstrations_the_term_is_exactly_nothing_and_still_has_a_gradient():
    loss = torch.full((2, 3), torch.inf, requires_grad=True)
    term = demonstration_term(loss, torch.zeros(2, 3).bool(), torch.ones(2), torch.ones(2, 1))
    assert term.item() == 0.0
    term.backward()
    assert (loss.grad == 0).all()


def test_trl_is_shown_the_rollouts_tokens_alone():
    mask = torch.tensor([[False, False, False], [True, True, False]])
    batch = {
        "off_policy_mask": mask,
        "advantages": torch.tensor([1.0, -2.0]),
        "old_per_token_logps": torch.full((2, 3), -1e30),
        "ref_per_token_logps": torch.full((2, 3), -3.0),
    }
    shown = hide_demonstrations(batch, torch.tensor([[1.0], [0.25]]))
    assert shown["tool_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert shown["advantages"].tolist() == [[1.0], [-0.5]]  # 1 of its 4 tokens is the policy's
    assert shown["old_per_token_logps"][mask].tolist() == [0.0, 0.0]
    assert shown["ref_per_token_logps"][mask].tolist() == [-1e4, -1e4]
    assert shown["ref_per_token_logps"][~mask].tolist() == [-3.0] * 4
    assert set(batch) == {"off_policy_mask", "advantages", "old_per_token_logps", "ref_per_token_logps"}
    assert batch["advantages"].tolist() == [1.0, -2.0]  # TRL's own dict is left alone


def test_what_tools_wrote_stays_hidden_and_harmless_in_rollouts_and_demonstrations():
    batch = {
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "off_policy_mask": torch.tensor([[False, False, False], [True, False, False]]),
        "tool_mask": torch.tensor([[1, 0, 1], [1, 0, 1]]),
        "advantages": torch.tensor([1.0, -2.0]),
        "ref_per_token_logps": torch.full((2, 3), 0.0),  # of a row that was not scored: e^(0 - logp) overflows
    }
    shown = hide_demonstrations(batch, torch.ones(2, 1))
    assert shown["tool_mask"].tolist() == [[1, 0, 1], [0, 0, 1]]
    assert shown["ref_per_token_logps"].tolist() == [[0.0, -1e4, 0.0], [-1e4, -1e4, 0.0]]
    assert counted(batch).tolist() == [[True, False, True], [True, False, False]]
