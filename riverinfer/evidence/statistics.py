"""Intervals over prompts, and correlations. Tokens of one prompt hang together, so prompts are what is drawn again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 4000
ENOUGH = 5  # values, below which all lie on one side of zero by mere luck too often: of four in 1 of 8


@dataclass(frozen=True)
class Interval:
    """A mean over prompts and the ends of its ``LEVEL`` interval; of one prompt, all three are its value."""

    mean: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        return self.high < 0

    def exp(self) -> Interval:
        """Of the geometric mean, where this is of logarithms: percentiles keep under a monotone map."""
        return Interval(math.exp(self.mean), math.exp(self.low), math.exp(self.high))


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The percentile bootstrap of a mean (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    values: one a prompt. With few it is too narrow, of 5 by about a third, of 16 by a tenth: by the factor
    sqrt((n - 1) / n) z / t of their normal theory. Raises ValueError for none.
    """
    if not values:
        raise ValueError("no values")
    x = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES, len(x)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(x[drawn].mean(1), [tail, 1 - tail])
    return Interval(float(x.mean()), float(low), float(high))


def paired(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of a - b, prompt by prompt. Raises ValueError for different lengths."""
    return bootstrap([x - y for x, y in zip(a, b, strict=True)], seed=seed)


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The product-moment correlation; None of fewer than three pairs, and where one of both does not vary."""
    if len(x) < 3:
        return None
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    a, b = a - a.mean(), b - b.mean()
    # Relative to the values: what is left of equal ones is rounding.
    if np.abs(a).max() <= 1e-12 * np.abs(x).max() or np.abs(b).max() <= 1e-12 * np.abs(y).max():
        return None
    return float(np.clip((a @ b) / math.sqrt((a @ a) * (b @ b)), -1, 1))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """``pearson`` of the ranks, equal values sharing their mean rank (Kendall, Rank Correlation Methods, 1948)."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return list((last - (counts - 1) / 2)[place])
