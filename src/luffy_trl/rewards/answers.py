r"""
Where a text says its answer: in boxes, between `<answer>` tags, after "the answer is", after `####`.

Every pattern here takes time in proportion to the text, whatever it holds.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

from .spelling import plain_characters, tidy, undecorated


LONGEST_BOX = 2_000  # characters; no gold answer of the paper's six benchmarks has more than 210
MAX_GAP = 80  # characters; boxes further apart are two answers, of which the last counts
LONGEST_PHRASE = 400
MOST_ANNOUNCEMENTS = 30  # the last ones are looked at

# Boxes

OPENING = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s{0,9}|<answer>", re.IGNORECASE)
CLOSING_TAG = re.compile(r"</answer>", re.IGNORECASE)
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
BARE = re.compile(
    r"[-+\u2212]?\s?(?:\\[dt]?frac\s?(?:\{[^{}]{0,99}\}|\d){2}|\\sqrt\s?\{[^{}]{0,99}\}|[^\s$\\{}*<]{1,60})"
)
NOTHING = re.compile(r"(?:[\s.?_~\u2026-]|\\[lc]?dots|\\[,;: ]|\\(?:text|mathrm)\{\s*\}|\{\s*\})*")

# Between boxes that are one answer: "\(\boxed{1}\) or $x_2 = \boxed{2}$"
SPACING = r"\\(?:[,;:!\\() \[\]]|(?:quad|qquad|enspace|left|right|newline)(?![A-Za-z]))|\\[hv]space\*?\{[^{}]{0,20}\}"
WRAPPING = r"\\(?:text\w{0,6}|math(?:rm|bf)|mbox)\s?\{|\\(?:begin|end)\{\w{1,9}\*?\}|[{}$~&*\u2022\s]"
VARIABLE = r"(?:\\[a-z]{2,8}|[A-Za-z])(?:['\u2032]|_\{?\w{1,5}\}?|\([\w,]{1,9}\))*"
NAME = rf"{VARIABLE}[\s$]{{0,3}}(?:=|:|\\approx|\\in(?![A-Za-z]))"
NUMBERING = r"(?:part|case|solution|root|answer)?\s?(?:\((?:[a-z]|[ivx]{1,4}|\d)\)|(?:[a-z]|[ivx]{1,4}|\d)[).:])\s?:?"
JOINING_WORD = (
    r"(?:and|or|also|as\swell\sas|both|either|respectively|along\swith|together\swith)(?![A-Za-z])"
    r"|\\(?:land|lor|wedge|vee)"
)
JOINT = re.compile(rf"(?:{SPACING}|{WRAPPING}|{NAME}|{JOINING_WORD}|(?<=\n){NUMBERING}|[,;.&-])", re.IGNORECASE)
MARKS = re.compile(rf"(?:{SPACING}|{WRAPPING})+")
# "\boxed{1} and the other root is \boxed{2}", or a line for each: "Width: \boxed{1}\nHeight: \boxed{2}"
PARALLEL = re.compile(
    r"\s?(?:[,;]\s)?(?:and|or|[,;])\s(?:the\s|its\s|a\s)?(?:\w{1,20}\s){0,5}?(?:\w{1,20}\s?)(?:is|are|=|:|equals)\s?",
    re.IGNORECASE,
)
LABEL = re.compile(r"[.,;]?\n[\s*-]{0,5}(?:the\s)?(?:\w{1,20}\s){0,3}\w{1,20}\s?(?::|=|is)\**\s?", re.IGNORECASE)
CORRECTING = re.compile(
    r"\b(?:wait|no|not|actually|rather|instead|correct\w*|wrong|mistake\w*|should|so|thus|hence|therefore|then|but|after|final"
    r"|answer|result|simplif\w*|check\w*|re\w+|giv\w+|becom\w+|mean\w*|impl\w+|which|that|it|this|we|i|is\sit|fix\w*|true"
    r"|real|better|now|finally|total)\b",
    re.IGNORECASE,
)

# Announcements

ANNOUNCING = re.compile(r"\b(?:answers?|ans)\b|\u7b54\u6848|^[ \t]{0,3}####(?=\s)", re.IGNORECASE | re.MULTILINE)
CONNECTIVE = re.compile(
    r"[*_`\"'\u201d)\]]{0,4}"
    r"(?:\s(?:to|of|for|in|as|here)\b[^.\n:$\\=]{0,60}?(?=\s(?:is|are|equals)\b|\s?:))?"
    r"(?:,[^,.\n]{1,40},)?\s{0,3}"
    r"(?P<verb>(?:is|are|equals|becomes|(?:must|should|will|would|can\sonly|has\sto|comes\sout\sto)\s(?:be|equal))\b"
    r"(?:\s(?:therefore|thus|hence|then|simply|just|clearly|exactly|indeed|now|also|equal\sto|given\sby|found\sto\sbe|:))*"
    r"|[:=\uff1a\u662f\u4e3a]|-{1,2}>?\s|[\u2013\u2014\u2192]|\\(?:to|rightarrow|Rightarrow)\b|of\b(?=\s[$\d\\]))"
    r"[\s:*_`\"'\u201c]{0,9}",
    re.IGNORECASE,
)
HEADING = re.compile(r"[\s#*_>-]{0,9}(?:(?:the|my|our|final|correct|short)\s){0,3}", re.IGNORECASE)
HEADING_END = re.compile(r"[*_:#\s]{0,9}\n[\s*_`]{0,9}")
NEGATED = re.compile(
    r"\s?(?:is|are|was|must|should|will|would|can)?\s?(?:not|n't|n\u2019t|never|neither|no\slonger)\b|n[o']t\b",
    re.IGNORECASE,
)
INSTEAD = re.compile(
    r"(?:,|;|\bbut|\binstead|\brather|[\u2014-])\s?(?:but\s|rather\s|instead\s)?(?:it(?:'s|\u2019s|\sis)\s|but\s)?(?:rather\s|actually\s)?",
    re.IGNORECASE,
)
# Before an announcement: it announces nothing
HYPOTHETICAL = re.compile(
    r"\b(?:(?:if|suppos\w+|assum\w+|whether|why|unless|maybe|perhaps|possibly|guess\w*|say|says|said|claims?|claimed|would|could|might"
    r"|check|verify|is)\s(?:is\s|that\s)?(?:the\s|my\s|our\s|your\s|an?\s)?(?:final\s|correct\s|right\s)?"
    r"|(?:wrong|incorrect|initial|previous|earlier|first|old|other|another|sample|example|alternative|possible|candidate)\s)"
    r"[*_]{0,3}$",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[!?](?=\s|$|[*_\"')])|\.(?=\s|$|[*_\"')<])|\n|;|\u3002")
CLAUSE = re.compile(
    r",?\s(?:because|since|as|which|so|where|when|by|due|that|thus|hence|from|using)\b|,\s(?:and\s)?(?:not|we|this|it|i|as|the)\b",
    re.IGNORECASE,
)
# After the last announcement: it is taken back
RETRACTED = re.compile(
    r"(?:^|[.!?\n]\s{0,3}|[-\u2014]\s?)(?:\b(?:wait|oops|hmm+|actually|correction|hold\son|scratch\sthat)\b|no[,.!])"
    r"|\b(?:that|this|it)(?:\sis|'s|\u2019s|\swas)\s(?:wrong|incorrect|not\s(?:right|correct))\b|\bmade\s(?:a|an)\s(?:\w{1,12}\s)?(?:mistake|error)\b",
    re.IGNORECASE,
)

# A value in words: "72 clips", "x = 5 or x = 6", "$72$ clips"

FORMULA = re.compile(r"\$\$(.{1,999}?)\$\$|\\\[(.{1,999}?)\\\]|\\\((.{1,999}?)\\\)|\$([^$\n]{1,999})\$", re.DOTALL)
PROSE = re.compile(r"(?:^|(?<=\s))[A-Za-z][a-z]+(?:'[a-z]+)?(?=[.,;:!?)]{0,3}(?:\s|$))")
FUNCTION = re.compile(
    r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|pi|and|or|lim|max|min|sup|inf|gcd|lcm|mod|det|deg|binom|floor"
    r"|ceil|abs|pm|infinity|infty|percent|percentage|pct|base|in",
    re.IGNORECASE,
)
NUMBER = (
    r"[-+]?(?:\\frac\s?(?:\{[^{}]{1,99}\}\s?\{[^{}]{1,99}\}|\d\s?\d)"
    r"|\d[\d,]*(?:\.\d+)?(?:/\d+|e[-+]?\d+)?|\.\d+)(?:\s?\\?%)?"
)
QUANTITY = re.compile(
    rf"(?P<number>(?:[A-Za-z](?:_\w)?\s?=\s?)?{NUMBER}(?:\s?\\(?:times|cdot)\s?10\^(?:\{{[-+]?\d+\}}|\d+))?(?:\s?\^\{{?\\circ\}}?)?)"
    r"(?P<unit>(?:\s|(?<=\d)(?=[a-zA-Z]{2,})).*)",
    re.DOTALL,
)
UNIT = re.compile(r"(?:\s{0,3}(?:[A-Za-z][A-Za-z'-]*|/)(?:\^?\{?-?[1-4]\}?)?[.,]?){1,8}\s*")
ONE_LETTER_UNITS = frozenset("mgshlLNJWKVAC")
TWO_LETTER_UNITS = re.compile(
    "km|cm|mm|dm|nm|kg|mg|lb|oz|ft|in|yd|mi|hr|ms|ml|mL|dl|cl|Hz|Pa|kJ|kW|eV|pc|AU|ly|sq|cu|of|as|by|at|us"
)
OPERATORS = re.compile(
    r"\b(?:and|or|times|plus|minus|over|more|less|fewer|greater|than|divided|multiplied|squared|cubed|half|hundred|thousand"
    r"|million|billion|trillion|dozen|to|if|when|not|mod|modulo|choose|factorial|root|point|wrong|incorrect|no|either|neither"
    r"|but|unless|except|something|power|minimum|maximum|is|are|was|equals?|possibly|maybe)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Box:
    """`text[start:end]` is the box with its command; `content` is None where it never ends."""

    start: int
    end: int
    content: str | None


def find_answer(text: str) -> list[str]:
    """
    The answer that a text settles on, as tidy LaTeX: one item, several where boxes are joined, none if there is none.

    The last box (or `<answer>`) counts, with those before it that "and", "or", commas, lines or names join to it; else
    the last announcement.
    """
    boxes = find_boxes(text)
    if boxes:
        contents = [_content(box, text) for box in _last_group(boxes, text)]
        readable = [content for content in contents if content is not None]
        return list(dict.fromkeys(readable)) if len(readable) == len(contents) else []
    announced = find_announced(text)
    return [announced] if announced else []


def read_gold(text: str) -> str | None:
    """
    A gold answer as tidy LaTeX: bare LaTeX, or written as answers are. None if no answer could equal it.

    A sentence, and a number with words that are no unit, are no gold answer: read as a formula, they would be the
    product of their letters.
    """
    if not text.strip() or text.count("{") != text.count("}"):
        return None
    if find_boxes(text) or ANNOUNCING.search(text):
        return ", ".join(find_answer(text)) or None
    value = read_phrase(text)
    if value is not None:
        return value
    words = PROSE.findall(_without_commands(text))
    return None if re.search(r"\d|\$", text) or len(words) > 6 else tidy(text) or None


# Boxes


def find_boxes(text: str) -> list[Box]:
    """The outermost boxes that hold something, in order."""
    closings = _closing_braces(text)
    boxes, position, tags_end = [], 0, False
    while opening := OPENING.search(text, position):
        position = opening.end()
        if opening[0].startswith("<"):
            closing = None if tags_end else CLOSING_TAG.search(text, position)
            tags_end = closing is None
            if closing is None:
                continue
            inner = max((m.end() for m in re.finditer("<answer>", text[position : closing.start()], re.I)), default=0)
            box = Box(opening.start(), closing.end(), text[position + inner : closing.start()])
        elif text[position : position + 1] == "{":
            end = closings.get(position)
            box = Box(opening.start(), end + 1 if end else len(text), text[position + 1 : end] if end else None)
        elif bare := BARE.match(text, position):
            content = bare[0].rstrip(".,;:!)")
            if not re.search(r"\d", content) and len(content) > 1:
                continue  # speaks of the command
            box = Box(opening.start(), bare.end(), content)
        else:
            continue
        if box.content is None or not NOTHING.fullmatch(box.content):
            boxes.append(box)
        position = box.end if box.content is not None else position
    return boxes


def last_boxes(text: str) -> list[str]:
    """What the last box holds, and those joined to it. Empty if the last one never ends."""
    boxes = find_boxes(text)
    contents = [box.content for box in _last_group(boxes, text)] if boxes else []
    readable = [content for content in contents if content is not None]
    return readable if len(readable) == len(contents) else []


def _closing_braces(text: str) -> dict[int, int]:
    """Opening brace -> its closing brace."""
    closings, opened = {}, []
    for match in BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closings[opened.pop()] = match.start()
    return closings


def _last_group(boxes: list[Box], text: str) -> list[Box]:
    group = [boxes[-1]]
    for before, after in reversed(list(pairwise(boxes))):
        if not joins(text[before.end : after.start]):
            break
        group.insert(0, before)
    return group


def joins(gap: str) -> bool:
    """Whether what stands between two boxes makes them one answer."""
    if len(gap) > MAX_GAP:
        return False
    position, end = 0, len(gap)
    while position < end and (token := JOINT.match(gap, position)):
        position = token.end()
    if position == end:
        return True
    words = MARKS.sub(lambda m: "\n" if "\n" in m[0] else " ", gap)
    return not CORRECTING.search(words) and bool(PARALLEL.fullmatch(words) or LABEL.fullmatch(words))


def _content(box: Box, text: str) -> str | None:
    content = box.content
    if content is None or len(content) > LONGEST_BOX:
        return None
    if text[box.start] == "<":
        found = find_answer(content)
        return ", ".join(found) if found else read_phrase(content) or tidy(content)
    inner = find_boxes(content)
    for nested in reversed(inner):
        content = content[: nested.start] + (nested.content or "") + content[nested.end :]
    return _without_unit(tidy(content))


# Announcements


def find_announced(text: str) -> str | None:
    """The value of the last announcement, such as "The answer is 5." or "#### 5"; None if it is taken back."""
    for match in reversed(list(ANNOUNCING.finditer(text))[-MOST_ANNOUNCEMENTS:]):
        start = max(text.rfind("\n", 0, match.start()) + 1, match.start() - 100)
        before, after = text[start : match.start()], text[match.end() : match.end() + LONGEST_PHRASE]
        if match[0].endswith("####"):
            value = read_phrase(after.strip().partition("\n")[0])
        elif HYPOTHETICAL.search(before):
            continue
        elif NEGATED.match(after):
            return _instead(after)
        else:
            value = _announced(after, before)
        if value is not None:
            return None if RETRACTED.search(text, match.end()) else value
    return None


def _announced(after: str, before: str) -> str | None:
    connective = CONNECTIVE.match(after)
    if connective is None and HEADING.fullmatch(before):
        connective = HEADING_END.match(after)
    if connective is None:
        return None
    rest = after[connective.end() :]
    return None if NEGATED.match(rest) else _first_value(rest)


def _instead(after: str) -> str | None:
    """Of "is not $5$, it is $6$": 6."""
    sentence = after.partition("\n")[0]
    values = [_first_value(sentence[match.end() :]) for match in INSTEAD.finditer(sentence)]
    return next((value for value in values if value is not None), None)


def _first_value(text: str) -> str | None:
    """The value that a sentence begins with. None if it is a question, or begins with no value."""
    if (display := FORMULA.match(text)) and not display[4]:
        head, rest = display[0], text[display.end() :]
    else:
        head, rest = "", text
    masked = FORMULA.sub(lambda m: "0" * len(m[0]), rest)  # no sentence ends within a formula
    end = SENTENCE_END.search(masked)
    sentence = rest[: end.start()] if end else rest
    if end and end[0] == "?":
        return None
    clause = CLAUSE.search(masked[: len(sentence)])
    return read_phrase(head + (sentence[: clause.start()] if clause else sentence))


# Values in words


def read_phrase(text: str) -> str | None:
    """A value with or without a unit, as tidy LaTeX: "72", "$72$ clips", "x = 5 or x = 6". None for anything else."""
    text = undecorated(plain_characters(text))
    if not text or len(text) > LONGEST_PHRASE:
        return None
    formulas = list(FORMULA.finditer(text))
    if formulas and _prose(FORMULA.sub(" ", text)):
        [*others, last] = formulas
        unit = text[last.end() :]
        if others or text[: last.start()].strip() or not _is_unit(unit):
            return None
        return tidy(last[0].strip("$"))
    text = _without_unit(tidy(FORMULA.sub(lambda m: next(filter(None, m.groups())), text)))
    return None if not text or _prose(text) else text


def _prose(text: str) -> bool:
    return any(not FUNCTION.fullmatch(word) for word in PROSE.findall(_without_commands(text)))


def _without_commands(text: str) -> str:
    return re.sub(r"\\(?:text\w{0,6}|mathrm|mbox|begin|end|operatorname)\s?\{[^{}]{0,500}\}|\\[A-Za-z]+", " ", text)


def _without_unit(latex: str) -> str:
    match = QUANTITY.fullmatch(latex)
    return match["number"].strip() if match and _is_unit(match["unit"]) else latex


def _is_unit(text: str) -> bool:
    """Whether words after a number only say of what it is: "clips", "km/h", "square meters in total"."""
    if not UNIT.fullmatch(text) or OPERATORS.search(text):
        return False
    words = re.findall(r"[A-Za-z]+", text)
    return all(
        not FUNCTION.fullmatch(word)
        and (len(word) > 2 or TWO_LETTER_UNITS.fullmatch(word) or word in ONE_LETTER_UNITS)
        for word in words
    )
