"""Dataclass trees as JSON and back."""

from __future__ import annotations

import math
import types
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints


def to_tree(value: Any) -> Any:
    """Dataclasses and dicts as objects, tuples as lists; a float that is no number, or infinite, as null."""
    if is_dataclass(value):
        return {field.name: to_tree(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): to_tree(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_tree(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_tree(kind: Any, value: Any) -> Any:
    """What ``to_tree`` made of a ``kind``: a dataclass, tuple[X, ...], tuple[X, Y], dict[str, X], X | None or a scalar.

    null where a float is due is NaN; fields that ``kind`` does not know are left out.
    Raises KeyError, TypeError or ValueError for what is none.
    """
    if kind is Any:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (each for each in args if each is not type(None))
        return None if value is None else from_tree(inner, value)
    if origin is tuple:
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        return tuple(from_tree(each, item) for each, item in zip(items, value, strict=True))
    if origin is dict:
        return {key: from_tree(args[1], item) for key, item in value.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: from_tree(hints[field.name], value[field.name]) for field in fields(kind)})
    if kind is float:
        return math.nan if value is None else float(value)
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
