"""From responses to scores, as in training: math by Math-Verify in worker processes, choices by their letter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..rewards.choice import choice_letter
from ..rewards.completions import Thought, answer_part
from ..rewards.verification import judge_math
from .samples import SampleStore


# The original evaluation script grades what follows the thought, and the whole response where no thought ends
DEFAULT_THOUGHT: Thought = "optional"


@dataclass(frozen=True)
class Judgement:
    """`answer`: what was taken for it, None if there was none. `correct`: None where the gold cannot be read."""

    answer: str | None
    correct: bool | None


def judge_responses(kind: str, responses: Sequence[str], golds: Sequence[str], thought: Thought) -> list[Judgement]:
    """
    Args:
        kind: "math" or "choice".
        golds: the right answers, in LaTeX or as a letter.
        thought: "required": what follows `</think>` counts, and nothing where it is missing; "optional": the whole
            response where it is missing; "unused": the whole response.
    """
    parts = [answer_part(response, mode=thought) or "" for response in responses]
    if kind == "choice":
        letters = map(choice_letter, parts)
        return [Judgement(letter, letter == gold) for letter, gold in zip(letters, golds, strict=True)]
    judged = judge_math(parts, golds)
    return [Judgement(None if v.outcome == "no answer" else v.answer, v.equal) for v in judged]


class Scorer:
    """Scores kept samples, task by task, and writes the scores beside them.

    Args:
        kinds: task -> "math" or "choice".
    """

    def __init__(self, store: SampleStore, kinds: Mapping[str, str], thought: Thought):
        self.store, self.kinds, self.thought = store, kinds, thought
        # Task -> problems whose gold answer Math-Verify cannot read: nothing is right there
        self.unreadable: dict[str, set[int]] = {}

    def score(self, task: str, documents: Mapping[int, Mapping[str, Any]]) -> None:
        """
        Args:
            documents: the task's documents by number.
        """
        samples = [s for s in self.store.samples.values() if s.task == task and s.doc_id in documents]
        for sample in samples:
            sample.problem, sample.gold = documents[sample.doc_id]["problem"], documents[sample.doc_id]["answer"]
        golds = [str(sample.gold) for sample in samples]
        verdicts = judge_responses(self.kinds[task], [sample.response for sample in samples], golds, self.thought)
        for sample, verdict in zip(samples, verdicts, strict=True):
            sample.answer, sample.score = verdict.answer, float(bool(verdict.correct))
        self.unreadable[task] = {s.doc_id for s, v in zip(samples, verdicts, strict=True) if v.correct is None}
        self.store.rewrite(task)


# For lm-eval's own command, `lm_eval --include_path .../luffy_trl/evaluation/tasks --tasks luffy_math`


def math_results(document: Mapping[str, Any], results: list[list[str]]) -> dict[str, float]:
    return _results("math", document, results)


def choice_results(document: Mapping[str, Any], results: list[list[str]]) -> dict[str, float]:
    return _results("choice", document, results)


RESULTS_BY_KIND = {"math": math_results, "choice": choice_results}


def _results(kind: str, document: Mapping[str, Any], results: list[list[str]]) -> dict[str, float]:
    [responses] = results
    verdicts = judge_responses(kind, responses, [document["answer"]] * len(responses), DEFAULT_THOUGHT)
    return {"score": sum(bool(verdict.correct) for verdict in verdicts) / len(responses)}
