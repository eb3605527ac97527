"""A model that is counted instead of computed: real tensors outside, PyTorch's fake tensors inside.

A trainer calls it as any other, with real token ids, and gets real log-probs (all 0, so every ratio is 1) through which
a backward pass runs. Its layers, its loss head and their backward passes run under `FakeTensorMode`, which knows
shapes and no values: a model of 7 billion parameters takes no memory and next to no time. What those passes would take
is counted on the way, FLOPs by `FlopCounterMode` and memory by `MemTracker`.

Three kernels of a GPU have stand-ins, since on a CPU others would be counted in their place:

- attention: PyTorch's counter has no formula for the one that fake tensors of a CPU take
  (`_scaled_dot_product_flash_attention_for_cpu`), and takes every token to see every other. Here the pairs of a query
  and a key are counted that the mask admits: flash attention's, which skips the future and padding, or for flex
  attention all pairs of every block that is not empty. See `pairs_of`.
- the two Triton kernels of TRL's loss head, which work in place and multiply no matrices;
- its sum of products in float32, which on a CPU makes float32 copies first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.utils import FusedCausalLMOutput


# Matrix products per pair of a query and a key: scores and values; going back, scores again and four gradients
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


@dataclass
class Counts:
    """Of the passes through a model since it was made or these were reset."""

    flops: int = 0
    gathers: int = 0  # of all parameters, with ZeRO-3: forward, recomputed, backward
    tokens: int = 0  # through the layers
    padding: int = 0  # of them
    peaks: list[int] = field(default_factory=list)  # of memory, in bytes, one a pass


class CountedModel:
    """A mixin of a `PreTrainedModel` made under `FakeTensorMode`; see `make_counted_model`."""

    def start_counting(self, mode: FakeTensorMode) -> None:
        self._fake, self._memory = mode, MemTracker()
        with mode:
            for parameter in self.parameters():  # as they are in every micro-batch but a step's first
                parameter.grad = torch.empty_like(parameter)
        self._memory.track_external(self)
        self._leaf = torch.zeros((), requires_grad=True)
        self.counts = Counts()
        first_layer = self.get_decoder().layers[0]
        first_layer.register_forward_pre_hook(lambda *_: self._add(gathers=1))

    def _apply(self, *args: Any, **kwargs: Any) -> "CountedModel":
        return self  # is on no device that it could leave

    def _add(self, **more: int) -> None:
        for name, value in more.items():
            setattr(self.counts, name, getattr(self.counts, name) + value)

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor, fused_lm_head: bool, **inputs: Any):
        call = Call(input_ids, labels, inputs.get("position_ids"), inputs.get("attention_mask"))
        self._add(tokens=input_ids.numel(), padding=call.padding())
        log_probs, entropy = _Counted.apply(self._leaf, self, call, torch.is_grad_enabled())
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy)

    def run_forward(self, call: "Call") -> tuple[torch.Tensor, int]:
        """Fake log-probs, with their graph, and how many pairs attended."""
        pairs, scored = pairs_of(call, self.config._attn_implementation), call.scored()
        self.counts.peaks.append(0)
        with self._counting(pairs), _KnownCount(scored):
            self._memory.reset_mod_stats()
            fake = {
                name: self._fake.from_tensor(value)
                for name, value in (
                    ("input_ids", call.input_ids),
                    ("labels", call.labels),
                    ("position_ids", call.position_ids),
                )
                if value is not None
            }
            return super().__call__(**fake, fused_lm_head=True).log_probs, pairs

    def run_backward(self, log_probs: torch.Tensor, gradient: torch.Tensor, pairs: int) -> None:
        self._add(gathers=1)
        with self._counting(pairs):
            log_probs.backward(self._fake.from_tensor(gradient))

    @contextmanager
    def _counting(self, pairs: int) -> Iterator[None]:
        """Inside, ops are fake, counted, and of the GPU's kernels."""
        implementation, flops = self.config._attn_implementation, FlopCounter(display=False, custom_mapping=FORMULAS)
        self.config._attn_implementation, _Pairs.now = "counted", pairs
        try:
            with _gpu_loss_head(), self._fake, self._memory, flops:
                yield
        finally:
            self.config._attn_implementation, _Pairs.now = implementation, None
        [peak] = self._memory.get_tracker_snapshot("peak").values()
        self.counts.flops += flops.get_total_flops()
        self.counts.peaks[-1] = max(self.counts.peaks[-1], peak["Total"])


def make_counted_model(architecture: type[PreTrainedModel], config: PretrainedConfig, attention: str) -> Any:
    """A model of fake bfloat16 weights that counts its passes, in `counts`, as with this implementation of attention."""
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


@dataclass
class Call:
    """What a trainer gave to the model: (B, S) each, or (1, N) of packed sequences."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None
    mask: torch.Tensor | BlockMask | None

    def scored(self) -> int:
        return int((self.labels[:, 1:] != -100).sum())

    def padding(self) -> int:
        return int((self.mask == 0).sum()) if isinstance(self.mask, torch.Tensor) else 0


def pairs_of(call: Call, attention: str) -> int:
    """Pairs of a query and a key that the kernels of an implementation of attention compute.

    Args:
        attention: "sdpa", which given a mask of padding computes all pairs of a padded row, and with packed sequences all
            of the packed row; "flex_attention", all pairs of blocks that its mask admits anything of; else flash
            attention, which computes each sequence's own, none of padding.
    """
    if isinstance(call.mask, BlockMask):
        blocks = call.mask.kv_num_blocks.sum()
        if call.mask.full_kv_num_blocks is not None:
            blocks = blocks + call.mask.full_kv_num_blocks.sum()
        return int(blocks) * prod(call.mask.BLOCK_SIZE)
    if attention == "sdpa":
        return call.input_ids.size(0) * call.input_ids.size(1) ** 2
    if call.mask is not None:
        lengths = call.mask.sum(1)
    else:  # packed: positions restart at each sequence
        starts = (call.position_ids[0] == 0).nonzero().flatten()
        lengths = torch.diff(starts, append=torch.tensor([call.input_ids.size(1)]))
    return int((lengths * (lengths + 1) // 2).sum())


class _Counted(torch.autograd.Function):
    """The seam between real and fake tensors."""

    @staticmethod
    def forward(ctx, leaf, model: Any, call: Call, with_graph: bool):
        ctx.set_materialize_grads(False)
        with torch.set_grad_enabled(with_graph):
            log_probs, pairs = model.run_forward(call)
        ctx.model, ctx.log_probs, ctx.pairs = model, log_probs, pairs
        return torch.zeros(log_probs.shape), torch.zeros(log_probs.shape)

    @staticmethod
    def backward(ctx, gradient, gradient_of_entropy):
        log_probs, ctx.log_probs = ctx.log_probs, None
        ctx.model.run_backward(log_probs, gradient, ctx.pairs)
        return None, None, None, None


class FlopCounter(FlopCounterMode):
    """FlopCounterMode for a whole model. By module, it would keep what is recomputed until the garbage collector runs."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.mod_tracker = _NoModules()


class _NoModules:
    parents = {"Global"}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class _KnownCount(TorchFunctionMode):
    """Fake tensors do not know how many values a boolean index takes: it is told."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            flat = args[0].flatten(0, args[1].dim() - 1)
            return flat.index_select(0, torch.zeros(self.count, dtype=torch.long))
        return function(*args, **(kwargs or {}))


# The GPU's kernels


class _Pairs:
    now: int | None = None


@torch.library.custom_op("luffy_benchmarks::attention", mutates_args=())
def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: int) -> list[torch.Tensor]:
    raise NotImplementedError("Fake tensors only.")


@attention.register_fake
def _(query, key, value, pairs):
    batch, heads, tokens, size = query.shape
    log_sum_exp = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    return [query.new_empty(batch, tokens, heads, size), log_sum_exp]


@torch.library.custom_op("luffy_benchmarks::attention_backward", mutates_args=())
def attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, pairs: int
) -> list[torch.Tensor]:
    raise NotImplementedError("Fake tensors only.")


@attention_backward.register_fake
def _(gradient, query, key, value, out, pairs):
    return [torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)]


@torch.library.custom_op("luffy_benchmarks::add_product", mutates_args=("sums",))
def add_product(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    raise NotImplementedError("Fake tensors only.")


@add_product.register_fake
def _(sums, a, b):
    return None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out, log_sum_exp = attention(query, key, value, _Pairs.now)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, _ = ctx.saved_tensors
        return tuple(attention_backward(gradient, query, key, value, out, _Pairs.now))


def _counted_attention(module, query, key, value, attention_mask, **options):
    return _Attention.apply(query, key, value), None


AttentionInterface.register("counted", _counted_attention)


def attention_flops(query, pairs: int, products: int) -> int:
    """Of `pairs` in each head; a product of matrices takes 2 FLOPs per pair and entry of a head."""
    _, heads, _, size = query
    return products * 2 * heads * size * pairs


FORMULAS = {
    torch.ops.luffy_benchmarks.attention: lambda query, key, value, pairs, **_: attention_flops(
        query, pairs, FORWARD_PRODUCTS
    ),
    torch.ops.luffy_benchmarks.attention_backward: lambda gradient, query, key, value, out, pairs, **_: (
        attention_flops(query, pairs, BACKWARD_PRODUCTS)
    ),
    torch.ops.luffy_benchmarks.add_product: lambda sums, a, b, **_: 2 * a[0] * a[1] * b[1],
}


@contextmanager
def _gpu_loss_head() -> Iterator[None]:
    """TRL's loss head as on a GPU: only scored tokens, folded in place."""
    stand_ins = {
        (trl_utils, "_use_triton"): lambda device: True,
        (chunked_logprob, "_forward_tile"): lambda *args, **kwargs: None,
        (chunked_logprob, "_backward_tile"): lambda *args, **kwargs: None,
        (chunked_logprob, "_addmm_fp32"): add_product,
    }
    before = {(module, name): getattr(module, name) for module, name in stand_ins}
    for (module, name), stand_in in stand_ins.items():
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)
