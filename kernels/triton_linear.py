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

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverinfer.kernels.linear_launch import (
    COLUMNS,
    INTERPRETED,
    Config,
    Workspace,
    check_arguments,
    config_for,
    launch_shape,
)
from riverinfer.kernels.packed_weights import PackedWeights
from riverinfer.kernels.triton_gate import leave_shares

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
    """a [M, K] b [K, N] + c, bfloat16 operands, float32 sums.

    The interpreter's products are a library's, whose float32 sums may hang on where a row stands: it adds in float64.
    """
    if INTERPRETED:
        return c + tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
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
