"""Decoder layers with marks between their operators: the same operators in the same order, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields

from torch import Tensor

from riverinfer.kernels.linear import Linear
from riverinfer.model import DecoderLayer, StepContext
from riverinfer.profiling.ranges import Ranges

_BEFORE = {"qkv": "norm", "o": "attention", "gate_up": "norm", "down": "silu"}  # what ends where a matrix begins


class _TimedLinear:
    """``linear`` between two marks."""

    def __init__(self, linear: Linear, name: str, mark: Callable[[str], None], ranges: Ranges) -> None:
        self._linear, self._name, self._mark, self._ranges = linear, name, mark, ranges
        self.in_features, self.weight_bytes, self.bias = linear.in_features, linear.weight_bytes, linear.bias

    def __call__(self, x: Tensor) -> Tensor:
        self._mark(_BEFORE[self._name])
        with self._ranges.of(self._name):
            y = self._linear(x)
        self._mark(self._name)
        return y


class TimedLayer(DecoderLayer):
    """The walk in Python. Residual sums count as the norm after them. ``enter``: called before a pass, open in it."""

    _mark: Callable[[str], None]
    _enter: Callable[[], AbstractContextManager[None]]

    @classmethod
    def of(
        cls,
        layer: DecoderLayer,
        mark: Callable[[str], None],
        enter: Callable[[], AbstractContextManager[None]],
        ranges: Ranges,
    ) -> TimedLayer:
        values = {each.name: getattr(layer, each.name) for each in fields(layer)}
        for name in _BEFORE:
            values[name] = _TimedLinear(values[name], name, mark, ranges)
        timed = cls(**values)
        timed._mark, timed._enter = mark, enter
        return timed

    def __call__(self, h: Tensor, step: StepContext, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        with self._enter():
            return DecoderLayer.__call__(self, h, step, k_cache, v_cache)

    def side_by_side(self, h: Tensor, steps: list[StepContext], caches: list[tuple[Tensor, Tensor]]) -> Tensor:
        with self._enter():
            return DecoderLayer.side_by_side(self, h, steps, caches)

    def _store(self, qkv: Tensor, step: StepContext, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q = DecoderLayer._store(self, qkv, step, k_cache, v_cache)
        self._mark("rope")
        return q
