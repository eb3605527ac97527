# ruff: noqa: RUF001
r"""
One spelling of LaTeX for the many in which people and models write an answer: `½`, `1\,000`, `6.02e5`, `**64**`.

Every pattern here takes time in proportion to the text, whatever it holds.
"""

import re
import unicodedata


INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff\u00ad"))
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑₒₓₙₖ", "0123456789+-()aeoxnk", strict=True))
SYMBOLS = {
    **{"−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot "},
    **{"∗": "*", "÷": r"\div ", "⁄": "/", "∕": "/", "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge "},
    **{
        "⩽": r"\le ",
        "⩾": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "∞": r"\infty ",
        "°": r"^{\circ}",
        "∅": r"\emptyset ",
    },
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∉": r"\notin ", "∖": r"\setminus ", "∧": r"\land ", "∨": r"\lor "},
    **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}"},
    **{"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle "},
    **{
        "∠": r"\angle ",
        "△": r"\triangle ",
        "′": "'",
        "’": "'",
        "‘": "'",
        "“": '"',
        "”": '"',
        "…": r"\ldots ",
        "→": r"\to ",
    },
    **{"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta "},
    **{"λ": r"\lambda ", "μ": r"\mu ", "π": r"\pi ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi "},
    **{"ϕ": r"\phi ", "χ": r"\chi ", "ψ": r"\psi ", "ω": r"\omega ", "ζ": r"\zeta ", "η": r"\eta ", "ξ": r"\xi "},
    **{"Γ": r"\Gamma ", "Δ": r"\Delta ", "Θ": r"\Theta ", "Λ": r"\Lambda ", "Σ": r"\Sigma ", "Φ": r"\Phi "},
    **{"Ψ": r"\Psi ", "Ω": r"\Omega ", "，": ",", "；": ";", "：": ":", "。": ".", "、": ","},
}
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
SPACE = re.compile(r"(?<!\\)\\(?:[,;: ]|(?:quad|qquad|enspace|thinspace|medspace|thickspace)(?![A-Za-z]))|~|[^\S\n]")
DOLLAR = re.compile(r"\\?\$|[€£¥₹]")
MARKUP = '*_`"\u201c\u201d'
LEADING = re.compile(r"\A(?:=|:|\\(?:approx|simeq|sim)(?![A-Za-z])|\s)+")
PLAIN_NUMBER = re.compile(r"\s*[-+]?[\d.,/]+\s*")
INNER = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]{0,200}\}){0,200}\}){0,500}"
BRACED = rf"\{{({INNER})\}}"

# What a root sign covers: a number, a letter, or what stands in brackets
ROOT = re.compile(r"([√∛∜])\s{0,3}(?:\{([^{}]{0,500})\}|\(([^()]{0,500})\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z])|)")
SUPERSCRIPT = re.compile(f"[{''.join(SUPERSCRIPTS)}]+")
SUBSCRIPT = re.compile(f"[{''.join(SUBSCRIPTS)}]+")
REPEATED_BAR = re.compile(
    r"(?<![\d.])(\d{0,50})\.(\d{0,50})\\(?:overline|bar|dot|widehat)\s?\{?(\d{1,50})\}?(?:(\d{0,50})\\dot\s?\{?(\d)\}?)?"
)
REPEATED_ROUND = re.compile(r"(?<![\d.])(\d{1,50})\.(\d{0,50})\((\d{1,50})\)")
REPEATED_DOTS = re.compile(r"(?<![\d.])(\d{1,50})\.(\d{1,60})\s?(?:\.\.\.|\\[lc]?dots)")
BOLD = re.compile(
    r"\\(?:mathbf|textbf|boldsymbol|bm|pmb|mathbf|underline|emph|textit|mathit|textrm|textsf|texttt|textnormal|mathsf)"
    rf"\s?{BRACED}"
)
DECLARATION = re.compile(
    r"\\(?:bf|bfseries|rm|it|sf|tt|displaystyle|textstyle|Large|LARGE|large|huge|Huge|boldmath|normalsize)(?![A-Za-z])"
)
COLOR = re.compile(r"\\(?:text)?color\s?\{[^{}]{0,50}\}|\\(?:tag|label)\*?\s?\{[^{}]{0,50}\}")
PLAIN_TEXT = re.compile(rf"\\(?:text|mathrm|mbox|operatorname)\s?{BRACED}")
GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,;:! ]|~|\{,\}| )\d{3})+(?!\d)")
GROUP_GAP = re.compile(r"\\[,;:! ]|~|\{,\}| ")
LISTED = re.compile(r"\d{1,3}(?:,\d{3})+")
E_NOTATION = re.compile(r"(?<![\w.\\}^])(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})[eE]([+-]?)(\d{1,4})(?![\w.]|\^)")
BASES = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10},
    **{"eleven": 11, "twelve": 12, "sixteen": 16},
}
DIGITS = r"(?=[A-F]{0,20}\d)[\dA-F]{1,200}(?:\.\d{1,200})?"
BASED = re.compile(
    rf"(?<![\w^\\])(?:\(({DIGITS})\)|({DIGITS}))\s?_\s?(?:(\d)|\{{((?:[^{{}}]|\{{[^{{}}]{{0,20}}\}}){{1,30}})\}})"
)
BASE_IN_WORDS = re.compile(
    r"(\d)\s?(?:\(|\\text\s?\{\s?\(?|\\mathrm\s?\{\s?\(?)?\s?(?:in\s)?base[\s~\\]{0,3}(\d{1,2}|[a-z]{3,7})\)?\}?"
)
BASE = re.compile(
    r"(?:\\(?:text|mathrm|rm)\b)?[\s{(]{0,3}(?:base[\s~]?)?(\d{1,2}|[a-z]{3,7})[\s})]{0,3}", re.IGNORECASE
)


def plain_characters(text: str) -> str:
    """LaTeX for mathematics written in Unicode; ASCII digits and letters for their other shapes; nothing invisible."""
    text = ROOT.sub(_root, text.translate(INVISIBLE))
    text = SUPERSCRIPT.sub(lambda match: "^{" + "".join(map(SUPERSCRIPTS.__getitem__, match[0])) + "}", text)
    text = SUBSCRIPT.sub(lambda match: "_{" + "".join(map(SUBSCRIPTS.__getitem__, match[0])) + "}", text)
    return "".join(map(_character, text)) if not text.isascii() else text


def _root(match: re.Match) -> str:
    covered = match[2] or match[3] or match[4]
    return ROOTS[match[1]] + (f"{{{covered}}}" if covered else "")


def _character(character: str) -> str:
    if character.isascii():
        return character
    if character in SYMBOLS:
        return SYMBOLS[character]
    numerator, slash, denominator = unicodedata.normalize("NFKC", character).partition("⁄")
    if slash and denominator:
        return rf"\frac{{{numerator}}}{{{denominator}}}"
    plain = unicodedata.normalize("NFKC", character)  # full-width and mathematical letters and digits, odd spaces
    return "".join(SYMBOLS.get(c, c) for c in plain)


def tidy(latex: str) -> str:
    """An answer's LaTeX without decoration: no bold, colour, Markdown, trailing full stop or thin spaces."""
    latex = DOLLAR.sub("", plain_characters(latex)).replace(r"\!", "")
    latex = COLOR.sub("", DECLARATION.sub("", latex)).replace(r"\degree", r"^{\circ}")
    latex = BOLD.sub(lambda m: m[1] if re.search(r"[\d\\]", m[1]) else rf"\text{{{m[1]}}}", latex)
    latex = PLAIN_TEXT.sub(lambda m: m[1] if PLAIN_NUMBER.fullmatch(m[1]) else m[0], latex)
    latex = GROUPED.sub(lambda m: GROUP_GAP.sub("", m[0]), latex)
    latex = SPACE.sub(" ", latex)
    latex = REPEATED_BAR.sub(_barred, latex)
    latex = REPEATED_DOTS.sub(_dotted, latex)
    return undecorated(latex)


def undecorated(text: str) -> str:
    """Without Markdown around it, a sign of equality before it, and full stops, commas and line breaks after it."""
    text = LEADING.sub("", text.strip().strip(MARKUP), count=1).strip()
    while text.endswith(("\\\\", ".", ",", ";", ":", *MARKUP)) and not text.endswith("..."):
        text = text.removesuffix("\\\\").rstrip(".,;:" + MARKUP).rstrip()
    if text.startswith("{") and text.endswith("}") and text.count("{") == text.count("}") == 1:
        text = text[1:-1].strip()
    return text


def _barred(match: re.Match) -> str:
    whole, fixed, first, between, last = match.groups()
    return _repeating(whole, fixed, first + (between or "") + (last or ""))


def _dotted(match: re.Match) -> str:
    """`0.333...` and `0.1212...`: only what is seen to repeat, three times or, for longer blocks, twice."""
    whole, digits = match.groups()
    for length in range(1, len(digits) // 2 + 1):
        block, times = digits[-length:], 3 if length == 1 else 2
        if digits.endswith(block * times):
            fixed = digits
            while fixed.endswith(block):
                fixed = fixed.removesuffix(block)
            return _repeating(whole, fixed, block)
    return match[0]


def _repeating(whole: str, fixed: str, block: str) -> str:
    numerator = int((whole or "0") + fixed + block) - int((whole or "0") + fixed)
    return rf"\frac{{{numerator}}}{{{'9' * len(block)}{'0' * len(fixed)}}}"


def readings(latex: str) -> list[str]:
    r"""The ways to read a tidy answer, most of the time one.

    `1e-5` is a power of ten, or 1 e - 5; `100,200` is one number or two; `2.5(3)` repeats, or is a product.
    """
    found = [E_NOTATION.sub(_power_of_ten, latex)]
    if LISTED.fullmatch(latex) and not re.search(r",0", latex):
        found.append(latex.replace(",", ", "))
    if (repeating := REPEATED_ROUND.sub(_barred_round, latex)) != latex:
        found.append(repeating)
    if re.fullmatch(r"\d+e[+-]\d+", latex):
        found.append(latex)
    return found


def _barred_round(match: re.Match) -> str:
    return _repeating(match[1], match[2], match[3])


def _power_of_ten(match: re.Match) -> str:
    mantissa, sign, exponent = match.groups()
    mantissa = mantissa.rstrip(".") if "." in mantissa else mantissa
    return rf"{mantissa} \times 10^{{{'-' if sign == '-' else ''}{int(exponent)}}}"


def without_bases(latex: str) -> tuple[str, tuple[int, ...]]:
    """The answer without the bases of its numbers, as in `1010_2`, and those bases in order."""
    bases = []

    def take(match: re.Match) -> str:
        base = _base(match[3] or match[4])
        if base is None:
            return match[0]
        bases.append(base)
        return match[1] or match[2]

    latex = BASE_IN_WORDS.sub(lambda m: f"{m[1]}_{{{m[2]}}}", latex)
    return BASED.sub(take, latex), tuple(sorted(bases))


def _base(text: str) -> int | None:
    match = BASE.fullmatch(text.strip())
    if match is None:
        return None
    return int(match[1]) if match[1].isdecimal() else BASES.get(match[1].lower())
