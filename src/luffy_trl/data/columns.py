"""What the columns of a file without types hold, and the rows as an Arrow table of these types, with nothing changed.

JSON and CSV say a type for no column. All rows are looked at first; then a column of numbers that 64 bits hold is one
of numbers, of numbers and texts one of texts, and what fits no type (a text in one row, messages in the next) stays
what it is in each row (`datasets.Json`).
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa
from datasets import Features, Json, List, Value

from .numbers import FLOAT_EXACT, exact_text, held_by_float, is_number, plain, whole_number


NUMBER_KINDS = {"int", "wide", "float", "exact"}
FLOATS = Value("float64")
WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
REAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,9})?")
TRUTH = {"True": True, "true": True, "TRUE": True, "False": False, "false": False, "FALSE": False}
# What tables of numbers have where one is missing; in a column of texts they are texts
MISSING = {"NA", "N/A", "n/a", "nan", "NaN", "NAN", "-nan", "null", "NULL", "None", "<NA>", "#N/A"}
# These hold texts whatever they look like
TEXT_COLUMNS = ("prompt", "completion")


@dataclass
class Kind:
    """What has been seen in one place of the rows: what kinds of values, and inside lists and objects likewise."""

    seen: set[str] = field(default_factory=set)
    item: "Kind | None" = None
    fields: dict[str, "Kind"] = field(default_factory=dict)

    def see(self, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, list):
            self.seen.add("list")
            self.item = self.item or Kind()
            if set(map(type, value)) == {float}:  # thousands of log-probs
                self.item.seen.add("float")
                return
            for item in value:
                self.item.see(item)
        elif isinstance(value, dict):
            self.seen.add("object")
            for key, item in value.items():
                self.fields.setdefault(key, Kind()).see(item)
        else:
            self.seen.add(_scalar_kind(value))

    def feature(self) -> Any:
        """The type that holds all of it; None: there is none."""
        if not self.seen:
            return Value("null")
        if self.seen == {"list"}:
            assert self.item is not None
            item = self.item.feature()
            return None if item is None else List(item)
        if self.seen == {"object"}:
            features = {key: kind.feature() for key, kind in self.fields.items()}
            return None if not features or None in features.values() else features
        return _scalar_feature(self.seen)


def _scalar_kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int):
        return "wide" if abs(value) > FLOAT_EXACT else "int"
    return "float" if isinstance(value, float) or held_by_float(value) else "exact"


def _scalar_feature(seen: set[str]) -> Value | None:
    if seen <= {"int", "wide"}:
        return Value("int64")
    if seen <= {"int", "float"}:
        return Value("float64")
    if seen <= NUMBER_KINDS | {"text"}:
        return Value("string")
    return Value("bool") if seen == {"truth"} else None


def json_features(rows: Iterable[dict[str, Any]]) -> Features:
    """The types of the columns, after a look at every row. Empty, if there are no rows."""
    kinds = Kind()
    for row in rows:
        kinds.see(row)
    features = {name: kind.feature() for name, kind in kinds.fields.items()}
    return Features({name: Json() if feature is None else feature for name, feature in features.items()})


def csv_features(rows: Iterable[dict[str, str | None]]) -> Features:
    """As [`json_features`], of cells: an empty one is None, and numbers are known by how they are written."""
    seen: dict[str, set[str]] = {}
    for row in rows:
        for name, text in row.items():
            kinds = seen.setdefault(name, set())
            if text is not None and "text" not in kinds:
                kinds.add(_cell_kind(text))
    return Features({name: _cell_feature(name, kinds) for name, kinds in seen.items()})


def _cell_kind(text: str) -> str:
    if text in MISSING:
        return "missing"
    if text in TRUTH:
        return "truth"
    number = _cell_number(text)
    return "text" if number is None else _scalar_kind(number)


def _cell_number(text: str) -> int | Decimal | None:
    if WHOLE.fullmatch(text):
        return whole_number(text)
    # 007 is a name, and 1.50 a number
    return Decimal(text) if REAL.fullmatch(text) and not re.match(r"[-+]?0[0-9]", text) else None


def _cell_feature(name: str, seen: set[str]) -> Value:
    found = seen - {"missing"}
    if not seen:
        return Value("null")
    if name in TEXT_COLUMNS or not found:
        return Value("string")
    return _scalar_feature(found) or Value("string")


def cell_value(text: str | None, feature: Value) -> Any:
    """A cell in its column's type; as the text that it is, where it does not fit."""
    if text is None or feature.dtype == "string":
        return text
    if text in MISSING:
        return None
    if feature.dtype == "bool":
        return TRUTH.get(text, text)
    number = _cell_number(text)
    if number is None:
        return text
    return float(number) if feature.dtype == "float64" else plain(number)


def fitted(value: Any, feature: Any) -> Any:
    """A value of JSON in its column's type."""
    if value is None:
        return None
    if isinstance(feature, Json):
        return json.dumps(plain(value), ensure_ascii=False)
    if isinstance(feature, List):
        if feature.feature == FLOATS and set(map(type, value)) == {float}:
            return value
        return [fitted(item, feature.feature) for item in value]
    if isinstance(feature, dict):
        return {key: fitted(value.get(key), inner) for key, inner in feature.items()}
    if feature.dtype == "string" and is_number(value):
        return exact_text(value)
    return float(value) if feature.dtype == "float64" else value


def to_table(columns: dict[str, list[Any]], features: Features) -> pa.Table:
    """Columns of values that are in the types of `features`."""
    arrays = []
    for name, field_type in zip(features, features.arrow_schema.types, strict=True):
        is_json = isinstance(features[name], Json)
        array = pa.array(columns[name], field_type.storage_type if is_json else field_type)
        arrays.append(pa.ExtensionArray.from_storage(field_type, array) if is_json else array)
    return pa.Table.from_arrays(arrays, schema=features.arrow_schema)
