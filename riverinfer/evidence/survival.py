"""Where free-running texts part from exact's: after the first other token they are other texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Survival:
    """Free-running greedy texts against exact's, N tokens each, the first one exact in both.

    parted: per prompt the index of the first other token, None if there was none. share: of texts that are still
    exact's after 1, 2, .. N tokens. median: tokens after which half have parted, None if fewer have.
    """

    parted: tuple[int | None, ...]
    share: tuple[float, ...]
    median: int | None


def survival(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Survival:
    """``pairs``: (exact's tokens, the other's), all of one length."""
    parted = tuple(next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), None) for pair in pairs)
    length = len(pairs[0][0])
    share = tuple(fmean(at is None or at > i for at in parted) for i in range(length))
    return Survival(parted, share, next((i + 1 for i, value in enumerate(share) if value <= 0.5), None))
