"""The rows of an optimizer step, in micro-batches that a budget of tokens allows, with what a loss must know of them.

A row counts as much as before in a micro-batch of another size if its `share`, how many of TRL's micro-batches it is
worth, goes into what is divided by (`counted_as`).
"""

from collections.abc import Callable, Sequence

import torch

from .dealing import Form, Rows, deal
from .micro_batches import Batch, counted_as, cut, has_gradient, has_rows, joined, kept_width, selected
from .packing import Layout


# Prompts are shared where that leaves out so large a part of the tokens: less would not pay for a row's longer keys
LEAST_SAVED = 0.02


class Due(list[Batch]):
    """The micro-batches that run where TRL takes one of its own: none, until the last of an optimizer step's."""


class StepRows:
    """The rows of this process in one optimizer step, or in what one generation has of it.

    Args:
        batches: TRL's micro-batches.
        completion_keys: of the batch, what is as wide as the completions.
        count_keys: of the batch, numbers of tokens or rows in a generation.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        multiple_of: int | None,
        completion_keys: Sequence[str],
        count_keys: Sequence[str],
    ):
        self._one_value = {key: value for key, value in batches[0].items() if not has_rows(value)}
        self._together = joined([batch | {_TOKENS: _tokens_a_row(batch)} for batch in batches])
        self._rows_each = len(batches[0]["advantages"])
        self._multiple_of, self._completion_keys, self._count_keys = multiple_of, completion_keys, count_keys
        prompt_ids = self._together["prompt_ids"]
        facts = [
            self._together["prompt_mask"].sum(1),
            self._together["completion_mask"].sum(1),
            prompt_ids.unique(dim=0, return_inverse=True)[1],
            has_gradient(self._together).long(),
        ]
        prompts, completions, groups, counts = torch.stack(facts).tolist()  # waits once for each step's rows
        self.rows = Rows(prompts, completions, groups)
        self._counting = [row for row, count in enumerate(counts) if count]

    def chosen(self, at_least: int, skip_zero_advantages: bool) -> list[int]:
        """The rows that go through the model, of which there are enough for so many micro-batches."""
        if not skip_zero_advantages:
            return list(range(len(self.rows)))
        others = [row for row in range(len(self.rows)) if row not in set(self._counting)]
        return self._counting + others[: max(at_least - len(self._counting), 0)]

    def padded_rows(self) -> Rows:
        """The rows with the widths that they have in a rectangle."""
        if self._multiple_of is None:
            return self.rows
        prompts, completions = (
            [kept_width(length, width, self._multiple_of) for length in lengths]
            for lengths, width in (
                (self.rows.prompts, self._together["prompt_mask"].size(1)),
                (self.rows.completions, self._together["completion_mask"].size(1)),
            )
        )
        return Rows(prompts, completions, self.rows.groups)

    def micro_batch(self, part: list[int], form: Form, per_token: bool) -> Batch:
        """The rows of `part` as TRL's loss takes them, with `share`, and with a `layout` where they are packed.

        Args:
            per_token: whether the loss is a mean over the tokens of one of TRL's micro-batches.
        """
        rows, device = self.rows.of(part), self._together["advantages"].device
        indices = torch.tensor(part)
        indices = indices.pin_memory() if device.type == "cuda" else indices
        batch = self._one_value | selected(self._together, indices.to(device, non_blocking=True))
        tokens = batch.pop(_TOKENS)  # (B,)
        batch = counted_as(batch, len(part) / self._rows_each, self._count_keys)
        if per_token:
            own = _tokens_a_row(batch)
            batch["advantages"] = batch["advantages"] * (own / tokens).view(-1, *[1] * (batch["advantages"].dim() - 1))
        batch = cut(batch, max(rows.prompts), max(rows.completions), self._multiple_of, self._completion_keys)
        if form != "padded":
            widths = batch["prompt_ids"].size(1), batch["completion_ids"].size(1)
            batch["layout"] = Layout.of(rows, *widths, shared=form == "shared", device=device)
        return batch


# Of a row's micro-batch, the tokens that count, by its rows
_TOKENS = "tokens_a_row"


def _tokens_a_row(batch: Batch) -> torch.Tensor:
    mask = batch["completion_mask"]
    mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask  # (B, T)
    return (mask.sum().clamp(min=1) / len(mask)).expand(len(mask))


def form_of(rows: Rows, packs: bool, shares: bool, always: bool) -> Form:
    """How the rows of a step should lie.

    Args:
        always: share prompts however little that saves.
    """
    if not packs:
        return "padded"
    saved = rows.saved_by_sharing() / max(rows.tokens("packed"), 1)
    return "shared" if shares and (always or saved >= LEAST_SAVED) else "packed"


def dealt(
    steps: Sequence[StepRows],
    forms: Sequence[Form],
    budget: int,
    skip_zero_advantages: bool,
    agree: Callable[[list[int]], list[int]],
) -> list[list[list[int]]]:
    """The rows of each step's micro-batches, of as many on each process. Collective.

    Args:
        agree: of a number for each step, the largest of all processes.
    """

    def of(step: StepRows, form: Form, at_least: int) -> list[list[int]]:
        rows = step.padded_rows() if form == "padded" else step.rows
        return deal(rows, step.chosen(at_least, skip_zero_advantages), budget, form, at_least)

    counts = agree([len(of(step, form, 1)) for step, form in zip(steps, forms, strict=True)])
    return [of(step, form, count) for step, form, count in zip(steps, forms, counts, strict=True)]
