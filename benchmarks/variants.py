"""Demonstrations that are not what one would wish for: wrong, few, or longer than needed."""

import random
from collections.abc import Sequence

from datasets import Dataset

from luffy_trl.tasks.letter_walk import Walk, answered


DEMONSTRATION_STYLES = ("plain", "doubled")


def demonstrate(
    walks: Sequence[Walk],
    faulty: float = 0.0,
    dropped: bool = False,
    demonstrated: float = 1.0,
    style: str = "plain",
    copies: int = 1,
    seed: int = 0,
) -> Dataset:
    """The data contract's columns, with demonstrations as a teacher of the given habits would write them.

    Args:
        walks: the problems.
        faulty: share of the demonstrations that leave the last shift out, and so end on a wrong letter: the same slip
            each time, which a policy can learn. They earn no reward.
        dropped: leave the faulty ones out again, as a reward that knows them lets one do before training.
        demonstrated: share of the problems that have a demonstration.
        style: "plain", or "doubled": every letter of the working twice, with the right answer.
        copies: of each demonstration, for groups that hold several; above 1 they are in `demonstrations`.
        seed: which problems they are.

    Raises:
        ValueError: if the style is not one of these.
    """
    if style not in DEMONSTRATION_STYLES:
        raise ValueError(f"style={style!r} is not one of {', '.join(map(repr, DEMONSTRATION_STYLES))}.")
    rng = random.Random(f"variants {seed}")
    chosen = rng.sample(range(len(walks)), round(demonstrated * len(walks)))
    wrong = set(rng.sample(chosen, round(faulty * len(chosen))))
    completions: list[str | None] = [None] * len(walks)
    for i in chosen:
        if dropped and i in wrong:
            continue
        steps = walks[i].steps()
        steps = steps[:-1] if i in wrong else steps
        completions[i] = answered([step for step in steps for _ in range(2)] if style == "doubled" else steps)
    columns: dict[str, list] = {
        "prompt": [walk.prompt() for walk in walks],
        "solution": [walk.answer for walk in walks],
    }
    if copies > 1:
        columns["demonstrations"] = [[text] * copies if text else [] for text in completions]
    else:
        columns["completion"] = completions
    return Dataset.from_dict(columns)
