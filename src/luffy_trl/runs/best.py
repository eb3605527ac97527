"""Which checkpoint is the best: by the reward in evaluation, of which the loss in GRPO says nothing."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from accelerate.logging import get_logger
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from trl import GRPOTrainer


logger = get_logger(__name__)

REWARD = "eval_reward"
# What transformers and TRL log in an evaluation, behind "eval_" and the set's name
LOGGED = (
    "loss", "runtime", "samples_per_second", "steps_per_second", "num_tokens", "reward", "reward_std",
    "frac_reward_zero_std", "entropy", "kl", "aux_loss", "policy_loss", "entropy_coef", "cispo_clip_ratio",
    "vespo/phi_seq_mean", "tools/call_frequency", "tools/failure_frequency", "completions/clipped_ratio",
    *(f"completions/{which}_{part}length" for which in ("mean", "min", "max") for part in ("", "terminated_")),
    *(f"clip_ratio/{which}" for which in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
    *(f"sampling/{which}" for which in (
        "sampling_logp_difference/mean", "sampling_logp_difference/max", "importance_sampling_ratio/min",
        "importance_sampling_ratio/mean", "importance_sampling_ratio/max",
    )),
)  # fmt: skip


class BestByRewardMixin(GRPOTrainer):
    """
    GRPOTrainer whose best model is the one with the highest reward. Goes before [`WholeCheckpointMixin`].

    What it adds: `check_before_training` refuses a `metric_for_best_model` that no evaluation logs. Of several
    evaluation sets it takes `eval_NAME_reward`, which [`~luffy_trl.runs.evaluations.EvaluationSetsMixin`] logs.
    """

    def check_before_training(self) -> None:
        super().check_before_training()
        sets = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        callbacks = self.callback_handler.callbacks
        for message in settle_metric(self.args, callbacks, sets, self.reward_func_names, self.reward_funcs):
            logger.warning(message)


def choose_by_reward(args: TrainingArguments) -> None:
    """The reward as the metric of the best model, where none is named and one is needed. Before `__post_init__`, which
    would take the loss.

    Raises:
        ValueError: for `greater_is_better=False` without the name of a metric.
    """
    is_needed = args.load_best_model_at_end or args.save_strategy == "best" or _follows_a_metric(args)
    if not is_needed or args.metric_for_best_model is not None:
        return
    if args.greater_is_better is False:
        raise ValueError(
            "greater_is_better=False needs metric_for_best_model: without it the best model is the one with the "
            "highest reward in evaluation. Name the metric of which less is better, or leave it out."
        )
    args.metric_for_best_model, args.greater_is_better = REWARD, True
    if _follows_a_metric(args):
        args.lr_scheduler_kwargs = {"mode": "max"} | (args.lr_scheduler_kwargs or {})


def _follows_a_metric(args: TrainingArguments) -> bool:
    return args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")


def settle_metric(
    args: TrainingArguments,
    callbacks: Iterable[TrainerCallback],
    sets: Sequence[str],
    reward_names: Sequence[str],
    reward_funcs: Sequence[Any],
) -> list[str]:
    """Make `args.metric_for_best_model` one that the evaluations log.

    Args:
        sets: names of the evaluation sets; empty where there is one without a name.

    Returns:
        Sentences to say.

    Raises:
        ValueError: for a metric that no evaluation logs.
    """
    if args.metric_for_best_model is None and any(
        isinstance(callback, EarlyStoppingCallback) for callback in callbacks
    ):
        args.metric_for_best_model, args.greater_is_better = REWARD, args.greater_is_better is not False
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return []
    name = args.metric_for_best_model
    name = name if name.startswith("eval_") else f"eval_{name}"
    if sets and name == REWARD:
        args.metric_for_best_model = f"eval_{sets[0]}_reward"
        return [
            f"The best model is the one with the highest {args.metric_for_best_model}, of the first of the evaluation "
            f"sets {', '.join(sets)}. metric_for_best_model names another."
        ]
    check_metric(
        name,
        _known(sets, reward_names),
        usual=f"eval_{sets[0]}_reward" if sets else REWARD,
        is_complete=not any(_logs_metrics(function) for function in reward_funcs),
    )
    return []


def check_metric(name: str, known: Sequence[str], usual: str, is_complete: bool = True) -> None:
    """
    Args:
        known: the metrics of an evaluation.
        usual: the one to name where nothing is near.
        is_complete: whether there are no others.

    Raises:
        ValueError: if no evaluation logs the metric.
    """
    full = name if name.startswith("eval_") else f"eval_{name}"
    near = [f"{full}/mean"] if f"{full}/mean" in known else difflib.get_close_matches(full, known, n=1, cutoff=0.75)
    if full not in known and (near or is_complete):
        hint = f"did you mean {near[0]}?" if near else f"the usual one is {usual}."
        raise ValueError(f"metric_for_best_model={name!r} is logged by no evaluation of this run: {hint}")


def _known(sets: Sequence[str], reward_names: Sequence[str]) -> list[str]:
    names = [*LOGGED, *(f"rewards/{name}/{part}" for name in reward_names for part in ("mean", "std"))]
    return [f"eval_{prefix}{name}" for prefix in ([f"{name}_" for name in sets] or [""]) for name in names]


def _logs_metrics(function: Callable) -> bool:
    """Whether a reward function may log metrics of its own, by TRL's `log_metric`."""
    while hasattr(function, "__wrapped__"):  # as functools.wraps leaves it
        function = function.__wrapped__
    if not hasattr(function, "__code__"):  # a model, or an object that is called
        return callable(function)
    code = function.__code__
    return "log_metric" in (*code.co_varnames, *code.co_consts)
