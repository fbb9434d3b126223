"""Shares of right answers: how sure one is, and whether two of the same questions differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from riverinfer.evidence.statistics import LEVEL


@dataclass(frozen=True)
class Share:
    """Right answers of all, and the ends of Wilson's ``LEVEL`` interval for their share; of none, all is NaN."""

    right: int
    total: int
    value: float
    low: float
    high: float


def wilson(right: int, total: int) -> Share:
    """Wilson's score interval of a share (JASA 22, 1927): holds at few questions, and at none or all right."""
    if not total:
        return Share(0, 0, math.nan, math.nan, math.nan)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == total else middle + half
    return Share(right, total, share, low, high)


@dataclass(frozen=True)
class Paired:
    """Two answers to each question: how many only the first, and only the second had right; the p of no difference."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """McNemar's exact two-sided test (Psychometrika 12, 1947): what differs went either way by the toss of a coin.

    Raises ValueError for lists of unlike length.
    """
    pairs = list(zip(first, second, strict=True))
    lost, won = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    differing = lost + won
    tail = sum(math.comb(differing, k) for k in range(min(lost, won) + 1)) / 2**differing
    return Paired(lost, won, min(1.0, 2 * tail))
