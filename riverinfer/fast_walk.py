"""The walk of ``decode.walk`` for a few tokens on a CPU, whole runs of layers a call: tested to be equal to the bit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from riverinfer.gates import FixedDepth, Gate
from riverinfer.kernels.few_rows import FEW
from riverinfer.kv_arena import SlotCache
from riverinfer.model import Model
from riverinfer.trace import Trace


def can_walk_fast(
    model: Model, tokens: int, kv: Sequence[tuple[Tensor, Tensor]], gate: Gate | None, trace: Trace | None
) -> bool:
    """Whether ``fast_walk`` can take this step: scripts for its paths, an arena's slot, a trace of the depth alone."""
    watched = trace is not None and (trace.states, trace.similarities, trace.ledger) != (None, None, None)
    paths = model.backbone_script is not None and (gate is None or model.river_script is not None)
    return tokens <= FEW and paths and isinstance(kv, SlotCache) and not watched


def fast_walk(
    model: Model,
    ids: Tensor,
    start: int,
    kv: Sequence[tuple[Tensor, Tensor]],
    *,
    seq_len: int | None = None,
    gate: Gate | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """``decode.walk`` where ``can_walk_fast``: int64 [T] to float32 [T, H]."""
    backbone, river, layers = model.backbone_script, model.river_script, len(model.layers)
    assert backbone is not None
    assert isinstance(kv, SlotCache)
    step = model.step_context(start, len(ids), seq_len or start + len(ids))
    h = model.embed(ids)
    exited = gate is not None and gate.start()
    depth = 0
    if gate is None or isinstance(gate, FixedDepth):
        depth = layers if gate is None else min(gate.depth, layers)
        h = backbone(h, 0, depth, step, kv.joint)
    else:
        while depth < layers and not exited:
            h_next = backbone(h, depth, depth + 1, step, kv.joint)
            exited = gate(depth, h, h_next)
            depth, h = depth + 1, h_next
    if depth < layers:
        assert river is not None
        h = river(h, depth, layers, step, kv.joint)
    if trace is not None:
        trace.depth = depth
    return h
