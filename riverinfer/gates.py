"""Gates decide, layer by layer, whether a token leaves the backbone for the river.

The similarity gate is the paper's (arXiv 2604.18396): it opens once the hidden states entering and leaving a layer
are alike. The others are controls: whoever claims that a gate chooses well must beat fixed and shuffled depths.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from riverinfer.errors import InvalidRequestError
from riverinfer.sampling import check_integer

SCOPES = ("last", "min")


def similarity(h: Tensor, h_next: Tensor) -> Tensor:
    """State transition similarity: cosine of each token's state before and after a layer, float32 [T]."""
    return F.cosine_similarity(h.float(), h_next.float(), dim=-1)


class Gate(Protocol):
    """A rule for one sequence. ``depth`` is how many backbone layers a token passes before the river."""

    def start(self) -> bool:
        """Called before the first layer of each step; True sends the step through the river from the start."""
        ...

    def __call__(self, layer: int, h: Tensor, h_next: Tensor) -> bool:
        """Called after backbone layer ``layer`` with its input and output, float32 [T, H]: True opens the gate.

        Not called again in a step once it has opened.
        """
        ...


@dataclass
class SimilarityGate:
    """Open when the similarity exceeds ``tau``, a number or one per layer (the last one serves all further layers).

    min_depth: backbone layers every token passes. max_depth: the gate is forced open there.
    scope: for steps of several tokens (prefill) the similarity of the "last" token or the "min" over all.
    A similarity that is not a number keeps the token in the backbone; ``not_a_number`` counts the steps that met one.
    Raises InvalidRequestError for values out of range.
    """

    tau: float | Sequence[float] = 0.5
    min_depth: int = 1
    max_depth: int | None = None
    scope: str = "last"
    not_a_number: int = 0
    _counted: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.tau, (int, float, list, tuple)):
            raise InvalidRequestError(f"is {self.tau!r}", field="tau", remedy="give a number, or one per layer")
        taus = [self.tau] if isinstance(self.tau, (int, float)) else list(self.tau)
        if not taus or not all(isinstance(t, (int, float)) and not isinstance(t, bool) and -1 <= t <= 1 for t in taus):
            raise InvalidRequestError(f"is {self.tau!r}", field="tau", remedy="give a number from -1 to 1")
        check_integer("min_depth", self.min_depth, 0)
        if self.max_depth is not None:
            check_integer("max_depth", self.max_depth, self.min_depth)
        if self.scope not in SCOPES:
            raise InvalidRequestError(f"is {self.scope!r}", field="scope", remedy=f"use {' or '.join(SCOPES)}")

    def start(self) -> bool:
        self._counted = False
        return self.max_depth == 0

    def __call__(self, layer: int, h: Tensor, h_next: Tensor) -> bool:
        depth = layer + 1
        if self.max_depth is not None and depth >= self.max_depth:
            return True
        if depth < self.min_depth:
            return False
        rows = slice(-1, None) if self.scope == "last" else slice(None)
        value = float(similarity(h[rows], h_next[rows]).min())
        if value != value:
            # What is no number stays none in all further layers: that is one step, not many.
            self.not_a_number += not self._counted
            self._counted = True
            return False
        return value > self._tau(layer)

    def _tau(self, layer: int) -> float:
        if isinstance(self.tau, (int, float)):
            return self.tau
        return self.tau[min(layer, len(self.tau) - 1)]


def undefined_steps(gate: Gate | None) -> int:
    """How many steps a gate kept in the backbone because their similarity was not a number."""
    return gate.not_a_number if isinstance(gate, SimilarityGate) else 0


@dataclass
class FixedDepth:
    """The static control: the first ``depth`` layers are backbone, the rest river, for every token."""

    depth: int

    def __post_init__(self) -> None:
        check_integer("depth", self.depth, 0)

    def start(self) -> bool:
        return self.depth == 0

    def __call__(self, layer: int, h: Tensor, h_next: Tensor) -> bool:
        return layer + 1 >= self.depth


class ShuffledDepths:
    """The shuffled control: each step's depth is drawn from ``histogram`` (depth -> weight), blind to the token."""

    def __init__(self, histogram: dict[int, float], seed: int = 0) -> None:
        if not histogram or any(depth < 0 or weight < 0 for depth, weight in histogram.items()):
            raise InvalidRequestError(
                f"is {histogram!r}", field="histogram", remedy="give weights for depths from 0 up"
            )
        self._depths, self._weights = list(histogram), list(histogram.values())
        self._random = random.Random(seed)
        self._depth = 0

    def start(self) -> bool:
        self._depth = self._random.choices(self._depths, self._weights)[0]
        return self._depth == 0

    def __call__(self, layer: int, h: Tensor, h_next: Tensor) -> bool:
        return layer + 1 >= self._depth


def never() -> FixedDepth:
    """A gate that stays shut: every layer is the backbone's."""
    return FixedDepth(1 << 30)


def always() -> FixedDepth:
    """A gate that is open from the start: every layer is the river's."""
    return FixedDepth(0)
