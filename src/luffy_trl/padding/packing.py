"""Sequences without padding in one row, prompts once where they are shared, and their values back in their places.

A row that shares its prompt has the prompt's last token for itself, as its own first: what it predicts is the row's.

    prompts a b c (twice) and x y      a b | c r r r | c s s | x y t t
    positions                          0 1 | 2 3 4 5 | 2 3 4 | 0 1 2 3
    attends to                         itself | a b, itself | a b, itself | itself
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from .dealing import OWN_TOKENS, Rows, shares


@dataclass(frozen=True)
class Span:
    """Tokens of the packed row that attend to themselves.

    Attributes:
        prefix: number of the span, a shared prompt's, to which they attend too.
    """

    length: int
    prefix: int | None = None


@dataclass(frozen=True)
class Layout:
    """Where the tokens of B padded rows, prompts of width P before completions of width T, lie in a row of N tokens.

    Attributes:
        source: `(N,)`, of the flattened `(B, P + T)`.
        position_ids: `(1, N)`.
        scored: `(M,)`, the completions' tokens in the packed row.
        places: `(M,)`, of the flattened `(B, T)`, the same tokens'.
        spans: in their order.
        shape: B and T.
    """

    source: torch.Tensor
    position_ids: torch.Tensor
    scored: torch.Tensor
    places: torch.Tensor
    spans: tuple[Span, ...]
    shape: tuple[int, int]

    @classmethod
    def of(cls, rows: Rows, prompt_width: int, width: int, shared: bool, device: torch.device) -> "Layout":
        """Of rows whose prompts are padded to the left and whose completions to the right.

        Made of numbers, so that nothing has to wait for the device.
        """
        spans: list[Span] = []
        source, positions, scored, places = (list[torch.Tensor]() for _ in range(4))
        prefixes: dict[int, int] = {}  # group -> number of its prompt's span
        packed = 0

        def add(row: int, start: int, end: int, prefix: int | None = None) -> None:
            nonlocal packed
            if start == end:
                return
            prompt, line = rows.prompts[row], prompt_width + width
            spans.append(Span(end - start, prefix))
            source.append(torch.arange(start, end) + row * line + prompt_width - prompt)
            positions.append(torch.arange(start, end))
            completion = torch.arange(min(max(start, prompt), end), end)
            scored.append(completion - start + packed)
            places.append(completion - prompt + row * width)
            packed += end - start

        members = [rows.groups.count(group) for group in rows.groups]
        for row, (prompt, completion) in enumerate(zip(rows.prompts, rows.completions, strict=True)):
            if not (shared and shares(members[row], prompt)):
                add(row, 0, prompt + completion)
                continue
            if rows.groups[row] not in prefixes:
                prefixes[rows.groups[row]] = len(spans)
                add(row, 0, prompt - OWN_TOKENS)
            add(row, prompt - OWN_TOKENS, prompt + completion, prefixes[rows.groups[row]])

        lies = [_to(device, torch.cat(parts)) for parts in (source, positions, scored, places)]
        return cls(lies[0], lies[1].unsqueeze(0), lies[2], lies[3], tuple(spans), (len(rows), width))

    @classmethod
    def of_masks(cls, mask: torch.Tensor, width: int) -> "Layout":
        """Of rows `(B, P + T)` without anything shared; waits for the device.

        Args:
            mask: True on tokens.
            width: T.
        """
        lengths = torch.stack([mask[:, :-width].sum(1), mask[:, -width:].sum(1)]).tolist()
        rows = Rows(lengths[0], lengths[1], groups=list(range(len(mask))))
        return cls.of(rows, mask.size(1) - width, width, shared=False, device=mask.device)

    @property
    def is_shared(self) -> bool:
        return any(span.prefix is not None for span in self.spans)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """The tokens of the padded rows `(B, P + T)` as one row `(1, N)`."""
        return values.flatten()[self.source].unsqueeze(0)

    def labels(self, packed_ids: torch.Tensor) -> torch.Tensor:
        """`(1, N)`: the completions' tokens, -100 elsewhere."""
        flat = packed_ids.flatten()
        return torch.full_like(flat, -100).scatter(0, self.scored, flat[self.scored]).unsqueeze(0)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The completions' values of a packed row `(1, N)` in their places `(B, T)`, zeros elsewhere."""
        rows, width = self.shape
        flat = packed.new_zeros(rows * width).scatter(0, self.places, packed.flatten()[self.scored])
        return flat.view(rows, width)

    def boundaries(self) -> dict[str, Any]:
        """Where the sequences of the packed row begin and end, under the names that transformers' layers read.

        Flash attention and linear attention go by `cu_seq_lens_*` (sequences + 1,) int32 and `max_length_*`,
        convolutions and state spaces by `seq_idx` (1, N) int32. transformers' `DataCollatorWithFlattening` makes the
        same of lists.
        """
        lengths = torch.tensor([span.length for span in self.spans if span.length > 0], dtype=torch.long)
        sequences = torch.arange(len(lengths), dtype=torch.int32)
        device = self.source.device
        ends = _to(device, pad(lengths.cumsum(0), (1, 0)).to(torch.int32))
        longest = int(lengths.max()) if len(lengths) > 0 else 0
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": _to(device, sequences.repeat_interleave(lengths)).unsqueeze(0),
        }


def _to(device: torch.device, values: torch.Tensor) -> torch.Tensor:
    """On the device, without waiting for what it has still to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def accepted(forward: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a model's `forward` takes: one from elsewhere may have no `**kwargs`."""
    parameters = inspect.signature(forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}
