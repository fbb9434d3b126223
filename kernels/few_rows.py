"""Norm and attention for steps of a few tokens on a CPU, where operators cost more to call than to compute.

A row's result does not depend, to the bit, on how many rows pass at once (bfloat16): a batch of up to ``FEW`` tokens
that verifies a draft gives what one token at a time gives. ``torch_ops`` is the reference, and other devices' path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from riverinfer.kernels import torch_ops

FEW = 16  # tokens; longer steps are prefill
# torch's CPU attention adds up positions a vector at a time and then the rest: between two multiples of the vector the
# order does not change. It takes 32 query rows at a time, and multiplies a block of a single one another way.
_LANES = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
_MAX_QUERIES = 32
_packet = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_operator: Any = None if _packet is None else _packet.default


@dataclass(slots=True)
class Span:
    """Rows of a step, first_row .. end_row - 1, and the cache positions, first .. end - 1, that they attend to.

    mask: added to the scores, [1, 1, rows * G, end - first] in the cache's dtype; None for a single row.
    """

    first_row: int
    end_row: int
    first: int
    end: int
    mask: Tensor | None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``torch_ops.rms_norm`` of float32 x [T, H], rounded to ``dtype``."""
    if x.shape[0] > FEW or x.device.type != "cpu":
        return torch_ops.rms_norm(x, weight, eps).to(dtype)
    size = x.shape[1]
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # [T, 1]
    if x.shape[0] == 1:
        length = norm.item()
        return (x * weight).mul_(1 / math.sqrt(length * length / size + eps)).to(dtype)
    # The same arithmetic in float64 for every row.
    inverse = norm.double().square_().div_(size).add_(eps).sqrt_().reciprocal_()
    return (x * weight).mul_(inverse.float()).to(dtype)


def spans(start: int, length: int, window: int | None, group: int, dtype: torch.dtype) -> list[Span]:
    """Who sees whom when positions start .. start + length - 1 join a cache; ``group`` query heads share a kv head.

    Rows are together as long as they begin at the same position and end between the same multiples of a vector.
    """
    found: list[Span] = []
    most = 1 if group == 1 else _MAX_QUERIES // group
    for row in range(length):
        end = start + row + 1
        first = 0 if window is None else max(0, end - window)
        last = found[-1] if found else None
        fits = last is not None and last.first == first and row - last.first_row < most
        if last is not None and fits and (end - first) // _LANES == (last.end - first) // _LANES:
            last.end_row, last.end = row + 1, end
        else:
            found.append(Span(row, row + 1, first, end, None))
    for span in found:
        rows = span.end_row - span.first_row
        if rows > 1:
            ends = torch.arange(span.end - rows, span.end)[:, None]  # [rows, 1], the last position each row sees
            hidden = torch.arange(span.first, span.end)[None, :] > ends  # [rows, S]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
            span.mask = mask.repeat_interleave(group, 0)[None, None]
    return found


@cache
def attention_works() -> bool:
    """Whether this torch build has the CPU attention operator, and it computes what the reference does: tried."""
    if _operator is None:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8), (2, 19, 8), (2, 19, 8)))
    try:
        got = attention(q, k, v, spans(17, 2, None, 2, torch.float32))
    except RuntimeError:
        return False
    _, mask = torch_ops.causal_mask(17, 2, None, torch.device("cpu"))
    return bool(torch.allclose(got, torch_ops.attention(q, k, v, mask), atol=1e-5))


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, parts: list[Span]) -> Tensor:
    """Grouped-query attention of T <= FEW tokens: q [T, Hq, D], caches [Hkv, S, D], to [T, Hq * D].

    ``parts`` from ``spans``. Scores are scaled by D ** -0.5.
    """
    tokens, heads, dim = q.shape
    kv_heads = k_cache.shape[0]
    out = []
    for part in parts:
        size = part.end - part.first
        k = k_cache.narrow(1, part.first, size).unsqueeze(0)  # [1, Hkv, S, D]
        v = v_cache.narrow(1, part.first, size).unsqueeze(0)
        rows = part.end_row - part.first_row
        if rows == 1:
            # The G query heads of a kv head are the rows of one small matrix.
            x = (q if tokens == 1 else q[part.first_row]).view(1, kv_heads, -1, dim)  # [1, Hkv, G, D]
            mixed = _operator(x, k, v)[0].view(1, heads * dim)
        else:
            x = q[part.first_row : part.end_row].view(rows, kv_heads, -1, dim)
            x = x.transpose(0, 1).reshape(1, kv_heads, -1, dim)  # [1, Hkv, rows * G, D]
            mixed = _operator(x, k, v, attn_mask=part.mask)[0].view(kv_heads, rows, -1, dim)
            mixed = mixed.transpose(0, 1).reshape(rows, heads * dim)
        out.append(mixed)
    return out[0] if len(out) == 1 else torch.cat(out)
