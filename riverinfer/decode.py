"""The walk of tokens through the layers. This is the method; everything faster is tested against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from riverinfer.model import Model

PREFILL_CHUNK = 512  # tokens a prefill passes at once; bounds the activations' memory


def walk(
    model: Model,
    ids: Tensor,
    start: int,
    kv: Sequence[tuple[Tensor, Tensor]],
    *,
    seq_len: int | None = None,
    states: list[Tensor] | None = None,
) -> Tensor:
    """Pass tokens ``ids`` (int64 [T]) at positions start .. start + T - 1 through every layer.

    ``kv`` has per layer the slot's (k, v), each [Hkv, S, D]: positions before ``start`` are read, those of the
    tokens written. ``seq_len`` is the length the whole sequence will have (default start + T), for length-dependent
    rotary scalings. ``states`` collects the residual stream: the embedding output, then every layer's output.
    Returns hidden states [T, H].
    """
    step = model.step_context(start, len(ids), seq_len or start + len(ids))
    h = model.embed(ids)
    if states is not None:
        states.append(h)
    for layer, (k, v) in zip(model.layers, kv, strict=True):
        h = layer(h, step, k, v)
        if states is not None:
            states.append(h)
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
) -> Tensor:
    """Write K and V of ``ids`` from position ``start`` on, chunk by chunk.

    ``on_chunk`` is called with the number of ``ids`` whose K and V are complete.

    Returns float32 logits: [T, vocab] with ``all_logits``, else [1, vocab] of the last token.
    """
    seq_len = start + len(ids)
    rows = []
    for offset in range(0, len(ids), chunk):
        part = torch.tensor(ids[offset : offset + chunk], dtype=torch.int64, device=model.device)
        h = walk(model, part, start + offset, kv, seq_len=seq_len)
        if all_logits:
            rows.append(model.logits(h))
        if on_chunk is not None:
            on_chunk(min(offset + chunk, len(ids)))
    return torch.cat(rows) if all_logits else model.logits(h[-1:])


@torch.inference_mode()
def decode_one(model: Model, token_id: int, position: int, kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One token at ``position``: float32 logits [1, vocab] for the next."""
    ids = torch.tensor([token_id], dtype=torch.int64, device=model.device)
    return model.logits(walk(model, ids, position, kv))
