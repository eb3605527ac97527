"""Which option a multiple-choice answer names, "A" to "J": MMLU-Pro has up to ten.

Every pattern here takes time in proportion to the text, whatever it holds.
"""

import re

from .answers import HYPOTHETICAL, MOST_ANNOUNCEMENTS, last_boxes
from .completions import LONGEST_ANSWER
from .spelling import plain_characters


# What may surround a letter: spaces, Markdown, quotes, brackets, and LaTeX such as \text{(C)}
COMMAND = (
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf)|bm|boldsymbol|mbox|underline|emph)\s?\{"
    r"|\\(?:bf|rm|it|sf|displaystyle|large|Large)(?![A-Za-z])|\\[(\[,;: ]"
)
OPEN = rf"(?:[\s*_$({{\[<`\"']|{COMMAND}){{0,12}}"
CLOSE = r"(?:[\s*_$)}\]>`\"']|\\[)\],;: ]){0,12}"
NOUN = r"(?:(?i:(?:the\s)?(?:correct\s|right\s|final\s)?(?:option|choice|answer|letter)\b)\s?:?)?"
OPTION = re.compile(rf"(?P<open>{OPEN}{NOUN}{OPEN})(?P<letter>[A-Ja-j])")
# Not a word, nor part of a formula: Carbon, C_6, B', A/m
ALONE = r"(?![\w^+=/-]|\\(?![)\],;: ])|'\w|\s[+=^/]\s?\S)"
ANOTHER = re.compile(
    rf"{CLOSE}(?:[,/&;]|(?:,\s?)?(?:\\\w{{4,6}}\{{\s?)?(?i:and/or|and|or)(?![A-Za-z])){CLOSE}{OPEN}{NOUN}{OPEN}"
    r"(?:[A-J](?![\w'])|[b-hj](?=[)\]}]))"
    rf"(?!{CLOSE}\s?(?:is|are|fails?|was|would|has|does|cannot|can|must)\b)"
)
# After "A" and "I", which are words, and small letters
ENDED = re.compile(
    r"\.?\s{0,3}$|\s?\n|[*_$)}\].,:;`\"'>]|\\|\s{1,3}(?:\(|[-\u2013\u2014]|because\b|since\b|as\b|which\b|due\b|based\b)"
)

VERB = (
    r"(?:(?:is|are|must\sbe|should\sbe|will\sbe|would\sbe|has\sto\sbe|can\sonly\sbe)\b"
    r"(?:\s(?:therefore|thus|hence|then|clearly|simply|definitely|indeed|most\slikely)\b)?\s?:?|[:=]|--?>|->|\\to\b|-{1,2}(?=\s))"
)
ANNOUNCED = re.compile(
    rf"\b(?:answer|option|choice|ans)\b(?:\s(?:to|for|of)\b[^.\n:]{{0,60}}?(?=\s(?:is|must|should)\b|\s?:))?[*_`\"')]{{0,4}}"
    rf"(?:\s{{0,3}}{VERB}|[*_:#\s]{{0,6}}\n)"
    rf"|\u7b54\u6848\s?[\u662f\u4e3a:]?|\u9009(?:\u62e9)?\s?:?"
    r"|\b(?:i|we)(?:'ll|\swould|\swill|\sthus|\stherefore)?\s(?:choose|pick|select|go\swith|chose)\b"
    r"|(?<![^\n])\s{0,3}####(?=\s)",
    re.IGNORECASE,
)
# "D is the correct answer", "option D is correct"
CALLED_RIGHT = re.compile(
    rf"(?:(?<![^.!?,;:\n])\s?|\b(?i:so|therefore|thus|hence|that|then|option|choice|answer|clearly|only|is|think|believe)\s)"
    rf"{OPEN}(?P<letter>[A-J]){CLOSE}\s?(?i:(?:is|must\sbe|should\sbe|would\sbe)\s(?:therefore\s|thus\s|clearly\s)?(?:(?:the|our|my)\s)?"
    r"(?:most\s|only\s|single\s)?(?:correct|right|best|answer|appropriate|accurate)(?:\s(?:answer|option|choice|one))?\b)"
)
LISTED_BEFORE = re.compile(r"(?:\b(?:and|or|nor|neither|not)|\b[A-J],|&)[\s(*]{1,4}$")
NEGATION = re.compile(r"[\s:*_]{0,5}(?:not|neither|never|n't|no\slonger|none)\b", re.IGNORECASE)
PHRASE_END = re.compile(r"[?!](?=[\s*_\"')]|$)|(?<![A-J(][A-J])(?<!\s[A-J])\.(?=\s|$)|\n")
OPTION_LINE = re.compile(
    rf"{OPEN}(?:{NOUN}{OPEN})?(?P<letter>[A-HJ])(?:[).:](?=[\s*_)}}$]|$)|\)|\s?[-\u2013\u2014]\s)"
)
LONE_LETTER = re.compile(rf"{OPEN}{NOUN}{OPEN}(?P<letter>[A-J]){CLOSE}[.]?{CLOSE}")
SPECIES = re.compile(
    r"[*_\s]{0,3}[A-J]\.\s(?:coli|elegans|subtilis|albicans|difficile|perfringens|botulinum|jejuni)\b"
)
AMBIGUOUS = "ambiguous"


def choice_letter(text: str) -> str | None:
    r"""
    The option that an answer settles on, or None, also where it names several ("B or C").

    The first of these that is there: the last box or `<answer>` (`\boxed{C}`, `\boxed{\text{(C) 5 m}}`), the last
    phrase such as "The answer is (C)", "Answer: C" or "C is correct", a last or first line that is a letter ("**C**"),
    a text that starts as an option does ("C. 5 m").
    """
    text = plain_characters(text[-LONGEST_ANSWER:]).strip()
    for read in (_boxed, _announced, _lone):
        if (found := read(text)) is not None:
            return None if found == AMBIGUOUS else found
    return None


def _boxed(text: str) -> str | None:
    letters = {_in_box(content) for content in last_boxes(text)}
    if not letters or letters == {None}:
        return None
    return letters.pop() if len(letters) == 1 else AMBIGUOUS


def _in_box(content: str) -> str | None:
    """Of a box, or between tags: a letter, by itself or before its option."""
    if last_boxes(content):
        return _boxed(content)
    found = option(content, in_box=True)
    return found if found is not None else _announced(content)


def option(text: str, in_box: bool = False) -> str | None:
    """The letter that a text begins with, AMBIGUOUS if another follows it ("B or C"), None if it begins with none."""
    match = OPTION.match(text)
    if match is None or not re.match(ALONE, text[match.end() : match.end() + 4]):
        return None
    rest, letter = text[match.end() :], match["letter"]
    if ANOTHER.match(rest):
        return AMBIGUOUS
    if in_box:
        after = re.match(rf"{CLOSE}(?:$|[.:,)]|\()", rest)
        return letter.upper() if after else None
    if letter in "BCDEFGHJ":
        return letter
    return letter.upper() if ENDED.match(rest) else None


def _announced(text: str) -> str | None:
    found = [(match.end(), match) for match in ANNOUNCED.finditer(text)]
    found += [(match.start("letter"), match) for match in CALLED_RIGHT.finditer(text)]
    for position, match in sorted(found, key=lambda pair: pair[0], reverse=True)[:MOST_ANNOUNCEMENTS]:
        start = max(text.rfind("\n", 0, match.start()) + 1, match.start() - 60)
        rest = text[position : position + 400]
        end = PHRASE_END.search(rest)
        if (
            HYPOTHETICAL.search(text[start : match.start()].rstrip() + " ")
            or NEGATION.match(rest)
            or (end and end[0] == "?")
        ):
            continue
        if match.re is CALLED_RIGHT:
            before = text[start:position]
            if not LISTED_BEFORE.search(before):
                return match["letter"]
        elif (letter := option(rest)) is not None:
            return letter
    return None


def _lone(text: str) -> str | None:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for line in (lines[-1:] + lines[:1]) if lines else []:
        if match := LONE_LETTER.fullmatch(line):
            return match["letter"]
    options = [match for line in lines if (match := OPTION_LINE.match(line)) and not SPECIES.match(line)]
    if len(options) != 1 or not OPTION_LINE.match(lines[0]) or SPECIES.match(lines[0]):
        return None
    rest = lines[0][options[0].end() :]
    return None if re.search(r"(?<![\w'])[A-J][.)](?=\s)", rest) else options[0]["letter"]
