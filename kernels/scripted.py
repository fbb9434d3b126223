"""Decoder layers for a few tokens as one TorchScript call: ``model.DecoderLayer`` without Python between operators.

On a CPU a token passes some 25 operators a layer, most of them shorter than the Python that calls them. The script runs
the same operators in the same order, so its results are equal to the bit; it is compiled in milliseconds at load. Where
torch has no TorchScript, or a layer has a matrix this file does not know, the plain layers run.
"""

# TorchScript reads the annotations of this file itself: no postponed evaluation, and Optional in its long form.
# ruff: noqa: UP045

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from riverinfer.kernels.few_rows import Span
from riverinfer.kernels.linear import Linear, PackedLinear, PlainLinear
from riverinfer.kernels.quantized_linear import CpuInt4Linear, CpuNibblesLinear

_PLAIN, _PACKED, _INT4, _NIBBLES = 0, 1, 2, 3
_LINEARS = ("qkv", "o", "gate_up", "down")

MARKS = ("norm", "qkv", "rope", "attention", "o", "norm", "gate_up", "silu", "down")  # of a layer, as they end

Marked = Callable[[int, int], None]  # (index in MARKS, layer)
_listening: list[Marked] = []  # who hears of the script that runs


@torch.jit.ignore
def _mark(which: int, layer: int) -> None:
    _listening[0](which, layer)


def _multiply(x: Tensor, kind: int, weight: Tensor, scales: Tensor, group: int, bias: Optional[Tensor]) -> Tensor:
    if kind == 0:
        return F.linear(x, weight, bias)
    if kind == 1:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    y = torch._weight_int4pack_mm_for_cpu(x, weight, group, scales)
    if kind == 3:
        half = y.size(1) // 2
        y = y[:, :half] + y[:, half:]
    return y if bias is None else y + bias


def _norm(x: Tensor, weight: Tensor, eps: float, like: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, 2, [1], True)  # [T, 1]
    if x.size(0) == 1:
        length = float(norm)
        return (x * weight).mul_(1.0 / math.sqrt(length * length / x.size(1) + eps)).to(like.dtype)
    inverse = norm.double().square_().div_(x.size(1)).add_(eps).sqrt_().reciprocal_()
    return (x * weight).mul_(inverse.float()).to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.size(-1)
    if size == x.size(-1):
        return (x * cos).addcmul_(x.roll(size // 2, -1), sin)
    turned = x[..., :size]
    turned = (turned * cos).addcmul_(turned.roll(size // 2, -1), sin)
    return torch.cat((turned, x[..., size:].float()), -1)


def _attend(q: Tensor, cache: Tensor, parts: list[list[int]], masks: list[Optional[Tensor]]) -> Tensor:
    """``few_rows.attention``; cache [2, Hkv, S, D] holds K and V."""
    heads, dim, kv_heads = q.size(1), q.size(2), cache.size(1)
    if len(parts) == 1 and q.size(0) == 1:
        seen = cache.narrow(2, parts[0][2], parts[0][3] - parts[0][2])
        q = q.view(1, kv_heads, heads // kv_heads, dim)
        return torch._scaled_dot_product_flash_attention_for_cpu(q, seen[0:1], seen[1:2])[0].view(1, heads * dim)
    out: list[Tensor] = []
    for i, part in enumerate(parts):
        seen = cache.narrow(2, part[2], part[3] - part[2])
        rows = part[1] - part[0]
        x = q[part[0] : part[1]].view(rows, kv_heads, -1, dim).transpose(0, 1).reshape(1, kv_heads, -1, dim)
        mixed = torch._scaled_dot_product_flash_attention_for_cpu(x, seen[0:1], seen[1:2], attn_mask=masks[i])[0]
        out.append(mixed.view(kv_heads, rows, -1, dim).transpose(0, 1).reshape(rows, heads * dim))
    return out[0] if len(out) == 1 else torch.cat(out)


class _Stack(torch.nn.Module):
    """The weights of L layers as flat lists, four linears a layer in the order of ``_LINEARS``.

    ``timed``: tell of every operator's end (``MARKS``). A constant: without it the compiled script has no marks.
    """

    timed: torch.jit.Final[bool]

    def __init__(self, layers: Sequence[Any], windows: Sequence[Optional[int]], timed: bool) -> None:
        super().__init__()
        self.timed = timed
        first = layers[0]
        self.heads: int = first.num_heads
        self.kv_heads: int = first.num_kv_heads
        self.dim: int = first.head_dim
        self.eps: float = first.eps
        self.use_rope: list[bool] = [layer.use_rope for layer in layers]
        self.window: list[int] = [windows.index(layer.window) for layer in layers]
        self.input_norm: list[Tensor] = [layer.input_norm for layer in layers]
        self.post_norm: list[Tensor] = [layer.post_norm for layer in layers]
        self.q_norm: list[Optional[Tensor]] = [layer.q_norm for layer in layers]
        self.k_norm: list[Optional[Tensor]] = [layer.k_norm for layer in layers]
        described = [_describe(getattr(layer, name)) for layer in layers for name in _LINEARS]
        self.kinds: list[int] = [kind for kind, *_ in described]
        self.weights: list[Tensor] = [weight for _, weight, *_ in described]
        self.scales: list[Tensor] = [scales for _, _, scales, *_ in described]
        self.groups: list[int] = [group for *_, group, _ in described]
        self.biases: list[Optional[Tensor]] = [bias for *_, bias in described]

    def _linear(self, x: Tensor, i: int) -> Tensor:
        return _multiply(x, self.kinds[i], self.weights[i], self.scales[i], self.groups[i], self.biases[i])

    def forward(
        self,
        h: Tensor,
        first: int,
        last: int,
        start: int,
        cos: Tensor,
        sin: Tensor,
        query_scale: Optional[Tensor],
        caches: list[Tensor],
        parts: list[list[list[int]]],
        masks: list[list[Optional[Tensor]]],
    ) -> Tensor:
        tokens, heads, kv_heads, dim = h.size(0), self.heads, self.kv_heads, self.dim
        # V is turned by nothing together with Q and K: one operator for the three, and one copy into the cache.
        still = [tokens, kv_heads, cos.size(2)]
        cos_all = torch.cat((cos.expand(-1, heads + kv_heads, -1), torch.ones(still)), 1)  # [T, Hq + 2 Hkv, R]
        sin_all = torch.cat((sin.expand(-1, heads + kv_heads, -1), torch.zeros(still)), 1)
        for i in range(first, last):
            cache = caches[i - first]  # [2, Hkv, S, D]
            x = _norm(h, self.input_norm[i], self.eps, cache)
            if self.timed:
                _mark(0, i)
            x = self._linear(x, 4 * i)
            if self.timed:
                _mark(1, i)
            x = x.view(tokens, heads + 2 * kv_heads, dim)  # [T, Hq + 2 Hkv, D]
            q_norm, k_norm = self.q_norm[i], self.k_norm[i]
            if q_norm is not None and k_norm is not None:
                wide = x.float()
                q = torch.rms_norm(wide[:, :heads], [dim], q_norm, self.eps)
                k = torch.rms_norm(wide[:, heads : heads + kv_heads], [dim], k_norm, self.eps)
                x = torch.cat((q, k, wide[:, heads + kv_heads :]), 1)
            if self.use_rope[i]:
                x = _rotate(x, cos_all, sin_all)
            q = x[:, :heads]
            if query_scale is not None:
                q = (q * query_scale).to(cache.dtype)
                x = x.to(cache.dtype)
            else:
                x = x.to(cache.dtype)
                q = x[:, :heads]
            new = x[:, heads:].view(tokens, 2, kv_heads, dim).permute(1, 2, 0, 3)
            cache.narrow(2, start, tokens).copy_(new)
            if self.timed:
                _mark(2, i)
            which = self.window[i]
            x = _attend(q, cache, parts[which], masks[which])
            if self.timed:
                _mark(3, i)
            h = h + self._linear(x, 4 * i + 1)
            if self.timed:
                _mark(4, i)
            x = _norm(h, self.post_norm[i], self.eps, cache)
            if self.timed:
                _mark(5, i)
            gate, up = self._linear(x, 4 * i + 2).chunk(2, 1)
            if self.timed:
                _mark(6, i)
            x = F.silu(gate).mul_(up)
            if self.timed:
                _mark(7, i)
            h = h + self._linear(x, 4 * i + 3)
            if self.timed:
                _mark(8, i)
        return h


class ScriptedLayers:
    """Layers first .. last - 1 of a stack in one call."""

    def __init__(self, script: Any, windows: list[Optional[int]], marked: Optional[Marked] = None) -> None:
        self._script, self._windows, self._marked = script, windows, marked

    def __call__(self, h: Tensor, first: int, last: int, step: Any, caches: list[Tensor]) -> Tensor:
        """h float32 [T, H] before layer ``first`` to the same after layer ``last - 1``.

        ``step`` must have spans. ``caches``: per layer K and V together, [2, Hkv, S, D].
        """
        spans: list[list[Span]] = [step.spans[window] for window in self._windows]
        arguments = (
            h,
            first,
            last,
            step.start,
            step.cos,
            step.sin,
            step.query_scale,
            caches if last - first == len(caches) else caches[first:last],
            [[[span.first_row, span.end_row, span.first, span.end] for span in parts] for parts in spans],
            [[span.mask for span in parts] for parts in spans],
        )
        if self._marked is None:
            return self._script(*arguments)
        _listening[:] = [self._marked]
        try:
            return self._script(*arguments)
        finally:
            _listening.clear()


def script_layers(layers: Sequence[Any], marked: Optional[Marked] = None) -> Optional[ScriptedLayers]:
    """A script of decoder layers on a CPU, or None where there can be none.

    ``marked`` is called at the end of each operator; the results are the same bits.
    """
    if not layers or any(_describe(getattr(layer, name)) is None for layer in layers for name in _LINEARS):
        return None
    windows = list(dict.fromkeys(layer.window for layer in layers))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls TorchScript deprecated; without it the plain layers run
            script = torch.jit.script(_Stack(layers, windows, marked is not None))
    except (RuntimeError, OSError, AttributeError):
        return None
    return ScriptedLayers(script, windows, marked)


def _describe(linear: Linear) -> Any:
    """(kind, weight, scales, group, bias) of a matrix that the script knows, else None."""
    none = torch.empty(0)
    if isinstance(linear, PlainLinear):
        return _PLAIN, linear.weight, none, 0, linear.bias
    if isinstance(linear, PackedLinear):
        return _PACKED, linear.packed, none, 0, linear.bias
    if isinstance(linear, (CpuInt4Linear, CpuNibblesLinear)):
        kind = _INT4 if isinstance(linear, CpuInt4Linear) else _NIBBLES
        return kind, linear.weight, linear.scales, linear.group, linear.bias
    return None
