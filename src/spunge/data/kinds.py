"""Kinds of columns: which Arrow type holds all values of a JSON column, and what Arrow types of other files become.

A column's kind is the narrowest that keeps every value: null < boolean; null < integer < float; lists and records element by
element. What mixes kinds otherwise, such as 7 beside "7", is text, each value as the file spells it.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from functools import reduce
from typing import Any

import pyarrow as pa

WIDE = pa.decimal128(38, 0)  # integers beyond 64 bits
# Keys inside a record under which each row has keys of its own: what a tool is called with, and takes. As a record they would
# be padded with every other row's, and a number beside a text become one; as JSON text they stay as they are.
FREE = ("arguments", "parameters", "input_schema")
MOST_FIELDS = 1000  # of a record; one with more is text, as its keys are data
NOTHING, TEXT = type(None), pa.string()


class Digits(str):
    """A number as the file spells it."""

    __slots__ = ()


def kind_of(values: Sequence[Any]) -> pa.DataType:
    """The type that holds all of a JSON column's values."""
    types = set(map(type, values)) - {NOTHING}
    if types == {str}:
        return TEXT
    if types and types <= {list, dict}:
        return _nested_kind(values, types)
    return reduce(merged, map(_kind, _spread(values, types)), pa.null())


def _spread(values: Sequence[Any], types: set[type]) -> Iterable[Any]:
    """The values that the kind of all follows from: of integers, the least and the greatest."""
    if types == {int}:
        numbers = [value for value in values if value is not None]
        return (min(numbers), max(numbers))
    return (False,) if types == {bool} else (0.0,) if types == {float} else values


def _nested_kind(values: Sequence[Any], types: set[type]) -> pa.DataType:
    """Of lists or records: by Arrow where it can tell, else value by value."""
    if types == {dict} and len(set().union(*filter(None, values))) > MOST_FIELDS:
        return TEXT
    try:
        kind = pa.array(values).type
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        kind = None
    # Arrow takes true for 1.0 where it stands among floats.
    if kind is None or _has(kind, pa.types.is_floating):
        kind = reduce(merged, map(_kind, values), pa.null())
    return _sound(kind)


def _kind(value: Any) -> pa.DataType:
    match value:
        case None:
            return pa.null()
        case bool():
            return pa.bool_()
        case int():
            return pa.int64() if -(2**63) <= value < 2**63 else WIDE if abs(value) < 10**38 else TEXT
        case float():
            return pa.float64()
        case list():
            return pa.list_(reduce(merged, map(_kind, value), pa.null()))
        case dict():
            return _record({name: _kind(inner) for name, inner in value.items()})
    return TEXT


def merged(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The narrowest type that holds the values of both."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_integer(one) and pa.types.is_integer(other):
        return pa.int64() if {one, other} <= {pa.int64(), *_SMALL} else WIDE
    if _is_number(one) and _is_number(other):
        return pa.float64()
    if {one, other} <= {WIDE, pa.int64(), *_SMALL}:
        return WIDE
    if pa.types.is_list(one) and pa.types.is_list(other):
        return pa.list_(merged(one.value_type, other.value_type))
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = {field.name: field.type for field in one}
        for field in other:
            fields[field.name] = merged(fields.get(field.name, pa.null()), field.type)
        return _record(fields)
    return TEXT


_SMALL = (pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32())


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _record(fields: Mapping[str, pa.DataType]) -> pa.DataType:
    # SQL does not tell fields apart that differ by case alone.
    if len(fields) > MOST_FIELDS or len({name.lower() for name in fields}) < len(fields):
        return TEXT
    return pa.struct([(name, TEXT if name in FREE and _is_nested(kind) else kind) for name, kind in fields.items()])


def _is_nested(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) or pa.types.is_list(kind) or pa.types.is_map(kind))


def _sound(kind: pa.DataType) -> pa.DataType:
    """The type with records that SQL cannot hold as text."""
    if pa.types.is_list(kind):
        return pa.list_(_sound(kind.value_type))
    return _record({field.name: _sound(field.type) for field in kind}) if pa.types.is_struct(kind) else kind


def _has(kind: pa.DataType, is_such: Any) -> bool:
    """Whether a type, or one inside it, is such."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return bool(is_such(kind)) or any(_has(each, is_such) for each in inner)


def column_of(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """A JSON column as an array of a type that holds its values (from `kind_of` or `merged`), numbers being Digits or not."""
    return pa.array([_converted(value, kind) for value in values], kind)


def _converted(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if kind == TEXT:
        return text_of(value)
    if pa.types.is_list(kind):
        return [_converted(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        return {field.name: _converted(value.get(field.name), field.type) for field in kind}
    if pa.types.is_floating(kind):
        return _exact(value)
    if pa.types.is_decimal(kind):
        return Decimal(value)
    return int(value) if pa.types.is_integer(kind) else value


def _exact(value: Any) -> float:
    """Raises ValueError for an integer that no float equals."""
    number = float(value)
    if (isinstance(value, int) or (isinstance(value, Digits) and value.lstrip("-").isdigit())) and int(value) != number:
        raise ValueError(value)
    return number


def plain_kind(kind: pa.DataType) -> pa.DataType:
    """The plain type of an Arrow type: text for what SQL cannot hold."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return TEXT if kind.extension_name == "arrow.uuid" else plain_kind(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return plain_kind(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return TEXT
    if types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    if _is_listed(kind):
        return pa.list_(plain_kind(kind.value_type))
    if types.is_map(kind):
        return pa.map_(plain_kind(kind.key_type), plain_kind(kind.item_type))
    if types.is_struct(kind):
        return _record({field.name: plain_kind(field.type) for field in kind})
    if types.is_decimal(kind):
        return pa.decimal128(kind.precision, kind.scale) if kind.precision <= 38 else TEXT
    if types.is_float16(kind):
        return pa.float32()
    return TEXT if types.is_union(kind) else kind


def _is_listed(kind: pa.DataType) -> bool:
    types = pa.types
    return any(is_such(kind) for is_such in (types.is_list, types.is_large_list, types.is_fixed_size_list, _is_view))


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def fitted(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """The column in a type that holds its values, value by value where Arrow's cast does not keep them."""
    if column.type == kind:
        return column
    by_hand = _has(column.type, _is_view) or _has(column.type, pa.types.is_run_end_encoded)
    if not by_hand and (kind != TEXT or plain_kind(column.type) == TEXT):
        with contextlib.suppress(pa.ArrowException):
            return column.cast(kind)
    chunks = [column_of([_unpadded(value) for value in chunk.to_pylist()], kind) for chunk in column.chunks]
    return pa.chunked_array(chunks, kind)


def _unpadded(value: Any) -> Any:
    """Without the keys that are null: Arrow gives every record the keys of all others."""
    if isinstance(value, dict):
        return {name: _unpadded(inner) for name, inner in value.items() if inner is not None}
    return [_unpadded(item) for item in value] if isinstance(value, list) else value


def text_of(value: Any) -> str:
    """A value as text: text and numbers as they are, dates as ISO, lists and records as JSON."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat(sep=" ")
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal) else _json(value)


def _json(value: Any) -> str:
    match value:
        case Digits():
            return str(value)
        case dict():
            return "{" + ", ".join(f"{_json(str(name))}: {_json(inner)}" for name, inner in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_json, value)) + "]"
        case float() if math.isfinite(value):
            return repr(value)
    return json.dumps(value, ensure_ascii=False, default=text_of)
