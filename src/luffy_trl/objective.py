"""The off-policy half of LUFFY's objective, and the denominators it shares with TRL's on-policy half.

For a group of rollouts (on-policy) and demonstrations (off-policy), mixed-policy GRPO of arXiv 2504.14945:

    loss = sum over rollout tokens of TRL's own loss / D  +  sum over demonstration tokens of -A f(r) / D

with A the advantage over the whole group, r = pi_theta / pi_behavior and D given by `loss_type`.
"""

import torch

from .shaping import Shaping, get_shaping


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


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")


def token_denominator(
    loss_type: str, mask: torch.Tensor, max_completion_length: int, tokens_in_step: torch.Tensor | float
) -> torch.Tensor:
    """What TRL divides a token's loss by in a micro-batch, before gradient accumulation.

    Args:
        loss_type: one of `LOSS_TYPES`, TRL's names.
        mask: True on the tokens that count, `(B, T)`.
        max_completion_length: in tokens; the constant length of "dr_grpo" (arXiv 2503.20783).
        tokens_in_step: tokens in the whole optimizer step, per process; used by "dapo", "cispo" and "vespo".

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
        denominator = torch.tensor(float(batch_size * max_completion_length), device=mask.device)
    elif loss_type == "luspo":  # sum over a row's tokens, mean over rows
        denominator = torch.tensor(float(batch_size), device=mask.device)
    elif loss_type in ("cispo", "dapo", "vespo"):  # mean over the optimizer step's tokens
        denominator = torch.as_tensor(tokens_in_step, dtype=torch.float32, device=mask.device)
    else:
        raise ValueError(f"Unknown loss_type {loss_type!r}. Known are {', '.join(map(repr, LOSS_TYPES))}.")
    return denominator.expand(batch_size, 1)
