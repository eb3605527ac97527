"""Which option a multiple-choice answer names."""

import re


LETTERS = "ABCDEFGHIJ"  # MMLU-Pro has up to ten options
MAX_ANSWER_LENGTH = 10_000  # characters; of a longer answer, the end is read

# What may surround a letter: spaces, Markdown, brackets, and LaTeX such as \text{(C)}
_OPEN = r"(?:[\s*_$({\[]|\\(?:text|textbf|mathrm|mathbf)\{){0,8}"
_CLOSE = r"[\s*_$)}\].]{0,8}"
_BOX = re.compile(rf"\\boxed\{{{_OPEN}([A-Ja-j])(?:{_CLOSE}\}}|[).:])")
# "A" and "I" are also words: they count where the phrase or the line ends with them
_PHRASE = re.compile(
    rf"(?i:answer|option|choice)(?i:\s+is)?\s{{0,3}}:?{_OPEN}"
    r"(?:([B-HJ])(?![A-Za-z'’])|([AI])(?=[*_$)}\].,:;]|\s*$|\s+(?:because|since|as)\b))",
    re.MULTILINE,
)
_LINE = re.compile(rf"{_OPEN}([A-J]){_CLOSE}")


def choice_letter(text: str) -> str | None:
    r"""
    The option that an answer settles on, "A" to "J", or None.

    Read in this order: the last box (`\boxed{C}`, `\boxed{\text{(C)}}`), the last phrase such as "The answer is (C)" or
    "Answer: C", a last line that is nothing but a letter ("**C**").
    """
    text = text[-MAX_ANSWER_LENGTH:]
    boxes = _BOX.findall(text)
    if boxes:
        return boxes[-1].upper()
    phrases = _PHRASE.findall(text)
    if phrases:
        return "".join(phrases[-1])
    lines = text.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    match = _LINE.fullmatch(last)
    return match[1] if match else None
