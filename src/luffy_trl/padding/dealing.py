"""Rows dealt into as few micro-batches as hold a budget of tokens, evenly. Lists of numbers, no tensors.

Which rows share a micro-batch says nothing about a step's loss, but all about its cost: padded rows want neighbours of
their own length, packed ones only a sum that fits, and rows of a shared prompt each other.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


# How the rows of a micro-batch lie: in a rectangle, in one row, or in one row with each prompt once
Form = Literal["padded", "packed", "shared"]
# What a row of a shared prompt has of it for itself: the last token, from which its first one is predicted
OWN_TOKENS = 1


@dataclass(frozen=True)
class Rows:
    """
    Attributes:
        prompts, completions: tokens of each row.
        groups: equal numbers for equal prompts.
    """

    prompts: list[int]
    completions: list[int]
    groups: list[int]

    def __len__(self) -> int:
        return len(self.prompts)

    def of(self, chosen: Sequence[int]) -> "Rows":
        return Rows(*([values[row] for row in chosen] for values in (self.prompts, self.completions, self.groups)))

    def tokens(self, form: Form) -> int:
        """What all of them cost in one micro-batch of this form."""
        if not self.prompts:
            return 0
        if form == "padded":
            return len(self) * (max(self.prompts) + max(self.completions))
        apart = sum(self.prompts) + sum(self.completions)
        return apart - (self.saved_by_sharing() if form == "shared" else 0)

    def saved_by_sharing(self) -> int:
        """Tokens that are not there twice where rows with the same prompt have it once."""
        members: dict[int, list[int]] = defaultdict(list)
        for prompt, group in zip(self.prompts, self.groups, strict=True):
            members[group].append(prompt)
        return sum(
            (len(prompts) - 1) * (prompts[0] - OWN_TOKENS)
            for prompts in members.values()
            if shares(len(prompts), prompts[0])
        )


def shares(rows: int, prompt: int) -> bool:
    """Whether so many rows have so long a prompt in common that some of it can be there once."""
    return rows > 1 and prompt > OWN_TOKENS


def deal(rows: Rows, chosen: Sequence[int], budget: int, form: Form, at_least: int = 1) -> list[list[int]]:
    """The chosen rows in as few micro-batches as hold `budget` tokens each, the most expensive first.

    A row of more tokens has a micro-batch to itself. None is empty.

    Args:
        at_least: micro-batches, no more than there are chosen rows: another process needs as many.
    """
    if form == "padded":
        dealt = _cut_evenly(rows, chosen, budget, at_least)
    else:
        dealt = _fewest(rows, chosen, budget, form, at_least)
    while len(dealt) < at_least:  # halves of the most expensive one that has more than a row
        largest = max((part for part in dealt if len(part) > 1), key=lambda part: rows.of(part).tokens(form))
        dealt.remove(largest)
        dealt += [largest[::2], largest[1::2]]
    return sorted(dealt, key=lambda part: -rows.of(part).tokens(form))


def _cut_evenly(rows: Rows, chosen: Sequence[int], budget: int, at_least: int) -> list[list[int]]:
    """The rows by length, cut where the next would not fit: with the smallest budget that needs no more cuts."""
    order = sorted(chosen, key=lambda row: (-rows.completions[row], -rows.prompts[row]))
    count = max(len(_cut(rows, order, budget)), at_least)
    lowest, highest = 1, budget
    while lowest < highest:
        middle = (lowest + highest) // 2
        if len(_cut(rows, order, middle)) > count:
            lowest = middle + 1
        else:
            highest = middle
    return _cut(rows, order, lowest)


def _cut(rows: Rows, order: Sequence[int], budget: int) -> list[list[int]]:
    parts: list[list[int]] = []
    prompt = completion = 0
    for row in order:
        prompt, completion = max(prompt, rows.prompts[row]), max(completion, rows.completions[row])
        if parts and (len(parts[-1]) + 1) * (prompt + completion) <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
            prompt, completion = rows.prompts[row], rows.completions[row]
    return parts


def _fewest(rows: Rows, chosen: Sequence[int], budget: int, form: Form, at_least: int) -> list[list[int]]:
    """The fewest micro-batches; of equally many those that take groups apart least."""
    groups: dict[int, list[int]] = defaultdict(list)
    for row in chosen:
        groups[rows.groups[row]].append(row)
    largest = max(map(len, groups.values()))
    best: list[list[int]] | None = None
    pieces = 1 if form == "shared" else largest
    while best is None or (pieces <= largest and len(best) > at_least):
        items = [part for group in groups.values() for part in _pieces(rows, group, pieces, budget, form)]
        found = _fill(rows, items, budget, form, at_least)
        best = found if best is None or len(found) < len(best) else best
        pieces *= 2
    return best


def _pieces(rows: Rows, group: list[int], pieces: int, budget: int, form: Form) -> list[list[int]]:
    """A group in so many parts, or in more where one would not fit."""
    while True:
        parts = [part for part in (group[i::pieces] for i in range(pieces)) if part]
        if all(len(part) == 1 or rows.of(part).tokens(form) <= budget for part in parts):
            return parts
        pieces += 1


def _fill(rows: Rows, items: list[list[int]], budget: int, form: Form, at_least: int) -> list[list[int]]:
    """The items in as few parts as hold the budget, each item where least is: the most expensive first."""
    costs = {i: rows.of(item).tokens(form) for i, item in enumerate(items)}
    order = sorted(costs, key=lambda i: -costs[i])
    count = min(max(at_least, -(-sum(costs.values()) // budget), 1), len(items))
    while True:
        parts = [(0, i, list[int]()) for i in range(count)]
        for i in order:
            cost, number, part = heapq.heappop(parts)
            heapq.heappush(parts, (cost + costs[i], number, part + items[i]))
        if count == len(items) or all(cost <= budget or len(part) == 1 for cost, _, part in parts):
            return [part for _, _, part in parts]
        count += 1
