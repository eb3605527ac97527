"""Demonstrations at temperature 1, whatever temperature the rollouts are sampled at.

TRL divides all logits by `temperature`: rollouts are samples of that policy, so their ratios are of it. Demonstrations
are not. Who wrote them is known at temperature 1, if at all, and what is to become likely is the text under the model
itself: log pi_theta of its tokens is read off the same hidden states, through TRL's own LM head at temperature 1.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from trl.trainer.utils import add_fused_lm_head


class HeadAtOne:
    """The LM head of a model at temperature 1: TRL's fused head takes it for a model that is given hidden states."""

    def __init__(self, model: PreTrainedModel, cast_lm_head_to_fp32: bool):
        self.config = model.config
        self.get_output_embeddings = model.get_output_embeddings  # FSDP and PEFT replace it: looked up on each call
        add_fused_lm_head(self, cast_lm_head_to_fp32=cast_lm_head_to_fp32, outputs=("log_probs", "entropy"))

    def base_model(self, hidden_states: torch.Tensor, **options: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=hidden_states)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never runs: the fused head takes its place."""


class DemonstrationsAtOne:
    """Scores demonstrations at temperature 1 in the forward passes of a model that has TRL's fused LM head.

    Costs the LM head of their tokens again, and no second pass through the model. The weights are used inside the
    model's own forward, where ZeRO-3 and FSDP have them, and on each process in each pass, whatever rows it holds.

    Args:
        model: a PreTrainedModel, whose `forward` is replaced, inside of an adapter's.
        temperature: of the fused head. At 1 nothing is done.
        laid_out: values `(B, S)` as a forward pass has its rows, like its labels: `(B, S)`; `(1, N)`, where the rows
            are packed; or wider, with the virtual tokens of a prompt adapter before each row.
    """

    def __init__(
        self,
        model: Any,
        temperature: float,
        cast_lm_head_to_fp32: bool,
        laid_out: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ):
        self._laid_out = laid_out
        # Mask `(B, S)` of demonstrations; None outside of a `with` block
        self._tokens: torch.Tensor | None = None
        if temperature != 1:
            inner = model.get_base_model() if is_peft_model(model) else model
            self._replace_forward(inner, HeadAtOne(inner, cast_lm_head_to_fp32))

    def _replace_forward(self, model: PreTrainedModel, head: HeadAtOne) -> None:
        fused = model.forward

        @functools.wraps(type(model).forward)  # `generate` reads the signature
        def forward(model: PreTrainedModel, *args: Any, **kwargs: Any):
            if self._tokens is None:
                return fused(*args, **kwargs)
            with _keeping_hidden_states(model) as hidden_states:
                outputs = fused(*args, **kwargs)
            [hidden], labels = hidden_states, kwargs["labels"]
            tokens = self._laid_out(self._tokens, labels)
            at_one = head.forward(
                hidden, labels=labels.masked_fill(~tokens, -100), fused_lm_head=True, output_router_logits=False
            )
            is_token = tokens[:, 1:].to(at_one.log_probs.device)  # outputs begin with the second token
            outputs.log_probs = torch.where(is_token, at_one.log_probs, outputs.log_probs)
            outputs.entropy = torch.where(is_token, at_one.entropy, outputs.entropy)
            return outputs

        model.forward = types.MethodType(forward, model)

    @contextmanager
    def __call__(self, batch: dict[str, torch.Tensor]) -> Iterator[None]:
        """In here the model gives log-probs and entropies at temperature 1 for the demonstrations of a micro-batch.

        Args:
            batch: with `off_policy_mask` and `prompt_mask`.
        """
        # a prompt is nobody's demonstration
        self._tokens = pad(batch["off_policy_mask"], (batch["prompt_mask"].size(1), 0))  # (B, S)
        try:
            yield
        finally:
            self._tokens = None


@contextmanager
def _keeping_hidden_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """What goes into the LM head in here, with its graph: `(B, S, H)`, one a forward pass."""
    kept: list[torch.Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state))
    try:
        yield kept
    finally:
        hook.remove()
