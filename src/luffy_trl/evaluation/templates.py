"""Prompt templates by name: how a problem stands in front of the model.

Templates other than `own` are plain text: the model's tokenizer adds its BOS token, if it has one, and nothing else.
They are quoted as they were published, since a model evaluated under other words is another experiment.
"""

from collections.abc import Callable


# "own" is the model's chat template, rendered by lm-eval's back end
OWN = "own"

# A system prompt that stands for the local files' own
FROM_DATA = "data"


def qwen_math(problem: str) -> str:
    """Qwen2.5-Math's evaluation prompt (github.com/QwenLM/Qwen2.5-Math)."""
    return (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    )


def r1_zero(problem: str) -> str:
    """DeepSeek-R1-Zero's template (arXiv 2501.12948, table 1) in the form of Dr. GRPO's code (arXiv 2503.20783).

    The prompt opens the thought, so that the response begins inside it.
    """
    return (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
        "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
        f"User: {problem}\nAssistant: <think>"
    )


def plain(problem: str) -> str:
    """The problem and nothing else, Dr. GRPO's "no template" (arXiv 2503.20783): Qwen2.5 bases answer best so."""
    return problem


TEXT_TEMPLATES: dict[str, Callable[[str], str]] = {"qwen_math": qwen_math, "r1_zero": r1_zero, "plain": plain}
TEMPLATES = (OWN, *TEXT_TEMPLATES)
