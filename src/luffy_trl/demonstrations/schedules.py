"""How guidance changes over a run: the weight of demonstrations, and how much of each is given. Pure Python.

Progress is the share of the run's optimizer steps that are done, from 0 to 1.
"""

import math
import random


PREFIX_STRATEGIES = ("fixed", "uniform", "linear", "cosine", "reverse")


def weight_factor(schedule: str, progress: float) -> float:
    """What `demonstration_weight` is multiplied by: 1, or falling from 1 to 0."""
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": _cosine(progress)}[schedule]


def chord_mu(step: int, peak: float, valley: float, warmup_steps: int, decay_steps: int) -> float:
    """CHORD's global coefficient (arXiv 2508.11408, Eq. 3) after so many optimizer steps.

    It rises from 0 to the peak, in a line, falls from there to the valley, by half a cosine, and stays.

    Args:
        decay_steps: those after the warm-up.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    decayed = min((step - warmup_steps) / decay_steps, 1.0) if decay_steps > 0 else 1.0
    return valley + (peak - valley) * _cosine(decayed)


def prefix_ratio(strategy: str, progress: float, shortest: float, longest: float) -> float:
    """The share of a demonstration's tokens that is given; the policy continues from there.

    "fixed" is `longest`. "uniform" draws from [shortest, longest], from Python's generator, which the trainer seeds
    and saves with every checkpoint. "linear" and "cosine" fall from `longest` to `shortest` over the run, "reverse"
    rises.
    """
    if strategy == "uniform":
        return random.uniform(shortest, longest)
    share = {"fixed": 1.0, "linear": 1.0 - progress, "cosine": _cosine(progress), "reverse": progress}[strategy]
    return shortest + share * (longest - shortest)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))
