"""
Whether two answers in LaTeX are equal: Math-Verify's verdict, less what it rounds away. For a worker process.

Math-Verify takes numbers for equal that agree to 15 digits after the point, or 6 where one is a decimal: for it 1/2^81
is 1/2^80, and 10^-20 is 10^-30. It also ignores the base in 1010_2.
"""

from functools import lru_cache

from latex2sympy2_extended import NormalizationConfig, normalize_latex
from math_verify import grader, verify
from math_verify.parser import parse_latex_cached
from sympy import (
    Basic,
    Derivative,
    Expr,
    Float,
    I,
    Integer,
    Limit,
    MatrixBase,
    MatrixExpr,
    Rational,
    UnevaluatedExpr,
    multiplicity,
)
from sympy.concrete.expr_with_limits import ExprWithLimits

from .spelling import readings, without_bases


# `\frac12` and `\sqrt2` are fine LaTeX; boxes are opened before
NORMALIZATION = NormalizationConfig(units=True, malformed_operators=True, nits=True, boxed="none")
MOST_DIGITS = 1_000  # to which a difference of exact numbers is computed; one that is 0 costs all of them
# Of decimals: what is left of rounding while computing, and what an approximation such as 0.333333 may leave
# A percentage equals its number for Math-Verify, 9% = 9 = 0.09; the others take minutes at many digits
NOT_COMPARED = (UnevaluatedExpr, ExprWithLimits, Limit, Derivative)
FLOATING_POINT_NOISE, APPROXIMATION = 1e-12, 1e-6
TINIEST = 1e-300  # beyond it and its inverse, decimals are compared exactly
FEWEST_DECIMALS, FEWEST_DIGITS = 6, 4  # that make a decimal a rounded form of another

math_verify_numeric_eq = grader.sympy_numeric_eq


def equal(gold: str, answer: str) -> bool:
    """Whether any reading of the answer equals any of the gold answer, both in tidy LaTeX."""
    return any(_equal(g, a) for g in readings(gold) for a in readings(answer))


def _equal(gold: str, answer: str) -> bool:
    (gold, gold_bases), (answer, answer_bases) = without_bases(gold), without_bases(answer)
    if gold_bases and answer_bases and gold_bases != answer_bases:
        return False
    return verify(parsed(gold), parsed(answer), timeout_seconds=None)


@lru_cache(maxsize=4096)  # the completions of a group share their gold
def parsed(latex: str) -> list:
    """As `math_verify.parse` gives it: the expression, if the text can be parsed, and the text."""
    text = normalize_latex(latex, NORMALIZATION)
    if not text:
        return []
    try:
        return [parse_latex_cached(text), text]
    except Exception:  # the parser's and SymPy's own, of any kind
        return [text]


def numeric_eq(a: Basic | MatrixBase, b: Basic | MatrixBase, float_rounding: int, numeric_precision: int) -> bool:
    """In the place of `math_verify.grader.sympy_numeric_eq`: the same, but for what is provably different."""
    if not math_verify_numeric_eq(a, b, float_rounding, numeric_precision):
        return False
    if isinstance(a, MatrixBase | MatrixExpr) or isinstance(b, MatrixBase | MatrixExpr):
        return True  # its elements came through here
    return not provably_different(a, b)


grader.sympy_numeric_eq = numeric_eq


def provably_different(a: Basic, b: Basic) -> bool:
    if not (isinstance(a, Expr) and isinstance(b, Expr)) or (a + b).has(*NOT_COMPARED):
        return False
    has_decimals = a.has(Float) or b.has(Float)
    a, b = _with_exact_decimals(a), _with_exact_decimals(b)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    # Two expressions that differ at one point are different
    point = {symbol: Rational(7 * i + 5, 2 * i + 3) for i, symbol in enumerate(symbols)}
    difference = _resolved((a - b).xreplace(point))
    if difference == 0:
        return False
    return not (has_decimals and not symbols and _same_to_their_digits(a, b, difference))


def _with_exact_decimals(expression: Expr) -> Expr:
    return expression.xreplace({decimal: Rational(str(decimal)) for decimal in expression.atoms(Float)})


def _resolved(expression: Expr) -> Expr:
    """Its value, to few digits, if that can be told from 0 within MOST_DIGITS, else 0."""
    parts = expression.evalf(2, maxn=MOST_DIGITS).as_real_imag()
    # SymPy marks what is lost in cancellation by a precision of 1
    certain = [part if isinstance(part, Float) and part._prec > 1 else Integer(0) for part in parts]
    return certain[0] + I * certain[1]


def _same_to_their_digits(a: Expr, b: Expr, difference: Expr) -> bool:
    """Whether two different numbers, of which one at least is a decimal, are one and the same rounded."""
    sizes = [abs(number.evalf(5)) for number in (a, b)]
    if not all(TINIEST < size < 1 / TINIEST for size in sizes):
        return False
    numbers = [number.doit() for number in (a, b)]
    decimals = {number: places for number in numbers if (places := _decimal_places(number)) is not None}
    noise = FLOATING_POINT_NOISE if len(decimals) == len(numbers) else APPROXIMATION
    if abs(difference) <= noise * max(sizes):
        return True
    if not decimals:
        return False
    shorter = min(decimals, key=decimals.__getitem__)
    unit = Rational(1, 10 ** decimals[shorter])
    is_rounded = decimals[shorter] >= FEWEST_DECIMALS and abs(shorter) >= 10 ** (FEWEST_DIGITS - 1) * unit
    return bool(is_rounded and abs(numbers[0] - numbers[1]) <= unit / 2)


def _decimal_places(number: Expr) -> int | None:
    """How many digits a number has after the point; None if they never end."""
    if not isinstance(number, Rational):
        return None
    twos, fives = (multiplicity(prime, number.q) for prime in (2, 5))
    return max(twos, fives) if 2**twos * 5**fives == number.q else None
