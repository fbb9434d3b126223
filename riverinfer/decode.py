"""The walk of tokens through the layers. This is the method; everything faster is tested against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from riverinfer.fast_walk import can_walk_fast, fast_walk
from riverinfer.gates import Gate
from riverinfer.model import Model
from riverinfer.trace import Trace

PREFILL_CHUNK = 512  # tokens a prefill passes at once; bounds the activations' memory


def walk(
    model: Model,
    ids: Tensor,
    start: int,
    kv: Sequence[tuple[Tensor, Tensor]],
    *,
    seq_len: int | None = None,
    gate: Gate | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Pass tokens ``ids`` (int64 [T]) at positions start .. start + T - 1 through every layer.

    Backbone layers until ``gate`` opens (None: never), river layers from there on. Both write K and V of the tokens
    into ``kv``, per layer the slot's (k, v), each [Hkv, S, D], and read those of positions before ``start``: no later
    token ever misses an entry. ``seq_len`` is the length the whole sequence will have (default start + T), for
    length-dependent rotary scalings. Returns hidden states float32 [T, H].
    """
    step = model.step_context(start, len(ids), seq_len or start + len(ids))
    h = model.embed(ids)
    exited = gate is not None and gate.start()
    depth = 0
    if trace is not None:
        trace.begin(h, step.start, step.end, kv)
    for i, (k, v) in enumerate(kv):
        layer = model.river[i] if exited else model.layers[i]
        h_next = layer(h, step, k, v)
        depth += not exited
        if trace is not None:
            trace.record(i, depth, h, h_next)
        exited = exited or (gate is not None and gate(i, h, h_next))
        h = h_next
    if trace is not None:
        trace.end(kv)
    return h


@torch.inference_mode()
def prefill(
    model: Model,
    ids: Sequence[int],
    start: int,
    kv: Sequence[tuple[Tensor, Tensor]],
    *,
    chunk: int = PREFILL_CHUNK,
    all_logits: bool = False,
    on_chunk: Callable[[int], None] | None = None,
    gate: Gate | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Write K and V of ``ids`` from position ``start`` on, chunk by chunk.

    ``gate`` and ``trace`` are those of ``walk``; the gate decides once a chunk. ``on_chunk`` is called with the number
    of ``ids`` whose K and V are complete. Tokens that left the backbone have their logits from the river's head.

    Returns float32 logits: [T, vocab] with ``all_logits``, else [1, vocab] of the last token.
    """
    seq_len = start + len(ids)
    trace = trace or Trace()
    rows = []
    for offset in range(0, len(ids), chunk):
        part = torch.tensor(ids[offset : offset + chunk], dtype=torch.int64, device=model.device)
        h = _walk(model, part, start + offset, kv, seq_len=seq_len, gate=gate, trace=trace)
        if all_logits:
            rows.append(model.logits(h, river=trace.depth < len(model.layers)))
        if on_chunk is not None:
            on_chunk(min(offset + chunk, len(ids)))
    return torch.cat(rows) if all_logits else model.logits(h[-1:], river=trace.depth < len(model.layers))


@torch.inference_mode()
def decode_batch(
    model: Model,
    ids: Sequence[int],
    positions: Sequence[int],
    kvs: Sequence[Sequence[tuple[Tensor, Tensor]]],
    *,
    gates: Sequence[Gate] = (),
    traces: Sequence[Trace] = (),
) -> Tensor:
    """The walk of B sequences side by side, one token of each: float32 logits [B, vocab] for the next.

    Rows that left the backbone have the logits of the river's head.

    ``gates``: none keeps all in the backbone; one a sequence lets each exit for itself, so that nobody's text depends
    on their neighbours; a single one sees all states, [B, H], and opens for all at once (with scope "min", the paper's
    minimum over the batch). ``traces``: one a sequence, or none; only depths are recorded.
    """
    rows = range(len(ids))
    steps = [model.step_context(position, 1, position + 1) for position in positions]
    h = model.embed(torch.tensor(ids, dtype=torch.int64, device=model.device))  # [B, H]
    shared = len(gates) == 1
    opened = [gate.start() for gate in gates]
    exited = opened * len(ids) if shared else opened or [False for _ in rows]
    depths = [0 for _ in rows]
    for i in range(len(model.layers)):
        h_next = torch.empty_like(h)
        for layers, members in (
            (model.layers, [row for row in rows if not exited[row]]),
            (model.river, [row for row in rows if exited[row]]),
        ):
            if members:
                caches = [kvs[row][i] for row in members]
                h_next[members] = layers[i].side_by_side(h[members], [steps[row] for row in members], caches)
        for row in rows:
            depths[row] += not exited[row]
        if shared and not exited[0]:
            exited = [gates[0](i, h, h_next)] * len(ids)
        elif gates and not shared:
            exited = [exited[row] or gates[row](i, h[row : row + 1], h_next[row : row + 1]) for row in rows]
        h = h_next
    for trace, depth in zip(traces, depths, strict=False):
        trace.depth = depth
    early = [row for row in rows if depths[row] < len(model.layers)]
    if model.river_head is None or len(early) in (0, len(ids)):
        return model.logits(h, river=bool(early))
    logits = torch.empty(len(ids), model.config.vocab_size, device=model.device)  # float32 [B, vocab]
    logits[early] = model.logits(h[early], river=True)
    late = [row for row in rows if row not in early]
    logits[late] = model.logits(h[late])
    return logits


@torch.inference_mode()
def decode_one(
    model: Model,
    token_id: int,
    position: int,
    kv: Sequence[tuple[Tensor, Tensor]],
    *,
    gate: Gate | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """One token at ``position``: float32 logits [1, vocab] for the next, from the river's head if it left."""
    ids = torch.tensor([token_id], dtype=torch.int64, device=model.device)
    trace = trace or Trace()
    h = _walk(model, ids, position, kv, gate=gate, trace=trace)
    return model.logits(h, river=trace.depth < len(model.layers))


def _walk(
    model: Model,
    ids: Tensor,
    start: int,
    kv: Sequence[tuple[Tensor, Tensor]],
    *,
    seq_len: int | None = None,
    gate: Gate | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """``walk``, in its faster form where there is one."""
    device_walk = model.device_walk
    if device_walk is not None and device_walk.can_take(len(ids), seq_len or start + len(ids), kv, gate, trace):
        return device_walk(ids, start, kv, seq_len=seq_len, gate=gate, trace=trace)
    chosen = fast_walk if can_walk_fast(model, len(ids), kv, gate, trace) else walk
    return chosen(model, ids, start, kv, seq_len=seq_len, gate=gate, trace=trace)
