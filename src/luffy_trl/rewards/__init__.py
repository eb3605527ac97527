"""Reward functions for TRL that no completion can hang or crash. Imports neither torch nor TRL."""

from .choice import choice_letter
from .completions import answer_part
from .functions import (
    ChoiceReward,
    FormatReward,
    MathReward,
    choice_reward,
    format_reward,
    math_reward,
    math_reward_optional_thought,
)
from .verification import verify_math


__all__ = [
    "ChoiceReward",
    "FormatReward",
    "MathReward",
    "answer_part",
    "choice_letter",
    "choice_reward",
    "format_reward",
    "math_reward",
    "math_reward_optional_thought",
    "verify_math",
]
