"""Log-probs of whole completions under a model, at temperature 1. Torch alone."""

from typing import Any

import torch


# Positions whose log-softmax is in memory at a time, in float32
POSITIONS_AT_ONCE = 1024


@torch.inference_mode()
def completion_logps(model: Any, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
    """The log-prob of each completion token after the prompt and the tokens before it.

    Args:
        model: a causal language model.
        prompt_ids: one token at least.
    """
    ids = torch.tensor([prompt_ids + completion_ids], device=model.device)  # (1, S)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]  # (T, V)
    targets = ids[0, len(prompt_ids) :].unsqueeze(1)  # (T, 1)
    parts = zip(logits.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True)
    logps = [part.float().log_softmax(-1).gather(1, chosen).squeeze(1) for part, chosen in parts]
    return torch.cat(logps).tolist()
