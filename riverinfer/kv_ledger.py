"""A debug check of KV completeness: every (layer, position) is written exactly once, and it is known by which path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BACKBONE, RIVER = 1, 2


class KVLedger:
    """Follows one sequence through its walks.

    ``paths`` int8 [layers, positions]: 0 not written, 1 backbone, 2 river. Before a step the memory it will write is
    poisoned with NaN, so that a write that the walk claims but does not make is found as well.
    """

    def __init__(self, layers: int, positions: int) -> None:
        self.paths = torch.zeros(layers, positions, dtype=torch.int8)

    def begin(self, start: int, end: int, kv: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Before tokens at start .. end - 1 walk: what lay there, from a longer past, is forgotten."""
        self.paths[:, start:] = 0
        for k, v in kv:
            k[:, start:end] = float("nan")
            v[:, start:end] = float("nan")

    def write(self, layer: int, start: int, end: int, *, river: bool) -> None:
        """A layer wrote these positions. Raises AssertionError if one was written before."""
        if bool(self.paths[layer, start:end].any()):
            raise AssertionError(f"layer {layer} writes positions {start}..{end - 1} twice")
        self.paths[layer, start:end] = RIVER if river else BACKBONE

    def check(self, end: int, kv: Sequence[tuple[Tensor, Tensor]]) -> None:
        """After a step: raises AssertionError unless every layer has every position up to ``end``."""
        absent = (self.paths[:, :end] == 0).nonzero()
        if len(absent):
            layer, position = absent[0].tolist()
            raise AssertionError(f"layer {layer} has no K and V at position {position}")
        for layer, (k, v) in enumerate(kv):
            if bool(torch.isnan(k[:, :end]).any() or torch.isnan(v[:, :end]).any()):
                raise AssertionError(f"layer {layer} claims K and V that it did not write, or that are NaN")
