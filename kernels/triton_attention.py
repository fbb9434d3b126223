"""Attention of 1 .. 16 rows over the KV arena in Triton, for NVIDIA GPUs from Ampere on: flash-decoding, one launch.

A sequence's keys are cut into splits of a fixed number of positions, which different programs take. The last of them to
arrive puts their results together (Dao et al., Flash-Decoding, 2023). Of one kv head a program serves a tile of
``columns`` pairs (row, query head): the G = Hq / Hkv heads of row 0, then those of row 1, and so on. They are the rows
of the matrix unit's left operand, 16 of them, which are no more than it takes for one.

Row by row, the bits do not depend on what else is in the launch. Splits and the blocks of keys within them lie at fixed
positions, and what a pair must not see changes nothing of it: a hidden key has the weight 0, a block or a split of
them adds 0 and multiplies by 1. Positions before a program's first visible one and after its last are not read at all,
as anything, even NaN, may lie there.

Programs know from the positions of their rows which splits take part; the others leave at once. So the grid depends
on the arena's length alone and can be captured in a CUDA graph, and what counts arrivals is exact.
"""
# Kernels have no annotations but constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverinfer.kernels.linear_launch import MAX_TOKENS, Workspace
from riverinfer.kernels.require import require
from riverinfer.kernels.triton_dual_linear import FINISHED
from riverinfer.kernels.triton_linear import dot, to_bfloat16
from riverinfer.kernels.triton_rope import check_arena, check_rows, check_tensor

_FINISHED: tl.constexpr = tl.constexpr(FINISHED)
_HIDDEN: tl.constexpr = tl.constexpr(-3e38)  # a score below all others; not -inf, whose difference with itself is NaN
_FAR: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def split_attention(
    x, k, v, positions, lowest, first, last, split,
    D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of queries x [COLUMNS, DP] over the positions of a split, before it is divided by the sum of weights.

    Column c sees lowest[c] .. positions[c], the tile as a whole first .. last; k and v point to position 0. Returns
    the weighted sum of values [COLUMNS, DP], the largest score and the sum of weights [COLUMNS], all float32. Scores
    are in units of log 2.
    """
    SCALE: tl.constexpr = 1.4426950408889634 / D**0.5
    t, d = tl.arange(0, KEYS), tl.arange(0, DP)
    top = tl.full((COLUMNS,), _HIDDEN, tl.float32)
    sums = tl.zeros((COLUMNS, KEYS), tl.float32)  # added up at the end: once across warps is enough
    acc = tl.zeros((COLUMNS, DP), tl.float32)
    begin = tl.maximum(split * SPLIT, first // KEYS * KEYS)
    end = tl.minimum((split + 1) * SPLIT, last + 1)
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        at = start + t
        mask = ((at >= first) & (at <= last))[:, None]
        if DP != D:
            mask = mask & (d < D)[None, :]
        place = at[:, None] * D + d[None, :]
        keys = tl.load(k + place, mask=mask, other=0.0)  # [KEYS, DP]
        scores = dot(x, tl.trans(keys), tl.zeros((COLUMNS, KEYS), tl.float32)) * SCALE
        seen = (at[None, :] <= positions[:, None]) & (at[None, :] >= lowest[:, None])
        scores = tl.where(seen, scores, _HIDDEN)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
        decay = tl.exp2(top - higher)
        sums = sums * decay[:, None] + weights
        values = tl.load(v + place, mask=mask, other=0.0)
        acc = dot(to_bfloat16(weights), values, acc * decay[:, None])
        top = higher
    return acc, top, tl.sum(sums, 1)


@triton.jit(do_not_specialize=["n", "length", "window"])
def attention_kernel(
    q, kv, position, slot, path, out, workspace, counters, n, length, slot_stride, window,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences x tiles of their pairs, kv heads, splits of ``length`` positions)."""
    tiles = tl.cdiv(n * G, COLUMNS)
    sequence, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, split = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * G
    pair = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = pair < n * G
    row = sequence * n + pair // G
    live = inside & (tl.load(path + row, mask=inside, other=_FINISHED) != _FINISHED)
    positions = tl.where(live, tl.load(position + row, mask=inside, other=0), -1)
    place = tl.max(tl.where(live, tl.load(slot + row, mask=inside, other=0), 0), 0)
    lowest = tl.maximum(positions + 1 - window, 0)
    last = tl.max(positions, 0)
    first = tl.min(tl.where(live, lowest, _FAR), 0)
    if (split * SPLIT <= last) & ((split + 1) * SPLIT > first):  # never without a live row
        d = tl.arange(0, DP)
        line = row * heads + kv_head * G + pair % G  # of q and out
        mask = live[:, None] & (d < D)[None, :]
        x = tl.load(q + line[:, None] * D + d[None, :], mask=mask, other=0.0)
        k = kv + place.to(tl.int64) * slot_stride + kv_head.to(tl.int64) * length * D
        v = k + tl.num_programs(1).to(tl.int64) * length * D
        acc, top, total = split_attention(
            x, k, v, positions, lowest, first, last, split, D, DP, COLUMNS, KEYS, SPLIT, STAGES
        )  # fmt: skip
        begin, end = first // SPLIT, last // SPLIT + 1
        if end - begin == 1:
            finish(out, line, d, acc + 0.0, total, live, D)  # no negative zeros, as where 0 is added to them
        else:
            splits = tl.num_programs(2)
            stats = workspace + (tl.num_programs(0) // tiles) * n * heads * splits * D
            part = line * splits + split
            tl.store(workspace + part[:, None] * D + d[None, :], acc, mask=mask)
            tl.store(stats + part * 2, top, mask=live)
            tl.store(stats + part * 2 + 1, total, mask=live)
            tl.debug_barrier()  # every thread's stores come before the count
            counter = counters + tl.program_id(0) * tl.num_programs(1) + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == end - begin - 1:
                tl.atomic_xchg(counter, 0)  # for the next launch
                for block in tl.range(0, tl.minimum(COLUMNS, n * G - tile * COLUMNS), PAIRS):
                    combine(
                        path, out, workspace, stats, sequence * n, tile * COLUMNS + block, n * G, heads, kv_head * G,
                        splits, begin, end, G, D, DP, PAIRS, PARTS,
                    )  # fmt: skip


@triton.jit
def combine(
    path, out, workspace, stats, first_row, first_pair, pairs, heads, first_head, splits, begin, end,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Put splits begin .. end - 1 of PAIRS pairs together and store the result.

    PARTS splits at a time, in ascending order; the sum of those that begin at a multiple of PARTS is a fixed tree.
    Splits that have nothing for a pair, and those of the tree that are not there, add 0.
    """
    pair = first_pair + tl.arange(0, PAIRS)
    d = tl.arange(0, DP)
    live = pair < pairs
    row = first_row + pair // G
    live = live & (tl.load(path + row, mask=live, other=_FINISHED) != _FINISHED)
    if tl.max(live.to(tl.int32), 0) > 0:
        line = row * heads + first_head + pair % G
        top = tl.full((PAIRS,), _HIDDEN, tl.float32)
        total = tl.zeros((PAIRS,), tl.float32)
        acc = tl.zeros((PAIRS, DP), tl.float32)
        for start in tl.range(begin // PARTS * PARTS, end, PARTS):
            s = start + tl.arange(0, PARTS)
            part = line[:, None] * splits + s[None, :]  # [PAIRS, PARTS]
            mask = live[:, None] & ((s >= begin) & (s < end))[None, :]
            # Other programs wrote them: .cg reads them from where all can see them.
            tops = tl.load(stats + part * 2, mask=mask, other=_HIDDEN, cache_modifier=".cg")
            totals = tl.load(stats + part * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
            sums = tl.load(
                workspace + part[:, :, None] * D + d[None, None, :],
                mask=mask[:, :, None] & (d < D)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )  # [PAIRS, PARTS, DP]
            higher = tl.maximum(top, tl.max(tops, 1))
            weights = tl.exp2(tops - higher[:, None])
            decay = tl.exp2(top - higher)
            total = total * decay + tl.sum(totals * weights, 1)
            acc = acc * decay[:, None] + tl.sum(sums * weights[:, :, None], 1)
            top = higher
        finish(out, line, d, acc, total, live, D)


@triton.jit
def finish(out, line, d, acc, total, live, D: tl.constexpr):
    """acc [n, DP] / total [n] to the lines of ``out`` that are live."""
    at = line[:, None] * D + d[None, :]
    tl.store(out + at, to_bfloat16(acc / total[:, None]), mask=live[:, None] & (d < D)[None, :])


@dataclass(frozen=True)
class Blocks:
    """How a program works. All but ``stages`` order sums: they are functions of the head dimension alone.

    A tile of ``columns`` pairs takes ``keys`` positions at a time, with ``stages`` of them on their way, in ``warps``
    warps. The last program takes ``parts`` splits of ``pairs`` pairs at a time. Powers of 2.
    """

    keys: int
    parts: int
    columns: int = 16  # the fewest that the matrix unit takes; with 64, Hopper's would be another
    warps: int = 4
    stages: int = 3
    pairs: int = 4


def blocks_for(head_dim: int) -> Blocks:
    """What fits the registers, and three programs a multiprocessor of an H100. Reasoned, not measured."""
    width = max(64, triton.next_power_of_2(head_dim))
    return Blocks(keys=8192 // width, parts=8 if width <= 128 else 4)


def split_for(length: int) -> int:
    """Positions of a split in an arena of ``length``: some 32 splits, which short contexts have fewer of."""
    return min(max(triton.next_power_of_2(triton.cdiv(length, 32)), 128), 1024)


def workspace_size(
    rows: int,
    rows_per_sequence: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    length: int,
    split: int | None = None,
) -> tuple[int, int]:
    """Floats and counters that ``decode_attention`` needs in its workspace for an arena of ``length`` positions."""
    split = split_for(length) if split is None else split
    pairs = rows_per_sequence * (num_heads // num_kv_heads)
    tiles = rows // rows_per_sequence * triton.cdiv(pairs, blocks_for(head_dim).columns)
    return rows * num_heads * triton.cdiv(length, split) * (head_dim + 2), tiles * num_kv_heads


def decode_attention(
    q: Tensor,
    kv: Tensor,
    position: Tensor,
    slot: Tensor,
    path: Tensor,
    *,
    rows_per_sequence: int,
    window: int | None = None,
    out: Tensor | None = None,
    split: int | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Grouped-query attention of R = 1 .. 16 rows, each over its slot: bfloat16 [R, Hq D]. Returns ``out``.

    q: bfloat16 [R, Hq, D]; kv: bfloat16 [slots, 2, Hkv, S, D], one layer of the arena, where K and V of all rows are
    written already; Hq is a multiple of Hkv. Slots may be apart by any multiple of 16 elements.
    position, slot, path: int32 [R], within ``kv``, which nobody checks. The row at position p sees p and what is before
    it, ``window`` positions in all if that is not None. Scores are scaled by D ** -0.5.
    Of rows with path FINISHED ``out`` is left as it is, and only ``path`` counts.
    rows_per_sequence: n; rows i n .. i n + n - 1 belong to one sequence: they share its slot and have consecutive
    positions, and those that are finished come last.
    out: if None, new. split: positions that a program takes, ``split_for(S)`` if None; it orders sums.
    workspace: as large as ``workspace_size`` says; if None, new for this call.

    Contiguous but for ``kv``, on one device, and starting at multiples of 16 bytes; D is a multiple of 8 up to 256. No
    host synchronization; can be captured in a CUDA graph once it ran. Raises InvalidRequestError for other arguments.
    """
    rows, heads, dim = q.shape if q.dim() == 3 else (0, 0, 0)
    require(1 <= rows <= MAX_TOKENS, "q", f"has shape {list(q.shape)}, not [1 .. {MAX_TOKENS}, Hq, D]")
    kv_heads = kv.shape[2] if kv.dim() == 5 else 0
    length, stride = check_arena(kv, kv_heads, dim)
    require(kv_heads > 0 and heads > 0 and heads % kv_heads == 0, "q", f"has {heads} heads, kv {kv_heads}")
    n, blocks = rows_per_sequence, blocks_for(dim)
    require(n >= 1 and rows % n == 0, "rows_per_sequence", f"is {n}, and q has {rows} rows")
    require(window is None or window >= 1, "window", f"is {window}")
    split = split_for(length) if split is None else split
    whole = split >= blocks.keys and split % blocks.keys == 0
    require(whole, "split", f"is {split}, not a multiple of {blocks.keys}")
    if out is None:
        out = torch.empty(rows, heads * dim, dtype=torch.bfloat16, device=q.device)
    check_tensor("q", q, (rows, heads, dim), torch.bfloat16, kv)
    check_tensor("out", out, (rows, heads * dim), torch.bfloat16, kv)
    check_rows(rows, kv, position=position, slot=slot, path=path)

    floats, counters = workspace_size(
        rows, n, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, length=length, split=split
    )
    require(floats < 2**31, "split", f"is {split}: too short for {length} positions")
    workspace = workspace or Workspace(q.device, floats, counters)
    fits = workspace.sums.numel() >= floats and workspace.counters.numel() >= counters
    require(fits, "workspace", f"is too small: {floats} floats and {counters} counters are needed")
    require(workspace.sums.device == q.device, "workspace", f"is on {workspace.sums.device}, not {q.device}")
    grid = (counters // kv_heads, kv_heads, triton.cdiv(length, split))
    attention_kernel[grid](
        q, kv, position, slot, path, out, workspace.sums, workspace.counters, n, length, stride,
        length if window is None else min(window, length),
        G=heads // kv_heads, D=dim, DP=triton.next_power_of_2(max(dim, 16)), COLUMNS=blocks.columns, KEYS=blocks.keys,
        SPLIT=split, STAGES=blocks.stages, PAIRS=blocks.pairs, PARTS=blocks.parts,
        num_warps=blocks.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out
