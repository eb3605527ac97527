"""The loss of a micro-batch: TRL's own on the rollouts' tokens, and one term more for the demonstrations'.

Mixed-policy GRPO (LUFFY, arXiv 2504.14945, section 3) of a group of rollouts (on-policy) and demonstrations
(off-policy), with A the advantage over the group and r = pi_theta / pi_behavior:

    loss = [ sum over rollout tokens of TRL's policy loss  +  w sum over demonstration tokens of -A f(r) ] / D
           + what TRL adds for rollouts alone: KL, entropy bonus, each averaged as TRL averages it

D is TRL's denominator for the `loss_type` (`token_denominator`), counted over the tokens of both; w is 1 in the paper.
With `demonstration_loss="sft"` -log pi_theta takes the place of -A f(r), with "chord_phi" -p (1 - p) log pi_theta. Of
a completion that begins with a demonstration and is continued by the policy, the first part is a demonstration's
tokens, the rest a rollout's. With a `demonstration_average` each sum is divided by a D of its own, and with
`rollout_weight="complement"` the first one counts 1 - w times.

The first sum is TRL's code, which is shown the rollouts' tokens alone (`hide_demonstrations`); nothing of it is
written again here.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .shaping import Shaping, get_shaping


# Below the log-prob of any token: exp(this - logp) does not overflow
BELOW_ALL_LOGPS = -1e4


def off_policy_loss(
    logps: torch.Tensor,
    advantages: torch.Tensor,
    shaping: str | Shaping = "regularized",
    gamma: float = 0.1,
    exponent: float = 0.5,
    behavior_logps: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of each demonstration token: -A f(r), unclipped, with the gradient flowing through f.

    Args:
        logps: log-probabilities of the tokens under the policy being trained, `(B, T)`, in nats.
        advantages: `(B,)`, one per completion, or `(B, T)`.
        shaping: a name in `luffy_trl.shaping.SHAPINGS`, or a function of (log ratio, gamma, exponent).
        gamma: the constant of "regularized". The paper uses 0.1.
        exponent: the constant of "power".
        behavior_logps: log-probabilities under the policy that wrote the demonstration, `(B, T)`. None is the
            paper's choice, a behavior policy that was certain of every token (pi_behavior = 1).

    Returns:
        The loss of each token, `(B, T)`, neither masked nor averaged.

    Raises:
        ValueError: if no shaping has the given name.
    """
    log_ratio = logps if behavior_logps is None else logps - behavior_logps  # (B, T)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)  # (B, 1)
    return -advantages * get_shaping(shaping)(log_ratio, gamma, exponent)


def chord_phi_loss(logps: torch.Tensor) -> torch.Tensor:
    """CHORD's loss of each demonstration token (arXiv 2508.11408, Eqs. 5 and 6): -phi log pi, with phi = p (1 - p).

    phi has no gradient of its own, as in the authors' code: the weight on grad log pi is phi itself, which is greatest
    where the policy is undecided.

    Args:
        logps: `(B, T)`, in nats.
    """
    fixed = logps.detach()
    return fixed.exp() * torch.expm1(fixed) * logps  # p (p - 1) log p


def sft_loss(logps: torch.Tensor) -> torch.Tensor:
    """-log pi of each token, of the same shape."""
    return -logps


# What `demonstration_loss` can be beside -A f(r): losses that look at no reward
IMITATIONS = {"sft": sft_loss, "chord_phi": chord_phi_loss}


def are_imitated(batch: Mapping[str, Any]) -> torch.Tensor:
    """True on rows that one of `IMITATIONS` trains, whatever their advantage, `(B,)`.

    Args:
        batch: `off_policy_weight` `(B,)`, `off_policy_mask` `(B, T)`.
    """
    return batch["off_policy_mask"].any(1) & (batch["off_policy_weight"] > 0)


def demonstration_term(
    per_token_loss: torch.Tensor, off_policy_mask: torch.Tensor, weights: torch.Tensor, denominator: torch.Tensor
) -> torch.Tensor:
    """The demonstrations' part of a micro-batch's loss, a scalar; exactly 0, with a gradient, where it holds none.

    Args:
        per_token_loss: `(B, T)`, of any value where there is no demonstration.
        off_policy_mask: True on the demonstrations' tokens, `(B, T)`.
        weights: `(B,)`, w of each row.
        denominator: `(B, 1)`, of `denominators`.
    """
    weighted = (weights.unsqueeze(1) * per_token_loss).masked_fill(~off_policy_mask, 0.0)  # (B, T)
    return (weighted / denominator).sum()


def hide_demonstrations(batch: dict[str, Any], factor: torch.Tensor) -> dict[str, Any]:
    """The micro-batch as TRL's loss should see it: demonstrations are context, nothing of them is trained.

    TRL's `tool_mask` means just that, tokens that the policy did not sample: clipping, KL, entropy bonus and
    quantile, sequence-level ratios and TRL's own metrics all respect it. Log-probs recorded for these tokens are
    replaced by values that keep ratio and KL finite, however improbable the tokens are: TRL multiplies them by the
    mask, and infinity times 0 is NaN.

    Args:
        batch: TRL's keys, among them `tool_mask` where there are tools, and `off_policy_mask` `(B, T)`. It is not
            changed.
        factor: `(B, 1)`, on the rollouts' policy loss, never negative: what TRL divides by, over what the loss is to
            be divided by, times the rollouts' weight. Each of TRL's policy losses is proportional to the advantage's
            size. (KL and entropy bonus are not: they stay averages over the rollouts' tokens.)
    """
    off_policy_mask = batch["off_policy_mask"]  # (B, T)
    not_sampled = off_policy_mask
    if "tool_mask" in batch:  # what tools and users wrote is nobody's, in demonstrations too
        not_sampled = not_sampled | ~batch["tool_mask"].bool()
    hidden = {**batch, "tool_mask": (~not_sampled).long()}
    hidden["advantages"] = batch["advantages"].unsqueeze(1) * factor  # (B, 1)
    for key, harmless in (("old_per_token_logps", 0.0), ("ref_per_token_logps", BELOW_ALL_LOGPS)):
        if key in batch:
            hidden[key] = batch[key].masked_fill(not_sampled, harmless)
    return hidden


def counted(batch: Mapping[str, Any]) -> torch.Tensor:
    """True on the tokens that a loss counts, `(B, T)`: no padding, and nothing that tools or users have written."""
    mask = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")


def token_denominator(
    loss_type: str,
    mask: torch.Tensor,
    max_completion_length: int,
    mean_tokens: torch.Tensor | float,
    rows: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """What TRL divides a token's loss by in a micro-batch, before gradient accumulation.

    Args:
        loss_type: one of `LOSS_TYPES`, TRL's names.
        mask: True on the tokens that count, `(B, T)`.
        max_completion_length: in tokens; the constant length of "dr_grpo" (arXiv 2503.20783).
        mean_tokens: tokens of a micro-batch on average, over a whole generation; used by "dapo", "cispo" and "vespo".
        rows: of a micro-batch that count, for the types that average over rows. None: all of `mask`.

    Returns:
        `(B, 1)`; the same value in each row except for the types that average within a row first.

    Raises:
        ValueError: if the loss type is none of TRL's.
    """
    batch_size = mask.size(0)
    rows = _on_device(batch_size if rows is None else rows, mask.device)
    if loss_type in ("grpo", "sapo"):  # mean over a row's tokens, then over rows
        return mask.sum(-1, keepdim=True).clamp(min=1.0) * rows
    elif loss_type == "bnpo":  # mean over the micro-batch's tokens
        denominator = mask.sum().clamp(min=1.0)
    elif loss_type == "dr_grpo":  # a constant: no length bias
        denominator = rows * max_completion_length
    elif loss_type == "luspo":  # sum over a row's tokens, mean over rows
        denominator = rows
    elif loss_type in ("cispo", "dapo", "vespo"):  # mean over the tokens of a generation
        denominator = _on_device(mean_tokens, mask.device)
    else:
        raise ValueError(f"Unknown loss_type {loss_type!r}. Known are {', '.join(map(repr, LOSS_TYPES))}.")
    return denominator.expand(batch_size, 1)


def _on_device(number: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """Filled there: a copy would wait."""
    return number.float() if isinstance(number, torch.Tensor) else torch.full((), float(number), device=device)


ITEM_KEYS = ("on_policy_tokens", "on_policy_rows", "off_policy_tokens", "off_policy_rows")


def items_in_batch(given: torch.Tensor, written: torch.Tensor, counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens and rows of rollouts, and of the demonstrations that count, in a generation: one number each.

    Args:
        given, written: tokens of each row that are a demonstration's, and all that are trained, `(N,)`.
        counts: `(N,)`, rows whose demonstration counts.
    """
    off = torch.minimum(given, written) * counts  # (N,)
    on = (written - given).clamp(min=0)  # (N,)
    # on-policy rows as TRL counts, with those that are masked for their length
    counted = (on.sum(), ((given == 0) | (on > 0)).sum(), off.sum(), (off > 0).sum())
    # Where there is nothing to average, any positive number will do
    return {key: number.clamp(min=1) for key, number in zip(ITEM_KEYS, counted, strict=True)}


def denominators(
    batch: dict[str, torch.Tensor],
    loss_type: str,
    average: str,
    max_completion_length: int,
    mean_tokens: torch.Tensor | float,
    micro_batches: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What TRL divides a rollout token's loss by, and what that and a demonstration token's are to be divided by.

    Args:
        batch: `completion_mask` and `off_policy_mask` `(B, T)`; unless the average is "joint", also of
            `items_in_batch`.
        average: "joint", both by D of all tokens, LUFFY's; else the rollouts by D of the rollouts, as in CHORD (arXiv
            2508.11408, Eqs. 1 to 3) and AMPO (arXiv 2510.02227, Eq. 7), and the demonstrations by their number of
            tokens, "token", CHORD's, or each by its own number of tokens and all by their number, "sequence", AMPO's.
        mean_tokens: of all rows, as for `token_denominator`.
        micro_batches: of all processes that share a generation.

    Returns:
        Three of `(B, 1)`.
    """
    mask, off_policy = counted(batch), batch["off_policy_mask"]  # (B, T)
    divided_by = partial(token_denominator, loss_type, max_completion_length=max_completion_length)
    seen = divided_by(mask & ~off_policy, mean_tokens=mean_tokens)
    if average == "joint":
        whole = divided_by(mask, mean_tokens=mean_tokens)
        return seen, whole, whole
    tokens, rows, off_tokens, off_rows = (batch[key] / micro_batches for key in ITEM_KEYS)
    on = divided_by(mask & ~off_policy, mean_tokens=tokens, rows=rows)
    like = {"token": "dapo", "sequence": "grpo"}[average]
    return seen, on, token_denominator(like, off_policy, max_completion_length, off_tokens, off_rows)
