"""The walk of ``decode.walk`` for a few tokens on a GPU: fused kernels, exits decided on the device, a graph a step.

A step is R rows: up to 16 tokens of one sequence, or one token each of several. Its launches are captured once as a
CUDA graph and replayed; all that changes from step to step lies in device memory. Triton's interpreter runs the same
launches on the CPU, without graphs, for tests.

Rows keep one order of reduction whatever their number (``kernels.triton_linear``): a verification gives the bits of
single steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riverinfer.gates import FixedDepth, Gate, SimilarityGate
from riverinfer.kernels.linear import AbsentLinear, Linear, PlainLinear, current
from riverinfer.kernels.linear_launch import Workspace, config_for, workspace_for
from riverinfer.kernels.packed_weights import PackedWeights
from riverinfer.kernels.quantized_linear import TritonPackedLinear
from riverinfer.kernels.triton_attention import decode_attention, workspace_size
from riverinfer.kernels.triton_dual_linear import BACKBONE, FINISHED, RIVER, dual_linear
from riverinfer.kernels.triton_gate import DeviceGate, thresholds
from riverinfer.kernels.triton_linear import linear
from riverinfer.kernels.triton_rope import rope_and_store
from riverinfer.kernels.triton_sampling import MAX_VOCAB
from riverinfer.kernels.triton_step import begin
from riverinfer.kv_arena import KVArena, SlotCache
from riverinfer.model import DecoderLayer, Model
from riverinfer.river_head import RiverHead
from riverinfer.rope import query_scale
from riverinfer.trace import Trace
from riverinfer.weights_convert.river_artifact import linear_shapes

_NAMES = ("qkv", "o", "gate_up", "down")
ROWS = (1, 2, 4, 8, 16)  # a step of another number takes the next larger one
MAX_ROWS = ROWS[-1]


@dataclass(frozen=True)
class StepKind:
    """What a graph computes.

    path: "backbone" or "river", every layer in one form, or "gated", in the one that each row's flag says.
    regime: of the rotary frequencies (``Rope.regime``).
    """

    path: str
    sequences: int
    rows_per_sequence: int
    regime: int = 0

    @property
    def rows(self) -> int:
        return self.sequences * self.rows_per_sequence


@dataclass(frozen=True)
class MarkedKind:
    """The key of a step that was captured with marks."""

    kind: StepKind


class StepState:
    """Device tensors that steps read and leave. A step of R rows uses the first R of each.

    tokens int64, position, slot: what the rows are; live: 0 leaves a row alone. path, depth, undefined: what the gate
    knows of each row. tau float32 [L] and limits int32 [2] (min and max depth) are the gate's.
    """

    def __init__(self, model: Model, rows: int) -> None:
        config, device = model.config, model.device

        def ints(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        def halves(width: int) -> Tensor:
            return torch.zeros(rows, width, dtype=torch.bfloat16, device=device)

        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.tokens = ints(rows, torch.int64)
        self.position, self.slot, self.live = ints(rows), ints(rows), ints(rows)
        self.path, self.depth, self.undefined = ints(rows), ints(rows), ints(rows)
        self.tau = torch.zeros(config.num_layers, dtype=torch.float32, device=device)
        self.limits = ints(2)
        # The state that enters a layer outlives it, for the gate.
        self.states = [torch.zeros(rows, config.hidden_size, dtype=torch.float32, device=device) for _ in range(3)]
        self.qkv, self.q, self.mixed = halves(queries + 2 * keys), halves(queries), halves(queries)
        self.act = halves(config.intermediate_size)


def held_bytes(*owners: object) -> int:
    """Bytes of the tensors that are attributes of these objects; copies on the host do not count."""
    tensors = [x for owner in owners for x in vars(owner).values() if isinstance(x, Tensor)]
    return sum(x.nbytes for x in tensors if not x.is_pinned())


def gate_is_known(gate: Gate | None) -> bool:
    """Whether a gate's decision for one token can be taken on the device."""
    return gate is None or type(gate) in (FixedDepth, SimilarityGate)


@dataclass(frozen=True)
class _Matrix:
    """A matrix of a layer in both forms, either of which may be missing, and the norm before it."""

    weight: Tensor | None
    packed: PackedWeights | None
    bias: Tensor | None
    norm: Tensor | None = None
    river_norm: Tensor | None = None


def kernels_take(model: Model) -> bool:
    """Whether the kernels take all shapes of a model, and its river, if there is one, is packed for them."""
    config = model.config
    if (
        config.head_dim % 8
        or config.head_dim > 256
        or config.vocab_size > MAX_VOCAB
        or config.num_heads % config.num_kv_heads
    ):
        return False
    linears = [getattr(layer, name) for layer in model.layers for name in _NAMES]
    packed = all(isinstance(getattr(layer, name), TritonPackedLinear) for layer in model.river for name in _NAMES)
    head = model.river_head is None or isinstance(getattr(model.river_head, "linear", None), TritonPackedLinear)
    plain = all(isinstance(each, (PlainLinear, AbsentLinear)) and each.in_features % 8 == 0 for each in linears)
    aligned = all(each.weight.data_ptr() % 16 == 0 for each in (*linears, model.head) if isinstance(each, PlainLinear))
    return packed and head and plain and aligned and isinstance(model.head, PlainLinear)


def _matrix_workspace(model: Model) -> tuple[int, int]:
    """Floats and counters that any step of the model's matrices needs."""
    shapes = {(name, *shape) for name, shape in linear_shapes(model.config).items()}
    shapes.add(("head", model.config.vocab_size, model.config.hidden_size))
    sizes = [
        workspace_for(MAX_ROWS, n, config_for(n, k), silu=name == "gate_up", parts=2, gated=True)
        for name, n, k in shapes
    ]
    floats, counters = (max(each) for each in zip(*sizes, strict=True))
    return floats, counters


class DeviceWalk:
    """Steps of one model on one arena. Not thread-safe: callers hold the engine's lock."""

    def __init__(self, model: Model, arena: KVArena, *, graphs: bool = True) -> None:
        """``graphs``: capture steps, on a GPU. The model is one that ``kernels_take``."""
        self.model, self.block = model, arena.block
        self.state = StepState(model, MAX_ROWS)
        self._graphs = graphs and model.device.type == "cuda"
        self.max_rows = MAX_ROWS
        self.owner: object = None  # whose tokens are placed: another's step takes the place
        # Told at each launch's end (operator, layer) while a step is launched, for profiles; captured with it.
        self.marked: Callable[[str, int | None], None] | None = None
        self._pool: Any = None
        self._ready: dict[object, Callable[[], None]] = {}
        self._workspace = Workspace(model.device, *_matrix_workspace(model))
        self._attention = self._attention_workspace()
        self._scale: Tensor | None = None
        if model.config.query_scaling is not None:
            positions = torch.arange(arena.ctx_size, dtype=torch.float32, device=model.device)
            self._scale = query_scale(model.config.query_scaling, positions).flatten()  # [S]
        assert isinstance(model.head, PlainLinear)
        self._head_weight = model.head.weight
        rivers: Sequence[DecoderLayer | None] = model.river or [None] * len(model.layers)
        self._matrices = [_matrices(layer, river) for layer, river in zip(model.layers, rivers, strict=True)]

    def __call__(
        self,
        ids: Tensor,
        start: int,
        kv: Sequence[tuple[Tensor, Tensor]],
        *,
        seq_len: int | None = None,
        gate: Gate | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """``decode.walk`` where ``can_take``: int64 [T] to float32 [T, H]."""
        count, layers = len(ids), len(self.model.layers)
        rows = next(rows for rows in ROWS if rows >= count)
        assert isinstance(kv, SlotCache)
        self.owner = None
        kind = StepKind(self.set_gate(gate), 1, rows, self.model.rope.regime(seq_len or start + count))
        self.place(ids, start, kv.slot)
        h = self.run(kind)[:count].clone()
        depth = {"backbone": layers, "river": 0}.get(kind.path)
        if depth is None:
            depth = int(self.state.depth[0])
            if isinstance(gate, SimilarityGate):
                gate.not_a_number += bool(self.state.undefined[0])
        if trace is not None:
            trace.depth = depth
        return h

    @property
    def captures(self) -> bool:
        """Whether steps are captured as graphs."""
        return self._graphs

    @property
    def nbytes(self) -> int:
        """Bytes of what steps compute in; weights and cache are others'."""
        scale = 0 if self._scale is None else self._scale.nbytes
        return (
            scale + held_bytes(self.state, self._workspace, self._attention) + sum(x.nbytes for x in self.state.states)
        )

    def _attention_workspace(self) -> Workspace:
        config, length = self.model.config, self.block.shape[4]
        sizes = [
            workspace_size(
                rows, n, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
                length=length,
            )
            for rows in ROWS
            for n in (1, rows)
        ]  # fmt: skip
        floats, counters = (max(each) for each in zip(*sizes, strict=True))
        return Workspace(self.model.device, floats, counters)

    def can_take(
        self,
        tokens: int,
        seq_len: int,
        kv: Sequence[tuple[Tensor, Tensor]],
        gate: Gate | None,
        trace: Trace | None,
    ) -> bool:
        """Whether a step can be taken here: few tokens, a slot of the arena, a gate that the kernels know."""
        model = self.model
        if tokens > MAX_ROWS or not isinstance(kv, SlotCache) or kv.arena_block is not self.block:
            return False
        if trace is not None and (trace.states, trace.similarities, trace.ledger) != (None, None, None):
            return False
        if model.rope.config.rope_type == "dynamic" and model.rope.scaled_by_length(seq_len):
            return False  # its frequencies change with every token
        if gate is None:
            return not model.offloaded
        return bool(model.river) and gate_is_known(gate) and (tokens == 1 or type(gate) is FixedDepth)

    def place(self, ids: Tensor, start: int, slot: int) -> None:
        """The next step's rows are ``ids`` (int64 [T]) of a slot, at positions from ``start`` on; others are idle."""
        state, count = self.state, len(ids)
        state.tokens[:count] = ids
        state.position[:count] = torch.arange(start, start + count, dtype=torch.int32, device=self.model.device)
        state.slot.fill_(slot)
        state.live.zero_()
        state.live[:count] = 1

    def set_gate(self, gate: Gate | None) -> str:
        """Tell the device a gate's numbers: the path that steps under it take."""
        layers = len(self.model.layers)
        least, most, taus = 0, layers + 1, [0.0]
        if isinstance(gate, FixedDepth):
            least = most = gate.depth
        elif isinstance(gate, SimilarityGate):
            least, most = gate.min_depth, layers + 1 if gate.max_depth is None else gate.max_depth
            taus = [gate.tau] if isinstance(gate.tau, (int, float)) else list(gate.tau)
        self.state.tau.copy_(thresholds(taus, layers))
        self.state.limits.copy_(torch.tensor([min(least, layers + 1), min(most, layers + 1)], dtype=torch.int32))
        if most <= 0:
            return "river"
        return "backbone" if gate is None or least >= layers else "gated"

    def run(self, kind: StepKind) -> Tensor:
        """The step of the placed rows: their states after the last layer, float32 [R, H], good until the next step."""
        self.replay(kind if self.marked is None else MarkedKind(kind), lambda: self.launch(kind))
        return self.states_after(kind)

    @torch.inference_mode()
    def replay(self, key: object, launch: Callable[[], None]) -> None:
        """``launch``, from its graph if there are graphs. ``key`` says which one it is, for ever.

        Before it is captured it runs once to compile, with all rows idle unless it places them itself: what it does
        then, the replay that follows does again.
        """
        with current(self.model.device):
            ready = self._ready.get(key)
            if ready is None:
                ready = self._ready[key] = self._capture(launch) if self._graphs else launch
            ready()

    def _capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        live = self.state.live.clone()
        self.state.live.zero_()
        try:
            return self._captured(launch)
        except BaseException:
            # Launches that did not finish leave counters that later ones would trust.
            self.owner = None
            for workspace in (self._workspace, self._attention):
                workspace.reset()
            raise
        finally:
            self.state.live.copy_(live)

    def _captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream):
            launch()
        torch.cuda.current_stream(self.model.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()  # replays follow each other: one serves all
        # Other threads may wait for their own events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            launch()
        return graph.replay

    @torch.inference_mode()
    def logits(self, h: Tensor) -> Tensor:
        """The exact head: states float32 [T, H], T at most ``max_rows``, to float32 logits [T, vocab]."""
        out = torch.empty(len(h), self.model.config.vocab_size, dtype=torch.float32, device=h.device)
        with current(self.model.device):
            self._head(h.contiguous(), out)
        return out

    def launch_head(self, kind: StepKind, out: Tensor) -> None:
        """Logits float32 [R, vocab] of the states that ``launch`` left, of the river's head for rows that are in it."""
        model, h = self.model, self.states_after(kind)
        river = model.river_head
        assert river is None or isinstance(river, RiverHead)
        if kind.path == "backbone" or river is None:
            self._head(h, out)
            return
        assert isinstance(river.linear, TritonPackedLinear)
        packed, rows = river.linear.packed, kind.rows
        common: dict[str, Any] = {
            "bias": model.head.bias,
            "norm": model.final_norm,
            "eps": model.config.rms_norm_eps,
            "out": out,
        }
        left = None
        if kind.path == "river":
            linear(h, packed, **common, workspace=self._workspace)
        else:
            path, depth = self.state.path[:rows], self.state.depth[:rows]
            # A gate that opens after the last layer leaves nothing to the river, and finished rows stay so.
            left = torch.where((depth < len(model.layers)) | (path == FINISHED), path, BACKBONE)
            dual_linear(h, left, self._head_weight, packed, **common, workspace=self._workspace)
        river.rescore(model.normed(h), out, None if left is None else left == RIVER)

    def _head(self, h: Tensor, out: Tensor) -> None:
        model = self.model
        linear(
            h, self._head_weight, bias=model.head.bias, norm=model.final_norm, eps=model.config.rms_norm_eps, out=out,
            workspace=self._workspace,
        )  # fmt: skip

    def unmark(self) -> None:
        """Let go of the steps that were captured with marks."""
        self._ready = {key: ready for key, ready in self._ready.items() if not isinstance(key, MarkedKind)}

    def close(self) -> None:
        """Wait for what is queued, and let go of weights, cache and graphs; no step may follow."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self._ready.clear()
        self._matrices.clear()
        del self.block, self._head_weight

    def states_after(self, kind: StepKind) -> Tensor:
        """Where a step of this kind leaves its states: float32 [R, H]."""
        return self.state.states[0 if len(self._matrices) % 2 == 0 else 2][: kind.rows]

    def launch(self, kind: StepKind) -> None:
        """Embedding and all layers of a step. The same method as ``decode.walk``, a flag of each row for ``exited``."""
        marked = self.marked or _unmarked
        model, config, rows = self.model, self.model.config, kind.rows
        state = self.state
        path, depth, undefined = state.path[:rows], state.depth[:rows], state.undefined[:rows]
        position, slot = state.position[:rows], state.slot[:rows]
        heads, dim = config.num_heads, config.head_dim
        qkv, q, mixed, act = (each[:rows] for each in (state.qkv, state.q, state.mixed, state.act))
        q = q.view(rows, heads, dim)
        h, mid, after = (each[:rows] for each in state.states)
        table = model.embed.table  # type: ignore[attr-defined]
        begin(
            state.tokens[:rows], state.live[:rows], state.limits, table,
            h=h, path=path, depth=depth, undefined=undefined,
        )  # fmt: skip
        marked("embed", None)
        cos, sin = model.rope.reserved(kind.regime)
        for i, (layer, matrices) in enumerate(zip(model.layers, self._matrices, strict=True)):
            self._multiply(kind, h, matrices["qkv"], out=qkv)
            marked("qkv", i)
            rope_and_store(
                qkv, position, slot, path,
                cos if layer.use_rope else None, sin if layer.use_rope else None, self.block[i],
                num_heads=heads, num_kv_heads=config.num_kv_heads, head_dim=dim,
                q_norm=layer.q_norm, k_norm=layer.k_norm, eps=layer.eps, query_scale=self._scale, out=q,
            )  # fmt: skip
            marked("rope", i)
            decode_attention(
                q, self.block[i], position, slot, path,
                rows_per_sequence=kind.rows_per_sequence, window=layer.window, out=mixed, workspace=self._attention,
            )  # fmt: skip
            marked("attention", i)
            self._multiply(kind, mixed, matrices["o"], residual=h, out=mid)
            marked("o", i)
            self._multiply(kind, mid, matrices["gate_up"], silu=True, out=act)
            marked("gate_up", i)
            gate = None
            if kind.path == "gated":
                gate = DeviceGate(h, i, state.tau, state.limits, depth, undefined)
            self._multiply(kind, act, matrices["down"], residual=mid, out=after, gate=gate)
            marked("down", i)
            h, after = after, h

    def _multiply(
        self, kind: StepKind, x: Tensor, matrix: _Matrix, *, gate: DeviceGate | None = None, **options: Any
    ) -> None:
        common = {"bias": matrix.bias, "eps": self.model.config.rms_norm_eps, "workspace": self._workspace, **options}
        if kind.path == "gated":
            assert matrix.packed is not None
            dual_linear(
                x, self.state.path[: kind.rows], matrix.weight, matrix.packed,
                norm=matrix.norm, river_norm=matrix.river_norm, gate=gate, **common,
            )  # fmt: skip
        elif kind.path == "backbone":
            assert matrix.weight is not None
            linear(x, matrix.weight, norm=matrix.norm, **common)
        else:
            assert matrix.packed is not None
            linear(x, matrix.packed, norm=matrix.river_norm, **common)


def _unmarked(_op: str, _layer: int | None) -> None:
    """Nobody listens."""


def _matrices(layer: DecoderLayer, river: DecoderLayer | None) -> dict[str, _Matrix]:
    """The matrices of a layer by name. Norms that bear a channel scale are the river's own."""
    found = {}
    for name, norm in (("qkv", "input_norm"), ("o", None), ("gate_up", "post_norm"), ("down", None)):
        backbone: Linear = getattr(layer, name)
        other = getattr(river, name, None)
        found[name] = _Matrix(
            weight=backbone.weight if isinstance(backbone, PlainLinear) else None,
            packed=other.packed if isinstance(other, TritonPackedLinear) else None,
            bias=backbone.bias,
            norm=getattr(layer, norm) if norm else None,
            river_norm=getattr(river, norm, None) if norm else None,
        )
    return found
