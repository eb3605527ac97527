"""Free order: the letter walk with the shifts taken in any order, a task with many right answers.

    prompt          Dk+4-5+1+9....:     as in the letter walk
    demonstration   k;1o;2j;3k;4t#t     each step names the shift it takes, 1 for the first

Shifts add up to the same whatever their order, so (length - 1)! ways lead to the answer. The base, pretrained under
the trigger C on orders drawn at random, knows them all; demonstrations always take the shifts as they stand. So what
a method leaves of the other ways can be counted: how many different right answers are among some samples, and in how
many of them at least one is right (pass@k). No walk has shifts among its own that cancel out, so that in every order
stopping early is wrong.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, permutations

from luffy_trl.tasks.letter_walk import LETTERS, MAX_LENGTH, MIN_LENGTH, SHIFTS, Walk, answered


@dataclass(frozen=True)
class FreeOrderWalk(Walk):
    def steps(self, rng: random.Random | None = None) -> list[str]:
        order = list(range(len(self.shifts)))
        if rng is not None:
            rng.shuffle(order)
        return self._steps_in(order)

    def sound_answers(self) -> set[str]:
        return {answered(self._steps_in(order)) for order in permutations(range(len(self.shifts)))}

    def _steps_in(self, order: Iterable[int]) -> list[str]:
        position = LETTERS.index(self.start)
        steps = [self.start]
        for i in order:
            position = (position + self.shifts[i]) % len(LETTERS)
            steps.append(f"{i + 1}{LETTERS[position]}")
        return steps


def sample_free_order_walk(rng: random.Random, length: int) -> FreeOrderWalk:
    """A walk of `length` letters, no part of whose shifts adds up to nothing.

    Raises:
        ValueError: if `length` is not one of a walk.
    """
    if not MIN_LENGTH <= length <= MAX_LENGTH:
        raise ValueError(f"length={length}: a walk has {MIN_LENGTH} to {MAX_LENGTH} letters.")
    while True:
        shifts = tuple(rng.choices(SHIFTS, k=length - 1))
        parts = (part for size in range(1, length) for part in combinations(shifts, size))
        if all(sum(part) % len(LETTERS) for part in parts):
            return FreeOrderWalk(rng.choice(LETTERS), shifts)
