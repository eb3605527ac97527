"""Numbers as exact text: every digit that the file has, and none that a float64 made up."""

import math
from decimal import Decimal
from typing import Any, TypeGuard


# Zeros that are written out; with more it is 1e400, and no text of a gigabyte
WRITTEN_OUT = 60
FLOAT_EXACT = 2**53  # every whole number up to here is a float64


def exact_text(number: int | float | Decimal) -> str:
    """A number as a person writes it: 72 for 72.0, 0.5 for 0.5, 0.00000001 for 1e-08.

    An infinity, or what is not a number, is `inf` or `nan`.
    """
    if isinstance(number, int) or not is_finite(number):
        return str(number)
    value = number if isinstance(number, Decimal) else Decimal(repr(number))
    if value == 0:
        return "0"
    if abs(value.adjusted()) > WRITTEN_OUT + len(value.as_tuple().digits):
        return str(value).replace("E+", "e").replace("E", "e")
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def is_finite(number: int | float | Decimal) -> bool:
    return number.is_finite() if isinstance(number, Decimal) else math.isfinite(number)


def is_number(value: Any) -> TypeGuard[int | float | Decimal]:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def whole_number(text: str) -> int | Decimal:
    """An integer literal of any length: as int where 64 bits hold it, else as Decimal, which holds all digits."""
    return int(text) if len(text) <= 18 or -(2**63) <= Decimal(text) < 2**63 else Decimal(text)


def real_number(text: str) -> float | Decimal:
    """A literal with a point or an exponent: as float, where that is written with the same digits, else as Decimal."""
    value = float(text)
    is_held = (len(text) <= 15 and "e" not in text and "E" not in text) or repr(value) == text
    return value if is_held else Decimal(text)


def held_by_float(value: Decimal) -> bool:
    """Whether the float64 next to it is written with the same digits."""
    as_float = float(value)
    return math.isfinite(as_float) and Decimal(repr(as_float)) == value


def plain(value: Any) -> Any:
    """A value as it was read, with Python's own numbers; one that they would change is its exact text."""
    if isinstance(value, Decimal):
        return float(value) if held_by_float(value) else exact_text(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
