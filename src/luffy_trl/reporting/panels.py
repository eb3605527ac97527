"""Which metrics are shown together, and their curves thinned to what a screen can show."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .logs import Run


# Points of a curve: a panel is some 400 pixels wide
MOST_POINTS = 400
REWARD_OF_SET = re.compile("eval_(.+)_reward")

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Metrics that are drawn together: `metrics` holds (name in the log, what the legend calls it)."""

    key: str
    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Series:
    """One line of a panel; `run` and `metric` count within the report's runs and the panel's metrics."""

    run: int
    metric: int
    label: str
    points: Points
    logged: int  # points before thinning
    last: float  # value that was logged, not a mean


ROLLOUTS, DEMONSTRATIONS = "rollouts", "demonstrations"
PANELS = (
    Panel(
        "reward",
        "Reward",
        "mean of a completion",
        (("on_policy/reward", ROLLOUTS), ("off_policy/reward", DEMONSTRATIONS)),
    ),
    Panel("eval_reward", "Reward in evaluation", "mean of a completion", ()),  # of each set, see evaluation_rewards
    Panel(
        "entropy",
        "Entropy of the policy",
        "nats per token",
        (("on_policy/entropy", ROLLOUTS), ("off_policy/entropy", DEMONSTRATIONS)),
    ),
    Panel(
        "probability",
        "Probability of the tokens",
        "mean under the policy",
        (("on_policy/prob", ROLLOUTS), ("off_policy/prob", DEMONSTRATIONS)),
    ),
    Panel("length", "Length", "tokens", (("on_policy/length", ROLLOUTS), ("off_policy/length", DEMONSTRATIONS))),
    Panel(
        "groups",
        "Groups",
        "share",
        (
            ("groups/solve_none", "none solved"),
            ("groups/solve_all", "all solved"),
            ("groups/guided", "guided"),
        ),
    ),
    Panel(
        "clip",
        "Clipped",
        "share",
        (("on_policy/clipped_ratio", "rollouts cut off"), ("clip_ratio/region_mean", "tokens' ratios")),
    ),
    Panel("loss", "Loss", "", (("loss", "whole"), ("off_policy/loss", DEMONSTRATIONS))),
    Panel(
        "fraction",
        "Demonstrations' tokens",
        "share",
        (("off_policy/token_fraction", "of all"), ("off_policy/below_gamma", "of them rarer than gamma")),
    ),
    Panel("cold_start", "Push down for pull up", "where no rollout is right", (("groups/push_to_pull", "ratio"),)),
    Panel("grad_norm", "Gradient norm", "", (("grad_norm", "before clipping"),)),
    Panel(
        "time",
        "Time of an optimizer step",
        "seconds",
        (("step_time", "whole"), ("time/generation", "generating"), ("time/rewards", "rewarding")),
    ),
)


def filled_panels(runs: Sequence[Run]) -> list[tuple[Panel, list[Series]]]:
    """The panels that have something to show, with their series. The others are left out."""
    evaluated = {metric: name for run in runs for metric, name in evaluation_rewards(run.history).items()}
    filled = []
    for panel in PANELS:
        if not panel.metrics:
            panel = replace(panel, metrics=tuple(evaluated.items()))
        series = [
            Series(r, m, label, thinned(curve), len(curve), curve[-1][1])
            for r, run in enumerate(runs)
            for m, (metric, label) in enumerate(panel.metrics)
            if (curve := run.curve(metric))
        ]
        if series:
            filled.append((panel, series))
    return filled


def evaluation_rewards(history: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The reward of each evaluation set: `eval_reward`, or of several sets `eval_NAME_reward` -> the set's name."""
    found = {}
    for line in history:
        for metric in line:
            name = (REWARD_OF_SET.fullmatch(metric) or [None, None])[1]
            # its time is logged beside it: a reward function's own metric may end with _reward, too
            if metric == "eval_reward" or (name is not None and f"eval_{name}_runtime" in line):
                found[metric] = name or "evaluation"
    return found


def thinned(curve: Points, most: int = MOST_POINTS) -> Points:
    """At most so many points: each the mean of neighbours, in steps and in values. Short curves stay as they are."""
    size = -(-len(curve) // most)
    if size <= 1:
        return curve
    buckets = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets]


def bounds(series: Sequence[Series]) -> tuple[float, float, float, float]:
    """(least step, most steps, least value, largest value), never without extent."""
    xs, ys = zip(*(point for one in series for point in one.points), strict=True)
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    if x0 == x1:
        around = 1 + 1e-9 * abs(x0)  # 1 alone is nothing beside 1e16
        x0, x1 = x0 - around, x1 + around
    if y1 - y0 <= 1e-9 * max(abs(y0), abs(y1)):
        y0, y1 = (y0 - 0.1 * abs(y0), y1 + 0.1 * abs(y1)) if y0 else (0.0, 1.0)
    return x0, x1, y0, y1


def ticks(low: float, high: float) -> list[float]:
    """Round values, three to seven, from at or below `low` to at or above `high`."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [size * i for i in range(first, last + 1)]
