"""Micro-batches without wasted padding: rows ordered by length, and every micro-batch cut to its longest row.

TRL pads every row of a generation batch to the longest prompt and the longest completion in it (TRL issue 7179), and
draws micro-batches at random. One long completion then makes every row as long. Here rows move between the
micro-batches of one optimizer step, never across it, so that rows of like length share one, and each micro-batch is
cut to its own longest row. Losses that are sums over the step's rows or tokens do not change.
"""

from collections.abc import Sequence
from typing import Any

import torch


# Keys of TRL's batch that are padded along dimension 1: prompts to the left, completions to the right
PROMPT_KEYS = ("prompt_ids", "prompt_mask")
# Prompts and completions in one, those of models that read images
WHOLE_KEYS = ("token_type_ids", "mm_token_type_ids")
COMPLETION_KEYS = (
    "completion_ids",
    "completion_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
    "tool_mask",
)

# Optional, True on rows that have a gradient without an advantage, too, (B,)
TRAINED_KEY = "is_trained"

Batch = dict[str, Any]


def optimizer_steps(micro_batches: int, current: int, following: int) -> list[range]:
    """Which of a generation's micro-batches belong to which optimizer step.

    Args:
        micro_batches: how many there are.
        current: how many the optimizer step under way still takes, 1 or more.
        following: how many each later one takes.
    """
    starts = [0, *range(current, micro_batches, following)]
    ends = [*starts[1:], micro_batches]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def order_by_length(batches: list[Batch]) -> list[Batch]:
    """The same rows in as many micro-batches of the same sizes, the longest completions first.

    On every process the k-th micro-batch then holds rows of about the same length. Completions decide, and prompts
    between equal ones: completions differ by more.
    """
    completions = torch.cat([batch["completion_mask"].sum(1) for batch in batches])  # (N,)
    prompts = torch.cat([batch["prompt_mask"].sum(1) for batch in batches])  # (N,)
    order = (completions * (prompts.max() + 1) + prompts).argsort(descending=True, stable=True)
    return _deal(batches, order.split([len(batch["prompt_mask"]) for batch in batches]))


def drop_rows_without_gradient(batches: list[Batch], count_keys: Sequence[str]) -> list[Batch]:
    """The rows that have a gradient, spread evenly over as many micro-batches; each keeps at least one row.

    Every process still runs as many forward passes as the others.

    Args:
        batches: the micro-batches of one optimizer step.
        count_keys: of the batch, numbers of tokens or rows in a generation.
    """
    trained = torch.cat([has_gradient(batch) for batch in batches])  # (N,)
    kept = trained.nonzero().flatten()
    if len(kept) < len(batches):  # not enough for a row each: fill up with rows that add nothing
        kept = torch.cat([kept, (~trained).nonzero().flatten()[: len(batches) - len(kept)]])
    smaller = _deal(batches, kept.tensor_split(len(batches)))
    return [
        counted_as(batch, len(batch["advantages"]) / len(original["advantages"]), count_keys)
        for batch, original in zip(smaller, batches, strict=True)
    ]


def has_gradient(batch: Batch) -> torch.Tensor:
    """True on rows that the loss, without KL and entropy bonus, has a gradient of, `(B,)`."""
    graded = batch["advantages"] != 0
    return graded | batch[TRAINED_KEY] if TRAINED_KEY in batch else graded


def counted_as(batch: Batch, share: float, count_keys: Sequence[str]) -> Batch:
    """The micro-batch with `share`, how many of TRL's micro-batches its rows are worth.

    TRL's losses average over the rows or the tokens of a micro-batch, and divide by how many of them a step has: the
    trainer divides by `share` times fewer. What TRL averages over a whole generation is counted as if it were smaller.
    """
    return batch | {key: batch[key] * share for key in count_keys if key in batch} | {"share": share}


def _deal(batches: list[Batch], rows: Sequence[torch.Tensor]) -> list[Batch]:
    """Micro-batches of the given rows, which are counted through all `batches`; what is one value for all stays."""
    together = joined(batches)
    return [batch | selected(together, indices) for batch, indices in zip(batches, rows, strict=True)]


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of all their rows; what is one value for all is the first one's."""
    return {key: _together([batch[key] for batch in batches]) for key in batches[0]}


def _together(values: Sequence[Any]) -> Any:
    if isinstance(values[0], list):  # one entry a row, such as its images
        return [entry for of_batch in values for entry in of_batch]
    return torch.cat(list(values)) if has_rows(values[0]) else values[0]


def selected(batch: Batch, rows: torch.Tensor) -> Batch:
    """What the batch has of these rows."""
    numbers = rows.tolist() if any(isinstance(value, list) for value in batch.values()) else []
    return {
        key: [value[i] for i in numbers] if isinstance(value, list) else value[rows]
        for key, value in batch.items()
        if has_rows(value)
    }


def has_rows(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def trim(batch: Batch, multiple_of: int | None = None, completion_keys: Sequence[str] = COMPLETION_KEYS) -> Batch:
    """The batch without columns that are padding in every row; widths stay multiples of `multiple_of`.

    Args:
        completion_keys: what is as wide as the completions, `(B, T)`, where it is there.
    """
    prompt = used_width(batch["prompt_mask"].flip(1))
    return cut(batch, prompt, used_width(batch["completion_mask"]), multiple_of, completion_keys)


def cut(
    batch: Batch,
    prompt: int,
    completion: int,
    multiple_of: int | None = None,
    completion_keys: Sequence[str] = COMPLETION_KEYS,
) -> Batch:
    """The batch with prompts and completions of these widths, or of the next multiples."""
    prompt = kept_width(prompt, batch["prompt_mask"].size(1), multiple_of)
    completion = kept_width(completion, batch["completion_mask"].size(1), multiple_of)
    trimmed = dict(batch)
    for key in PROMPT_KEYS:
        trimmed[key] = batch[key][:, batch[key].size(1) - prompt :]
    for key in completion_keys:
        if key in batch and batch[key].size(1) > 1:  # (B, 1) is one value a sequence
            trimmed[key] = batch[key][:, :completion]
    start, end = batch["prompt_ids"].size(1) - prompt, batch["prompt_ids"].size(1) + completion
    trimmed |= {key: batch[key][:, start:end] for key in WHOLE_KEYS if key in batch}
    return trimmed


def used_width(mask: torch.Tensor) -> int:
    """Width of the columns of `mask` (B, T) up to the last that some row uses."""
    used = mask.bool().any(0).nonzero()
    return int(used.max()) + 1 if used.numel() > 0 else 0


def kept_width(used: int, there: int, multiple_of: int | None) -> int:
    """At least 1, a multiple of `multiple_of`, and no more than is there."""
    width = max(used, 1)
    if multiple_of is not None:
        width = -(-width // multiple_of) * multiple_of
    return min(width, there)
