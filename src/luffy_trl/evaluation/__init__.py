"""The paper's evaluation on lm-evaluation-harness: `luffy-trl eval`, and the task definitions in `tasks/`."""


class EvaluationError(ValueError):
    """What the person who started an evaluation can put right, in one sentence."""


class ScoringError(EvaluationError):
    """Another process scores the samples of the directory, and lets nobody in."""


class LeftToOthersError(Exception):
    """Other processes are still at work in the directory: the last of them scores."""
