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


Shaping = Callable[[torch.Tensor, float, float], torch.Tensor]


def regularized(log_ratio: torch.Tensor, gamma: float, exponent: float) -> torch.Tensor:
    # r / (r + gamma) = 1 / (1 + gamma / r), a sigmoid in log r: no overflow for any ratio
    return torch.sigmoid(log_ratio - math.log(gamma))


def identity(log_ratio: torch.Tensor, gamma: float, exponent: float) -> torch.Tensor:
    return torch.exp(log_ratio)


def power(log_ratio: torch.Tensor, gamma: float, exponent: float) -> torch.Tensor:
    return torch.exp(exponent * log_ratio)


def log(log_ratio: torch.Tensor, gamma: float, exponent: float) -> torch.Tensor:
    return log_ratio


SHAPINGS: dict[str, Shaping] = {"regularized": regularized, "identity": identity, "power": power, "log": log}


def register_shaping(function: Shaping, name: str | None = None) -> str:
    """Add `function(log_ratio, gamma, exponent)` to the registry and return the name it is known by.

    The name defaults to the function's own. Registering the same function again changes nothing.

    Raises:
        ValueError: if the name is taken by another function, or the function has no name of its own (a lambda).
    """
    name = name or function.__name__
    if not name.isidentifier():
        raise ValueError(f"A shaping needs a name; {name!r} is none. Pass a named function, or `name=`.")
    if SHAPINGS.setdefault(name, function) is not function:
        raise ValueError(f"There is already another shaping named {name!r}. Give yours a name of its own.")
    return name


def get_shaping(shaping: str | Shaping) -> Shaping:
    """The function behind a name; a function is returned as it is.

    Raises:
        ValueError: if no shaping has that name.
    """
    if callable(shaping):
        return shaping
    if shaping not in SHAPINGS:
        raise ValueError(
            f"Unknown shaping {shaping!r}. Known are {', '.join(map(repr, SHAPINGS))}; add your own with "
            "`luffy_trl.shaping.register_shaping`."
        )
    return SHAPINGS[shaping]
