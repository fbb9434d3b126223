"""Matrices of 4 or 8 bits as the GPU's kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from riverinfer.kernels.quantized_linear import dequantize
from riverinfer.kernels.require import require
from riverinfer.weights_convert.packing import unpack


@dataclass(frozen=True)
class PackedWeights:
    """An [N, K] matrix of 4 or 8 bits on its device, as the kernels read it. Made by ``packed_weights``."""

    q: Tensor  # int16 [N, K / 4] (4 bits, planes) or uint8 [N, K]
    pairs: Tensor  # int32 [K / group, N]: the bits of a bfloat16 scale, and of its offset in the high half
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.q.shape[0], self.pairs.shape[0] * self.group

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.pairs.nbytes

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        scale, offset = (half.view(torch.float32).t() for half in (self.pairs << 16, self.pairs & -65536))  # [N, K / G]
        return dequantize(unpack(self.q, self.bits, self.group), scale, offset, self.bits)


def packed_weights(q: Tensor, scale: Tensor, offset: Tensor, *, bits: int, group: int) -> PackedWeights:
    """Weights in the order of ``weights_convert.packing`` for the kernels; ``q`` is not copied.

    q int16 [N, K / 4] (4 bits) or uint8 [N, K]; scale and offset bfloat16 [N, K / group]; group 32, 64 or 128, or 0
    for one a row of 8 bits. Raises InvalidRequestError for anything else.
    """
    require(bits in (4, 8), "bits", f"{bits} bits are not supported")
    kind = torch.int16 if bits == 4 else torch.uint8
    require(q.dim() == 2 and q.dtype == kind, "q", f"is {q.dtype} {list(q.shape)}, not a matrix of {kind}")
    n, k = q.shape[0], q.shape[1] * (4 if bits == 4 else 1)
    if group == 0 and bits == 8:  # the matrix unit takes a group at a time
        group = next((size for size in (128, 64, 32) if k % size == 0), 0)
        require(group > 0, "q", f"{k} columns are not whole groups of 32")
        scale, offset = (x.expand(n, k // group) for x in (scale, offset))
    require(group in (32, 64, 128) and k % group == 0, "group", f"{k} columns are not whole groups of {group}")
    for name, x in (("scale", scale), ("offset", offset)):
        shape = (n, k // group)
        fits = tuple(x.shape) == shape and x.dtype == torch.bfloat16
        require(fits, name, f"is {x.dtype} {list(x.shape)}, not bfloat16 {list(shape)}")
    pairs = torch.stack((scale.t(), offset.t()), -1).view(torch.int32)[..., 0].contiguous()  # little endian
    return PackedWeights(q, pairs, bits, group)
