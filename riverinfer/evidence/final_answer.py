"""The answer in a text that reasons its way to it, and when two of them are the same."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(r"####\s*\$?\s*(" + _NUMBER + ")")
_BOX = re.compile(r"\\f?boxed\s*\{")
_REWRITTEN = (
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(?:left|right|displaystyle)(?![a-z])|\\[!,;: ]|[~$]|\^\\circ|\^\{\\circ\}|\\?%", ""),
    (r"\\(?:text|mbox)\{\s[^{}]*\}$", ""),  # a unit
    (r"\\(?:text|mbox|textbf|mathrm)\{([^{}]*)\}", r"\1"),
    (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"\s+", ""),
    (r"^[a-zA-Z]=", ""),
    (r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}"),
    (r"^\\frac\{-(\d+)\}|^\\frac(?=\{-)", r"-\\frac{\1}"),
)


def final_answer(text: str) -> str | None:
    """The last ``\\boxed{...}``, else the last number after ``####``, else the last number; None without any."""
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    for pattern in (_MARKED, re.compile(_NUMBER)):
        found = pattern.findall(text)
        if found:
            return str(found[-1])
    return None


def _boxed(text: str) -> str | None:
    """What stands in the last box that is closed, braces within it included."""
    for box in reversed(list(_BOX.finditer(text))):
        depth = 1
        for at in range(box.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                return text[box.end() : at]
    return None


def same_answer(one: str | None, other: str) -> bool:
    """Whether two answers are written alike: numbers by value, LaTeX up to spacing, units and sizes.

    Nothing is computed: 1/2 and 0.5 are different, and so are x+1 and 1+x. None is no answer, and never right.
    """
    return one is not None and _plain(one) == _plain(other)


def _plain(answer: str) -> str:
    text = answer.strip().rstrip(".").replace("\\$", "").strip()
    for pattern, replacement in _REWRITTEN:
        text = re.sub(pattern, replacement, text)
    number = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).rstrip(".,")
    try:
        value = Decimal(number)
    except InvalidOperation:
        return text
    return str(value.normalize() + 0) if value.is_finite() else text
