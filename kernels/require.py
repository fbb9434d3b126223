"""What a kernel's arguments must be."""

from __future__ import annotations

from riverinfer.errors import InvalidRequestError


def require(condition: bool, field: str, problem: str) -> None:
    """Raise InvalidRequestError about ``field`` unless ``condition`` holds."""
    if not condition:
        raise InvalidRequestError(problem, field=field)
