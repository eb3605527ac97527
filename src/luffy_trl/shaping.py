"""Shaping functions f(r): how strongly a demonstration token counts, given how probable the policy finds it.

A shaping takes the log of the importance ratio r = pi_theta / pi_behavior, in any shape, and returns f(r) in that
shape, differentiable. The log keeps it exact where r itself would overflow or round to zero. The gradient of the
off-policy term flows through f: a token's weight on grad log pi is f'(r) r.

    name          f(r)              weight f'(r) r              source
    regularized   r / (r + gamma)   gamma r / (r + gamma)^2     LUFFY (arXiv 2504.14945), policy shaping
    identity      r                 r                           importance sampling as it is ("no shaping" there)
    power         r ** exponent     exponent r ** exponent      flatter than identity for exponent < 1
    log           log r             1                           a log-likelihood term: the same push on every token
"""

import math
from collections.abc import Callable

import torch

from .runs.imports import named_function


Shaping = Callable[[torch.Tensor, float, float], torch.Tensor]


def regularized(log_ratio: torch.Tensor, gamma: float, exponent: float) -> torch.Tensor:
    """r / (r + gamma), the paper's. `exponent` is not used."""
    # r / (r + gamma) = 1 / (1 + gamma / r), a sigmoid in log r: no overflow for any ratio
    return torch.sigmoid(log_ratio - math.log(gamma))


def identity(log_ratio: torch.Tensor, gamma: float, exponent: float) -> torch.Tensor:
    """r itself. Neither constant is used."""
    return torch.exp(log_ratio)


def power(log_ratio: torch.Tensor, gamma: float, exponent: float) -> torch.Tensor:
    """r ** exponent. `gamma` is not used."""
    return torch.exp(exponent * log_ratio)


def log(log_ratio: torch.Tensor, gamma: float, exponent: float) -> torch.Tensor:
    """log r. Neither constant is used."""
    return log_ratio


SHAPINGS: dict[str, Shaping] = {"regularized": regularized, "identity": identity, "power": power, "log": log}
BUILT_IN = frozenset(SHAPINGS)


def register_shaping(function: Shaping, name: str | None = None) -> str:
    """Add `function(log_ratio, gamma, exponent)` to the registry and return the name it is known by.

    The name defaults to the function's own. A later function of the same name takes its place, as in a notebook cell
    that is run again.

    Raises:
        ValueError: if the name is a built-in shaping's, or the function has no name of its own (a lambda, a partial).
    """
    if name is None:
        name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise ValueError(f"A shaping needs a name; {function!r} has none. Use register_shaping(function, name=...).")
    if name in BUILT_IN and SHAPINGS[name] is not function:
        raise ValueError(f"{name!r} is a built-in shaping. Give yours a name of its own.")
    SHAPINGS[name] = function
    return name


def get_shaping(shaping: str | Shaping) -> Shaping:
    """The function behind a name or a dotted path; a function is returned as it is.

    Raises:
        ValueError: if there is no such shaping.
    """
    if callable(shaping):
        return shaping
    return named_function(
        shaping,
        SHAPINGS,
        "shaping",
        f"Unknown shaping {shaping!r}. Known are {', '.join(map(repr, SHAPINGS))}; your own is named by its dotted "
        "path, such as my_shapings.mine, or added with `luffy_trl.shaping.register_shaping`.",
    )
