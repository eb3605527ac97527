"""Attention of a packed row, each sequence by itself: no mask as wide as the row, nothing computed between strangers.

PyTorch's `scaled_dot_product_attention` knows no packed rows, and a mask over a row of N tokens costs N x N whatever
it hides. Transformers lets an implementation of attention be registered by name: the one here calls PyTorch's for each
sequence of a packed row, with the keys and values of a shared prompt before the row's own, and is Transformers' `sdpa`
for any other row.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .packing import Layout, Span


BY_SEQUENCE = "sdpa_by_sequence"
# Layers of other kinds either have no attention or hide more than what is below
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# What other models have in a layer's attention beside a softmax of scaled products
UNKNOWN_TERMS = ("softcap", "s_aux", "position_bias")

_is_packed: ContextVar[bool] = ContextVar("_is_packed", default=False)


@dataclass(frozen=True)
class Window:
    """In place of a mask: each token sees so many, itself among them."""

    size: int


@contextmanager
def without_masks() -> Iterator[None]:
    """In here a model with this attention makes no masks: its packed row says where its sequences are."""
    token = _is_packed.set(True)
    try:
        yield
    finally:
        _is_packed.reset(token)


def can_attend_by_sequence(config: PretrainedConfig) -> bool:
    """Whether a model's attention is `sdpa` over all that came before, or over a window of it."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    is_chunked = getattr(config, "attention_chunk_size", None) is not None
    return config._attn_implementation in ("sdpa", BY_SEQUENCE) and layers <= KNOWN_LAYERS and not is_chunked


def attend_by_sequence(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Window | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    spans: tuple[Span, ...] | None = None,
    **terms: Any,
) -> tuple[torch.Tensor, None]:
    """What Transformers' attention functions return, `(1, N, heads, head_dim)`.

    Args:
        query, key, value: `(1, heads, N, head_dim)`; of keys and values there can be fewer heads.
        spans: of the packed row; None for any other.
    """
    if spans is None:
        assert not isinstance(attention_mask, Window)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **terms)
    for name in UNKNOWN_TERMS:
        if terms.get(name) is not None:
            raise ValueError(f"its attention has a term, {name}, that sequence by sequence is not computed")
    window = attention_mask.size if isinstance(attention_mask, Window) else None
    options: Any = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.size(1) != query.size(1)}
    lengths = [span.length for span in spans]
    # split and no slices: in the backward pass of a slice the whole row is filled
    parts = list(zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True))
    attended = []
    for span, own in zip(spans, parts, strict=True):
        before = () if span.prefix is None else parts[span.prefix]
        attended.append(_attend(*own, *before, window=window, **options))
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *before: torch.Tensor,
    window: int | None,
    **options: Any,
) -> torch.Tensor:
    """Of one sequence, `(1, heads, length, head_dim)`.

    Args:
        before: queries, keys and values of the prompt that it continues.
        window: how many keys a query sees at most; None: all.
    """
    added = 0
    if before:
        queries, keys, values = before
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        if query.device.type == "cpu" and queries.size(2) < query.size(2):
            # Less than what a mask, which hides nothing from the computation there, would cost
            query, added = torch.cat([queries, query], dim=2), queries.size(2)
    visible = _causal(query.size(2), key.size(2), window or key.size(2), query.device)
    return scaled_dot_product_attention(query, key, value, **visible, **options)[:, :, added:]


def _causal(queries: int, keys: int, window: int, device: torch.device) -> dict[str, Any]:
    """The last query sees all keys, the one before it all but the last; no more than a window of them."""
    if queries == keys and keys <= window:
        return {"is_causal": True}
    if device.type == "cuda" and keys <= window:
        return {"attn_mask": causal_lower_right(queries, keys)}  # no mask there: flash attention's own
    before = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return {"attn_mask": before.triu(keys - queries - window + 1)}


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | Window | None:
    if _is_packed.get():
        return None if local_size is None else Window(local_size)
    return sdpa_mask(*args, local_size=local_size, **kwargs)


AttentionInterface.register(BY_SEQUENCE, attend_by_sequence)
AttentionMaskInterface.register(BY_SEQUENCE, _mask)


def block_mask(layout: Layout) -> BlockMask:
    """Flex attention's mask of a packed row whose prompts are shared: a token sees its own span and its prompt's."""
    device = layout.source.device
    lengths = torch.tensor([span.length for span in layout.spans])
    span_of = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)  # (N,)
    prefixes = torch.tensor([-1 if span.prefix is None else span.prefix for span in layout.spans])
    prefix_of = prefixes.repeat_interleave(lengths).to(device)  # (N,)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        is_before = (span_of[query] == span_of[key]) & (query >= key)
        return is_before | (prefix_of[query] == span_of[key])

    size = len(span_of)
    mask: Callable = create_block_mask
    return mask(sees, 1, None, size, size, device=str(device))
