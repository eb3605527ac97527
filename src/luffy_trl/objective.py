"""The loss of a micro-batch: TRL's own on the rollouts' tokens, and one term more for the demonstrations'.

Mixed-policy GRPO (LUFFY, arXiv 2504.14945, section 3) of a group of rollouts (on-policy) and demonstrations
(off-policy), with A the advantage over the group and r = pi_theta / pi_behavior:

    loss = [ sum over rollout tokens of TRL's policy loss  +  w sum over demonstration tokens of -A f(r) ] / D
           + what TRL adds for rollouts alone: KL, entropy bonus, each averaged as TRL averages it

D is TRL's denominator for the `loss_type` (`token_denominator`), counted over the tokens of both; w is 1 in the paper.
With `demonstration_loss="sft"` -log pi_theta takes the place of -A f(r). Of a completion that begins with a
demonstration and is continued by the policy, the first part is a demonstration's tokens, the rest a rollout's.

The first sum is TRL's code, which is shown the rollouts' tokens alone (`hide_demonstrations`); nothing of it is
written again here.
"""

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


def demonstration_term(
    per_token_loss: torch.Tensor, off_policy_mask: torch.Tensor, weights: torch.Tensor, denominator: torch.Tensor
) -> torch.Tensor:
    """The demonstrations' part of a micro-batch's loss, a scalar; exactly 0, with a gradient, where it holds none.

    Args:
        per_token_loss: `(B, T)`, of any value where there is no demonstration.
        off_policy_mask: True on the demonstrations' tokens, `(B, T)`.
        weights: `(B,)`, w of each row.
        denominator: `(B, 1)`, of `token_denominator`.
    """
    weighted = (weights.unsqueeze(1) * per_token_loss).masked_fill(~off_policy_mask, 0.0)  # (B, T)
    return (weighted / denominator).sum()


def hide_demonstrations(
    batch: dict[str, Any], seen_denominator: torch.Tensor, whole_denominator: torch.Tensor
) -> dict[str, Any]:
    """The micro-batch as TRL's loss should see it: demonstrations are context, nothing of them is trained.

    TRL's `tool_mask` means just that, tokens that the policy did not sample: clipping, KL, entropy bonus and
    quantile, sequence-level ratios and TRL's own metrics all respect it. Log-probs recorded for these tokens are
    replaced by values that keep ratio and KL finite, however improbable the tokens are: TRL multiplies them by the
    mask, and infinity times 0 is NaN.

    Args:
        batch: TRL's keys, and `off_policy_mask` `(B, T)`. It is not changed.
        seen_denominator, whole_denominator: `(B, 1)`, of `token_denominator` over the rollouts' tokens, and over all.
            Where TRL averages over the tokens that it sees, scaling the advantages by their ratio, which is never
            negative, makes that an average over all: each of TRL's policy losses is proportional to the advantage's
            size. (KL and entropy bonus are not: they stay averages over the rollouts' tokens.)
    """
    off_policy_mask = batch["off_policy_mask"]  # (B, T)
    hidden = {**batch, "tool_mask": (~off_policy_mask).long()}
    hidden["advantages"] = batch["advantages"].unsqueeze(1) * (seen_denominator / whole_denominator)  # (B, 1)
    for key, harmless in (("old_per_token_logps", 0.0), ("ref_per_token_logps", BELOW_ALL_LOGPS)):
        if key in batch:
            hidden[key] = batch[key].masked_fill(off_policy_mask, harmless)
    return hidden


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")


def token_denominator(
    loss_type: str, mask: torch.Tensor, max_completion_length: int, mean_tokens: torch.Tensor | float
) -> torch.Tensor:
    """What TRL divides a token's loss by in a micro-batch, before gradient accumulation.

    Args:
        loss_type: one of `LOSS_TYPES`, TRL's names.
        mask: True on the tokens that count, `(B, T)`.
        max_completion_length: in tokens; the constant length of "dr_grpo" (arXiv 2503.20783).
        mean_tokens: tokens of a micro-batch on average, over a whole generation; used by "dapo", "cispo" and "vespo".

    Returns:
        `(B, 1)`; the same value in each row except for the types that average within a row first.

    Raises:
        ValueError: if the loss type is none of TRL's.
    """
    batch_size = mask.size(0)
    if loss_type in ("grpo", "sapo"):  # mean over a row's tokens, then over rows
        return mask.sum(-1, keepdim=True).clamp(min=1.0) * batch_size
    elif loss_type == "bnpo":  # mean over the micro-batch's tokens
        denominator = mask.sum().clamp(min=1.0)
    elif loss_type == "dr_grpo":  # a constant: no length bias
        denominator = torch.full((), float(batch_size * max_completion_length), device=mask.device)
    elif loss_type == "luspo":  # sum over a row's tokens, mean over rows
        denominator = torch.full((), float(batch_size), device=mask.device)
    elif loss_type in ("cispo", "dapo", "vespo"):  # mean over the tokens of a generation
        denominator = torch.as_tensor(mean_tokens, dtype=torch.float32, device=mask.device)
    else:
        raise ValueError(f"Unknown loss_type {loss_type!r}. Known are {', '.join(map(repr, LOSS_TYPES))}.")
    return denominator.expand(batch_size, 1)
