"""What a decoded token must cost at least: a count of what its steps read and compute.

The limit is the roofline model's: a step reads and computes at the same time, so it takes at least the longer of bytes
over bandwidth and operations over their peak (Williams, Waterman and Patterson, "Roofline: an insightful visual
performance model for multicore architectures", CACM 52(4), 2009).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor

from riverinfer.errors import InvalidRequestError
from riverinfer.kernels.linear import Linear
from riverinfer.loader import Embedding
from riverinfer.model import DecoderLayer, Model
from riverinfer.profiling.result import Limit, Machine, Run
from riverinfer.river_head import K_SHORTLIST
from riverinfer.sequence import closed_error
from riverinfer.weights_convert.river_artifact import linear_shapes

if TYPE_CHECKING:
    from riverinfer.engine import Engine


def token_limit(
    engine: Engine, mode: str, runs: Sequence[Run], machine: Machine, *, positions: float, batch: int
) -> Limit:
    """The limit of the tokens after the first ones of ``runs``, all of ``mode``, and how near to it they came.

    positions: mean number of positions that a token attends to, its own included; a sliding window caps it.
    batch: sequences of each run, all equally long. ``exit_depths`` of a batch are those of its first sequence, then
    those of its second, and so on.

    A step reads the weights on its way once for all of its rows: backbone layers up to the deepest exit, river layers
    from the shallowest on, and the heads that are asked. K and V are each sequence's own. In lossless mode a step is a
    verification, whose rows share K and V, or a draft that goes straight through the river; what is looked up drafts
    for free. A run without rounds was decoded as in exact mode. Not counted, as it may stay in caches or is small:
    activations, sampling, rotary tables, and what river mode's repair computes again.

    Bytes of matrices are ``Linear.weight_bytes``, those of their biases and of norms included. Operations of a row are
    2 N K for each matrix [N, K] and 4 positions Hq D for attention, products and sums of Q K^T and of its weights with
    V. Rows of the exact head that rescore the river's count as those that the exact head reads.

    Raises EngineClosedError, and InvalidRequestError for runs that time no token after the first, or are ragged.
    """
    if engine.closed:
        raise closed_error()
    for run in runs:
        each = len(run.intervals_s) + 1
        if run.new_tokens != batch * each or (mode == "river" and len(run.exit_depths) != run.new_tokens):
            raise InvalidRequestError(
                f"are {run.new_tokens} in {each} steps of {batch}", field="tokens", remedy="let all run equally long"
            )
    tokens = batch * sum(len(run.intervals_s) for run in runs)
    measured = sum(sum(run.intervals_s) for run in runs)
    if not measured:
        raise InvalidRequestError("no token after the first was timed", remedy="ask for at least two")
    counts, work = _Counts.of(engine.model, positions), _passes(mode, runs, engine.config.num_layers, batch)
    nbytes = sum(count * counts.weights(depths) for depths, count in work.passes.items())
    nbytes += work.reads * counts.cache + work.rows.total() * counts.row
    operations = sum(count * counts.operations(depth) for depth, count in work.rows.items())
    reading, computing = nbytes / machine.bytes_per_s, operations / machine.operations_per_s
    return Limit(
        bytes=nbytes / tokens,
        operations=operations / tokens,
        seconds=max(reading, computing) / tokens,
        bound="bandwidth" if reading >= computing else "compute",
        achieved=max(reading, computing) / measured,
    )


@dataclass(frozen=True)
class _Passes:
    """passes: by the set of exit depths of their rows. rows: by exit depth. reads: how often a sequence's cache is."""

    passes: Counter[frozenset[int]]
    rows: Counter[int]
    reads: int


def _passes(mode: str, runs: Sequence[Run], layers: int, batch: int) -> _Passes:
    rounds = sum(run.rounds for run in runs)
    if mode == "lossless" and rounds:
        drafts = sum(run.river_drafted for run in runs)
        verified = rounds + sum(run.drafted for run in runs)
        passes = Counter({frozenset({layers}): rounds, frozenset({0}): drafts})
        return _Passes(passes, Counter({layers: verified, 0: drafts}), rounds + drafts)
    steps: list[tuple[int, ...]] = []
    for run in runs:
        each = len(run.intervals_s) + 1
        depths = run.exit_depths if mode == "river" else (layers,) * run.new_tokens
        # The first token of a sequence comes with its prompt.
        steps += zip(*(depths[i + 1 : i + each] for i in range(0, len(depths), each)), strict=True)
    rows = Counter(chain.from_iterable(steps))
    return _Passes(Counter(map(frozenset, steps)), rows, rows.total())


@dataclass(frozen=True)
class _Counts:
    """Bytes and operations of a model's parts.

    backbone, river: bytes of the matrices, by layer. vectors: bytes of norms and biases, which both share. shortlist:
    bytes of the exact head's rows that rescore. cache: bytes of the K and V that a row sees. row: bytes of its
    embedding, and of the K and V that it writes. per_row: operations of layers and head, rescoring those of the
    shortlist.
    """

    backbone: tuple[int, ...]
    river: tuple[int, ...]
    vectors: int
    head: int
    river_head: int
    shortlist: float
    cache: float
    row: float
    per_row: float
    rescoring: int

    @classmethod
    def of(cls, model: Model, positions: float) -> _Counts:
        """Those of a token that attends to ``positions``."""
        config, embed = model.config, model.embed
        hidden, vocab, layers = config.hidden_size, config.vocab_size, config.num_layers
        visible = sum(positions if window is None else min(positions, window) for window in config.windows)
        kv = config.kv_bytes_per_token(model.dtype.itemsize)
        matrices = layers * sum(n * k for n, k in linear_shapes(config).values()) + vocab * hidden
        river_head = getattr(model.river_head, "weight_bytes", 0)
        shortlist = min(K_SHORTLIST, vocab) if river_head else 0
        embedded = embed.table[0].nbytes if isinstance(embed, Embedding) else hidden * model.dtype.itemsize
        return cls(
            backbone=tuple(map(_matrix_bytes, model.layers)),
            river=tuple(map(_matrix_bytes, model.river)),
            vectors=sum(map(_vector_bytes, model.layers)) + model.final_norm.nbytes,
            head=model.head.weight_bytes + _nbytes(model.head.bias),
            river_head=river_head,
            shortlist=shortlist * model.head.weight_bytes / vocab,
            cache=kv / layers * visible,
            row=embedded + kv,
            per_row=2 * matrices + 4 * config.num_heads * config.head_dim * visible,
            rescoring=2 * shortlist * hidden,
        )

    def weights(self, depths: frozenset[int]) -> float:
        """Bytes that a pass reads whose rows leave the backbone at ``depths``."""
        shallowest, deepest, layers = min(depths), max(depths), len(self.backbone)
        total = sum(self.backbone[:deepest]) + sum(self.river[shallowest:]) + self.vectors
        if deepest == layers or not self.river_head:
            return total + self.head + (self.river_head if shallowest < layers else 0)
        return total + self.river_head + self.shortlist

    def operations(self, depth: int) -> float:
        """Of one row that leaves the backbone at ``depth``."""
        return self.per_row + (self.rescoring if depth < len(self.backbone) else 0)


def _linears(layer: DecoderLayer) -> tuple[Linear, ...]:
    return layer.qkv, layer.o, layer.gate_up, layer.down


def _matrix_bytes(layer: DecoderLayer) -> int:
    return sum(linear.weight_bytes for linear in _linears(layer))


def _vector_bytes(layer: DecoderLayer) -> int:
    norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
    return _nbytes(*norms, *(linear.bias for linear in _linears(layer)))


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
