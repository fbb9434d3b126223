"""Matrices of 4- and 8-bit weights: w = (q - 2 ** (bits - 1)) * scale + offset, with one scale and offset per group.

The reference multiplies with the dequantized matrix. On a GPU Triton's kernels read the packed one. On a CPU in
bfloat16, torch's own packed kernel does: 4-bit weights as they are, 8-bit ones as two nibbles each, for torch's 8-bit
kernel is slower from memory and takes one scale a row only.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from riverinfer.kernels.linear import Linear, current, make_linear, triton_runs

_KERNEL_GROUPS = (128, 64, 32)
_ROWS = 4096  # packed at once: a multiple of the rows that the packed form keeps together, at most 64


def dequantize(q: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """q uint8 [N, K], scale and offset [N, K / group] of any float dtype: float32 [N, K]."""
    rows, columns = q.shape
    levels = (q.float() - 2 ** (bits - 1)).view(rows, scale.shape[1], -1)  # [N, K / G, G]
    return (levels * scale.float().unsqueeze(-1) + offset.float().unsqueeze(-1)).view(rows, columns)


class CpuInt4Linear:
    """torch's ``_weight_int4pack_mm_for_cpu``: bfloat16 activations, 4-bit weights, float32 sums.

    ``weight``, ``scales`` and ``group`` are the operator's own arguments.
    """

    def __init__(self, q: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None = None) -> None:
        self.in_features = q.shape[1]
        self.group = self.in_features // scale.shape[1]
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        # Packing reads int32: of a whole head that would take several times the room of the result.
        packed = [pack(rows.int(), 1) for rows in q.split(_ROWS)]
        self.weight = packed[0] if len(packed) == 1 else torch.cat(packed)  # uint8 [N, K / 2]
        # [K / G, N, 2]: the kernel computes (q - 8) * scale + zero, which is our offset.
        self.scales = torch.stack((scale.t(), offset.t()), -1).to(torch.bfloat16).contiguous()
        self.bias = bias
        self.weight_bytes = q.numel() // 2 + self.scales.nbytes
        self._linear = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, x: Tensor) -> Tensor:
        y = self._linear(x, self.weight, self.group, self.scales)
        return y if self.bias is None else y + self.bias


class CpuNibblesLinear:
    """8-bit weights as the 2N rows of one 4-bit matrix: y = high + low of q = 16 * high + low.

    With w = (q - 128) * s + o = [16 s (high - 8) + o] + [s (low - 8) + 8 s] the high rows have scale 16 s and offset o,
    the low ones s and 8 s, all exact in bfloat16. Each half of y is rounded to bfloat16, and so is their sum: beside
    that of float32 sums, the error is at most e + 2**-8 (abs(y) + e) with e = 2**-8 (abs(high) + abs(low)).

    ``weight``, ``scales`` and ``group`` are those of the 4-bit matrix.
    """

    def __init__(self, q: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None = None) -> None:
        nibbles = torch.cat((q >> 4, q & 15))  # uint8 [2N, K]
        both = CpuInt4Linear(nibbles, torch.cat((16 * scale, scale)), torch.cat((offset, 8 * scale)))
        self.in_features, self.bias = both.in_features, bias
        self.weight, self.scales, self.group = both.weight, both.scales, both.group
        self.weight_bytes = both.weight_bytes
        self._rows = len(q)
        self._linear = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, x: Tensor) -> Tensor:
        y = self._linear(x, self.weight, self.group, self.scales)  # [T, 2N]
        y = y[:, : self._rows] + y[:, self._rows :]
        return y if self.bias is None else y + self.bias


class TritonPackedLinear:
    """The GPU kernels' form: up to 16 tokens read the packed weights, more of them a copy dequantized for the call.

    ``packed`` is a ``packed_weights.PackedWeights``.
    """

    def __init__(self, q: Tensor, scale: Tensor, offset: Tensor, *, bits: int, bias: Tensor | None = None) -> None:
        from riverinfer.kernels.linear_launch import MAX_TOKENS
        from riverinfer.kernels.packed_weights import packed_weights
        from riverinfer.kernels.triton_linear import linear
        from riverinfer.weights_convert.packing import pack

        group = q.shape[1] // scale.shape[1]
        words = pack(q, bits, group)
        if words.data_ptr() % 16:  # 8 bits are taken as they are, even out of a mapped file
            words = words.clone()
        self.packed = packed_weights(words, scale, offset, bits=bits, group=group)
        self.in_features, self.bias = q.shape[1], bias
        self.weight_bytes = self.packed.nbytes
        self._linear, self._few = linear, MAX_TOKENS

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= self._few:
            with current(x.device):
                return self._linear(x.contiguous(), self.packed, bias=self.bias)
        return F.linear(x, self.packed.dequantize().to(x.dtype), self.bias)


@cache
def _kernel_works(group: int) -> bool:
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


def packed_group(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype, device: torch.device) -> int:
    """The group with which a packed kernel reads an [N, K] matrix of ``group`` (0: one per row); 0 if none does.

    It divides ``group``, whose scales are then repeated.
    """
    if dtype == torch.bfloat16 and triton_runs(device.type):
        return next((size for size in _KERNEL_GROUPS if (group or columns) % size == 0), 0)
    if device.type != "cpu" or dtype != torch.bfloat16 or rows * bits // 4 % 16:
        return 0
    fits = (size for size in _KERNEL_GROUPS if (group or columns) % size == 0 and _kernel_works(size))
    return next(fits, 0)


def quantized_bytes(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that ``make_quantized_linear`` will hold for an [N, K] matrix; group 0 is one per row."""
    read = packed_group(rows, columns, bits, group, dtype, device)
    if not read:
        return rows * columns * dtype.itemsize
    if triton_runs(device.type):
        return rows * columns * bits // 8 + rows * columns // read * 4
    nibbles = rows * bits // 4 * columns
    return nibbles // 2 + nibbles // read * 4


def make_quantized_linear(
    q: Tensor, scale: Tensor, offset: Tensor, *, bits: int, dtype: torch.dtype, bias: Tensor | None = None
) -> Linear:
    """The fastest right form for the device of ``q`` and activations of ``dtype``.

    q uint8 [N, K]; scale and offset bfloat16 [N, K / group]. Without a packed kernel for the case the matrix is
    dequantized to ``dtype``: right, but no smaller or faster than the backbone's.
    """
    rows, columns = q.shape
    group = columns // scale.shape[1]
    read = packed_group(rows, columns, bits, group, dtype, q.device)
    if read:
        scale, offset = (x.repeat_interleave(group // read, 1) for x in (scale, offset))  # [N, K / read]
        if triton_runs(q.device.type):
            return TritonPackedLinear(q, scale, offset, bits=bits, bias=bias)
        return CpuInt4Linear(q, scale, offset, bias) if bits == 4 else CpuNibblesLinear(q, scale, offset, bias)
    return make_linear(dequantize(q, scale, offset, bits).to(dtype), bias)
