"""Typed access to the JSON files of a model folder; every complaint names the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from riverinfer.errors import ConfigError, UnsupportedModelError


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises ConfigError when the file cannot be read, is no JSON, or is not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise ConfigError(f"cannot be read ({exc.strerror})", file=path, remedy="check the file") from exc
    except RecursionError as exc:
        raise ConfigError("is nested too deeply", file=path, remedy="download the file again") from exc
    except ValueError as exc:
        raise ConfigError(f"is not valid JSON ({exc})", file=path, remedy="download or write the file again") from exc
    if not isinstance(data, dict):
        raise ConfigError("is not a JSON object", file=path, remedy="download or write the file again")
    return data


class JsonFields:
    """One JSON object of a file. ``prefix`` is the path to it within the file, for messages."""

    def __init__(self, raw: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.raw, self.path, self.prefix = raw, path, prefix

    def error(self, name: str, problem: str) -> ConfigError:
        return ConfigError(problem, file=self.path, field=self.prefix + name, remedy="correct the field")

    def unsupported(self, name: str, problem: str, remedy: str) -> UnsupportedModelError:
        return UnsupportedModelError(problem, file=self.path, field=self.prefix + name, remedy=remedy)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"must be an integer, not {value!r}")
        if value < minimum:
            raise self.error(name, f"must be at least {minimum}, not {value}")
        return value

    def number(self, name: str, default: float | None = None, *, positive: bool = True) -> float:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(name, f"must be a number, not {value!r}")
        if positive and value <= 0:
            raise self.error(name, f"must be positive, not {value}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.raw.get(name) is None else self.number(name, positive=False)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {value!r}")
        return value

    def number_list(self, name: str, length: int) -> tuple[float, ...]:
        value = self.raw.get(name)
        if not isinstance(value, list) or not all(
            isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) and x > 0 for x in value
        ):
            raise self.error(name, "must be a list of positive numbers")
        if len(value) != length:
            raise self.error(name, f"must have {length} entries, not {len(value)}")
        return tuple(float(x) for x in value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.raw.get(name)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if any(isinstance(x, bool) or not isinstance(x, int) or x < 0 for x in values):
            raise self.error(name, f"must be a token id or a list of them, not {value!r}")
        return tuple(values)
