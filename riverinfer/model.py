"""One decoder layer that reads a configuration, and the model around it: embedding, layers, final norm, head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from riverinfer.config import ModelConfig
from riverinfer.kernels import few_rows
from riverinfer.kernels.few_rows import Span, rms_norm
from riverinfer.kernels.linear import AbsentLinear, Linear
from riverinfer.kernels.scripted import ScriptedLayers, script_layers
from riverinfer.kernels.torch_ops import attention, causal_mask, rotate, silu_mul
from riverinfer.kernels.torch_ops import rms_norm as rms_norm_heads
from riverinfer.rope import Rope, query_scale

if TYPE_CHECKING:
    from riverinfer.device_walk import DeviceWalk


@dataclass(slots=True)
class StepContext:
    """What all layers share while the T tokens at positions start .. end - 1 of one sequence pass through."""

    start: int
    end: int
    cos: Tensor  # [T, 1, rotary_dim] float32
    sin: Tensor
    query_scale: Tensor | None  # [T, 1, 1] float32
    masks: dict[int | None, tuple[int, Tensor | None]]  # by window: first visible position, mask
    spans: dict[int | None, list[Span]] | None = None  # instead of masks, for a few tokens on a CPU


@dataclass(slots=True)
class DecoderLayer:
    """Pre-norm attention and gated MLP. Holds weights; writes K and V where the caller's cache says.

    The residual stream is float32 whatever the weights' dtype: with bfloat16 weights that takes 40 % of the error
    against a float32 run away, and costs nothing. Inputs of matrices and the cache have the weights' dtype.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    use_rope: bool
    window: int | None
    input_norm: Tensor  # [H] float32, like every norm weight
    qkv: Linear  # [(Hq + 2 Hkv) D, H]
    o: Linear  # [H, Hq D]
    post_norm: Tensor  # [H]
    gate_up: Linear  # [2 I, H], gate first
    down: Linear  # [H, I]
    q_norm: Tensor | None = None  # [D]
    k_norm: Tensor | None = None

    def __call__(self, h: Tensor, step: StepContext, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """h float32 [T, H] to h float32 [T, H]; k_cache, v_cache [Hkv, S, D] get the positions of this step."""
        qkv = self.qkv(rms_norm(h, self.input_norm, self.eps, k_cache.dtype))  # [T, (Hq + 2 Hkv) D]
        h = h + self.o(self._mix(qkv, step, k_cache, v_cache))
        return h + self.down(silu_mul(self.gate_up(rms_norm(h, self.post_norm, self.eps, k_cache.dtype))))

    def side_by_side(self, h: Tensor, steps: list[StepContext], caches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One token of each of B sequences: h float32 [B, H] to the same; row i has ``steps[i]`` and ``caches[i]``.

        The matrices, which are what takes time, are read once for all.
        """
        dtype = caches[0][0].dtype
        qkv = self.qkv(rms_norm(h, self.input_norm, self.eps, dtype))
        mixed = [
            self._mix(qkv[row : row + 1], step, k, v)
            for row, (step, (k, v)) in enumerate(zip(steps, caches, strict=True))
        ]
        h = h + self.o(torch.cat(mixed))
        return h + self.down(silu_mul(self.gate_up(rms_norm(h, self.post_norm, self.eps, dtype))))

    def _mix(self, qkv: Tensor, step: StepContext, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Write K and V of [T, (Hq + 2 Hkv) D] to the cache and attend: [T, Hq D]."""
        q = self._store(qkv, step, k_cache, v_cache)
        if step.spans is not None:
            return few_rows.attention(q, k_cache, v_cache, step.spans[self.window])
        first, mask = step.masks[self.window]
        return attention(q, k_cache[:, first : step.end], v_cache[:, first : step.end], mask)

    def _store(self, qkv: Tensor, step: StepContext, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Norms, rotation, and K and V to the cache: queries [T, Hq, D] in the cache's dtype."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = qkv.view(-1, heads + 2 * kv_heads, self.head_dim)  # [T, Hq + 2 Hkv, D]
        qk = qkv[:, : heads + kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.float().split((heads, kv_heads), 1)
            qk = torch.cat((rms_norm_heads(q, self.q_norm, self.eps), rms_norm_heads(k, self.k_norm, self.eps)), 1)
        if self.use_rope:
            qk = rotate(qk, step.cos, step.sin)
        q = qk[:, :heads]
        if step.query_scale is not None:
            q = q * step.query_scale
        k_cache[:, step.start : step.end] = qk[:, heads:].transpose(0, 1)
        v_cache[:, step.start : step.end] = qkv[:, heads + kv_heads :].transpose(0, 1)
        return q.to(k_cache.dtype)


class Model:
    """A decoder-only language model: layers plus what turns ids into states and states into logits."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embed: Callable[[Tensor], Tensor],
        layers: list[DecoderLayer],
        final_norm: Tensor,
        head: Linear,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.embed = embed  # int64 [T] -> float32 [T, H] on device
        self.layers = layers  # the backbone
        self.river: list[DecoderLayer] = []  # the same layers with quantized matrices, once loaded
        self.backbone_script: ScriptedLayers | None = None  # the same layers, few tokens a call, on a CPU
        self.river_script: ScriptedLayers | None = None
        self.device_walk: DeviceWalk | None = None  # the same layers, few tokens a step, by a GPU's kernels
        self.river_head: Callable[[Tensor], Tensor] | None = None  # as ``RiverHead``, where there is one
        self.final_norm = final_norm
        self.head = head
        self.dtype = dtype
        self.device = device
        self.rope = Rope(config.rope, device)
        self._windows = set(config.windows)

    def script(self) -> None:
        """Prepare the faster form of the layers, where there is one. Needed again when layers are replaced."""
        self.backbone_script = self.river_script = None
        if self.device.type == "cpu" and few_rows.attention_works():
            self.backbone_script = script_layers(self.layers[: self.held_layers])
            self.river_script = script_layers(self.river)

    @property
    def held_layers(self) -> int:
        """How many backbone layers are loaded, from the first on."""
        return sum(not isinstance(layer.qkv, AbsentLinear) for layer in self.layers)

    @property
    def offloaded(self) -> bool:
        """Deep backbone layers are not loaded: every token must be in the river by then."""
        return self.held_layers < len(self.layers)

    def step_context(self, start: int, length: int, seq_len: int) -> StepContext:
        """Shared tensors for ``length`` tokens from position ``start`` of a sequence that will be ``seq_len`` long."""
        cos, sin = self.rope.tables(start, start + length, seq_len)
        scale, scaling = None, self.config.query_scaling
        if scaling is not None:
            positions = torch.arange(start, start + length, dtype=torch.float32, device=self.device)  # [T]
            scale = query_scale(scaling, positions)
        spans = None
        if length <= few_rows.FEW and self.device.type == "cpu" and few_rows.attention_works():
            group = self.config.num_heads // self.config.num_kv_heads
            spans = {window: few_rows.spans(start, length, window, group, self.dtype) for window in self._windows}
        return StepContext(
            start=start,
            end=start + length,
            cos=cos,
            sin=sin,
            query_scale=scale,
            masks={window: causal_mask(start, length, window, self.device) for window in self._windows},
            spans=spans,
        )

    def logits(self, h: Tensor, *, river: bool = False) -> Tensor:
        """Hidden states float32 [T, H] after the last layer to float32 logits [T, vocab].

        ``river``: through the river's head, if it has one.
        """
        if not river or self.river_head is None:
            if self.device_walk is not None and len(h) <= self.device_walk.max_rows:
                return self.device_walk.logits(h)
            return self.head(self.normed(h)).float()
        return self.river_head(self.normed(h))

    def normed(self, h: Tensor) -> Tensor:
        """What the head reads: float32 [T, H] to the weights' dtype."""
        return rms_norm(h, self.final_norm, self.config.rms_norm_eps, self.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices that a token's pass reads: the layers' linears and the head."""
        return self.head.weight_bytes + sum(
            linear.weight_bytes for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )
