"""Intervals and tests over prompts, and correlations. Tokens of one prompt hang together: prompts are what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
TAIL = (1 - LEVEL) / 2  # of an interval's two; a one-sided test is significant below it
RESAMPLES = 4000
FLIPS = 9999  # drawn sign patterns, where there are more than can be listed


@dataclass(frozen=True)
class Interval:
    """A mean over prompts and the ends of its ``LEVEL`` interval; of one prompt, all three are its value."""

    mean: float
    low: float
    high: float

    def exp(self) -> Interval:
        """Of the geometric mean, where this is of logarithms: percentiles keep under a monotone map."""
        with np.errstate(over="ignore"):
            return Interval(*(float(np.exp(end)) for end in (self.mean, self.low, self.high)))


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The expanded percentile bootstrap of a mean: percentiles as far out as ``expanded_tail`` says.

    values: one a prompt. Of skewed values it still covers too seldom, above all in the long tail. Raises ValueError for
    none.
    """
    if not values:
        raise ValueError("no values")
    x = np.asarray(values, dtype=np.float64)
    count = len(x)
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    tail = expanded_tail(count)
    low, high = np.quantile(x[drawn].mean(1), [tail, 1 - tail])
    return Interval(float(x.mean()), float(low), float(high))


def expanded_tail(count: int) -> float:
    """What a bootstrap of ``count`` values must leave on each side to be ``LEVEL`` wide.

    With it the interval of normal values is Student's; plain percentiles are too narrow by sqrt((n - 1) / n) z / t, a
    third for 5 values. Hesterberg, The American Statistician 69, 2015, section 3.2.4.
    """
    return NormalDist().cdf(-math.sqrt(count / (count - 1)) * student(count - 1)) if count > 1 else TAIL


def student(freedom: int) -> float:
    """The quantile of Student's t that leaves ``TAIL`` above it, to 1e-2 from 3 degrees of freedom on.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5; too small at 1 and 2.
    """
    z = NormalDist().inv_cdf(1 - TAIL)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def sign_flip(values: Sequence[float]) -> float:
    """The one-sided p-value of "the mean is at most zero", whatever the spread: Fisher's randomisation of signs.

    Exact where values are symmetric about zero (The Design of Experiments, 1935, section 21), close otherwise, and with
    few values as with many. Never below 1 / 2^n. All patterns of signs are listed for up to 13 values, else ``FLIPS``
    drawn. Of values that are no numbers it is 1: they show nothing. Raises ValueError for none.
    """
    if not values:
        raise ValueError("no values")
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        return 1.0
    signs, listed = _signs(len(x))
    sums = signs @ x
    # Equal sums come out apart by rounding.
    reached = int((sums >= x.sum() - 1e-9 * np.abs(x).sum()).sum())
    return reached / len(signs) if listed else (reached + 1) / (len(signs) + 1)


@lru_cache(maxsize=4)
def _signs(count: int) -> tuple[NDArray[np.float64], bool]:
    """Patterns of 1 and -1 [patterns, count], and whether they are all there are."""
    if 1 << count <= FLIPS:
        bits = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
    else:
        bits = np.random.default_rng(0).integers(2, size=(FLIPS, count))
    return np.where(bits, -1.0, 1.0), len(bits) == 1 << count


def least_p(count: int) -> float:
    """The smallest ``sign_flip`` of so many values."""
    return max(1 / (1 << count), 1 / (FLIPS + 1)) if count < 64 else 1 / (FLIPS + 1)


def can_pass(least: Sequence[float], level: float = TAIL) -> list[bool]:
    """Which of several tests, by the ``least`` p-value that each can have, may still pass ``holm`` among each other.

    With K the smallest k for which at most k tests have a least value of ``level`` / k, these are those of
    ``level`` / K (Tarone, Biometrics 46, 1990). What is left out could not pass, and need not weigh on the others: the
    choice hangs on nothing that the p-values say.
    """
    number = next(k for k in range(1, len(least) + 2) if sum(p <= level / k for p in least) <= k)
    return [p <= level / number for p in least]


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p-values adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    With probability 1 - a at least no true null hypothesis has one of at most a, however they depend on each other.
    """
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        adjusted[place] = min(1.0, largest)
    return adjusted


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
