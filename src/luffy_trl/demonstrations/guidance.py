"""How much demonstrations weigh, and what rollouts then weigh: by the clock, or by how often the policy is right.

schedule        w, the weight of a demonstration's loss                         source
constant        demonstration_weight                                            LUFFY: 1
linear, cosine  falling from there to 0 over the run
chord           mu: up to there, then down to demonstration_weight_final        CHORD (arXiv 2508.11408), Eq. 3
success         demonstration_weight max(0, success_target - s), with s the     CHORD, section 4.3, with the mean
                success rate of the rollouts, remembered over generations       reward for s and no memory
group_success   the same, with s that of the group's own rollouts
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainerState
from trl import GRPOConfig

from .schedules import chord_mu, weight_factor


WEIGHT_SCHEDULES = ("constant", "linear", "cosine", "chord", "success", "group_success")
ROLLOUT_WEIGHTS = ("one", "complement")
AVERAGES = ("joint", "token", "sequence")
SUCCESS_FILE = "success_rate.json"


@dataclass
class GuidanceConfig(GRPOConfig):
    """GRPOConfig with the fields of [`Guidance`], and of how the two losses are averaged.

    Raises:
        ValueError: at construction, for what cannot work.
    """

    demonstration_weight: float = field(
        default=1.0,
        metadata={"help": "Factor on the demonstrations' loss, 0 or above. Default 1.0, the paper's."},
    )
    demonstration_weight_schedule: str = field(
        default="constant",
        metadata={
            "help": "What demonstration_weight becomes: by the clock 'constant', or 'linear' or 'cosine', a fall to 0 "
            "over the run, or 'chord', CHORD's mu, a warm-up and a fall to demonstration_weight_final; by success "
            "'success' or 'group_success', it times max(0, success_target - the share of rollouts that are solved) "
            "(see solved_reward), remembered over generations or of each group. Default 'constant', the paper's."
        },
    )
    demonstration_weight_warmup_steps: int = field(
        default=0,
        metadata={"help": "With the schedule 'chord', optimizer steps from 0 to demonstration_weight. Default 0."},
    )
    demonstration_weight_decay_steps: int | None = field(
        default=None,
        metadata={
            "help": "With the schedule 'chord', optimizer steps from demonstration_weight to "
            "demonstration_weight_final. Default None: the rest of the run."
        },
    )
    demonstration_weight_final: float = field(
        default=0.0,
        metadata={"help": "With the schedule 'chord', where the weight ends, 0 or above. Default 0."},
    )
    success_target: float = field(
        default=1.0,
        metadata={
            "help": "With the schedules 'success' and 'group_success', the share of solved rollouts from which on "
            "demonstrations weigh nothing, above 0, up to 1. Default 1."
        },
    )
    success_memory: float = field(
        default=0.9,
        metadata={
            "help": "With the schedule 'success', what the rate keeps of itself in each generation, from 0, which is "
            "the generation's own rate, to below 1. Default 0.9."
        },
    )
    rollout_weight: str = field(
        default="one",
        metadata={
            "help": "Factor on the rollouts' policy loss: 'one', or 'complement', 1 less the demonstrations' weight, "
            "as in CHORD (KL and entropy bonus stay as they are). Default 'one', the paper's."
        },
    )
    demonstration_average: str = field(
        default="joint",
        metadata={
            "help": "What token losses are averaged over: 'joint', demonstrations and rollouts together, as loss_type "
            "does; or each by themselves, the rollouts as loss_type does, the demonstrations by 'token' (a mean over "
            "tokens, CHORD's) or by 'sequence' (a mean over demonstrations of means over tokens, AMPO's). Default "
            "'joint', the paper's."
        },
    )

    def __post_init__(self):
        self._check_weights()
        self._check_success()
        super().__post_init__()

    def _check_weights(self):
        check_name("demonstration_weight_schedule", self.demonstration_weight_schedule, WEIGHT_SCHEDULES)
        check_name("rollout_weight", self.rollout_weight, ROLLOUT_WEIGHTS)
        check_name("demonstration_average", self.demonstration_average, AVERAGES)
        for name in ("demonstration_weight", "demonstration_weight_final"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be a finite number, 0 or above.")
            if self.rollout_weight == "complement" and value > 1:
                raise ValueError(f"{name}={value} must be at most 1 with rollout_weight='complement', 1 less it.")
        if self.demonstration_weight_warmup_steps < 0:
            raise ValueError(
                f"demonstration_weight_warmup_steps={self.demonstration_weight_warmup_steps} must be 0 or above."
            )
        if self.demonstration_weight_decay_steps is not None and self.demonstration_weight_decay_steps < 1:
            raise ValueError(
                f"demonstration_weight_decay_steps={self.demonstration_weight_decay_steps} must be 1 or above."
            )
        self._check_used("chord", "demonstration_weight_warmup_steps", 0)
        self._check_used("chord", "demonstration_weight_decay_steps", None)
        self._check_used("chord", "demonstration_weight_final", 0.0)

    def _check_used(self, schedule: str, name: str, default: float | None):
        if self.demonstration_weight_schedule != schedule and getattr(self, name) != default:
            raise ValueError(
                f"{name}={getattr(self, name)} has nothing to do with demonstration_weight_schedule="
                f"{self.demonstration_weight_schedule!r}. Set that to {schedule!r}, or leave {name} out."
            )

    def _check_success(self):
        if not 0 < self.success_target <= 1:
            raise ValueError(f"success_target={self.success_target} must be above 0 and at most 1.")
        if not 0 <= self.success_memory < 1:
            raise ValueError(f"success_memory={self.success_memory} must be from 0 to below 1.")


def check_name(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError for a value of the field that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")


def progress(state: TrainerState) -> float:
    """The share of the run's optimizer steps that are done."""
    return state.global_step / max(state.max_steps, 1)


class Guidance:
    """The weights of a generation's rows. What it is told is of all processes, and so the same on each of them.

    Attributes:
        rate: the share of rollouts that are solved, remembered over generations; None before the first.
        metrics: of the latest generation, for the log; none where the weight is constant.
    """

    def __init__(self, args: GuidanceConfig):
        self.args = args
        self.rate: float | None = None
        self.metrics: dict[str, float] = {}

    def weigh(
        self, solved: torch.Tensor, has_demonstration: torch.Tensor, state: TrainerState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors on a demonstration's and on a rollout's loss, by row, both `(N,)`.

        Args:
            solved: `(groups, G)`, rollouts that are.
            has_demonstration: `(N,)`, whole or in part. Each group has a rollout.
            state: how far the run is.
        """
        args, rollouts = self.args, ~has_demonstration.view_as(solved)  # (groups, G)
        rates = solved.sum(1) / rollouts.sum(1)  # (groups,)
        self.rate = self._remembered((solved.sum() / rollouts.sum()).item())
        if args.demonstration_weight_schedule == "group_success":
            weights = args.demonstration_weight * (args.success_target - rates).clamp(min=0)
        else:
            weights = torch.full_like(rates, self._of_the_run(self.rate, state))
        self.metrics = {}
        if args.demonstration_weight_schedule != "constant":
            self.metrics = {"groups/weight": weights.mean().item(), "groups/success_rate": self.rate}
        by_row = weights.repeat_interleave(solved.size(1))
        return by_row, (1 - by_row if args.rollout_weight == "complement" else torch.ones_like(by_row))

    def _of_the_run(self, rate: float, state: TrainerState) -> float:
        args, weight = self.args, self.args.demonstration_weight
        if args.demonstration_weight_schedule == "success":
            return weight * max(0.0, args.success_target - rate)
        if args.demonstration_weight_schedule == "chord":
            warmup, decay = args.demonstration_weight_warmup_steps, args.demonstration_weight_decay_steps
            decay = state.max_steps - warmup if decay is None else decay
            return chord_mu(state.global_step, weight, args.demonstration_weight_final, warmup, decay)
        return weight * weight_factor(args.demonstration_weight_schedule, progress(state))

    def _remembered(self, latest: float) -> float:
        kept = self.args.success_memory
        return latest if self.rate is None else kept * self.rate + (1 - kept) * latest

    def save(self, checkpoint: Path) -> None:
        """Write what is needed to go on, on one process: nothing where the weight does not follow success."""
        if self.rate is not None and self.args.demonstration_weight_schedule == "success":
            (checkpoint / SUCCESS_FILE).write_text(json.dumps({"rate": self.rate}))

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; from one without a rate, where the weight did not follow it, as at the start."""
        path = checkpoint / SUCCESS_FILE
        self.rate = json.loads(path.read_text())["rate"] if path.is_file() else None
