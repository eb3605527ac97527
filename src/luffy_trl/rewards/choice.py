"""Which option a multiple-choice answer names, "A" to "J": MMLU-Pro has up to ten."""

import re

from .completions import LONGEST_ANSWER


# What may surround a letter: spaces, Markdown, brackets, and LaTeX such as \text{(C)}
OPEN = r"(?:[\s*_$({\[]|\\\(|\\(?:text|textbf|mathrm|mathbf)\{){0,8}"
CLOSE = r"(?:[\s*_$)}\].]|\\\)){0,8}"
BOX = re.compile(rf"\\boxed\{{{OPEN}([A-Ja-j])(?:{CLOSE}\}}|[).:])")
# "A" and "I" are words, too: they count where the phrase ends with them
PHRASE = re.compile(
    rf"\b(?i:answer|option|choice)[*_]{{0,2}}\s{{0,3}}(?i:is\s{{0,3}}:?|:){OPEN}(?i:(?:option|choice)\s{{1,3}})?{OPEN}"
    rf"(?:([B-HJ])(?![A-Za-z'\u2019])|([AI])(?=[*_$)}}\].,:;]|\s{{0,3}}$|\s{{1,3}}(?:because|since|as)\b))",
    re.MULTILINE,
)
LONE_LETTER = re.compile(rf"{OPEN}([A-J]){CLOSE}")
NUMBERED_OPTION = re.compile(rf"{OPEN}([A-J])[).:]")


def choice_letter(text: str) -> str | None:
    r"""
    The option that an answer settles on, or None.

    The first of these that is there: the last box (`\boxed{C}`, `\boxed{\text{(C) 5 m}}`), the last phrase such as
    "The answer is (C)" or "Answer: C", a last line that is a letter ("**C**"), a single line that starts as an option
    does ("C. 5 m").
    """
    text = text[-LONGEST_ANSWER:].strip()
    if found := BOX.findall(text):
        return found[-1].upper()
    if found := PHRASE.findall(text):
        return "".join(found[-1])
    match = LONE_LETTER.fullmatch(text.rpartition("\n")[2])
    if match is None and "\n" not in text:
        match = NUMBERED_OPTION.match(text)
    return match[1] if match else None
