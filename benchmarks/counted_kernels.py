"""Kernels of a GPU that fake tensors stand in for, with the FLOPs that each takes.

On a CPU others would be counted in their place:

- attention: PyTorch's counter has no formula for the op that fake tensors of a CPU take
  (`_scaled_dot_product_flash_attention_for_cpu`), has every token see every other in those that it knows, and takes
  flex attention for as dense. Here the pairs of a query and a key are counted that the mask admits, as flash attention
  skips the future, padding and other sequences; or for flex attention all pairs of each block that is not empty;
- the two Triton kernels of TRL's loss head, which work in place and multiply no matrices;
- its sum of products in float32, which on a CPU makes float32 copies first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from luffy_trl.padding import attention as own_attention
from luffy_trl.padding.packing import Span


# Matrix products per pair of a query and a key: scores and values; going back, scores again and four gradients
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
BLOCK = 128  # flex attention's, queries and keys


def pairs_of_rows(mask: torch.Tensor) -> int:
    """Pairs of a query and a key that causal attention admits in padded rows `(B, S)`, none of padding."""
    lengths = mask.sum(1)
    return int((lengths * (lengths + 1) // 2).sum())


def pairs_of_spans(spans: Sequence[Span]) -> int:
    """The same of a packed row, whose spans also attend to a shared prompt's."""
    before = [0 if span.prefix is None else spans[span.prefix].length for span in spans]
    return sum(n.length * prompt + n.length * (n.length + 1) // 2 for n, prompt in zip(spans, before, strict=True))


def pairs_of_blocks(spans: Sequence[Span]) -> int:
    """All pairs of the blocks in which a packed row's mask admits any."""
    starts = [0]
    for span in spans:
        starts.append(starts[-1] + span.length)
    seen: set[tuple[int, int]] = set()
    for i, span in enumerate(spans):
        for query in range(starts[i] // BLOCK, -(-starts[i + 1] // BLOCK)):
            seen.update((query, key) for key in range(starts[i] // BLOCK, query + 1))
            if span.prefix is not None:
                first, end = starts[span.prefix], starts[span.prefix + 1]
                seen.update((query, key) for key in range(first // BLOCK, -(-end // BLOCK)))
    return len(seen) * BLOCK**2


# Stand-ins


@torch.library.custom_op("luffy_benchmarks::attention", mutates_args=())
def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: int) -> list[torch.Tensor]:
    raise NotImplementedError("Fake tensors only.")


@attention.register_fake
def _(query, key, value, pairs):
    return [torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)]


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
    def forward(ctx, query, key, value, pairs):
        out, log_sum_exp = attention(query, key, value, pairs)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        ctx.pairs = pairs
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, _ = ctx.saved_tensors
        return *attention_backward(gradient, query, key, value, out, ctx.pairs), None


class GpuKernels(TorchFunctionMode):
    """Inside, on fake tensors, attention is counted, and a boolean index takes as many values as is said.

    Args:
        pairs: that a call of attention computes, where it is called for whole rows; None where it is called for each
            sequence, whose lengths say it.
        taken: by a boolean index, whose values fake tensors do not know.
    """

    def __init__(self, pairs: int | None, taken: int):
        super().__init__()
        self.pairs, self.taken = pairs, taken

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            flat = args[0].flatten(0, args[1].dim() - 1)
            return flat.index_select(0, torch.zeros(self.taken, dtype=torch.long))
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self._before, _Now.pairs = _Now.pairs, self.pairs
        self._head = _stand_ins()
        self._head.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._head.__exit__(*error)
        _Now.pairs = self._before


class _Now:
    pairs: int | None = None


def _whole_rows(module, query, key, value, attention_mask, **options):
    return _Attention.apply(query, key, value, _Now.pairs).transpose(1, 2).contiguous(), None


def _by_sequence(query, key, value, *before, window, **options):
    """`_attend` of our attention as on a GPU, where flash attention knows that queries are the last of the keys."""
    if before:
        _, keys, values = before
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
    queries, keys = query.size(2), key.size(2)
    assert window is None or keys <= window
    return _Attention.apply(query, key, value, queries * (keys - queries) + queries * (queries + 1) // 2)


WHOLE_ROWS = "counted_by_rows"
AttentionInterface.register(WHOLE_ROWS, _whole_rows)


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
def _stand_ins() -> Iterator[None]:
    """TRL's loss head as on a GPU: only scored tokens, folded in place. And our attention."""
    stand_ins = {
        (own_attention, "_attend"): _by_sequence,
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
