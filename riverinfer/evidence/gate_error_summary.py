"""What the errors of forced exits come to: correlations with the similarity there, and means by depth and layer.

The paper (arXiv 2604.18396) reports Pearson r = 0.5536 between early-layer similarity and the similarity of last-layer
values between backbone and exit path: here that with ``last_v_cosine``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from riverinfer.evidence.gate_error import Exit, KVError, Sampled, mean_error
from riverinfer.evidence.statistics import pearson, spearman

PAPER_R = 0.5536  # arXiv 2604.18396
KEPT = ("kl", "k_cosine", "v_cosine", "k_l2", "v_l2", "last_v_cosine")  # what similarity is correlated with


@dataclass(frozen=True)
class Correlation:
    """Of similarity with an error, over the tokens that left at ``depth``, or over all exits (depth None).

    ``pooled`` ones mix depths, and with them the fact that deeper exits err less whatever the token. None: undefined.
    """

    depth: int | None
    error: str
    pearson: float | None
    spearman: float | None
    tokens: int


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


def _correlations(depth: int | None, exits: Sequence[Exit]) -> Iterator[Correlation]:
    similarity = [exit.similarity for exit in exits]
    for name in KEPT:
        errors = [getattr(exit if hasattr(exit, name) else exit.error, name) for exit in exits]
        yield Correlation(depth, name, pearson(similarity, errors), spearman(similarity, errors), len(exits))


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
