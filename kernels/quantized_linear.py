"""Matrices of 4- and 8-bit weights: w = (q - 2 ** (bits - 1)) * scale + offset, with one scale and offset per group.

The reference multiplies with the dequantized matrix. On a CPU in bfloat16, torch's own packed kernels read the small
weights directly.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from riverinfer.kernels.linear import Linear, make_linear


def dequantize(q: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """q uint8 [N, K], scale and offset [N, K / group] of any float dtype: float32 [N, K]."""
    rows, columns = q.shape
    levels = (q.float() - 2 ** (bits - 1)).view(rows, scale.shape[1], -1)  # [N, K / G, G]
    return (levels * scale.float().unsqueeze(-1) + offset.float().unsqueeze(-1)).view(rows, columns)


class CpuInt4Linear:
    """torch's ``_weight_int4pack_mm_for_cpu``: bfloat16 activations, 4-bit weights, float32 sums."""

    def __init__(self, q: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None = None) -> None:
        self.in_features = q.shape[1]
        self._group = self.in_features // scale.shape[1]
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        # [K / G, N, 2]: the kernel computes (q - 8) * scale + zero, which is our offset.
        self._scales = torch.stack((scale.t(), offset.t()), -1).to(torch.bfloat16).contiguous()
        self.bias = bias
        self.weight_bytes = q.numel() // 2 + self._scales.nbytes
        self._linear = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, x: Tensor) -> Tensor:
        y = self._linear(x, self._weight, self._group, self._scales)
        return y if self.bias is None else y + self.bias


class CpuInt8Linear:
    """torch's ``_weight_int8pack_mm``: bfloat16 activations, 8-bit weights with one scale and offset a row.

    The offset of a row meets the sum of x, which is taken in float32.
    """

    def __init__(self, q: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None = None) -> None:
        self.in_features = q.shape[1]
        self._weight = (q.int() - 128).to(torch.int8)
        self._scales = scale.view(-1).to(torch.bfloat16)
        self._offset = offset.view(1, -1).float()  # [1, N]
        self.bias = bias
        self.weight_bytes = self._weight.nbytes + self._scales.nbytes + offset.nbytes
        self._linear = torch.ops.aten._weight_int8pack_mm.default

    def __call__(self, x: Tensor) -> Tensor:
        y = self._linear(x, self._weight, self._scales)
        y = (y + x.sum(-1, keepdim=True, dtype=torch.float32) * self._offset).to(x.dtype)
        return y if self.bias is None else y + self.bias


@cache
def _int4_works(group: int) -> bool:
    """Whether this torch build multiplies 4-bit weights of this group size on the CPU, and rightly: tried."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (32, 2 * group), generator=generator, dtype=torch.uint8)
    scale = torch.rand(32, 2, generator=generator).bfloat16()
    offset = torch.randn(32, 2, generator=generator).bfloat16()
    x = torch.randn(3, 2 * group, generator=generator).bfloat16()
    try:
        got = CpuInt4Linear(q, scale, offset)(x)
    except (AttributeError, RuntimeError):
        return False
    want = x.float() @ dequantize(q, scale, offset, 4).T
    return bool(torch.allclose(got.float(), want, rtol=2e-2, atol=2e-2 * float(want.abs().max())))


@cache
def _int8_works() -> bool:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 256, (32, 64), generator=generator, dtype=torch.uint8)
    scale = torch.rand(32, 1, generator=generator).bfloat16()
    x = torch.randn(3, 64, generator=generator).bfloat16()
    try:
        got = CpuInt8Linear(q, scale, torch.zeros_like(scale))(x)
    except (AttributeError, RuntimeError):
        return False
    want = x.float() @ dequantize(q, scale, torch.zeros_like(scale), 8).T
    return bool(torch.allclose(got.float(), want, rtol=2e-2, atol=2e-2 * float(want.abs().max())))


def _packed(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    if bits == 4:
        return rows % 16 == 0 and _int4_works(group)
    return group in (0, columns) and _int8_works()


def quantized_bytes(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that ``make_quantized_linear`` will hold for an [N, K] matrix; group 0 is one per row."""
    if not _packed(rows, columns, bits, group, dtype, device):
        return rows * columns * dtype.itemsize
    return rows * columns * bits // 8 + rows * (columns // group if group else 1) * 4


def make_quantized_linear(
    q: Tensor, scale: Tensor, offset: Tensor, *, bits: int, dtype: torch.dtype, bias: Tensor | None = None
) -> Linear:
    """The fastest right form for the device of ``q`` and activations of ``dtype``.

    q uint8 [N, K]; scale and offset bfloat16 [N, K / group]. Without a packed kernel for the case the matrix is
    dequantized to ``dtype``: right, but no smaller or faster than the backbone's.
    """
    rows, columns = q.shape
    if _packed(rows, columns, bits, columns // scale.shape[1], dtype, q.device):
        return CpuInt4Linear(q, scale, offset, bias) if bits == 4 else CpuInt8Linear(q, scale, offset, bias)
    return make_linear(dequantize(q, scale, offset, bits).to(dtype), bias)
