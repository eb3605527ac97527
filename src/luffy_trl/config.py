"""LuffyConfig: GRPOConfig with the paper's defaults, the fields that demonstrations need, and their refusals."""

import math
from dataclasses import dataclass, field

import torch

from .demonstrations.encoding import OVERFLOWS
from .demonstrations.guidance import GuidanceConfig, check_name
from .demonstrations.schedules import PREFIX_STRATEGIES
from .demonstrations.sources import SOURCES, get_source_function, register_source
from .hub.mixin import HubPushConfig
from .objective import IMITATIONS, LOSS_TYPES
from .padding.config import PaddingFreeConfig
from .runs.best import choose_by_reward
from .runs.budget import TokenBudgetConfig
from .runs.recipe import given_fields
from .runs.redaction import NoTokenInPickles
from .shaping import get_shaping, register_shaping


ADVANTAGE_BASELINES = ("group", "on_policy")
DEMONSTRATION_LOSSES = ("importance_sampling", *IMITATIONS)


@dataclass
class LuffyConfig(NoTokenInPickles, TokenBudgetConfig, GuidanceConfig, PaddingFreeConfig, HubPushConfig):
    """
    Configuration of [`LuffyTrainer`]: every field of [`~trl.GRPOConfig`], and the ones below.

    Two defaults differ from `GRPOConfig`, after the paper (arXiv 2504.14945): `loss_type="dr_grpo"` (no length
    normalization) and `scale_rewards="none"` (no division by the standard deviation).

    Raises:
        ValueError: at construction, naming the field and its value, for what cannot work.
    """

    loss_type: str = field(
        default="dr_grpo",
        metadata={
            "help": "How token losses are averaged, for rollouts and demonstrations alike: one of 'grpo', 'bnpo', "
            "'dr_grpo', 'dapo', 'cispo', 'sapo', 'vespo', 'luspo' (see GRPOConfig). Default 'dr_grpo', the paper's: "
            "the sum of token losses over batch size times max_completion_length."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "What advantages are divided by: 'none', or the standard deviation of the 'group' or 'batch'. "
            "Default 'none', the paper's: an advantage is the reward less the group's mean."
        },
    )

    num_demonstrations: int = field(
        default=1,
        metadata={
            "help": "Demonstrations put into each group of num_generations completions, in place of as many rollouts. "
            "Default 1, the paper's (7 rollouts + 1). 0 is GRPO. A prompt with fewer demonstrations gets rollouts "
            "instead."
        },
    )
    shaping: str = field(
        default="regularized",
        metadata={
            "help": "f(r), what a demonstration token counts at importance ratio r: 'regularized' r / (r + gamma), "
            "'identity' r, 'power' r ** exponent, 'log' log r, or the dotted path of a function of (log ratio, gamma, "
            "exponent), such as my_shapings.mine; in Python also the function. Default 'regularized', the paper's."
        },
    )
    shaping_gamma: float = field(
        default=0.1,
        metadata={
            "help": "gamma of 'regularized', above 0. Smaller values push less probable tokens more. Default 0.1, the "
            "paper's."
        },
    )
    shaping_exponent: float = field(
        default=0.5, metadata={"help": "Exponent of 'power', above 0. Default 0.5. Other shapings do not use it."}
    )
    demonstration_loss: str = field(
        default="importance_sampling",
        metadata={
            "help": "What trains the demonstrations' tokens: 'importance_sampling', -A f(r); or whatever their reward "
            "'sft', -log pi, or 'chord_phi', -p (1 - p) log pi, CHORD's, which both need "
            "advantage_baseline='on_policy'. Default 'importance_sampling', the paper's."
        },
    )
    success_gate: float | None = field(
        default=None,
        metadata={
            "help": "Demonstrations count only in groups in which at most this share of the rollouts is solved (see "
            "solved_reward), from 0 (none) to 1: elsewhere they enter neither the loss nor the baseline. Default "
            "None: in all groups, the paper's."
        },
    )
    solved_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function that says whether a completion is solved (for success_gate, replay "
            "and groups/*), by its value without its weight, or 'total', the weighted sum of all. Default: the only "
            "one; of several the first that judges answers (math_reward, math_reward_optional_thought, "
            "choice_reward, accuracy_reward, reasoning_accuracy_reward, letter_walk_reward), or else 'total', with a "
            "warning."
        },
    )
    solved_threshold: float = field(
        default=1.0,
        metadata={"help": "From what value of solved_reward on a completion is solved. Default 1."},
    )
    prefix_strategy: str = field(
        default="fixed",
        metadata={
            "help": "How much of a demonstration is given, before the policy continues it: 'fixed', prefix_max; "
            "'uniform' between prefix_min and prefix_max; 'linear' or 'cosine', falling from prefix_max to prefix_min "
            "over the run; 'reverse', rising. Default 'fixed'."
        },
    )
    prefix_min: float = field(
        default=0.0,
        metadata={
            "help": "Least share of a demonstration's tokens that is given, 0 to 1; prefix_strategy='fixed' does not "
            "look at it. Default 0."
        },
    )
    prefix_max: float = field(
        default=1.0,
        metadata={"help": "Largest share. Default 1: with prefix_strategy='fixed' the whole one, the paper's."},
    )
    prefix_shared: bool = field(
        default=False,
        metadata={
            "help": "One share for all demonstrations of a group, where prefix_strategy='uniform'. Default False: one "
            "for each."
        },
    )
    demonstration_source: str = field(
        default="dataset",
        metadata={
            "help": "Where demonstrations come from: the 'dataset'; 'replay', the policy's own past solutions "
            "(ExGRPO, arXiv 2510.02245); or the dotted path of a function from a dataset row to a list of "
            "completions, such as my_demonstrations.of; in Python also the function. Default 'dataset', the paper's."
        },
    )
    replay_ratio: float = field(
        default=0.5,
        metadata={
            "help": "With demonstration_source='replay', the share of a generation's groups whose prompt comes from "
            "the buffer, 0 to 1. Default 0.5, ExGRPO's."
        },
    )
    replay_start: float = field(
        default=0.35,
        metadata={
            "help": "Replay starts when this share of a generation's rollouts is solved (see solved_reward) for the "
            "first time, 0 to 1. Default 0.35, ExGRPO's."
        },
    )
    replay_capacity: int = field(
        default=100_000,
        metadata={
            "help": "Solutions that all processes together keep, at 6 bytes a token and some overhead; then the "
            "oldest goes. Default 100000: 1.6 GB, measured, where they have 2000 tokens."
        },
    )
    demonstration_overflow: str = field(
        default="drop",
        metadata={
            "help": "What to do with a demonstration of more than max_completion_length tokens: 'drop' it (a rollout "
            "takes its place), 'truncate' it (it then has no EOS), or 'error'. Default 'drop'. Both are counted in "
            "the log."
        },
    )
    advantage_baseline: str = field(
        default="group",
        metadata={
            "help": "Whose mean reward is the baseline of a group's advantages: the whole 'group' or its 'on_policy' "
            "rollouts alone. Default 'group', the paper's."
        },
    )

    trim_padding: bool | None = field(
        default=None,
        metadata={
            "help": "Order rows by length within each optimizer step and cut every micro-batch to its own longest "
            "row, where TRL pads all to the longest of a generation. Does not change a step's loss (except what is "
            "computed a micro-batch: 'bnpo', an entropy bonus, top_entropy_quantile < 1, a mixture of experts' "
            "auxiliary loss). Default: on with demonstrations, tokens_per_micro_batch or "
            "skip_zero_advantages, off without, so that num_demonstrations=0 is GRPO bit for bit."
        },
    )

    def __post_init__(self):
        self.given = given_fields(self)  # the recipe on the model card: before anything is derived
        self.given.pop("hub_token", None)
        if self.trim_padding is None:
            asked = self.tokens_per_micro_batch is not None or self.skip_zero_advantages
            self.trim_padding = self.num_demonstrations > 0 or asked
        self._check_names()
        self._check_ranges()
        self._check_combinations()
        choose_by_reward(self)
        super().__post_init__()
        if self.device.type == "cpu":
            # Accelerate's name for it in a distributed run is "cpu:0", which torch.load does not know: no resuming
            self._setup_devices = torch.device("cpu")
        if self.num_demonstrations > 0:
            self._check_groups_stay_whole(self.steps_per_generation)

    def _check_names(self):
        # By name from here on: the config is saved with each checkpoint, and a function does not serialize
        if callable(self.shaping):
            self.shaping = register_shaping(self.shaping)
        get_shaping(self.shaping)
        if callable(self.demonstration_source):
            self.demonstration_source = register_source(self.demonstration_source)
        if self.demonstration_source not in SOURCES:
            get_source_function(self.demonstration_source)
        check_name("loss_type", self.loss_type, LOSS_TYPES)
        check_name("demonstration_overflow", self.demonstration_overflow, OVERFLOWS)
        check_name("demonstration_loss", self.demonstration_loss, DEMONSTRATION_LOSSES)
        check_name("prefix_strategy", self.prefix_strategy, PREFIX_STRATEGIES)
        check_name("advantage_baseline", self.advantage_baseline, ADVANTAGE_BASELINES)

    def _check_ranges(self):
        for name in ("prefix_min", "prefix_max", "replay_ratio", "replay_start"):
            _check_share(name, getattr(self, name))
        if self.success_gate is not None:
            _check_share("success_gate", self.success_gate)
        for name in ("shaping_gamma", "shaping_exponent"):
            _check_positive(name, getattr(self, name))
        if not math.isfinite(self.solved_threshold):
            raise ValueError(f"solved_threshold={self.solved_threshold} must be a finite number.")
        if self.replay_capacity < 1:
            raise ValueError(f"replay_capacity={self.replay_capacity} must be 1 or above.")
        if self.num_demonstrations < 0:
            raise ValueError(f"num_demonstrations={self.num_demonstrations} must be 0 (plain GRPO) or above.")

    def _check_combinations(self):
        if self.prefix_min > self.prefix_max:
            raise ValueError(f"prefix_min={self.prefix_min} must not be above prefix_max={self.prefix_max}.")
        imitates = f"demonstration_loss={self.demonstration_loss!r}"
        if self.demonstration_loss in IMITATIONS and self.advantage_baseline != "on_policy":
            raise ValueError(
                f"{imitates} cannot be combined with advantage_baseline={self.advantage_baseline!r}: demonstrations "
                "without an advantage of their own must not move the rollouts'. Set advantage_baseline='on_policy'."
            )
        is_apart = self.demonstration_loss in IMITATIONS or self.demonstration_average != "joint"
        if is_apart and self.loss_type == "bnpo" and self.tokens_per_micro_batch is not None:
            raise ValueError(
                f"tokens_per_micro_batch={self.tokens_per_micro_batch} cannot be combined with loss_type='bnpo', "
                f"{imitates} and demonstration_average={self.demonstration_average!r}: losses are means there over "
                "the tokens of one of TRL's micro-batches. Take loss_type='dapo', whose mean is over all tokens."
            )
        if self.num_demonstrations == 0 and self.demonstration_source != "dataset":
            raise ValueError(
                f"demonstration_source={self.demonstration_source!r} has nothing to do with num_demonstrations=0. Set "
                "num_demonstrations to 1 or more, or leave demonstration_source out."
            )
        if self.num_demonstrations >= self.num_generations:
            raise ValueError(
                f"num_demonstrations={self.num_demonstrations} must be below num_generations={self.num_generations}: "
                "demonstrations take the place of rollouts, and each group needs at least one rollout."
            )
        if self.num_demonstrations > 0:
            self._check_demonstrations_can_be_used()
            if self.generation_batch_size is None:
                # Before TRL's own check, whose message names fields that are derived
                self._check_groups_stay_whole(self.steps_per_generation or self.gradient_accumulation_steps)

    def _check_demonstrations_can_be_used(self):
        if self.max_completion_length is None:
            raise ValueError("max_completion_length=None: demonstrations need a limit. Set a number of tokens.")
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would take the demonstrations out of the dataset. Set it to False."
            )

    def _check_groups_stay_whole(self, steps_per_generation: int):
        rows = self.per_device_train_batch_size * steps_per_generation
        if rows % self.num_generations != 0:
            raise ValueError(
                f"Each process generates {rows} completions at a time (per_device_train_batch_size="
                f"{self.per_device_train_batch_size} x steps_per_generation={steps_per_generation}), which is "
                f"not a multiple of num_generations={self.num_generations}. A group with demonstrations must not be "
                "split between processes: raise gradient_accumulation_steps (or steps_per_generation) or "
                "per_device_train_batch_size."
            )


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must be a number from 0 to 1.")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} must be a finite number above 0.")
