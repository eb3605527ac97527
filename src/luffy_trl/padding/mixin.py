"""PaddingFreeMixin: a GRPOTrainer that computes next to nothing on padding."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object
from torch.nn.functional import pad
from trl import GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from .budget import Due, StepRows, dealt, form_of
from .config import PaddingFreeConfig
from .micro_batches import COMPLETION_KEYS, Batch, drop_rows_without_gradient, optimizer_steps, order_by_length, trim
from .packing import Layout
from .scoring import ScoringMixin


logger = get_logger(__name__)


class PaddingFreeMixin(ScoringMixin):
    """
    GRPOTrainer whose micro-batches hold rows of like length, cut to the longest, packed where attention allows it.

    What differs from [`~trl.GRPOTrainer`], beside the forward passes of
    [`~luffy_trl.padding.forward.PackedForwardMixin`] and [`~luffy_trl.padding.scoring.ScoringMixin`], override by
    override:

    - `_prepare_inputs`: orders the rows of each optimizer step by length, and trims the micro-batches; or, with
      `tokens_per_micro_batch`, deals them into others;
    - `training_step`: with `tokens_per_micro_batch`, runs those, all of them where TRL runs the step's last one;
    - `compute_loss`: a row of theirs counts as much as in TRL's; processes may have other numbers of rows.

    No row leaves its optimizer step, and each process runs as many forward passes as the others.

    Raises:
        ValueError: for `skip_zero_advantages` with a loss over all rows, and for what the forward passes refuse.
    """

    args: PaddingFreeConfig
    # With a budget, what is due at each of TRL's steps
    _buffered_inputs: list[Any] | None
    current_gradient_accumulation_steps: Any
    # Keys of the batch that are as wide as the completions; a subclass adds its own
    _completion_keys: tuple[str, ...] = COMPLETION_KEYS
    # And that count tokens or rows of a generation, by which a micro-batch's loss is divided
    _count_keys: tuple[str, ...] = ("num_items_in_batch",)

    def __init__(self, model, reward_funcs=None, args: PaddingFreeConfig | None = None, *trl_args, **trl_kwargs):
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        if self.args.skip_zero_advantages and self.aux_loss_enabled:
            raise ValueError(
                "skip_zero_advantages=True cannot be combined with the auxiliary loss of this mixture of experts, "
                "which is over all rows. Set one of skip_zero_advantages and router_aux_loss_coef to False or 0."
            )
        # Where the optimizer step under way began, and how many of its micro-batches were taken
        self._step_under_way, self._micro_batches_taken = -1, 0
        self._micro_batches_run = 0

    # Micro-batches

    def _prepare_inputs(self, generation_batch):
        if isinstance(generation_batch, Due) or not self.model.training:
            return generation_batch if isinstance(generation_batch, Due) else super()._prepare_inputs(generation_batch)
        if self.state.global_step != self._step_under_way:
            self._step_under_way, self._micro_batches_taken = self.state.global_step, 0
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        is_new = self._buffered_inputs is not before
        if self.args.trim_padding and is_new and self._buffered_inputs is not None:
            self._check_packing()  # the micro-batches are other ones where rows are packed
            self._buffered_inputs = (
                self._deal(self._buffered_inputs) if self._budget else self._arrange(self._buffered_inputs)
            )
            # TRL's own choice, from the batches as they are now
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        self._micro_batches_taken += 1
        return inputs

    def _arrange(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a generation, without wasted padding. No row leaves its optimizer step."""
        batches = [split_pixel_values_by_grid(batch) for batch in batches]  # a row's images go where it goes
        if self._steps_are_the_same_in_each_iteration(len(batches)):
            batches = [batch for step in self._steps_of(len(batches)) for batch in self._reorder(batches, step)]
        return [self._trimmed(unsplit_pixel_values_by_grid(batch)) for batch in batches]

    def _trimmed(self, batch: Batch) -> Batch:
        batch = trim(batch, self.pad_to_multiple_of, self._completion_keys)
        if self._packs and "pixel_values" not in batch:
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            batch["layout"] = Layout.of_masks(mask.bool(), batch["completion_mask"].size(1))
        return batch

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
        if self.args.skip_zero_advantages:
            ordered = drop_rows_without_gradient(ordered, self._count_keys)
            most = self._largest([len(batch["advantages"]) for batch in ordered])
            ordered = [batch | {"most_rows": rows} for batch, rows in zip(ordered, most, strict=True)]
        return ordered

    # Micro-batches by a budget of tokens

    def _deal(self, batches: list[Batch]) -> list[Due]:
        """What is due at each of TRL's steps: the micro-batches of an optimizer step with its last. Collective."""
        if "pixel_values" in batches[0]:
            return [Due([batch]) for batch in batches]
        parts = self._steps_of(len(batches))
        steps = [
            StepRows([batches[i] for i in part], self.pad_to_multiple_of, self._completion_keys, self._count_keys)
            for part in parts
        ]
        always = self.args.share_prompts is True
        forms = [form_of(step.rows, self._packs, self._shares, always) for step in steps]
        budget = self._budget
        found = dealt(steps, forms, budget, self.args.skip_zero_advantages, self._largest)
        due = [Due() for _ in batches]
        for part, step, form, rows in zip(parts, steps, forms, found, strict=True):
            most = self._largest([len(chosen) for chosen in rows])
            for chosen, rows_elsewhere in zip(rows, most, strict=True):
                batch = step.micro_batch(chosen, form, per_token=self.loss_type == "bnpo")
                due[part.stop - 1].append(batch | {"most_rows": rows_elsewhere, "in_place_of": len(part) / len(rows)})
            self._tell_of_long_rows(sum(step.rows.of(chosen).tokens(form) > budget for chosen in rows))
        return due

    def _largest(self, numbers: list[int]) -> list[int]:
        """The largest of each number over all processes. Collective."""
        return [max(of_all) for of_all in zip(*gather_object([numbers]), strict=True)]

    def _tell_of_long_rows(self, count: int) -> None:
        if count > 0:
            logger.warning_once(
                f"{count} rows of an optimizer step on a process are longer than tokens_per_micro_batch="
                f"{self._budget}: each has a micro-batch to itself, of more tokens. Said once."
            )

    def training_step(self, model, inputs, num_items_in_batch):
        if not self._budget:
            return super().training_step(model, inputs, num_items_in_batch)
        start = time.perf_counter()
        model.train()
        due = self._prepare_inputs(inputs)
        loss = torch.zeros((), device=self.accelerator.device)
        for batch in due[:-1]:
            with self._before_the_last(model):
                # Transformers', of which TRL's counts one more step
                loss = loss + super(GRPOTrainer, self).training_step(model, Due([batch]), num_items_in_batch)
        self._current_train_step_time += time.perf_counter() - start
        self._count_micro_batches(len(due))
        if due:
            return loss + super().training_step(model, Due(due[-1:]), num_items_in_batch)
        self._step += 1
        return loss

    def _count_micro_batches(self, run: int) -> None:
        self._micro_batches_run += run
        if self._micro_batches_taken % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["micro_batches"].append(float(self._micro_batches_run))
            self._micro_batches_run = 0

    @contextmanager
    def _before_the_last(self, model) -> Iterator[None]:
        """Gradients are added up in here, and reduced over the processes with those of the last micro-batch."""
        state = self.accelerator.gradient_state
        is_last_step = state.sync_gradients
        reduces_each = (
            state.plugin_kwargs.get("sync_each_batch", False)
            or self.accelerator.distributed_type == DistributedType.DEEPSPEED
        )
        with ExitStack() as stack:
            if is_last_step and not reduces_each:
                stack.enter_context(self.accelerator.no_sync(model))
            state._set_sync_gradients(False)
            stack.callback(state._set_sync_gradients, is_last_step)
            yield

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = partial(super().compute_loss, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        [batch] = inputs if isinstance(inputs, Due) else [inputs]
        if "most_rows" not in batch:  # TRL's own
            return loss(model, batch)
        steps = self.current_gradient_accumulation_steps
        with self._gathering_as_many_rows(len(batch["advantages"]), batch["most_rows"]):
            self.current_gradient_accumulation_steps = steps / batch.get("share", 1)
            try:
                return loss(model, batch)
            finally:
                self.current_gradient_accumulation_steps = steps

    @contextmanager
    def _gathering_as_many_rows(self, rows: int, most: int) -> Iterator[None]:
        """TRL gathers one value for each row of a micro-batch: processes have different numbers of rows in here."""
        gather = self.accelerator.gather

        def gather_padded(values: Any) -> Any:
            if values.dim() == 1 and values.is_floating_point() and len(values) == rows:
                values = pad(values, (0, most - rows), value=torch.nan)  # TRL takes it for a row without tokens
            return gather(values)

        self.accelerator.gather = gather_padded
        try:
            yield
        finally:
            del self.accelerator.gather
