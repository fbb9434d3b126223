"""What a generation with clocks leaves: spans on one time axis, for sums, traces and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from riverinfer.profiling.result import OperatorTime


@dataclass(frozen=True, slots=True)
class Span:
    """One operator from ``begin`` to ``end``, seconds on the recorder's clock. See ``OperatorTime`` for the rest."""

    begin: float
    end: float
    phase: str
    path: str
    layer: int | None
    op: str


@dataclass(frozen=True)
class TokenSpan:
    """One token of one sequence, from the end of the one before (of the first: from the call) to its own.

    sequence: row of the batch. exit_depth: river mode. source: lossless mode.
    """

    begin: float
    end: float
    sequence: int
    index: int
    text: str
    exit_depth: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class Recording:
    """All spans of one generation, in order; op spans follow each other without overlap."""

    mode: str
    spans: tuple[Span, ...]
    tokens: tuple[TokenSpan, ...]
    device: str


def totals(spans: Sequence[Span]) -> tuple[OperatorTime, ...]:
    """Sums by phase, path, layer and operator, in the order of their first appearance."""
    found: dict[tuple[str, str, int | None, str], list[float]] = {}
    for span in spans:
        entry = found.setdefault((span.phase, span.path, span.layer, span.op), [0.0, 0])
        entry[0] += span.end - span.begin
        entry[1] += 1
    return tuple(OperatorTime(*key, seconds, int(count)) for key, (seconds, count) in found.items())
