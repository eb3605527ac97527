"""A model that is counted instead of computed: real tensors outside, PyTorch's fake tensors inside.

A trainer calls it as any other, with real token ids, and gets real log-probs (all 0, so every ratio is 1) through
which a backward pass runs. Its layers, its loss head and their backward passes run under `FakeTensorMode`, which knows
shapes and no values: a model of 7 billion parameters takes no memory and next to no time. What those passes would take
is counted on the way, FLOPs by `FlopCounterMode` and memory by `MemTracker`, with a GPU's kernels
(`counted_kernels.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from counted_kernels import FORMULAS, WHOLE_ROWS, GpuKernels, pairs_of_blocks, pairs_of_rows, pairs_of_spans
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from luffy_trl.padding import forward as packed_forward
from luffy_trl.padding.attention import BY_SEQUENCE
from luffy_trl.padding.packing import Layout, Span


@dataclass
class Counts:
    """Of the passes through a model since it was made or these were reset."""

    flops: int = 0
    gathers: int = 0  # of all parameters, with ZeRO-3: forward, recomputed, backward
    tokens: int = 0  # through the layers
    padding: int = 0  # of them
    peaks: list[int] = field(default_factory=list)  # of memory, in bytes, one a pass


@dataclass
class Call:
    """What a trainer gave to the model: `(B, S)` each, or `(1, N)` of a packed row."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | Layout | None = None  # a layout in place of flex attention's mask
    spans: tuple[Span, ...] | None = None

    def scored(self) -> int:
        return int((self.labels[:, 1:] != -100).sum())

    def padding(self) -> int:
        return int((self.attention_mask == 0).sum()) if isinstance(self.attention_mask, torch.Tensor) else 0

    def pairs(self, attention: str) -> int:
        """Pairs of a query and a key that an implementation of attention computes in whole rows."""
        if isinstance(self.attention_mask, torch.Tensor):
            return pairs_of_rows(self.attention_mask)
        spans = (
            self.attention_mask.spans if isinstance(self.attention_mask, Layout) else self.spans or self.sequences()
        )
        return pairs_of_blocks(spans) if attention == "flex_attention" else pairs_of_spans(spans)

    def sequences(self) -> list[Span]:
        """Of a packed row, whose positions restart at each."""
        [starts] = (self.position_ids[0] == 0).nonzero(as_tuple=True)
        ends = [*starts.tolist()[1:], self.input_ids.size(1)]
        return [Span(end - start) for start, end in zip(starts.tolist(), ends, strict=True)]


class FlopCounter(FlopCounterMode):
    """FlopCounterMode for a whole model. By module, it would keep what is recomputed until garbage is collected."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=FORMULAS)
        self.mod_tracker: Any = _NoModules()


class MemoryTracker(MemTracker):
    """MemTracker for a whole model: by module takes longer."""

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker: Any = _NoModules()


class _NoModules:
    parents = ("Global",)
    is_bw = False

    def register_user_hooks(self, *_: Any) -> None:
        pass

    def clear_user_hooks(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


class CountedModel:
    """A mixin of a `PreTrainedModel` made under `FakeTensorMode`; see `make_counted_model`."""

    config: PretrainedConfig

    def start_counting(self, mode: FakeTensorMode) -> None:
        self._fake, self._memory = mode, MemoryTracker()
        with mode:
            for parameter in self.parameters():  # as they are in every micro-batch but a step's first
                parameter.grad = torch.empty_like(parameter)
        self._memory.track_external(self)
        self._leaf = torch.zeros((), requires_grad=True)
        self.counts = Counts()
        self.get_decoder().layers[0].register_forward_pre_hook(lambda *_: self._add(gathers=1))

    def _apply(self, *args: Any, **kwargs: Any) -> "CountedModel":
        return self  # is on no device that it could leave

    def _add(self, **more: int) -> None:
        for name, value in more.items():
            setattr(self.counts, name, getattr(self.counts, name) + value)

    def __call__(self, fused_lm_head: bool, **inputs: Any) -> FusedCausalLMOutput:
        call = Call(**{name: value for name, value in inputs.items() if name in Call.__dataclass_fields__})
        self._add(tokens=call.input_ids.numel(), padding=call.padding())
        log_probs, entropy = _Seam.apply(self._leaf, self, call, torch.is_grad_enabled())
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy)

    def run_forward(self, call: Call) -> tuple[torch.Tensor, GpuKernels]:
        """Fake log-probs, with their graph, and what the same pass needs on its way back."""
        attention = self.config._attn_implementation
        by_sequence = attention == BY_SEQUENCE and call.spans is not None
        kernels = GpuKernels(None if by_sequence else call.pairs(attention), call.scored())
        self.counts.peaks.append(0)
        inputs = {"input_ids": call.input_ids, "labels": call.labels, "position_ids": call.position_ids}
        with self._counting(kernels):
            fake = {name: self._fake.from_tensor(value) for name, value in inputs.items() if value is not None}
            if by_sequence:
                fake["spans"] = call.spans
            return super().__call__(**fake, fused_lm_head=True).log_probs, kernels

    def run_backward(self, log_probs: torch.Tensor, gradient: torch.Tensor, kernels: GpuKernels) -> None:
        self._add(gathers=1)
        with self._counting(kernels):
            log_probs.backward(self._fake.from_tensor(gradient))

    @contextmanager
    def _counting(self, kernels: GpuKernels) -> Iterator[None]:
        """Inside, ops are fake, counted, and of the GPU's kernels."""
        implementation, flops = self.config._attn_implementation, FlopCounter()
        if kernels.pairs is not None:
            self.config._attn_implementation = WHOLE_ROWS
        try:
            with self._fake, self._memory, flops, kernels:
                yield
        finally:
            self.config._attn_implementation = implementation
        [peak] = self._memory.get_tracker_snapshot("peak").values()
        self.counts.flops += flops.get_total_flops()
        self.counts.peaks[-1] = max(self.counts.peaks[-1], peak["Total"])


class _Seam(torch.autograd.Function):
    """Between real and fake tensors."""

    @staticmethod
    def forward(ctx, leaf, model: CountedModel, call: Call, with_graph: bool):
        ctx.set_materialize_grads(False)
        with torch.set_grad_enabled(with_graph):
            log_probs, kernels = model.run_forward(call)
        ctx.model, ctx.log_probs, ctx.kernels = model, log_probs, kernels
        return torch.zeros(log_probs.shape), torch.zeros(log_probs.shape)

    @staticmethod
    def backward(ctx, gradient, gradient_of_entropy):
        log_probs, ctx.log_probs = ctx.log_probs, None
        ctx.model.run_backward(log_probs, gradient, ctx.kernels)
        return None, None, None, None


def make_counted_model(architecture: type[PreTrainedModel], config: PretrainedConfig, attention: str) -> Any:
    """A model of fake bfloat16 weights that counts its passes, in `counts`.

    Args:
        attention: implementation, by Transformers' name.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    counted = type(architecture.__name__, (CountedModel, architecture), {})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with mode:
            model = counted(config)
    finally:
        torch.set_default_dtype(before)
    model.config._attn_implementation = attention  # no check of packages: nothing of it runs
    model.start_counting(mode)
    return model


@contextmanager
def layouts_for_masks() -> Iterator[None]:
    """Inside, flex attention is given a packed row's layout: its mask of N x N pairs would be made, and not read."""
    before = packed_forward.block_mask
    packed_forward.block_mask = lambda layout: layout
    try:
        yield
    finally:
        packed_forward.block_mask = before
