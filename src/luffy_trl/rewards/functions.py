"""The reward functions, in TRL's signature: completions and the dataset's columns in, a reward per completion out."""

import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Rational, Real
from typing import Any

from .choice import choice_letter
from .completions import THOUGHT_MODES, Thought, answer_part, completion_text
from .spelling import INVISIBLE
from .verification import DEFAULT_MEMORY_LIMIT, DEFAULT_TIMEOUT, check_limits, judge_math


logger = logging.getLogger(__name__)
MAX_REPORTED = 1000  # gold answers that are named in warnings
LARGEST_EXACT = 2**53  # beyond it a float may be another whole number than was meant
MAX_EXPONENT = 25  # of ten; a smaller or larger number is written with it
TAG = re.compile(r"[<\uff1c][\s/]{0,9}think", re.IGNORECASE)
EMPTY_GLYPHS = "\u2800\u3164\u115f\u1160\uffa0"  # Braille and Hangul that show nothing
LogExtra = Callable[[str, list], None]
LogMetric = Callable[[str, float], None]


class _AnswerReward:
    """1.0 for a right answer, 0.0 for a wrong or missing one, None where the gold answer is none."""

    __name__: str  # what TRL calls its metrics

    def __init__(self, thought: Thought = "required", delimiter: str = "</think>"):
        if thought not in THOUGHT_MODES:
            raise ValueError(f"thought={thought!r} must be one of {', '.join(map(repr, THOUGHT_MODES))}.")
        if not delimiter:
            raise ValueError("delimiter is empty: give what ends the thought, such as '</think>'.")
        self.thought = thought
        self.delimiter = delimiter
        self.reported: set[Any] = set()

    def answers(self, completions: list) -> list[str]:
        parts = [answer_part(completion_text(c), self.delimiter, self.thought) for c in completions]
        return [part or "" for part in parts]

    def report(self, gold: Any) -> None:
        """Warn of a gold answer that nothing can be compared with, once."""
        if gold not in self.reported and len(self.reported) < MAX_REPORTED:
            self.reported.add(gold)
            logger.warning(
                "%s: the gold answer %r in column `solution` cannot be parsed. Its completions get no reward; correct "
                "the row, or take it out of the dataset.",
                self.__name__,
                gold,
            )


class MathReward(_AnswerReward):
    r"""
    Whether the answer equals the column `solution` mathematically. `math_reward` is this with its defaults.

    Each answer is verified by Math-Verify in a worker process, with hard limits: see
    [`~luffy_trl.rewards.verification.judge_math`].

    Args:
        thought: "required": only what follows the delimiter is read, and a completion without it gets 0.0, as in the
            paper. "optional": a completion without it is read whole. "unused": every completion is read whole.
        delimiter: what ends the thought.
        timeout: seconds for one answer.
        memory_limit: MiB for one worker process. Not enforced on macOS.
        workers: most worker processes. Default: LUFFY_TRL_REWARD_WORKERS, or this rank's share of the cores.

    Raises:
        ValueError: for an unknown `thought`, or limits that leave no room for any answer.
    """

    __name__ = "math_reward"
    columns = ("solution",)  # of the dataset, without which it is an error to call it

    def __init__(
        self,
        thought: Thought = "required",
        delimiter: str = "</think>",
        timeout: float = DEFAULT_TIMEOUT,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
        workers: int | None = None,
    ):
        super().__init__(thought, delimiter)
        check_limits(timeout, memory_limit, workers)
        self.timeout = timeout
        self.memory_limit = memory_limit
        self.workers = workers

    def __call__(
        self,
        completions: list,
        solution: Sequence[str | None] | None = None,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Rewards of completions, str or messages. `solution`: the gold answers, bare LaTeX or `$...$` or in a box."""
        golds = check_solutions(self.__name__, solution, completions)
        answers = self.answers(completions)
        verdicts = judge_math(answers, [g or "" for g in golds], self.timeout, self.memory_limit, self.workers)
        for gold, verdict in zip(golds, verdicts, strict=True):
            if verdict.equal is None:
                self.report(gold)
        if log_extra is not None:
            log_extra("math_answer", [verdict.answer for verdict in verdicts])
            log_extra("math_outcome", [verdict.outcome for verdict in verdicts])
        if log_metric is not None and verdicts:
            over = [verdict.outcome in ("time limit", "crash") for verdict in verdicts]
            log_metric("math_reward/over_limit", sum(over) / len(over))
        return [None if verdict.equal is None else float(verdict.equal) for verdict in verdicts]


class ChoiceReward(_AnswerReward):
    """
    Whether the answer names the option in column `solution`, "A" to "J". `choice_reward` is this with its defaults.

    Args:
        thought: as in [`MathReward`].
        delimiter: what ends the thought.
    """

    __name__ = "choice_reward"
    columns = ("solution",)  # of the dataset, without which it is an error to call it

    def __call__(
        self,
        completions: list,
        solution: Sequence[str | None] | None = None,
        log_extra: LogExtra | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        texts = check_solutions(self.__name__, solution, completions, numbers=False)
        golds = [choice_letter(text or "") for text in texts]
        letters = [choice_letter(answer) for answer in self.answers(completions)]
        for text, gold in zip(texts, golds, strict=True):
            if gold is None:
                self.report(text)
        if log_extra is not None:
            log_extra("choice_answer", [letter or "" for letter in letters])
        return [float(letter == gold) if gold else None for letter, gold in zip(letters, golds, strict=True)]


class FormatReward:
    """
    Whether a completion is one thought, then an answer: `<think>...</think>...`. `format_reward` is this.

    The opening tag may be missing, as it is where the prompt ends with it. Neither part may be blank, and nothing else
    may look like a tag of thoughts, such as `<think >` or `<THINK>`.
    """

    __name__ = "format_reward"

    def __call__(self, completions: list, **kwargs: Any) -> list[float]:
        return [float(self.is_well_formed(completion_text(completion))) for completion in completions]

    def is_well_formed(self, text: str) -> bool:
        text = text.translate(INVISIBLE).strip().removeprefix("<think>")
        thought, found, answer = text.partition("</think>")
        if not found or TAG.search(thought) or TAG.search(answer):
            return False
        return not is_blank(thought) and not is_blank(answer)


def is_blank(text: str) -> bool:
    """Whether nothing of it can be seen: spaces, controls, formats, marks without a letter, and empty glyphs."""
    return all(unicodedata.category(c)[0] in "ZCM" or c in EMPTY_GLYPHS for c in text)


def check_solutions(
    name: str, solution: Sequence[Any] | None, completions: list, numbers: bool = True
) -> list[str | None]:
    """
    The gold answers as exact text: numbers with all their digits.

    Raises:
        ValueError: if the dataset has no column `solution`, or naming the row of what is neither text nor an exact
            number. `numbers`: whether there may be any.
    """
    if solution is None:
        raise ValueError(f"{name} needs the dataset's column `solution`, the gold answer of each prompt, as text.")
    if len(solution) != len(completions):
        raise ValueError(f"{name}: {len(completions)} completions, but {len(solution)} solutions.")
    return [_gold_text(name, gold, row, numbers) for row, gold in enumerate(solution)]


def _gold_text(name: str, gold: Any, row: int, numbers: bool) -> str | None:
    if gold is None or isinstance(gold, str):
        return gold
    wrong = f"{name}: `solution` is {type(gold).__name__} {str(gold)[:100]}, but must be text"
    if not numbers or isinstance(gold, bool) or not isinstance(gold, Real | Decimal):
        raise ValueError(f"{wrong}, in row {row} of the batch: make the column text, or correct the row.")
    if isinstance(gold, Rational):  # int, Fraction, numpy's integers
        return str(gold)
    number = Decimal(str(gold))  # the shortest decimal that is this float
    if not number.is_finite():
        raise ValueError(f"{wrong} or a finite number, in row {row} of the batch: correct the row, or take it out.")
    if isinstance(gold, Real) and abs(number) > LARGEST_EXACT:
        raise ValueError(
            f"{wrong}, in row {row} of the batch: a float of this size may have lost digits. Read it as text."
        )
    if number == number.to_integral_value():
        number = number.quantize(Decimal(1)) if abs(number.adjusted()) < MAX_EXPONENT else number
    return f"{number:f}" if abs(number.adjusted()) < MAX_EXPONENT else str(number)


math_reward = MathReward()
math_reward_optional_thought = MathReward(thought="optional")
math_reward_optional_thought.__name__ = "math_reward_optional_thought"
choice_reward = ChoiceReward()
format_reward = FormatReward()
