"""Results that are saved: trees of dataclasses as JSON and back. A file's ``schema`` names its kind and version."""

from __future__ import annotations

import json
import math
import types
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from riverinfer.errors import InvalidRequestError

Kind = TypeVar("Kind")


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


def from_tree(kind: Any, value: Any, where: str = "", *, nan: bool = False) -> Any:
    """What ``to_tree`` made of a ``kind``: a dataclass, tuple[X, ...], tuple[X, Y], dict[str, X], X | None or a scalar.

    nan: null where a float is due is NaN; else it is refused. Fields that ``kind`` does not know are left out, as those
    of later versions; those that it has a default for may be missing, as in earlier ones.
    Raises ValueError for what is none, naming its place below ``where``.
    """
    if kind is Any:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (each for each in args if each is not type(None))
        return None if value is None else from_tree(inner, value, where, nan=nan)
    if origin is tuple:
        items = _require(value, list, where)
        kinds = args[:1] * len(items) if args[-1] is Ellipsis else args
        if len(items) != len(kinds):
            raise ValueError(f"{where} has {len(items)} values, not {len(kinds)}")
        pairs = enumerate(zip(kinds, items, strict=True))
        return tuple(from_tree(each, item, f"{where}[{i}]", nan=nan) for i, (each, item) in pairs)
    if origin is dict:
        items = _require(value, dict, where)
        return {key: from_tree(args[1], item, _inside(where, key), nan=nan) for key, item in items.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        hints, items = get_type_hints(kind), _require(value, dict, where)
        return kind(
            **{
                field.name: from_tree(hints[field.name], items[field.name], _inside(where, field.name), nan=nan)
                for field in fields(kind)
                if field.name in items or not _may_lack(field, where)
            }
        )
    if kind is float:
        return math.nan if nan and value is None else _require(value, (int, float), where)
    return _require(value, kind, where)


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _may_lack(field: Field[Any], where: str) -> bool:
    if field.default is MISSING and field.default_factory is MISSING:
        raise ValueError(f"{_inside(where, field.name)} is missing")
    return True


def _require(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        name = "number" if isinstance(kind, tuple) else kind.__name__
        raise ValueError(f"{where or 'it'} is {value!r:.40}, no {name}")
    return value


def load_tree(path: Path, kind: type[Kind], schema: str, command: str, *, nan: bool = False) -> Kind:
    """A ``kind`` from a JSON file of that schema, which ``command`` writes; ``nan`` as for ``from_tree``.

    Raises InvalidRequestError for what is none, or of another version, naming the field.
    """
    try:
        data = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise InvalidRequestError(f"cannot be read ({reason})", file=path, remedy=f"give a file of {command}") from exc
    remedy = f"make it anew with {command}"
    found = data.get("schema") if isinstance(data, dict) else None
    if found != schema:
        raise InvalidRequestError(f"is {found!r}, not {schema!r}", file=path, field="schema", remedy=remedy)
    try:
        loaded: Kind = from_tree(kind, data, nan=nan)
    except ValueError as exc:
        raise InvalidRequestError(f"is not whole ({exc})", file=path, remedy=remedy) from exc
    return loaded
