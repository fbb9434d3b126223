"""Matrix products of 1 .. 16 tokens in Triton, for NVIDIA GPUs from Ampere on: y = x W^T and its surroundings.

The matrix is the left operand of the matrix unit, read once in a stream; 8 tokens are its columns. One token pays for
8, which is free as long as the weights' bytes take the time, and one compiled kernel serves 1 .. 8 tokens; 9 .. 16
take a second block of columns of the same kernel. Nothing that orders a sum (block sizes, splits of K, number of warps)
knows the number of tokens: row by row, a batch gives the bits that its tokens give alone.

Weights are bfloat16 [N, K], or 4 or 8 bits in the order of ``weights_convert.packing`` (``PackedWeights``), with
w = (q - half) * scale + offset, half = 2 ** (bits - 1). Sums are float32. Of a group g of a row the kernel adds

    scale * (sum q' x - shift * sum x) + offset * sum x        4 bits: q' = 128 + q, shift 136; 8 bits: q - 128, 0

where q' is exact in bfloat16 and 128 + q needs no conversion: its bits are those of q beside a constant (the idea of
Kim et al., arXiv 2211.10017). sum x is a product with ones on the matrix unit, which is idle otherwise.

RMSNorm before the matrix is deferred: y = (sum_k W bfloat16(x_k * weight_k)) / rms(x). The squares are summed from the
blocks that are multiplied anyway, so that nothing is read twice and no kernel runs before. To round x * weight rather
than x / rms * weight costs the same relative error.

Where N alone gives too few programs to keep the memory busy, K is split: partial sums go to a workspace and the last
program to arrive adds them in ascending order of the splits, whoever it is.

Triton contracts a * b + c as it pleases unless told not to; launches tell it, and ``tl.fma`` says where it is meant.
Kernels of both paths can therefore be compared bit by bit. ``triton_reference`` holds the plain torch counterpart.
Triton's interpreter (TRITON_INTERPRET=1) runs everything on CPU tensors; as it has no bfloat16 arithmetic, the helpers
with an ``INTERPRETED`` branch stand in.
"""
# Kernels have no annotations but constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverinfer.errors import InvalidRequestError
from riverinfer.kernels.quantized_linear import dequantize
from riverinfer.kernels.triton_gate import SUMS, leave_shares
from riverinfer.weights_convert.packing import unpack

MAX_TOKENS = 16
COLUMNS = 8  # tokens of a program: the narrowest right operand of the matrix unit

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
_SHIFT: tl.constexpr = tl.constexpr(-136.0)


@triton.jit
def to_bfloat16(v):
    """float32 to bfloat16, to nearest even; the interpreter by itself would truncate."""
    if INTERPRETED:
        bits = v.to(tl.uint32, bitcast=True)
        rounded = tl.where(v == v, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(tl.bfloat16)


@triton.jit
def dot(a, b, c):
    """a [M, K] b [K, N] + c, bfloat16 operands, float32 sums."""
    if INTERPRETED:
        return c + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, c)


@triton.jit
def nibble(words, J: tl.constexpr):
    """Nibble J of int16 words as bfloat16 128 + q."""
    if INTERPRETED:
        return (((words >> (4 * J)) & 0xF) | 0x4300).to(tl.bfloat16, bitcast=True)
    # Two words at a time: (words >> 4 J & 15) | 128.0.
    asm: tl.constexpr = f"{{ .reg .b32 t; shr.b32 t, $1, {4 * J}; lop3.b32 $0, t, 0xf000f, 0x43004300, 0xEA; }}"
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def activations(x, norm, at, inside, tokens, T, K: tl.constexpr, MASKED: tl.constexpr):
    """Columns ``at`` of the tokens' rows of x: the right operand bfloat16 [len(at), tokens], and x itself.

    Zero where a token or, if MASKED, a column is outside: both then add nothing.
    """
    mask = (tokens < T)[None, :]
    if MASKED:
        mask = mask & inside[:, None]
    v = tl.load(x + tokens[None, :] * K + at[:, None], mask=mask, other=0.0)  # [len(at), BM]
    right = v
    if norm is not None:
        weight = tl.load(norm + at, mask=inside, other=0.0) if MASKED else tl.load(norm + at)  # [len(at)]
        right = to_bfloat16(v * weight[:, None])
    return right, v


@triton.jit
def products(
    x, norm, w, pairs, rows, tokens, T, split,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Split ``split`` of K: sums float32 [BN, BM] of weight rows ``rows`` with the tokens, and of x * x [BM].

    BITS 16 takes BK columns at a time, 4 and 8 a group, with 4 bits in four planes of GROUP / 4 columns; UNROLL of
    them between two barriers.
    """
    PART: tl.constexpr = BK if BITS == 16 else GROUP  # columns that share a scale
    COUNT: tl.constexpr = (K + PART - 1) // PART
    STEPS: tl.constexpr = (COUNT + SPLIT * UNROLL - 1) // (SPLIT * UNROLL)  # of a split; the last may be outside of K
    PLANES: tl.constexpr = 4 if BITS == 4 else 1
    RUN: tl.constexpr = PART // PLANES  # columns of a product
    WIDTH: tl.constexpr = RUN if RUN >= 16 else 16  # the matrix unit's shortest: the rest is masked
    MASKED: tl.constexpr = (STEPS * SPLIT * UNROLL * PART != K) or (WIDTH != RUN)
    LENGTH: tl.constexpr = K // 4 if BITS == 4 else K  # elements of a row as stored

    column = tl.arange(0, WIDTH)
    acc = tl.zeros((BN, BM), tl.float32)
    squares = tl.zeros((WIDTH, BM), tl.float32)
    ones = tl.full((BN, WIDTH), 0x3F80, tl.int16).to(tl.bfloat16, bitcast=True)
    w_rows = w + rows.to(tl.int64)[:, None] * LENGTH
    for i in tl.range(0, STEPS, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            g = (split * STEPS + i) * UNROLL + u
            inside = (column < RUN) & (g * PART + column < K)
            stored = g * RUN + column
            if MASKED:
                tile = tl.load(w_rows + stored[None, :], mask=inside[None, :], other=0, eviction_policy="evict_first")
            else:
                tile = tl.load(w_rows + stored[None, :], eviction_policy="evict_first")  # [BN, WIDTH]
            if BITS == 16:
                right, v = activations(x, norm, stored, inside, tokens, T, K, MASKED)
                acc = dot(tile, right, acc)
                if norm is not None:
                    squares = tl.fma(v, v, squares)
            else:
                if MASKED:
                    pair = tl.load(pairs + g * N + rows, mask=g < COUNT, other=0)
                else:
                    pair = tl.load(pairs + g * N + rows)  # [BN]: scale in the low half, offset in the high one
                part = tl.zeros((BN, BM), tl.float32)
                total = tl.zeros((BN, BM), tl.float32)  # the sum of x, in every row
                for j in tl.static_range(PLANES):
                    right, v = activations(x, norm, g * PART + j * RUN + column, inside, tokens, T, K, MASKED)
                    if BITS == 4:
                        left = nibble(tile, j)
                    else:  # 2**23 + q has the bits of q beside a constant
                        magic = (tile.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
                        left = (magic - 8388736.0).to(tl.bfloat16)
                    part = dot(left, right, part)
                    total = dot(ones, right, total)
                    if norm is not None:
                        squares = tl.fma(v, v, squares)
                if BITS == 4:
                    part = tl.fma(total, _SHIFT, part)
                scale = (pair << 16).to(tl.float32, bitcast=True)
                offset = (pair & -65536).to(tl.float32, bitcast=True)
                acc = tl.fma(part, scale[:, None], acc)
                acc = tl.fma(total, offset[:, None], acc)
    return acc, tl.sum(squares, 0)


@triton.jit
def epilogue(
    acc, squares, rows, bias, residual, out, eps, wanted, tokens, block, before, shares,
    HAS_NORM: tl.constexpr, SILU: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Everything after the sums of all of K, and the store of the ``wanted`` tokens.

    before: None, or float32 states [T, N] that the output is compared with; for ``shares`` see ``leave_shares``.
    """
    y = acc  # [BN, BM]
    if HAS_NORM:
        y = y * tl.rsqrt(squares / K + eps)[None, :]
    if bias is not None:
        y = y + tl.load(bias + rows).to(tl.float32)[:, None]
    if SILU:
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, BN // 2, BM)), (1, 2, 0)))  # [BN / 2, BM] each
        y = gate * tl.sigmoid(gate) * up
    WIDE: tl.constexpr = N // 2 if SILU else N
    HIGH: tl.constexpr = BN // 2 if SILU else BN
    n = block * HIGH + tl.arange(0, HIGH)
    mask = (n < WIDE)[:, None] & wanted[None, :]
    at = tokens[None, :] * WIDE + n[:, None]
    if residual is not None:
        y = y + tl.load(residual + at, mask=mask, other=0.0)
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(out + at, to_bfloat16(y), mask=mask)
    else:
        tl.store(out + at, y, mask=mask)
    if before is not None:
        a = tl.load(before + at, mask=mask, other=0.0)
        leave_shares(a, y, mask, wanted, shares, block, tl.num_programs(1), BM)


@triton.jit
def compute(
    x, norm, w, pairs, bias, residual, out, workspace, counters, T, eps, wanted, part, before, shares,
    SILU: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """What a program does for one kind of weights. Grid: (blocks of tokens, blocks of rows, SPLIT).

    ``part`` 0 or 1 is the share of workspace and counters that this kind of weights has for itself; ``before`` and
    ``shares`` as in ``epilogue``. Returns 1 from the program that completed its tile, the last of the splits, else 0.
    """
    block, split = tl.program_id(1), tl.program_id(2)
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    i = tl.arange(0, BN)
    if SILU:  # the first half of the rows are gates, the second their ups
        rows = tl.minimum(block * (BN // 2) + i % (BN // 2), N // 2 - 1) + (i // (BN // 2)) * (N // 2)
    elif N % BN == 0:
        rows = block * BN + i
    else:
        rows = tl.minimum(block * BN + i, N - 1)  # rows outside repeat the last one and are not stored
    acc, squares = products(
        x, norm, w, pairs, rows, tokens, T, split, N, K, BITS, GROUP, BN, BM, BK, STAGES, UNROLL, SPLIT
    )  # fmt: skip
    HAS_NORM: tl.constexpr = norm is not None
    completed = 1
    if SPLIT == 1:
        epilogue(
            acc, squares, rows, bias, residual, out, eps, wanted, tokens, block, before, shares,
            HAS_NORM, SILU, N, K, BN, BM,
        )  # fmt: skip
    else:
        j = tl.arange(0, BM)
        TILE: tl.constexpr = (BN + 1) * BM  # sums, and a row of squares
        place = part * tl.num_programs(0) * tl.num_programs(1) + block * tl.num_programs(0) + tl.program_id(0)
        tile = workspace + place * (SPLIT * TILE)
        at = i[:, None] * BM + j[None, :]
        used = tokens < T
        tl.store(tile + split * TILE + at, acc, mask=used[None, :])
        if HAS_NORM:
            tl.store(tile + split * TILE + BN * BM + j, squares, mask=used)
        tl.debug_barrier()  # every thread's stores come before the count
        last = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        completed = last.to(tl.int32)
        if last:
            acc = tl.zeros((BN, BM), tl.float32)
            squares = tl.zeros((BM,), tl.float32)
            for s in tl.static_range(SPLIT):
                acc += tl.load(tile + s * TILE + at, mask=used[None, :], other=0.0, cache_modifier=".cg")
                if HAS_NORM:
                    squares += tl.load(tile + s * TILE + BN * BM + j, mask=used, other=0.0, cache_modifier=".cg")
            tl.atomic_xchg(counters + place, 0)  # for the next launch
            epilogue(
                acc, squares, rows, bias, residual, out, eps, wanted, tokens, block, before, shares,
                HAS_NORM, SILU, N, K, BN, BM,
            )  # fmt: skip
    return completed


@triton.jit(do_not_specialize=["T", "eps"])
def linear_kernel(
    x, norm, w, pairs, bias, residual, out, workspace, counters, T, eps,
    SILU: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    wanted = tl.program_id(0) * BM + tl.arange(0, BM) < T
    compute(
        x, norm, w, pairs, bias, residual, out, workspace, counters, T, eps, wanted, 0, None, None,
        SILU, N, K, BITS, GROUP, BN, BM, BK, STAGES, UNROLL, SPLIT,
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """How a matrix is cut. ``split`` orders its sums; with a fused norm all the others may, through that of x * x.

    A program of ``warps`` warps takes ``block_n`` rows and, of bfloat16 weights, ``block_k`` columns at a time, with
    ``stages`` of them on their way; of packed weights a group or ``packed_k`` columns, with ``packed_stages``.
    """

    block_n: int = 64  # a power of 2, at least 16, with silu 32
    split: int = 1
    warps: int = 2
    block_k: int = 64  # a power of 2, at least 16
    stages: int = 4
    packed_k: int = 128
    packed_stages: int = 4

    def unroll(self, group: int) -> int:
        """Groups that packed weights take at a time."""
        return min(2, max(1, self.packed_k // group))  # more of them take ptxas half a minute


measured: dict[tuple[int, int], Config] = {}  # by [N, K]: what ``triton_tuning`` found for this GPU
_WIDE = 65536  # rows of a head: more of them share each read of x
_PROGRAMS = 512  # about four for each multiprocessor of an H100
_SHORTEST = 256  # columns of a split: below this its partial sums cost more than it hides


def config_for(n: int, k: int) -> Config:
    """The blocks for an [N, K] matrix: a function of its shape alone, as batches must give the bits of single tokens.

    Not of the kind of weights either: the two forms of a dual matrix share a launch, and have the bits of each alone.
    Where nothing was measured, reasoned: enough programs to keep the memory busy.
    """
    if (n, k) in measured:
        return measured[n, k]
    if n >= _WIDE:
        return Config(block_n=128, warps=4)
    split = 1
    while triton.cdiv(n, 64) * split < _PROGRAMS and k // (2 * split) >= _SHORTEST:
        split *= 2
    return Config(split=split)


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
    _require(bits in (4, 8), "bits", f"{bits} bits are not supported")
    kind = torch.int16 if bits == 4 else torch.uint8
    _require(q.dim() == 2 and q.dtype == kind, "q", f"is {q.dtype} {list(q.shape)}, not a matrix of {kind}")
    n, k = q.shape[0], q.shape[1] * (4 if bits == 4 else 1)
    if group == 0 and bits == 8:  # the matrix unit takes a group at a time
        group = next((size for size in (128, 64, 32) if k % size == 0), 0)
        _require(group > 0, "q", f"{k} columns are not whole groups of 32")
        scale, offset = (x.expand(n, k // group) for x in (scale, offset))
    _require(group in (32, 64, 128) and k % group == 0, "group", f"{k} columns are not whole groups of {group}")
    for name, x in (("scale", scale), ("offset", offset)):
        shape = (n, k // group)
        fits = tuple(x.shape) == shape and x.dtype == torch.bfloat16
        _require(fits, name, f"is {x.dtype} {list(x.shape)}, not bfloat16 {list(shape)}")
    pairs = torch.stack((scale.t(), offset.t()), -1).view(torch.int32)[..., 0].contiguous()  # little endian
    return PackedWeights(q, pairs, bits, group)


class Workspace:
    """Room for the partial sums of split matrices and gates. One serves all launches of a stream, one after the other.

    The counters are zero between launches; ``reset`` makes them so after a launch that did not finish.
    """

    def __init__(self, device: torch.device | str, floats: int = 2**22, counters: int = 2**12) -> None:
        self.sums = torch.empty(floats, dtype=torch.float32, device=device)
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)

    def reset(self) -> None:
        self.counters.zero_()


def linear(
    x: Tensor,
    weight: Tensor | PackedWeights,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    silu: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    config: Config | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """x W^T for T = 1 .. 16 tokens, and what surrounds it: residual + act(rmsnorm(x) W^T + bias). Returns ``out``.

    x: bfloat16 [T, K]; with ``norm`` (float32 [K]; ``eps``) the float32 residual stream [T, K], normalised here.
    weight: bfloat16 [N, K] or ``PackedWeights``. bias: bfloat16 or float32 [N].
    silu: the first N / 2 rows are gates g, the others u: silu(g) * u, so that M = N / 2 instead of N is the width.
    residual: float32 [T, M], added last; then ``out`` is float32, and may be ``residual`` itself.
    out: bfloat16 or float32 [T, M], apart from x; if None, new in ``out_dtype``, or float32 with ``residual``.
    config: ``config_for(N, K)`` if None. workspace: for a split matrix; if None, new for this call.

    All contiguous, on one device, and starting at multiples of 16 bytes; K is a multiple of 8. No host
    synchronization; can be captured in a CUDA graph once it ran. Raises InvalidRequestError for other arguments.
    """
    n, k = weight.shape
    config = config or config_for(n, k)
    out = check_arguments(
        x,
        (weight,),
        bias=bias,
        norms=(norm,),
        silu=silu,
        residual=residual,
        out=out,
        out_dtype=out_dtype,
        config=config,
    )
    tokens = x.shape[0]
    grid, sums, counters = launch_shape(tokens, n, config, silu, 1, workspace, x.device)
    pairs: Tensor | None = None
    if isinstance(weight, PackedWeights):
        w, pairs, bits, group = weight.q, weight.pairs, weight.bits, weight.group
        stages, unroll = config.packed_stages, config.unroll(weight.group)
    else:
        w, bits, group, stages, unroll = weight, 16, 0, config.stages, 1
    linear_kernel[grid](
        x, norm, w, pairs, bias, residual, out, sums, counters, tokens, eps,
        SILU=silu, N=n, K=k, BITS=bits, GROUP=group, BN=config.block_n, BM=COLUMNS, BK=config.block_k,
        STAGES=stages, UNROLL=unroll, SPLIT=config.split,
        num_warps=config.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def check_arguments(
    x: Tensor,
    weights: tuple[Tensor | PackedWeights, ...],
    *,
    bias: Tensor | None,
    norms: tuple[Tensor | None, ...],
    silu: bool,
    residual: Tensor | None,
    out: Tensor | None,
    out_dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """``out``, made if None. Raises InvalidRequestError unless all is as ``linear`` says, for every weight and norm."""
    n, k = weights[0].shape
    tokens = x.shape[0] if x.dim() == 2 else 0
    _require(1 <= tokens <= MAX_TOKENS, "x", f"has shape {list(x.shape)}, not 1 .. {MAX_TOKENS} rows")
    _require(k % 8 == 0, "weight", f"has {k} columns, not a multiple of 8")
    _require(not silu or n % 2 == 0, "weight", f"has {n} rows: gates and ups are equally many")
    _require(not silu or config.block_n >= 32, "config", "gates and ups need block_n 32")
    for value, least in ((config.block_n, 16), (config.block_k, 16), (config.warps, 1)):
        _require(value >= least and value & (value - 1) == 0, "config", f"{value} is not a power of 2 from {least} on")
    _require(config.split >= 1, "config", f"split is {config.split}")

    floats = (torch.float32,)
    halves = (torch.bfloat16, torch.float32)
    normed = norms[0] is not None
    expect: list[tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("x", x, (tokens, k), floats if normed else (torch.bfloat16,)),
        ("bias", bias, (n,), halves),
    ]
    for norm in norms:
        _require((norm is not None) == normed, "norm", "is missing for one path")
        expect.append(("norm", norm, (k,), floats))
    for weight in weights:
        if isinstance(weight, PackedWeights):
            _require(weight.shape == (n, k), "weight", f"is {list(weight.shape)}, not {[n, k]}")
            expect.append(("q", weight.q, tuple(weight.q.shape), (torch.int16, torch.uint8)))
            expect.append(("pairs", weight.pairs, tuple(weight.pairs.shape), (torch.int32,)))
        else:
            expect.append(("weight", weight, (n, k), (torch.bfloat16,)))
    shape = (tokens, n // 2 if silu else n)
    expect.append(("residual", residual, shape, floats))
    if out is None:
        out = torch.empty(shape, dtype=out_dtype if residual is None else torch.float32, device=x.device)
    expect.append(("out", out, shape, halves if residual is None else floats))
    for name, tensor, size, dtypes in expect:
        if tensor is None:
            continue
        fits = tuple(tensor.shape) == size and tensor.dtype in dtypes
        _require(fits, name, f"is {tensor.dtype} {list(tensor.shape)}, not {dtypes[0]} {list(size)}")
        _require(tensor.is_contiguous(), name, "is not contiguous")
        _require(tensor.device == x.device, name, f"is on {tensor.device}, x on {x.device}")
        # Triton compiles another kernel for pointers that are not.
        _require(tensor.data_ptr() % 16 == 0, name, "does not start at a multiple of 16 bytes")
    usable = x.device.type == "cuda" or (INTERPRETED.value and x.device.type == "cpu")
    _require(usable, "x", f"is on {x.device}, and Triton's kernels need an NVIDIA GPU")
    return out


def _tiles(tokens: int, n: int, config: Config, silu: bool) -> tuple[int, int]:
    """Blocks of tokens, and of rows."""
    rows, block = (n // 2, config.block_n // 2) if silu else (n, config.block_n)
    return triton.cdiv(tokens, COLUMNS), triton.cdiv(rows, block)


def workspace_for(tokens: int, n: int, config: Config, *, silu: bool, parts: int, gated: bool) -> tuple[int, int]:
    """Floats and counters of the workspace that a launch needs; the arguments are those of ``launch_shape``."""
    blocks, tiles = _tiles(tokens, n, config, silu)
    counters = floats = 0
    if config.split > 1:
        counters = parts * blocks * tiles
        floats = counters * config.split * (config.block_n + 1) * COLUMNS
    if gated:
        counters += blocks
        floats += blocks * tiles * SUMS * COLUMNS
    return floats, counters


def launch_shape(
    tokens: int,
    n: int,
    config: Config,
    silu: bool,
    parts: int,
    workspace: Workspace | None,
    device: torch.device,
    gated: bool = False,
) -> tuple[tuple[int, int, int], Tensor | None, Tensor | None]:
    """Grid, partial sums and counters of a launch that has ``parts`` kinds of weights and, ``gated``, a gate.

    Those of the gate come last. Raises InvalidRequestError.
    """
    # Neighbours in the first dimension read the same weights, at nearly the same time.
    grid = (*_tiles(tokens, n, config, silu), config.split)
    floats, counters = workspace_for(tokens, n, config, silu=silu, parts=parts, gated=gated)
    if not counters:
        return grid, None, None
    workspace = workspace or Workspace(device, floats, counters)
    fits = workspace.sums.numel() >= floats and workspace.counters.numel() >= counters
    _require(fits, "workspace", f"is too small: {floats} floats and {counters} counters are needed")
    _require(workspace.sums.device == device, "workspace", f"is on {workspace.sums.device}, not {device}")
    return grid, workspace.sums, workspace.counters


def _require(condition: bool, field: str, problem: str) -> None:
    if not condition:
        raise InvalidRequestError(problem, field=field)
