"""A run that ends when it has seen so many tokens, whatever its steps: for methods whose steps differ in cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer, TrainerCallback


@dataclass
class TokenBudgetConfig:
    """The field for a trainer with [`TokenBudgetMixin`]. A parent of a config beside TRL's.

    Raises:
        ValueError: for what is no number of tokens.
    """

    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Stop after the optimizer step in which this many tokens, prompts included, have been sampled or "
            "trained on: TRL's `num_tokens`. `max_steps` stays the limit, and what schedules go by. Default None: no "
            "limit."
        },
    )

    def __post_init__(self):
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget={self.token_budget} must be 1 or more.")
        super().__post_init__()  # type: ignore[misc] # TRL's


class TokenBudgetMixin(Trainer):
    """A trainer of TRL that stops at `args.token_budget`."""

    args: Any
    _metrics: Mapping[str, dict[str, list[float]]]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.token_budget is not None:
            self.add_callback(StopAtTokens(self._metrics["train"], self.args.token_budget))


class StopAtTokens(TrainerCallback):
    """
    Args:
        metrics: the trainer's metrics of the log under way, which TRL keeps by name. `num_tokens` is the run's count.
        budget: in tokens.
    """

    def __init__(self, metrics: Mapping[str, list[float]], budget: int):
        self.metrics, self.budget = metrics, budget

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen = self.metrics.get("num_tokens")
        if seen and seen[-1] >= self.budget:
            control.should_training_stop = True
