"""What one walk through the layers did: recorded for statistics, pictures, tests and the debug check of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from riverinfer.gates import similarity
from riverinfer.kv_ledger import KVLedger


@dataclass
class Trace:
    """What one walk did, for those who ask.

    depth: backbone layers the step passed. states: the residual stream, embedding output first, float32 [T, H] each.
    similarities: per layer the cosine of each token's state before and after it, float32 [T]. ledger: told of every
    layer's writes, as a debug check.
    """

    depth: int = 0
    states: list[Tensor] | None = None
    similarities: list[Tensor] | None = None
    ledger: KVLedger | None = None
    _span: tuple[int, int] = (0, 0)

    def begin(self, h: Tensor, start: int, end: int, kv: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._span = start, end
        if self.states is not None:
            self.states = [h]
        if self.similarities is not None:
            self.similarities = []
        if self.ledger is not None:
            self.ledger.begin(start, end, kv)

    def record(self, layer: int, depth: int, h: Tensor, h_next: Tensor) -> None:
        self.depth = depth
        if self.ledger is not None:
            self.ledger.write(layer, *self._span, river=layer >= depth)
        if self.states is not None:
            self.states.append(h_next)
        if self.similarities is not None:
            self.similarities.append(similarity(h, h_next))

    def end(self, kv: Sequence[tuple[Tensor, Tensor]]) -> None:
        if self.ledger is not None:
            self.ledger.check(self._span[1], kv)

    def last_similarities(self) -> tuple[float, ...]:
        """Of the walk's last token, one per layer; empty if they are not recorded."""
        return tuple(float(values[-1]) for values in self.similarities or ())

    @classmethod
    def full(cls) -> Trace:
        """A trace that records everything."""
        return cls(states=[], similarities=[])
