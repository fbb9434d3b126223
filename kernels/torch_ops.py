"""Norm, rotary embedding, attention and gated activation in plain torch: the reference on every device.

Shapes: T tokens, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head dimension, S cached positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of float32 x over the last dimension, weight float32 (arXiv 1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of each head, R = cos.shape[-1]; returns float32.

    x [T, H, D] of any float dtype; cos, sin float32 [T, 1, R] with the first half of sin negated
    (``riverinfer.rope``). Products and sum are float32: the result is rounded once, when it is stored.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim == x.shape[-1]:
        return (x * cos).addcmul_(x.roll(rotary_dim // 2, -1), sin)
    turned = x[..., :rotary_dim]
    turned = (turned * cos).addcmul_(turned.roll(rotary_dim // 2, -1), sin)
    return torch.cat((turned, x[..., rotary_dim:].float()), -1)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [T, 2 I], gate first; returns [T, I]."""
    half = gate_up.shape[-1] // 2
    return F.silu(gate_up[:, :half]).mul_(gate_up[:, half:])


def causal_mask(start: int, length: int, window: int | None, device: torch.device) -> tuple[int, Tensor | None]:
    """Who sees whom when positions start .. start + length - 1 join a cache.

    Returns (first, mask): attention reads cache positions first .. start + length - 1; mask is bool
    [length, S] over those, True = visible, or None when plain causal or full visibility says it all.
    With a window w, position i sees j with i - w < j <= i.
    """
    end = start + length
    first = 0 if window is None else max(0, start + 1 - window)
    if length == 1 or (first == 0 and start == 0 and (window is None or window >= end)):
        return first, None
    rows = torch.arange(start, end, device=device)[:, None]  # [T, 1]
    columns = torch.arange(first, end, device=device)[None, :]  # [1, S]
    mask = columns <= rows
    if window is not None:
        mask &= columns > rows - window
    return first, mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention of T new tokens over S cached positions, theirs included.

    q [T, Hq, D], k and v [Hkv, S, D], mask bool [T, S] or None. None means causal when T == S, and everything
    visible when T == 1. Returns [T, Hq * D]. Scores are scaled by D ** -0.5.
    """
    tokens, heads, dim = q.shape
    if tokens == 1:
        # One token: the G query heads of a kv head are the rows of one small matrix.
        grouped = q.view(1, k.shape[0], -1, dim)  # [1, Hkv, G, D]
        return F.scaled_dot_product_attention(grouped, k.unsqueeze(0), v.unsqueeze(0)).view(1, heads * dim)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),  # [1, Hq, T, D]
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=heads != k.shape[0],
    )
    return out[0].transpose(0, 1).reshape(tokens, heads * dim)
