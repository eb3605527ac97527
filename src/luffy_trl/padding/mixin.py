"""PaddingFreeMixin: a GRPOTrainer that computes next to nothing on padding."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from torch.nn.functional import pad
from transformers.utils.generic import is_flash_attention_requested
from trl import GRPOTrainer

from .config import PaddingFreeConfig
from .micro_batches import COMPLETION_KEYS, Batch, drop_zero_advantages, optimizer_steps, order_by_length, trim
from .packing import accepted, boundaries, pack, unpack
from .packing_check import COMPLETION_LENGTHS, Agreement, compare, mode, no_trace, probe


logger = get_logger(__name__)

# These divide a token's loss by the tokens of a generation, the others by the rows of a micro-batch
LOSSES_OVER_TOKENS = ("dapo", "cispo", "vespo")


class PaddingFreeMixin(GRPOTrainer):
    """
    GRPOTrainer whose micro-batches hold rows of like length, cut to the longest, packed where attention allows it.

    What differs from [`~trl.GRPOTrainer`], override by override:

    - `_prepare_inputs`: orders the rows of each optimizer step by length, and trims the micro-batches;
    - `_generate_and_score_completions`: nothing; while it runs, forward passes are those of the old and the reference
      policy;
    - `_get_per_token_logps_and_entropies`: packs the forward pass; of a generation, scores by rows of like length, and
      only those that `_rows_to_score` names.

    No row leaves its optimizer step, and each process runs as many forward passes as the others.

    Raises:
        ValueError: for `packed_forward=True` with a model that does not keep packed sequences apart, at construction,
            or where the model is sharded with its first forward pass; for `skip_zero_advantages` with a loss over all
            rows.
    """

    args: PaddingFreeConfig
    _buffered_inputs: list[Batch] | None
    # Keys of the batch that are as wide as the completions; a subclass adds its own
    _completion_keys: tuple[str, ...] = COMPLETION_KEYS

    def __init__(self, model, reward_funcs=None, args: PaddingFreeConfig | None = None, *trl_args, **trl_kwargs):
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        if self.args.skip_zero_advantages and self.aux_loss_enabled:
            raise ValueError(
                "skip_zero_advantages=True cannot be combined with the auxiliary loss of this mixture of experts, "
                "which is over all rows. Set one of skip_zero_advantages and router_aux_loss_coef to False or 0."
            )
        whole = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._backbone_forward = whole.base_model.forward
        self._packs, self._packing_is_checked = self._packing_is_on(), False
        # Now, where the model is whole already and a refusal is due; else with the first forward pass
        if self.args.packed_forward and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._check_packing()
        # What forward passes are for: the loss, or the log-probs of old and reference policy in a generation
        self._phase: Literal["loss", "generation"] = "loss"
        # Where the optimizer step under way began, and how many of its micro-batches were taken
        self._step_under_way, self._micro_batches_taken = -1, 0

    def _rows_to_score(self, rows: int) -> list[int]:
        """Of a generation's `rows` rows on this process, those whose old and reference log-probs anybody needs.

        The others get 0: who leaves rows out keeps these values out of the loss. At least one row is scored.
        """
        return list(range(rows))

    # Micro-batches

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self.state.global_step != self._step_under_way:
            self._step_under_way, self._micro_batches_taken = self.state.global_step, 0
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        is_new = self._buffered_inputs is not before
        if self.args.trim_padding and is_new and self._buffered_inputs is not None:
            self._buffered_inputs = self._arrange(self._buffered_inputs)
            # TRL's own choice, from the batches as they are now
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        self._micro_batches_taken += 1
        return inputs

    def _arrange(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a generation, without wasted padding. No row leaves its optimizer step."""
        if "pixel_values" in batches[0]:  # rows with different numbers of image tensors cannot change places
            return batches
        if self._steps_are_the_same_in_each_iteration(len(batches)):
            batches = [batch for step in self._steps_of(len(batches)) for batch in self._reorder(batches, step)]
        return [trim(batch, self.pad_to_multiple_of, self._completion_keys) for batch in batches]

    def _steps_are_the_same_in_each_iteration(self, per_generation: int) -> bool:
        """Else `num_iterations` cuts one generation's micro-batches into other steps the second time."""
        per_step = self.args.gradient_accumulation_steps
        return self.num_iterations == 1 or per_generation % per_step == 0 or per_step % per_generation == 0

    def _steps_of(self, per_generation: int) -> list[range]:
        """Which micro-batches of a generation belong to which optimizer step."""
        # The last step of an epoch can be shorter; one that was interrupted is counted from its start again
        current = self.current_gradient_accumulation_steps
        left = current - self._micro_batches_taken % current
        return optimizer_steps(per_generation, left, self.args.gradient_accumulation_steps)

    def _reorder(self, batches: list[Batch], step: range) -> list[Batch]:
        ordered = order_by_length([batches[i] for i in step])
        if self.args.skip_zero_advantages:  # after the order: its advantages are those of a micro-batch's size
            ordered = drop_zero_advantages(ordered, rows_count=self.loss_type not in LOSSES_OVER_TOKENS)
        return ordered

    # Forward passes

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
        forward = super()._get_per_token_logps_and_entropies
        self._check_packing()
        if all(value is None for value in images.values()):
            if self._packs:
                forward = self._packed_forward
            if self._phase == "generation" and self.args.trim_padding:
                return self._score(forward, model, input_ids, attention_mask, logits_to_keep, batch_size)
        return forward(
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size=batch_size,
            compute_entropy=compute_entropy,
            compute_aux_loss=compute_aux_loss,
            **images,
        )

    def _score(self, forward, model, input_ids, attention_mask, logits_to_keep, batch_size):
        """Log-probs `(B, T)` of the rows to score, by rows of like length; 0 for the others. All that TRL takes."""
        lengths = attention_mask[:, -logits_to_keep:].sum(1).tolist()  # (B,)
        rows = sorted(self._rows_to_score(len(input_ids)), key=lambda row: -lengths[row])
        rows = self._as_many_everywhere(rows)
        logps = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)  # (B, T)
        for chunk in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size)):
            part = {
                "prompt_ids": input_ids[chunk, :-logits_to_keep],
                "prompt_mask": attention_mask[chunk, :-logits_to_keep],
                "completion_ids": input_ids[chunk, -logits_to_keep:],
                "completion_mask": attention_mask[chunk, -logits_to_keep:],
            }
            part = trim(part, self.pad_to_multiple_of)
            width = part["completion_ids"].size(1)
            logps[chunk, :width] = forward(
                model,
                torch.cat([part["prompt_ids"], part["completion_ids"]], 1),
                torch.cat([part["prompt_mask"], part["completion_mask"]], 1),
                width,
            )[0].to(logps.dtype)
        return logps, None, None

    def _as_many_everywhere(self, rows: list[int]) -> list[int]:
        """The rows, with the last one again and again where another process has more. Collective."""
        return rows + rows[-1:] * (max(gather_object([len(rows)])) - len(rows))

    # Packing

    def _packing_is_on(self) -> bool:
        """Whether it is wanted; whether it is possible is checked."""
        if self.args.packed_forward is None:  # flash attention of a package, or a kernel of the Hub
            return is_flash_attention_requested(self.model.config.get_text_config())
        return self.args.packed_forward

    def _check_packing(self) -> None:
        """Pads from now on if this model does not keep packed sequences apart. Collective; does nothing again.

        Raises:
            ValueError: instead, where packing was asked for.
        """
        if self._packing_is_checked or not self._packs:
            return
        self._packing_is_checked = True  # before the forward passes of the check, which come by here
        own = self._try_packing()
        everywhere = gather_object([(own.holds, own.difference)])
        if all(holds for holds, _ in everywhere):
            return
        self._packs = False
        config = self.model.config
        model = f"this model ({config.model_type}, {config.get_text_config()._attn_implementation!r} attention)"
        found = (
            f"packed rows do not equal padded ones with {model}: log-probs of two short sequences differ by up to "
            f"{max(difference for _, difference in everywhere):.2g}"
        )
        if own.refusal is not None:
            found = f"{model} refuses packed rows: {own.refusal}"
        if self.args.packed_forward:
            raise ValueError(f"packed_forward=True cannot be used: {found}. Leave it out, and rows are padded.")
        logger.warning(f"packed_forward is off, and rows are padded: {found}.")

    def _try_packing(self) -> Agreement:
        """Log-probs of two short sequences in a packed row against padded rows. Leaves model and generators alone."""
        model, device = self.model, self.accelerator.device
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}  # images' among them
        vocabulary = range(min(len(self._tokenizer), model.config.get_text_config().vocab_size))
        plain = [token for token in vocabulary if token not in special]
        ids, other_ids, mask = probe(plain or vocabulary, device)
        kept = max(COMPLETION_LENGTHS)

        def scored(forward, ids: torch.Tensor) -> torch.Tensor:
            with no_trace(device):  # each draws the same dropout
                return forward(model, ids, mask, kept)[0].float()  # (2, T)

        padded_forward = super()._get_per_token_logps_and_entropies
        with mode(model, training=False):
            padded = scored(padded_forward, ids)
        try:
            with mode(model, training=True):  # other kernels can run here
                in_training = torch.stack([scored(self._packed_forward, x) for x in (ids, other_ids)])
            with mode(model, training=False):
                packed = torch.stack([scored(self._packed_forward, x) for x in (ids, other_ids)])
        except ValueError as error:  # newer Transformers', of a layer whose stand-in for a kernel reads no boundaries
            return Agreement(False, math.inf, " ".join(str(error).split()).rstrip("."))
        return compare(padded, packed[0], [in_training, packed], mask[:, -kept:], self._precision())

    def _precision(self) -> Literal["single", "half"]:
        """What forward passes round to. Quantized weights, which are no floats, are computed in half precision."""
        is_single = (
            all(parameter.dtype in (torch.float32, torch.float64) for parameter in self.model.parameters())
            and self.accelerator.mixed_precision == "no"
            and torch.get_float32_matmul_precision() == "highest"
        )
        return "single" if is_single else "half"

    def _packed_forward(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **images: Any,
    ):
        """What the method of TRL returns, from one row of sequences without padding per `batch_size` rows."""
        logps, entropies, aux_losses = [], [], []
        options = {"output_router_logits": True} if compute_aux_loss else {}
        batch_size = batch_size or len(input_ids)
        for ids, kept in zip(input_ids.split(batch_size), attention_mask.bool().split(batch_size), strict=True):
            labels = ids.clone()
            labels[:, :-logits_to_keep] = -100  # only completion tokens are scored
            packed_ids, position_ids = pack(ids, kept)  # (1, N)
            # What keeps sequences apart: positions that restart, and for layers without positions their boundaries
            apart = accepted(self._backbone_forward, {"position_ids": position_ids, **boundaries(kept)})
            with self.accelerator.autocast():
                outputs = model(
                    input_ids=packed_ids,
                    labels=labels[kept].unsqueeze(0),
                    fused_lm_head=True,
                    **apart,
                    **options,
                )
            # The model's outputs begin with the second token, (1, N - 1)
            logps.append(unpack(pad(outputs.log_probs, (1, 0)), kept)[:, -logits_to_keep:])
            if compute_entropy:
                entropies.append(unpack(pad(outputs.entropy, (1, 0)), kept)[:, -logits_to_keep:])
            if compute_aux_loss:
                aux_losses.append(outputs.aux_loss)
        return (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )
