"""What a completion says: its text, and the part of it that holds the answer."""

from typing import Any, Literal


# Characters: of a longer answer the end is read, a longer gold answer is none
LONGEST_ANSWER = 10_000

Thought = Literal["required", "optional", "unused"]
THOUGHT_MODES = ("required", "optional", "unused")
# Where a parsed message has its thought, by the name that a tokenizer's response template gives it
REASONING_KEYS = ("reasoning_content", "thinking")


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """
    The text of a completion in either of TRL's forms: str, or messages, of which the last counts.

    A thought that was parsed into a field of its own is put back in front, between `<think>` and `</think>`.
    """
    if isinstance(completion, str):
        return completion
    message = completion[-1] if completion else {}
    content = message.get("content") or ""
    thought = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    return content if thought is None else f"<think>{thought}</think>{content}"


def answer_part(text: str, delimiter: str = "</think>", mode: Thought = "required") -> str | None:
    """
    The part of a completion that is graded.

    Args:
        delimiter: what ends the thought.
        mode: "required": the text after the last delimiter, None if there is none. "optional": the same, but the whole
            text if there is none. "unused": always the whole text.
    """
    if mode == "unused":
        return text
    _, found, answer = text.rpartition(delimiter)
    return answer if found or mode == "optional" else None
