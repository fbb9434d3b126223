"""The walk of tokens through the layers. This is the method; everything faster is tested against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
    of ``ids`` whose K and V are complete.

    Returns float32 logits: [T, vocab] with ``all_logits``, else [1, vocab] of the last token.
    """
    seq_len = start + len(ids)
    rows = []
    for offset in range(0, len(ids), chunk):
        part = torch.tensor(ids[offset : offset + chunk], dtype=torch.int64, device=model.device)
        h = walk(model, part, start + offset, kv, seq_len=seq_len, gate=gate, trace=trace)
        if all_logits:
            rows.append(model.logits(h))
        if on_chunk is not None:
            on_chunk(min(offset + chunk, len(ids)))
    return torch.cat(rows) if all_logits else model.logits(h[-1:])


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
    """One token at ``position``: float32 logits [1, vocab] for the next."""
    ids = torch.tensor([token_id], dtype=torch.int64, device=model.device)
    return model.logits(walk(model, ids, position, kv, gate=gate, trace=trace))
