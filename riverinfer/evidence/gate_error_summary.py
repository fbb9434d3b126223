"""What the errors of forced exits come to: correlations with the similarity there, and means by depth and layer.

The paper (arXiv 2604.18396) reports Pearson r = 0.5536 between early-layer similarity and the similarity of last-layer
values between backbone and exit path: here that with ``last_v_cosine`` at early depths.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from riverinfer.evidence.gate_error import Exit, KVError, Sampled, exit_depths, mean_error
from riverinfer.evidence.statistics import expanded_tail, pearson, spearman

PAPER_R = 0.5536  # arXiv 2604.18396
# What similarity is correlated with, and the sign of a correlation by which similar tokens err less. Of a norm ratio it
# is |log ratio|: a norm twice too large is as wrong as one twice too small.
ERRORS = {
    "k_cosine": 1,
    "v_cosine": 1,
    "last_v_cosine": 1,
    "k_l2": -1,
    "v_l2": -1,
    "k_norm": -1,
    "v_norm": -1,
    "kl": -1,
}
LEAST_PROMPTS = 5  # of fewer, resampled correlations are mostly of one or two prompts again: no interval
RESAMPLES = 1000
CELLS = 1 << 20  # resamples times exits held at once: 8 MB an array
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """Of similarity with an error of ``ERRORS``, over the tokens that left at ``depth``, or over all exits (None).

    Those over all mix depths, and with them the fact that deeper exits err less whatever the token. None: undefined.
    Intervals: 95 %, of prompts drawn again; None of fewer than ``LEAST_PROMPTS``.
    """

    depth: int | None
    error: str
    pearson: float | None
    spearman: float | None
    tokens: int
    pearson_interval: tuple[float, float] | None = None
    spearman_interval: tuple[float, float] | None = None

    @property
    def direction(self) -> int:
        """1: similar tokens surely err less, -1: more; 0: one of both intervals holds zero, or is None.

        Both, as a few far-off tokens can turn Pearson's against all others.
        """
        sides = {
            0 if interval is None else int(interval[0] > 0) - int(interval[1] < 0)
            for interval in (self.pearson_interval, self.spearman_interval)
        }
        return ERRORS.get(self.error, 0) * sides.pop() if len(sides) == 1 else 0


@dataclass(frozen=True)
class LayerSimilarity:
    """Similarity at one backbone layer over sampled tokens: mean, standard deviation, 5 %, 50 % and 95 % points."""

    layer: int
    mean: float
    sd: float
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class LayerError:
    """Mean error that exits at ``depth`` left in the cache at ``layer`` >= depth."""

    depth: int
    layer: int
    error: KVError


@dataclass(frozen=True)
class GateError:
    """The scatter and what it comes to. paper_r: the paper's, beside ``last_v_cosine``'s Pearson of early depths."""

    exits: tuple[Exit, ...]
    correlations: tuple[Correlation, ...]
    layers: tuple[LayerSimilarity, ...]
    by_layer: tuple[LayerError, ...]
    paper_r: float = PAPER_R

    def depths(self, most: int | None = None) -> list[int]:
        """Those of all exits, or at most ``most`` of them, evenly spread."""
        found = sorted({exit.depth for exit in self.exits})
        if most is None or len(found) <= most:
            return found
        return [depth for depth in exit_depths(max(found) + 1, most) if depth in found]


def summarize_errors(sampled: Sequence[Sampled]) -> GateError:
    """All that was sampled, of one model and the same depths."""
    exits = tuple(exit for token in sampled for exit in token.exits)
    depths, layers = sorted({exit.depth for exit in exits}), len(sampled[0].similarities)
    groups = [(depth, [exit for exit in exits if exit.depth == depth]) for depth in depths]
    return GateError(
        exits=exits,
        correlations=tuple(c for depth, members in [*groups, (None, exits)] for c in _correlations(depth, members)),
        layers=tuple(_layer(i, [token.similarities[i] for token in sampled]) for i in range(layers)),
        by_layer=tuple(_layer_errors(sampled)),
    )


def error_of(exit: Exit, name: str) -> float:
    """An error of ``ERRORS`` as it is correlated."""
    value = float(getattr(exit if hasattr(exit, name) else exit.error, name))
    return abs(math.log(max(value, sys.float_info.min))) if name.endswith("_norm") else value


def _correlations(depth: int | None, exits: Sequence[Exit]) -> Iterator[Correlation]:
    similarity = [exit.similarity for exit in exits]
    errors = {name: [error_of(exit, name) for exit in exits] for name in ERRORS}
    _, which = np.unique([exit.prompt for exit in exits], return_inverse=True)
    prompts = int(which.max(initial=-1)) + 1
    drawn = None
    if prompts >= LEAST_PROMPTS:
        drawn = _resampled(which, np.array(similarity), np.array(list(errors.values())))
    for place, (name, values) in enumerate(errors.items()):
        found = pearson(similarity, values), spearman(similarity, values)
        intervals = (
            None if value is None or drawn is None else _interval(drawn[kind, place], expanded_tail(prompts))
            for kind, value in enumerate(found)
        )
        yield Correlation(depth, name, *found, len(exits), *intervals)


def _resampled(which: NDArray[np.intp], x: Floats, errors: Floats, *, seed: int = 0) -> Floats:
    """Pearson's r and Spearman's rho of ``x`` [exits] with each of ``errors`` [E, exits], prompts drawn again.

    which: the prompt of each exit, from 0. Returns [2, E, RESAMPLES].
    """
    count = int(which.max()) + 1
    counts = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=RESAMPLES)
    found = np.empty((2, len(errors), RESAMPLES))
    step = max(1, CELLS // len(x))
    for start in range(0, RESAMPLES, step):
        part = slice(start, start + step)
        weights = counts[part][:, which].astype(np.float64)  # how often each exit is drawn [step, exits]
        ranks = _ranks(weights, x)
        for place, y in enumerate(errors):
            found[0, place, part] = _weighted_pearson(weights, x, y)
            found[1, place, part] = _weighted_pearson(weights, ranks, _ranks(weights, y))
    return found


def _ranks(weights: Floats, values: Floats) -> Floats:
    """Mean ranks of values that occur ``weights`` times each, a row a resample."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks: Floats = (np.cumsum(counts, axis=1) - (counts - 1) / 2)[:, place]
    return ranks


def _weighted_pearson(weights: Floats, x: Floats, y: Floats) -> Floats:
    """Pearson's r of each resample; NaN where one of both does not vary in it."""
    total = weights.sum(1, keepdims=True)

    def centred(values: Floats) -> Floats:
        values = np.broadcast_to(values, weights.shape)
        off: Floats = values - (weights * values).sum(1, keepdims=True) / total
        flat = np.sqrt((weights * off**2).sum(1) / total[:, 0]) <= 1e-12 * np.abs(values).max()
        return np.where(flat[:, None], np.nan, off)

    a, b = centred(x), centred(y)
    r: Floats = (weights * a * b).sum(1) / np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
    return np.clip(r, -1, 1)


def _interval(drawn: Floats, tail: float) -> tuple[float, float] | None:
    """Without resamples that have no correlation; None where those are most."""
    known = drawn[np.isfinite(drawn)]
    if 2 * len(known) < len(drawn):
        return None
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)


def _layer(layer: int, values: Sequence[float]) -> LayerSimilarity:
    low, median, high = (float(q) for q in np.quantile(values, [0.05, 0.5, 0.95]))
    return LayerSimilarity(layer, float(np.mean(values)), float(np.std(values)), low, median, high)


def _layer_errors(sampled: Sequence[Sampled]) -> Iterator[LayerError]:
    places: dict[tuple[int, int], list[KVError]] = {}
    for token in sampled:
        for exit, errors in zip(token.exits, token.by_layer, strict=True):
            for layer, error in enumerate(errors, exit.depth):
                places.setdefault((exit.depth, layer), []).append(error)
    for (depth, layer), members in sorted(places.items()):
        yield LayerError(depth, layer, mean_error(members))
