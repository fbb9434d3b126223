"""Candidates for a better gate, judged against their own controls on prompts that they were not fitted on.

The prompts are dealt into ``FOLDS``; each fold is judged by gates that were fitted on all others.

All are one rule: leave after layer l once the error that is predicted there falls below a limit,

    base[l] + w . ((similarity - mean[l]) / sd[l], last - its mean, recent - its mean) < limit

``last`` is the river's own confidence, the highest probability of its prediction for the token that now passes;
``recent`` the mean of that over the last ``RECENT`` predictions. Predicted is log KL of ``gate_error``'s exits: base by
depth, weights by least squares over deviations from each depth's means, with a small ridge. The limit is the one that
gives the calibration tokens a wanted mean depth; controls take the depths that the gate then really has. Confidences
to fit on are those of a walk in which every token has the wanted depth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from riverinfer.evidence.controls import Comparison, Trial, compare
from riverinfer.evidence.gate_error import Sampled
from riverinfer.gates import similarity

RECENT = 4
FOLDS = 4
FEWEST = 8  # calibration tokens
FLOOR = 1e-4  # nats; a smaller KL counts as this one before its logarithm is taken
FEATURES = ("similarity", "last", "recent")
PLAIN = "similarity"  # the gate as it is, no candidate: beside them at the same depth, for comparison
# Which features each weighs. The first two predict nothing: they only order by similarity.
CANDIDATES: dict[str, tuple[str, ...]] = {
    PLAIN: ("similarity",),
    "standardised similarity": ("similarity",),
    "confidence": ("last", "recent"),
    "combination": FEATURES,
}


@dataclass(frozen=True)
class GateFit:
    """The numbers of one candidate; see the module. mean, sd, base: L values each. weights: as ``FEATURES``."""

    name: str
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    base: tuple[float, ...]
    weights: tuple[float, float, float]
    mean_last: float
    mean_recent: float
    limit: float


def wanted_depth(layers: int) -> int:
    """The mean depth that candidates are fitted for: half the layers, where a gate has most room to choose."""
    return max(1, layers // 2)


class FittedGate:
    """A candidate as a gate for one sequence. It hears the river's predictions (``heard``) as they are made."""

    def __init__(self, fit: GateFit) -> None:
        self.fit = fit
        self._confidences: deque[float] = deque(maxlen=RECENT)
        self._of_token = 0.0

    def heard(self, logits: Tensor) -> None:
        """``logits``: float32 [1, vocab] of the step that just ended."""
        self._confidences.append(confidence(logits[0]))

    def start(self) -> bool:
        fit, heard = self.fit, self._confidences
        last = heard[-1] - fit.mean_last if heard else 0.0
        recent = sum(heard) / len(heard) - fit.mean_recent if heard else 0.0
        self._of_token = fit.weights[1] * last + fit.weights[2] * recent
        return False

    def __call__(self, layer: int, h: Tensor, h_next: Tensor) -> bool:
        fit = self.fit
        deviation = (float(similarity(h[-1:], h_next[-1:])) - fit.mean[layer]) / fit.sd[layer]
        return fit.base[layer] + fit.weights[0] * deviation + self._of_token < fit.limit


def confidence(logits: Tensor) -> float:
    """The highest probability of float32 [vocab]."""
    return float(logits.softmax(-1).max())


@dataclass(frozen=True)
class Example:
    """A calibration token: what ``gate_error`` measured of it, and the river's confidences before it."""

    sampled: Sampled
    last: float
    recent: float


def examples(sampled: Sequence[Sampled], confidences: Sequence[float]) -> list[Example]:
    """Of one text: ``confidences[i]`` is that of the river's prediction of answer token i + 1. Token 0 is left out."""
    found = []
    for token in sampled:
        heard = confidences[max(0, token.position - RECENT) : token.position]
        if heard:
            found.append(Example(token, heard[-1], sum(heard) / len(heard)))
    return found


def fit_gate(name: str, tokens: Sequence[Example], depth: float) -> GateFit:
    """Candidate ``name`` of ``CANDIDATES`` for a mean depth near ``depth``. Raises ValueError for too few tokens."""
    if len(tokens) < FEWEST:
        raise ValueError(f"{len(tokens)} calibration tokens are too few")
    seen = np.array([token.sampled.similarities for token in tokens])  # [N, L]
    layers = seen.shape[1]
    plain = name == PLAIN
    mean = np.zeros(layers) if plain else seen.mean(0)
    sd = np.ones(layers) if plain else np.maximum(seen.std(0), 1e-6)
    own = np.array([(token.last, token.recent) for token in tokens])  # [N, 2]
    own_mean = own.mean(0)
    base, weights = np.zeros(layers), np.array([-1.0, 0.0, 0.0])
    if name not in (PLAIN, "standardised similarity"):
        base, weights = _least_squares(CANDIDATES[name], tokens, (seen - mean) / sd, own - own_mean)
    predicted = base + weights[0] * (seen - mean) / sd + ((own - own_mean) @ weights[1:])[:, None]
    return GateFit(
        name,
        mean=tuple(mean.tolist()),
        sd=tuple(sd.tolist()),
        base=tuple(base.tolist()),
        weights=(float(weights[0]), float(weights[1]), float(weights[2])),
        mean_last=float(own_mean[0]),
        mean_recent=float(own_mean[1]),
        limit=_limit(predicted, depth),
    )


def _least_squares(
    features: Sequence[str], tokens: Sequence[Example], deviations: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """base [L] and weights [3] from the exits of all tokens."""
    used = [FEATURES.index(feature) for feature in features]
    depths = sorted({exit.depth for token in tokens for exit in token.sampled.exits})
    rows: list[np.ndarray] = []
    wanted: list[np.ndarray] = []
    means = []
    for depth in depths:
        exits = [(row, exit) for row, token in enumerate(tokens) for exit in token.sampled.exits if exit.depth == depth]
        here = np.array([(deviations[row, depth - 1], *own[row]) for row, _ in exits])
        logs = np.log([max(exit.kl, FLOOR) for _, exit in exits])
        means.append(float(logs.mean()))
        rows.append(here - here.mean(0))
        wanted.append(logs - means[-1])
    x, y = np.concatenate(rows)[:, used], np.concatenate(wanted)
    ridge = 1e-2 * len(x) * np.eye(len(used))
    weights = np.zeros(len(FEATURES))
    weights[used] = np.linalg.solve(x.T @ x + ridge, x.T @ y)
    # base[l] is of leaving after layer l, at depth l + 1.
    return np.interp(np.arange(1, deviations.shape[1] + 1), depths, means), weights


def _limit(predicted: np.ndarray, depth: float) -> float:
    """The limit at which tokens with ``predicted`` errors [N, L] have a mean depth nearest to ``depth``."""
    layers = predicted.shape[1]

    def mean_depth(limit: float) -> float:
        below = predicted[:, :-1] < limit
        return float(np.where(below.any(1), below.argmax(1) + 1, layers).mean())

    tried = np.quantile(predicted[np.isfinite(predicted)], np.linspace(0, 1, 400))
    return float(min(tried, key=lambda limit: abs(mean_depth(float(limit)) - depth)))


@dataclass(frozen=True)
class Candidate:
    """fit: on all prompts, to be used. comparison: of the folds' own gates, over all prompts."""

    fit: GateFit
    comparison: Comparison


@dataclass(frozen=True)
class BetterGates:
    """wanted_depth: what all were fitted for. folds: how many parts the prompts were dealt into.

    kept: names of those that beat shuffled depths, judged together. ``PLAIN`` is judged by itself and never kept.
    """

    wanted_depth: int
    folds: int
    candidates: tuple[Candidate, ...]
    kept: tuple[str, ...]

    @property
    def verdict(self) -> str:
        proposed = [each.comparison for each in self.candidates if each.comparison.name != PLAIN]
        if not any(each.chooses for each in proposed):
            return "no candidate gate chooses: each lets all tokens of a prompt leave alike"
        if not any(each.shuffled.judged for each in proposed):
            return "the prompts are too few to judge candidate gates by shuffled depths"
        if not self.kept:
            return "no candidate gate surely beats shuffled depths on prompts that it was not fitted on"
        return f"beat shuffled depths on prompts that they were not fitted on: {', '.join(self.kept)}"


def judged(
    fits: Mapping[str, GateFit], trials: Mapping[str, Sequence[Trial]], wanted_depth: int, folds: int, layers: int
) -> BetterGates:
    """The outcome over all candidates. ``trials``: of each, one a prompt, by the gate of the prompt's fold."""
    plain = {name: tried for name, tried in trials.items() if name == PLAIN}
    proposed = {name: tried for name, tried in trials.items() if name != PLAIN}
    comparisons = compare(plain, layers) + compare(proposed, layers)
    kept = tuple(each.name for each in comparisons if each.name != PLAIN and each.shuffled.beats)
    return BetterGates(wanted_depth, folds, tuple(Candidate(fits[each.name], each) for each in comparisons), kept)
