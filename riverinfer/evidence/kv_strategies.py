"""What a token that leaves the backbone early does about the K and V it never computed: five answers, one interface.

A token of *depth* d has passed layers 0 .. d - 1; layers d .. L - 1 lack its K and V. River-LLM (arXiv 2604.18396)
calls this KV cache absence and lets a quantized copy of the layers write the entries (``KVShare``). The four other
strategies are here for comparison only, each as the rule for the cache alone: gate and head are the same for all, so
that nothing but the rule differs. In these four a token that has left skips all further layers, and its logits are
the final norm and the head applied to the state it left with.

T tokens, H hidden size, L layers, Hkv key/value heads, S cached positions, D head dimension.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from riverinfer import decode
from riverinfer.gates import Gate
from riverinfer.kernels.torch_ops import rms_norm, rotate
from riverinfer.model import DecoderLayer, Model, StepContext
from riverinfer.trace import Trace

KV = Sequence[tuple[Tensor, Tensor]]


class EarlyExit:
    """One sequence that leaves the backbone where ``gate`` opens, and does nothing about what is missing.

    On its own it is broken: a later token that goes deeper attends to entries that nobody wrote. Subclasses mend it.

    kv: per layer the sequence's own (k, v), each [Hkv, S, D] of the model's dtype, S at least the length to come.
    gate: asked as in ``decode.walk``, with the current token's states only.

    Invariant: an entry that no layer wrote is NaN, so that reading one shows in the logits.
    Raises ValueError if S positions change the rotary frequencies (dynamic and longrope scaling beyond their trained
    length): K written before would have to be computed again.
    """

    def __init__(self, model: Model, kv: KV, gate: Gate) -> None:
        if model.rope.scaled_by_length(kv[0][0].shape[1]):
            raise ValueError("the sequence is longer than this model's unscaled rotary embedding")
        for entries in kv:
            for x in entries:
                x.fill_(float("nan"))
        self.model, self.kv, self.gate = model, kv, gate
        self.length = 0  # positions walked, which is the next token's position
        self.max_depth = len(model.layers)

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """An exact prompt, called once and first: float32 logits [1, vocab] after its last token."""
        logits = decode.prefill(self.model, ids, 0, self.kv)
        self.length = len(ids)
        return logits

    @torch.inference_mode()
    def step(self, token: int) -> tuple[Tensor, int]:
        """The next token: float32 logits [1, vocab], and its depth."""
        context = self.model.step_context(self.length, 1, self.length + 1)
        h = self._embed(token)
        depth, exited = 0, self.gate.start()
        while depth < self.max_depth and not exited:
            h_next = self._layer(depth, h, context)
            exited = self.gate(depth, h, h_next)
            h, depth = h_next, depth + 1
        self._leave(h, depth, context)
        self.length += 1
        return self.model.logits(h), depth

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer by position, float32 [Hkv, length, D], NaN where there is none."""
        k, v = self.kv[layer]
        return k[:, : self.length].float(), v[:, : self.length].float()

    def _embed(self, token: int) -> Tensor:
        return self.model.embed(torch.tensor([token], dtype=torch.int64, device=self.model.device))  # [1, H]

    def _layer(self, index: int, h: Tensor, context: StepContext) -> Tensor:
        """One backbone layer, h float32 [1, H] to the same; writes the token's K and V there."""
        k, v = self.kv[index]
        return self.model.layers[index](h, context, k, v)

    def _leave(self, h: Tensor, depth: int, context: StepContext) -> None:
        """Called with the state float32 [1, H] that the token leaves with, before its position is counted."""


class KVShare(EarlyExit):
    """River-LLM (arXiv 2604.18396): the rest of the layers in their quantized copy, on the same cache.

    ``decode.walk``, unchanged. Needs ``model.river``, except with a gate that never opens: then this is exact
    decoding.
    """

    @torch.inference_mode()
    def step(self, token: int) -> tuple[Tensor, int]:
        trace = Trace()
        logits = decode.decode_one(self.model, token, self.length, self.kv, gate=self.gate, trace=trace)
        self.length += 1
        return logits, trace.depth


class Masking(EarlyExit):
    """Missing entries stay missing, and later tokens do not see them at that layer.

    The cache rule of D-LLM (NeurIPS 2024), which evicts the entries of skipped layers and masks them out. Its trained
    decision at every layer, and the first tokens that it keeps whole, are left out.

    Each layer stores only what it has, densely in the order of positions, K rotated by its true position: attention
    over a slice of that equals attention over all positions under a mask, and reads less.
    """

    def __init__(self, model: Model, kv: KV, gate: Gate) -> None:
        super().__init__(model, kv, gate)
        self.positions: list[list[int]] = [[] for _ in model.layers]  # by layer, ascending: whose entries it stores

    def prefill(self, ids: Sequence[int]) -> Tensor:
        self.positions = [list(range(len(ids))) for _ in self.model.layers]
        return super().prefill(ids)

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        positions = self.positions[layer]

        def spread(packed: Tensor) -> Tensor:
            out = packed.new_full((packed.shape[0], self.length, packed.shape[2]), float("nan"), dtype=torch.float32)
            out[:, positions] = packed[:, : len(positions)].float()
            return out  # [Hkv, length, D]

        k, v = self.kv[layer]
        return spread(k), spread(v)

    def _layer(self, index: int, h: Tensor, context: StepContext) -> Tensor:
        layer, positions = self.model.layers[index], self.positions[index]
        # The window is one of positions: i sees j > i - window. It holds fewer than ``window`` earlier entries, so
        # that attention over the cache from ``first`` on needs no window of its own.
        first = 0 if layer.window is None else bisect_left(positions, self.length + 1 - layer.window)
        slot = len(positions) - first
        positions.append(self.length)
        packed = replace(
            self.model.step_context(slot, 1, slot + 1),
            cos=context.cos,
            sin=context.sin,
            query_scale=context.query_scale,
        )
        k, v = self.kv[index]
        return layer(h, packed, k[:, first:], v[:, first:])


class BatchedRecompute(EarlyExit):
    """Tokens that left wait with their state; who goes deeper takes them along, and their K and V become exact.

    EE-LLM (arXiv 2312.04916), KV recomputation: tokens with missing entries are kept in a list and pass together with
    the current one. There they run again from the embedding; here they go on from the state they left with, which
    gives the same K and V for fewer sums.

    A token that goes only part of the way takes the others that far: a layer's batch is the current token and all
    that wait before that layer, and where the current one leaves, all of them wait. So a layer has every position
    up to the last token that passed it, and what a token reads is always the full backbone's: its state at any depth
    is exact. What waits at one layer is therefore a run of positions at the end of the sequence, and the layer is
    called on it as in a prefill.

    limit: once so many tokens wait, the next one passes all layers whatever the gate says, as in EE-LLM, and the list
    is empty.
    """

    def __init__(self, model: Model, kv: KV, gate: Gate, limit: int = 8) -> None:
        super().__init__(model, kv, gate)
        self.limit = limit
        # (depth, states float32 [T, H]) of consecutive positions, the last one's at the end; depths fall strictly.
        self.waiting: list[tuple[int, Tensor]] = []

    @torch.inference_mode()
    def step(self, token: int) -> tuple[Tensor, int]:
        full = sum(len(states) for _, states in self.waiting) >= self.limit
        self.length += 1
        h, depth = self._carry(self._embed(token), None if full else self.gate)
        return self.model.logits(h[-1:]), depth

    @torch.inference_mode()
    def flush(self) -> None:
        """Take all that wait through the rest of the layers: the cache is then the full backbone's."""
        self._carry(torch.empty(0, self.model.config.hidden_size, device=self.model.device), None)

    def _carry(self, h: Tensor, gate: Gate | None) -> tuple[Tensor, int]:
        """States h float32 [T, H] of the last T positions (T may be 0) from the embedding to where ``gate`` opens.

        Returns the states there, float32 [T', H] with those that joined in front, and the depth.
        """
        depth, exited = 0, gate is not None and gate.start()
        context: StepContext | None = None
        while depth < len(self.model.layers) and not exited:
            if self.waiting and self.waiting[-1][0] == depth:
                h, context = torch.cat((self.waiting.pop()[1], h)), None
            if len(h):
                context = context or self.model.step_context(self.length - len(h), len(h), self.length)
                h_next = self._layer(depth, h, context)
                exited = gate is not None and gate(depth, h[-1:], h_next[-1:])
                h = h_next
            depth += 1
        if depth < len(self.model.layers):
            at_depth = self.waiting.pop()[1] if self.waiting and self.waiting[-1][0] == depth else h[:0]
            self.waiting.append((depth, torch.cat((at_depth, h))))
        return h, depth


class StatePropagation(EarlyExit):
    """The state a token leaves with stands in for its state at all deeper layers: K and V are computed from it.

    CALM (arXiv 2207.07061), state propagation. Nothing else of a skipped layer runs. Q, K and V are one matrix here,
    so Q is computed too and dropped.
    """

    def _leave(self, h: Tensor, depth: int, context: StepContext) -> None:
        for layer, (k, v) in zip(self.model.layers[depth:], self.kv[depth:], strict=True):
            write_kv(layer, h, context, k, v)


class MonotoneDepth(EarlyExit):
    """No token goes deeper than the one before it, so none reads a layer where an earlier one is missing.

    The invariant of SkipDecode (arXiv 2307.02628): depths never increase along a sequence. Here a token may pass at
    most as many layers as the token before it, the first after the prompt all of them (the prompt is exact), and the
    gate may open earlier. So a depth once lost never returns. SkipDecode itself has no gate: a schedule, linear in the
    position, sets the depth, and it skips lower layers rather than the last ones.
    """

    def _leave(self, h: Tensor, depth: int, context: StepContext) -> None:
        self.max_depth = depth


def write_kv(layer: DecoderLayer, h: Tensor, context: StepContext, k_cache: Tensor, v_cache: Tensor) -> None:
    """K and V of ``layer`` for input states h float32 [T, H], as ``DecoderLayer`` makes them, and nothing else.

    k_cache and v_cache [Hkv, S, D] get the context's positions.
    """
    heads, kv_heads = layer.num_heads, layer.num_kv_heads
    qkv = layer.qkv(rms_norm(h, layer.input_norm, layer.eps).to(k_cache.dtype))
    k, v = qkv.view(len(h), -1, layer.head_dim)[:, heads:].split(kv_heads, 1)  # [T, Hkv, D] each
    if layer.k_norm is not None:
        k = rms_norm(k.float(), layer.k_norm, layer.eps)
    if layer.use_rope:
        k = rotate(k, context.cos, context.sin)
    k_cache[:, context.start : context.end] = k.transpose(0, 1)
    v_cache[:, context.start : context.end] = v.transpose(0, 1)


STRATEGIES: dict[str, type[EarlyExit]] = {
    "masking (D-LLM)": Masking,
    "batched recompute (EE-LLM)": BatchedRecompute,
    "state propagation (CALM)": StatePropagation,
    "monotone depth (SkipDecode)": MonotoneDepth,
    "KV share (River-LLM)": KVShare,
}
