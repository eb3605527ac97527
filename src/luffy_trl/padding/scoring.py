"""ScoringMixin: a GRPOTrainer that scores a generation by rows of like length, and only the rows that need it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate.utils import gather_object

from .dealing import Form, Rows, deal
from .forward import PackedForwardMixin
from .micro_batches import trim


class ScoringMixin(PackedForwardMixin):
    """
    GRPOTrainer whose log-probs of the old and the reference policy are computed by rows of like length.

    What differs from [`~trl.GRPOTrainer`], beside the forward passes, override by override:

    - `_generate_and_score_completions`: nothing; while it runs, forward passes are those of the old and the reference
      policy;
    - `_get_per_token_logps_and_entropies`: of a generation, orders and trims the rows, and scores only those that
      `_rows_to_score` names.
    """

    def __init__(self, *args, **kwargs):
        # What forward passes are for: the loss, or the log-probs of old and reference policy in a generation
        self._phase: Literal["loss", "generation"] = "loss"
        super().__init__(*args, **kwargs)

    def _rows_to_score(self, rows: int) -> list[int]:
        """Of a generation's `rows` rows on this process, those whose old and reference log-probs anybody needs.

        The others get 0: who leaves rows out keeps these values out of the loss. At least one row is scored.
        """
        return list(range(rows))

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        with self._in_generation():
            return super()._generate_and_score_completions(inputs)

    @contextmanager
    def _in_generation(self) -> Iterator[None]:
        self._phase = "generation"
        try:
            yield
        finally:
            self._phase = "loss"

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **images,
    ):
        is_text = all(value is None for value in images.values())
        if self._phase == "generation" and self.args.trim_padding and is_text:
            self._check_packing()
            return self._score(model, input_ids, attention_mask, logits_to_keep, batch_size)
        return super()._get_per_token_logps_and_entropies(
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size=batch_size,
            compute_entropy=compute_entropy,
            compute_aux_loss=compute_aux_loss,
            **images,
        )

    def _score(self, model, input_ids, attention_mask, logits_to_keep, batch_size):
        """Log-probs `(B, T)` of the rows to score, by rows of like length; 0 for the others. All that TRL takes."""
        prompts, completions = attention_mask[:, :-logits_to_keep], attention_mask[:, -logits_to_keep:]
        lengths = torch.stack([prompts.sum(1), completions.sum(1)]).tolist()  # waits once a generation
        rows = Rows(lengths[0], lengths[1], groups=list(range(len(input_ids))))
        logps = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)  # (B, T)
        for chunk in self._chunks_to_score(rows, batch_size):
            part = {
                "prompt_ids": input_ids[chunk, :-logits_to_keep],
                "prompt_mask": prompts[chunk],
                "completion_ids": input_ids[chunk, -logits_to_keep:],
                "completion_mask": completions[chunk],
            }
            part = trim(part, self.pad_to_multiple_of)
            width = part["completion_ids"].size(1)
            logps[chunk, :width] = (
                super()
                ._get_per_token_logps_and_entropies(
                    model,
                    torch.cat([part["prompt_ids"], part["completion_ids"]], 1),
                    torch.cat([part["prompt_mask"], part["completion_mask"]], 1),
                    width,
                )[0]
                .to(logps.dtype)
            )
        return logps, None, None

    def _chunks_to_score(self, rows: Rows, batch_size: int) -> list[list[int]]:
        """The rows to score in as many parts on each process, the longest first. Collective."""
        chosen = sorted(self._rows_to_score(len(rows)), key=lambda row: -rows.completions[row])
        if not self._budget:
            chosen = self._as_many_everywhere(chosen)
            return [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
        form: Form = "packed" if self._packs else "padded"
        chunks = deal(rows, chosen, self._budget, form)
        most = max(gather_object([len(chunks)]))
        # A process with few rows to score scores some of them again
        return [
            *deal(rows, chosen, self._budget, form, min(most, len(chosen))),
            *([chosen[-1:]] * (most - len(chosen))),
        ]

    def _as_many_everywhere(self, rows: list[int]) -> list[int]:
        """The rows, with the last one again and again where another process has more. Collective."""
        return rows + rows[-1:] * (max(gather_object([len(rows)])) - len(rows))
