"""Scales of input channels that make a matrix lose least when it is quantized.

AWQ, activation-aware weight quantization (Lin et al., arXiv 2306.00978, section 3.2): the matrix W [N, K] of a linear
is quantized as W * s, column k times s[k] > 0, and the linear reads x / s. Nothing is lost but by rounding, and the
rounding of a scaled-up column weighs s[k] times less. Columns that meet large inputs are scaled up:

    s = m ** alpha / sqrt(max(m ** alpha) * min(m ** alpha)),   m[k] = mean over tokens of |x[k]|

with the alpha in 0, 0.05 .. 0.95 of least squared output error on the calibration tokens. Alpha 0 is no scaling.

At run time the division costs nothing, for whatever writes x does it: the norms before ``qkv`` and ``gate_up``, and the
rows of ``up`` before ``down``. ``o`` reads V from the cache that backbone and river share, so it is not scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from riverinfer.errors import WeightsError
from riverinfer.weights_convert.quantize import quantize

ALPHAS = tuple(step / 20 for step in range(20))
NORMED = ("qkv", "gate_up")  # linears whose input a norm writes; the others' scales live in weights
_FLOOR = 1e-4  # of the largest mean: channels that the tokens hardly excite are not scaled down without end
_ROWS = 512


class Calibration(Protocol):
    """What a model's linears read on calibration text."""

    @property
    def digest(self) -> str:
        """A hash that tells one set of calibration tokens from another."""
        ...

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        """Per layer the inputs [tokens, K] of ``qkv``, ``gate_up`` and ``down``, of any floating dtype."""
        ...


class LayerScaling:
    """The channel scales of one layer's linears, which must come in an order that has ``down`` before ``gate_up``.

    ``inputs`` are those of the layer in ``Calibration``, on the device of the matrices. The scale of ``down`` divides
    the rows of ``up`` but does not reach a bias of ``up``: ``scale_down`` must be False where there is one.
    """

    def __init__(self, inputs: Mapping[str, Tensor], *, bits: int, group: int, scale_down: bool = True) -> None:
        self._inputs, self._bits, self._group, self._scale_down = inputs, bits, group, scale_down
        self._down: Tensor | None = None  # [I]

    def __call__(self, linear: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The matrix [N, K] to quantize instead of ``weight`` float32 [N, K], and the scale [K] that a norm must bear.

        The scale is None for ``o`` and ``down``. Raises what ``search_channel_scales`` raises.
        """
        if linear == "gate_up" and self._down is not None:
            gate, up = weight.chunk(2)  # [I, K] each
            weight = torch.cat((gate, up / self._down.unsqueeze(1)))
        if linear not in self._inputs or (linear == "down" and not self._scale_down):
            return weight, None
        scale = search_channel_scales(weight, self._inputs[linear], bits=self._bits, group=self._group)  # [K]
        if linear == "down":
            self._down = scale
        return weight * scale, scale if linear in NORMED else None


def search_channel_scales(weight: Tensor, inputs: Tensor, *, bits: int, group: int) -> Tensor:
    """The scales s, float32 [K], of least ``output_error`` for ``weight`` float32 [N, K] and ``inputs`` [tokens, K].

    Rows are quantized independently of each other: of more than 512, the error is taken over 512 evenly spaced ones.
    Raises InvalidRequestError for settings that do not exist, WeightsError if weights or inputs are NaN or infinite.
    """
    rows = len(weight)
    if rows > _ROWS:
        weight = weight[torch.arange(_ROWS, device=weight.device) * rows // _ROWS]
    inputs = inputs.to(torch.float32)
    mean = inputs.abs().mean(0)  # [K]
    if not bool(mean.isfinite().all()):
        raise WeightsError(
            "reads NaN or infinite values on the calibration text",
            remedy="check the weights with riverinfer info --check, or load them as float32",
        )
    mean = (mean / mean.max().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=_FLOOR)
    best, best_error = torch.ones_like(mean), float("inf")
    for alpha in ALPHAS:
        scale = mean**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = output_error(weight, inputs, scale, bits=bits, group=group)
        if error < best_error:
            best, best_error = scale, error
    return best


def output_error(weight: Tensor, inputs: Tensor, scale: Tensor, *, bits: int, group: int) -> float:
    """``|| inputs @ (W - Q(W * scale) / scale).T ||**2``, Q rounding to nearest; all float32, [tokens, K] @ [K, N]."""
    scaled = quantize(weight * scale, bits=bits, group=group, method="rtn").dequantize()
    return float((inputs @ (weight - scaled / scale).T).square().sum())
