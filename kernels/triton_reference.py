"""Plain torch counterparts of the Triton kernels: the same roundings, float32 sums in torch's order. Any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from riverinfer.kernels import torch_ops
from riverinfer.sampling import _MASK, _start, _variates

if TYPE_CHECKING:
    from riverinfer.kernels.triton_sampling import SamplingState


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


def gate(
    before: Tensor,
    after: Tensor,
    path: Tensor,
    *,
    layer: int,
    tau: Tensor,
    limits: Tensor,
    depth: Tensor,
    undefined: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``triton_gate.DeviceGate`` makes of path, depth and undefined (int32 [T]), and the similarities float32 [T].

    before, after float32 [T, N]. All four are new; of finished rows, the similarity is of no meaning.
    """
    similarity = F.cosine_similarity(before, after, dim=1)
    backbone = path == 0
    passed = depth + backbone.int()
    forced = passed >= limits[1]
    asked = backbone & (passed >= limits[0]) & ~forced
    opened = backbone & forced | asked & (similarity > tau[layer])
    lost = asked & similarity.isnan()
    return torch.where(opened, 1, path), passed, undefined + lost.int(), similarity


def sample(logits: Tensor, state: SamplingState, position: Tensor, *, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What ``triton_sampling.sample`` writes for rows that are not finished, in float64 and with exact scores.

    logits float32 [R, V]; position int [R]. Returns token int64, logprob and confidence float32, all [R].
    """
    chosen: list[tuple[int, float, float]] = []
    for row, at in zip(logits[:, :vocab_size], position.tolist(), strict=True):
        i = len(chosen)
        temperature, k, top_p = state.temperature[i].item(), int(state.top_k[i]), state.top_p[i].item()
        logprobs, peak = row.double().log_softmax(0), row.max().double()  # [vocab]
        greedy = int(row.argmax())
        if not peak.isfinite() or not temperature > 0 or k == 1:
            likeliest = float(logprobs[greedy].exp()) if peak.isfinite() else 0.0
            chosen.append((greedy, float(logprobs[greedy]), likeliest))
            continue
        s = (row.double() - peak) / temperature
        stays = torch.ones_like(s, dtype=torch.bool)
        if 0 < k < len(s):
            stays = s >= s.topk(k).values[-1]
        if top_p < 1:
            values = s[stays].sort(descending=True).values
            short = int((values.softmax(0).cumsum(0) < top_p).sum())
            stays &= s >= values[min(short, len(values) - 1)]
        stays &= s >= state.min_p[i].clamp(max=1).log()
        p = torch.where(stays, s, -torch.inf).softmax(0)
        start = _start(int(state.seed[i]) & _MASK, at)
        token = int((_variates(start, torch.arange(len(p), device=p.device)) / p).argmin())
        sure = logprobs[greedy].exp() if stays.sum() == 1 else p.max()
        chosen.append((token, float(logprobs[token]), float(sure)))
    tokens, *reals = zip(*chosen, strict=True)
    logprob, confidence = (torch.tensor(x, dtype=torch.float32, device=logits.device) for x in reals)
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device), logprob, confidence


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
    """What ``triton_rope.rope_and_store`` does, to ``kv`` and ``out`` alike."""
    if out is None:
        out = torch.empty(qkv.shape[0], num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim).float()  # [R, Hq + 2 Hkv, D]
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    at = position.long()
    if q_norm is not None and k_norm is not None:
        q, k = torch_ops.rms_norm(q, q_norm, eps), torch_ops.rms_norm(k, k_norm, eps)
    if cos is not None and sin is not None:
        tables = cos[at].unsqueeze(1), sin[at].unsqueeze(1)  # [R, 1, rotary_dim]
        q, k = torch_ops.rotate(q, *tables), torch_ops.rotate(k, *tables)
    if query_scale is not None:
        q = q * query_scale[at, None, None]
    finite = v.isfinite()
    k, v = k.masked_fill(~finite.all(-1, keepdim=True), float("nan")), v.masked_fill(~finite, 0)
    for row in (path != 2).nonzero().flatten():
        out[row] = q[row].to(out.dtype)
        kv[slot[row], 0, :, at[row]], kv[slot[row], 1, :, at[row]] = k[row].to(kv.dtype), v[row].to(kv.dtype)
    return out


def decode_attention(
    q: Tensor,
    kv: Tensor,
    position: Tensor,
    slot: Tensor,
    path: Tensor,
    *,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What ``triton_attention.decode_attention`` leaves in ``out``, here a new tensor of its dtype.

    Without ``out`` float32 [R, Hq D], before it is rounded, with zeros for finished rows. Weights are not rounded.
    """
    rows, heads, dim = q.shape
    made = q.new_zeros(rows, heads * dim, dtype=torch.float32) if out is None else out.clone()
    for row in (path != 2).nonzero().flatten().tolist():
        end = int(position[row]) + 1
        start = 0 if window is None else max(0, end - window)
        k, v = kv[slot[row], :, :, start:end].float()  # [Hkv, S, D] each
        grouped = q[row].view(k.shape[0], -1, dim).float()  # [Hkv, G, D]
        weights = torch.softmax(grouped @ k.transpose(1, 2) * dim**-0.5, -1)
        made[row] = (weights @ v).flatten().to(made.dtype)
    return made
