"""PackedForwardMixin: a GRPOTrainer whose forward passes are rows of sequences without padding, where it is right."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from torch.nn.functional import pad
from transformers.utils.generic import is_flash_attention_requested
from trl import GRPOTrainer

from .attention import BY_SEQUENCE, KNOWN_LAYERS, block_mask, can_attend_by_sequence, without_masks
from .config import PaddingFreeConfig
from .packing import Layout, accepted
from .packing_check import COMPLETION_LENGTHS, Agreement, compare, compare_shared, mode, no_trace, probe, shared_probe
from .waiting import read, read_later


logger = get_logger(__name__)


class PackedForwardMixin(GRPOTrainer):
    """
    GRPOTrainer that packs its forward passes where the model allows it.

    What differs from [`~trl.GRPOTrainer`], override by override:

    - `_get_per_token_logps_and_entropies`: packs the forward pass;
    - `_compute_loss`: nothing; while it runs, a micro-batch lies as its `layout` says, and no metric is waited for;
    - `log`: reads those metrics.

    Raises:
        ValueError: for `packed_forward=True` with a model that does not keep packed sequences apart, and for
            `share_prompts=True` with one whose sequences cannot share a prompt; at construction, or where the model is
            sharded with its first forward pass.
    """

    args: PaddingFreeConfig

    def __init__(self, model, reward_funcs=None, args: PaddingFreeConfig | None = None, *trl_args, **trl_kwargs):
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        whole = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._backbone_forward = whole.base_model.forward
        self._text_config = self.model.config.get_text_config()
        self._packs, self._packing_is_checked = self._packing_is_on(), False
        self._shares = self._packs and self._sharing_is_on()
        # How the rows of the forward pass under way lie, where they are packed
        self._layout: Layout | None = None
        # Of the loss that is computed, what ends with it
        self._after_forward: ExitStack | None = None
        # Now, where the model is whole already and a refusal is due; else with the first forward pass
        asked = self.args.packed_forward or self.args.share_prompts
        if asked and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._check_packing()

    def _compute_loss(self, model, inputs):
        self._check_packing()  # before a layout is made use of
        self._layout = inputs.get("layout") if self._packs else None
        try:
            with ExitStack() as self._after_forward:
                return super()._compute_loss(model, inputs)
        finally:
            self._layout = self._after_forward = None

    def _laid_out(self, values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Values of padded rows `(B, S)` as the forward pass under way has its rows: like its `labels`."""
        if self._layout is not None:
            return self._layout.pack(values)
        return pad(values, (labels.size(1) - values.size(1), 0))  # a prompt adapter's virtual tokens come first

    # Forward passes

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
            forward = self._packed_forward if self._packs else forward
        outputs = forward(
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size=batch_size,
            compute_entropy=compute_entropy,
            compute_aux_loss=compute_aux_loss,
            **images,
        )
        # What comes now of TRL's loss reads metrics. Adaptive entropy goes on from one of them
        if self._after_forward is not None and self.model.training and not self.use_adaptive_entropy:
            self._after_forward.enter_context(read_later())
        return outputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        read(self._metrics["train"])
        super().log(logs, start_time)

    # Packing

    def _packing_is_on(self) -> bool:
        """Whether it is wanted; whether it is possible is checked."""
        if self.args.packed_forward is not None:
            return self.args.packed_forward
        config = self.model.config.get_text_config()
        # Flash attention of a package, or a kernel of the Hub
        if is_flash_attention_requested(config) or config._attn_implementation == "flex_attention":
            return True
        return self._budget > 0 and can_attend_by_sequence(config)

    def _sharing_is_on(self) -> bool:
        """Whether it is wanted and attention can do it; whether the rest of the model can is checked.

        Raises:
            ValueError: where it is wanted and attention cannot.
        """
        if self.args.share_prompts is False or not self._budget:
            return False
        is_flex = self._text_config._attn_implementation == "flex_attention"
        layers = set(getattr(self._text_config, "layer_types", None) or ["full_attention"])
        # flex attention is given one mask for all layers
        can_share = layers <= {"full_attention"} if is_flex else can_attend_by_sequence(self._text_config)
        if can_share and not self.aux_loss_enabled:
            return True
        if self.args.share_prompts:
            raise ValueError(
                f"share_prompts=True cannot be used with this model ({self.model.config.model_type}, "
                f"{self._text_config._attn_implementation!r} attention): it needs 'sdpa' or 'flex_attention', layers "
                f"of {' or '.join(sorted(KNOWN_LAYERS))} only (flex attention: full_attention), and no auxiliary loss "
                "of experts. Leave it out, and each row has its own prompt."
            )
        return False

    @property
    def _budget(self) -> int:
        """Tokens of a micro-batch; 0 where micro-batches are TRL's."""
        return self.args.tokens_per_micro_batch or 0

    def _attend_apart(self, apart: bool = True) -> None:
        """From now on `sdpa` attends sequence by sequence in packed rows, where it can; or as before."""
        if can_attend_by_sequence(self._text_config):
            for model in (self.model, self.ref_model):
                if model is not None:
                    model.config.get_text_config()._attn_implementation = BY_SEQUENCE if apart else "sdpa"

    def _check_packing(self) -> None:
        """Pads from now on if this model does not keep packed sequences apart. Collective; does nothing again.

        Raises:
            ValueError: instead, where packing was asked for.
        """
        if self._packing_is_checked or not self._packs:
            return
        self._packing_is_checked = True  # before the forward passes of the check, which come by here
        self._attend_apart()
        own, sharing = self._try_packing()
        everywhere = gather_object([(own.holds, own.difference, sharing.holds, sharing.difference)])
        attention = self._text_config._attn_implementation.replace(BY_SEQUENCE, "sdpa")
        model = f"this model ({self.model.config.model_type}, {attention!r} attention)"
        packed, apart, shared, shared_apart = zip(*everywhere, strict=True)
        if not all(packed):
            found = (
                f"packed rows do not equal padded ones with {model}: log-probs of two short sequences differ by up to "
                f"{max(apart):.2g}"
            )
            if own.refusal is not None:
                found = f"{model} refuses packed rows: {own.refusal}"
            self._do_without("packed_forward", "rows are padded", found)
            self._packs = self._shares = False
            self._attend_apart(False)
        elif self._shares and not all(shared):
            found = (
                f"rows of a shared prompt do not equal padded ones with {model}: their log-probs differ by up to "
                f"{max(shared_apart):.2g}"
            )
            self._do_without("share_prompts", "each row has its own prompt", found)
            self._shares = False

    def _do_without(self, field: str, instead: str, found: str) -> None:
        if getattr(self.args, field):
            raise ValueError(f"{field}=True cannot be used: {found}. Leave it out, and {instead}.")
        logger.warning(f"{field} is off, and {instead}: {found}.")

    def _try_packing(self) -> tuple[Agreement, Agreement]:
        """Log-probs of two short sequences in a packed row against padded rows, and the same with a prompt in common.

        Leaves model and generators alone.
        """
        model, device = self.model, self.accelerator.device
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}  # images' among them
        vocabulary = range(min(len(self._tokenizer), model.config.get_text_config().vocab_size))
        plain = [token for token in vocabulary if token not in special]
        ids, other_ids, mask = probe(plain or vocabulary, device)
        kept = max(COMPLETION_LENGTHS)

        def scored(forward, ids: torch.Tensor, mask: torch.Tensor = mask, **layout: Layout) -> torch.Tensor:
            with no_trace(device):  # each draws the same dropout
                return forward(model, ids, mask, kept, **layout)[0].float()  # (2, T)

        padded_forward = super()._get_per_token_logps_and_entropies
        with mode(model, training=False):
            padded = scored(padded_forward, ids)
        try:
            with mode(model, training=True):  # other kernels can run here
                in_training = torch.stack([scored(self._packed_forward, x) for x in (ids, other_ids)])
            with mode(model, training=False):
                packed = torch.stack([scored(self._packed_forward, x) for x in (ids, other_ids)])
        except ValueError as error:  # newer Transformers', of a layer whose stand-in for a kernel reads no boundaries
            refused = Agreement(False, math.inf, " ".join(str(error).split()).rstrip("."))
            return refused, refused
        own = compare(padded, packed[0], [in_training, packed], mask[:, -kept:], self._precision())
        if not (self._shares and own.holds):
            return own, own
        ids, mask, rows = shared_probe(plain or vocabulary, device)
        layout = Layout.of(rows, ids.size(1) - kept, kept, shared=True, device=device)
        with mode(model, training=False):
            padded, shared = scored(padded_forward, ids, mask), scored(self._packed_forward, ids, mask, layout=layout)
        return own, compare_shared(padded, shared, mask[:, -kept:], self._precision())

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
        layout: Layout | None = None,
        **images: Any,
    ):
        """What the method of TRL returns, from one row of sequences without padding per `batch_size` rows."""
        parts = []
        batch_size = batch_size or len(input_ids)
        layout = layout or self._layout
        for ids, kept in zip(input_ids.split(batch_size), attention_mask.bool().split(batch_size), strict=True):
            with self._lying_as(layout or Layout.of_masks(kept, logits_to_keep)) as lies:
                outputs = self._packed_row(model, lies, lies.pack(ids), output_router_logits=compute_aux_loss)
            # The model's outputs begin with the second token, (1, N - 1)
            logps = lies.unpack(pad(outputs.log_probs, (1, 0)))
            entropies = lies.unpack(pad(outputs.entropy, (1, 0))) if compute_entropy else None
            parts.append((logps, entropies, outputs.aux_loss))
        all_logps, all_entropies, aux_losses = zip(*parts, strict=True)
        return (
            torch.cat(all_logps),
            torch.cat(all_entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    @contextmanager
    def _lying_as(self, layout: Layout) -> Iterator[Layout]:
        before, self._layout = self._layout, layout
        try:
            yield layout
        finally:
            self._layout = before

    def _packed_row(self, model, layout: Layout, packed_ids: torch.Tensor, output_router_logits: bool):
        # What keeps sequences apart: positions that restart, for layers without positions their boundaries
        apart: dict[str, Any] = {"position_ids": layout.position_ids}
        if self._text_config._attn_implementation == BY_SEQUENCE:
            # A mask of ones spares transformers the look, for which it waits, whether positions restart
            apart |= {"spans": layout.spans, "attention_mask": torch.ones_like(packed_ids)}
        if layout.is_shared and self._text_config._attn_implementation == "flex_attention":
            apart["attention_mask"] = block_mask(layout)
        if not layout.is_shared:
            apart |= layout.boundaries()
        options = {"output_router_logits": True} if output_router_logits else {}
        with self.accelerator.autocast(), without_masks():
            return model(
                input_ids=packed_ids,
                labels=layout.labels(packed_ids),
                fused_lm_head=True,
                **accepted(self._backbone_forward, apart),
                **options,
            )
