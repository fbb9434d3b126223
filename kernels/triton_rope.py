"""From the joint q, k, v product of 1 .. 16 rows to rotated queries and the KV arena, in Triton: one launch.

A program takes one head of one row: it normalises, rotates and scales in float32 and rounds once, when it stores. V is
copied. Where a row goes, and whether it does, stands in device memory. ``triton_reference`` holds the plain torch
counterpart.

What is written to V is finite: attention multiplies it by the weights of rows that do not see it too, which are 0.
Where V is not, 0 stands for it, and the whole head of K becomes NaN, for the rows that see it.
"""
# Kernels have no annotations but constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverinfer.kernels.linear_launch import INTERPRETED, MAX_TOKENS
from riverinfer.kernels.require import require
from riverinfer.kernels.triton_dual_linear import FINISHED
from riverinfer.kernels.triton_linear import to_bfloat16

LARGEST_HEAD = 256
_FINISHED: tl.constexpr = tl.constexpr(FINISHED)
_INFINITY: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["length", "eps"])
def rope_kernel(
    qkv, position, slot, path, cos, sin, q_norm, k_norm, query_scale, kv, out, length, slot_stride, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, Hq + 2 Hkv)."""
    row, head = tl.program_id(0), tl.program_id(1)
    at, place = tl.load(position + row), tl.load(slot + row)  # before the branch: one latency for all loads
    d = tl.arange(0, DP)
    inside = d < D
    start = qkv + (row * (HQ + 2 * HKV) + head) * D
    y = tl.load(start + d, mask=inside, other=0.0).to(tl.float32)
    if tl.load(path + row) != _FINISHED:
        if head < HQ + HKV:
            turns = d < ROTARY
            other = tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
            partner = y
            if cos is not None:
                partner = tl.load(start + other, mask=turns, other=0.0).to(tl.float32)
            if q_norm is not None:
                inverse = tl.rsqrt(tl.sum(y * y, 0) / D + eps)
                if head < HQ:
                    weight = tl.load(q_norm + d, mask=inside, other=0.0)
                    partner_weight = tl.load(q_norm + other, mask=turns, other=0.0)
                else:
                    weight = tl.load(k_norm + d, mask=inside, other=0.0)
                    partner_weight = tl.load(k_norm + other, mask=turns, other=0.0)
                y = y * inverse * weight
                partner = partner * inverse * partner_weight
            if cos is not None:
                c = tl.load(cos + at * ROTARY + d, mask=turns, other=0.0)
                s = tl.load(sin + at * ROTARY + d, mask=turns, other=0.0)
                y = tl.where(turns, tl.fma(partner, s, y * c), y)  # one rounding for the sum, as addcmul has
            if query_scale is not None:
                y = y * tl.where(head < HQ, tl.load(query_scale + at), 1.0)
            if head >= HQ:
                value = tl.load(start + HKV * D + d, mask=inside, other=0.0).to(tl.float32)
                y = tl.where(tl.min((tl.abs(value) < _INFINITY).to(tl.int32), 0) > 0, y, float("nan"))
        else:
            y = tl.where(tl.abs(y) < _INFINITY, y, 0.0)
        if head < HQ:
            tl.store(out + (row * HQ + head) * D + d, to_bfloat16(y), mask=inside)
        else:  # kv heads: first those of K, then those of V
            cache = kv + place.to(tl.int64) * slot_stride + (head - HQ).to(tl.int64) * length * D
            tl.store(cache + at * D + d, to_bfloat16(y), mask=inside)


def rope_and_store(
    qkv: Tensor,
    position: Tensor,
    slot: Tensor,
    path: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    kv: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    query_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Queries bfloat16 [R, Hq, D] to ``out``, which is returned; K and V to ``kv[slot, :, :, position]``.

    qkv: bfloat16 [R, (Hq + 2 Hkv) D], R = 1 .. 16. position, slot, path: int32 [R], within ``kv``, which nobody checks.
    Of rows with path FINISHED nothing is written, and only ``path`` counts.
    cos, sin: float32 [>= S, rotary_dim], the first half of sin negated (``riverinfer.rope``), or None for no rotation.
    kv: bfloat16 [slots, 2, Hkv, S, D], one layer of the arena; slots may be apart by any multiple of 16 elements.
    q_norm, k_norm: float32 [D], both or none: RMS norm of each head, with ``eps``, before the rotation.
    query_scale: float32 [>= S], a factor for the queries of each position. out: if None, new.

    Contiguous but for ``kv``, on one device, and starting at multiples of 16 bytes; D is a multiple of 8 up to 256. No
    host synchronization; can be captured in a CUDA graph once it ran. Raises InvalidRequestError for other arguments.
    """
    rows = qkv.shape[0] if qkv.dim() == 2 else 0
    require(1 <= rows <= MAX_TOKENS, "qkv", f"has shape {list(qkv.shape)}, not 1 .. {MAX_TOKENS} rows")
    length, stride = check_arena(kv, num_kv_heads, head_dim)
    require((cos is None) == (sin is None), "sin", "and cos come together")
    require((q_norm is None) == (k_norm is None), "k_norm", "and q_norm come together")
    rotary = 0 if cos is None or cos.dim() != 2 else cos.shape[1]
    if cos is not None:
        require(0 < rotary <= head_dim and rotary % 2 == 0, "cos", f"is {list(cos.shape)}: no half of a head rotates")
    shape = (rows, num_heads, head_dim)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=qkv.device)
    check_tensor("qkv", qkv, (rows, (num_heads + 2 * num_kv_heads) * head_dim), torch.bfloat16, kv)
    check_tensor("out", out, shape, torch.bfloat16, kv)
    check_rows(rows, kv, position=position, slot=slot, path=path)
    for name, table, size in (("cos", cos, (rotary,)), ("sin", sin, (rotary,)), ("query_scale", query_scale, ())):
        if table is not None:
            long = table.shape[0] if table.dim() else 0
            require(long >= length, name, f"has {long} positions, kv {length}")
            check_tensor(name, table, (long, *size), torch.float32, kv)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_tensor(name, norm, (head_dim,), torch.float32, kv)
    rope_kernel[(rows, num_heads + 2 * num_kv_heads)](
        qkv, position, slot, path, cos, sin, q_norm, k_norm, query_scale, kv, out, length, stride, eps,
        HQ=num_heads, HKV=num_kv_heads, D=head_dim, DP=triton.next_power_of_2(head_dim), ROTARY=rotary,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def check_arena(kv: Tensor, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
    """(S, elements from slot to slot) of a layer of the arena. Raises InvalidRequestError unless it is one."""
    require(
        8 <= head_dim <= LARGEST_HEAD and head_dim % 8 == 0, "head_dim", f"is {head_dim}, not a multiple of 8 up to 256"
    )
    fits = kv.dim() == 5 and kv.dtype == torch.bfloat16
    require(fits, "kv", f"is {kv.dtype} {list(kv.shape)}, not bfloat16 [slots, 2, Hkv, S, D]")
    slots, two, kv_heads, length, dim = kv.shape
    found = [two, kv_heads, dim]
    require(found == [2, num_kv_heads, head_dim], "kv", f"has 2, Hkv, D {found}, not {[2, num_kv_heads, head_dim]}")
    require(0 < length * dim < 2**31, "kv", f"has {length} positions")
    require(slots > 0 and kv[0].is_contiguous(), "kv", "has no slots, or they are not contiguous")
    stride = kv.stride(0) if slots > 1 else 2 * kv_heads * length * dim
    # Triton compiles another kernel for addresses that are not.
    require(stride % 16 == 0 and kv.data_ptr() % 16 == 0, "kv", "does not have its slots at multiples of 16")
    usable = kv.device.type == "cuda" or (INTERPRETED.value and kv.device.type == "cpu")
    require(usable, "kv", f"is on {kv.device}, and Triton's kernels need an NVIDIA GPU")
    return length, stride


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, kv: Tensor) -> None:
    """Raises InvalidRequestError unless ``tensor`` is contiguous, aligned, of this kind, and where ``kv`` is."""
    fits = tuple(tensor.shape) == shape and tensor.dtype == dtype
    require(fits, name, f"is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
    require(tensor.is_contiguous(), name, "is not contiguous")
    require(tensor.device == kv.device, name, f"is on {tensor.device}, kv on {kv.device}")
    require(tensor.data_ptr() % 16 == 0, name, "does not start at a multiple of 16 bytes")


def check_rows(rows: int, kv: Tensor, **fields: Tensor) -> None:
    """Raises InvalidRequestError unless each of ``fields`` has an int32 for every row."""
    for name, tensor in fields.items():
        check_tensor(name, tensor, (rows,), torch.int32, kv)
