"""Plain torch counterparts of the Triton kernels: the same roundings, float32 sums in torch's order. Any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    silu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """What ``triton_linear.linear`` computes, in float32 and before ``out`` rounds it.

    x bfloat16 [T, K], or float32 with ``norm``; weight [N, K] of any float dtype, packed ones dequantized to float32.
    bias [N], norm float32 [K], residual float32 [T, M]. Returns float32 [T, M], M = N / 2 with ``silu``, else N.
    """
    right = x.float() if norm is None else (x * norm).to(torch.bfloat16).float()  # [T, K]
    y = right @ weight.float().T  # [T, N]
    if norm is not None:
        y = y * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)
    if bias is not None:
        y = y + bias.float()
    if silu:
        gate, up = y.chunk(2, 1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


def dual_linear(
    x: Tensor,
    path: Tensor,
    weight: Tensor,
    river: Tensor,
    *,
    out: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    river_norm: Tensor | None = None,
    eps: float = 0.0,
    silu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """What ``triton_dual_linear.dual_linear`` leaves in ``out``, here a new tensor of its dtype.

    river: the packed matrix dequantized, float32 [N, K]. Rows with another flag than 0 and 1 keep what ``out`` holds.
    """
    dense = linear(x, weight, bias=bias, norm=norm, eps=eps, silu=silu, residual=residual)
    norm = norm if river_norm is None else river_norm
    packed = linear(x, river, bias=bias, norm=norm, eps=eps, silu=silu, residual=residual)
    flags = path[:, None]
    chosen = torch.where(flags == 0, dense, packed).to(out.dtype)
    return torch.where((flags == 0) | (flags == 1), chosen, out)
