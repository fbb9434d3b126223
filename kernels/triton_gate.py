"""The similarity gate on the device: an exit is decided where a layer's output is written.

``triton_dual_linear`` runs it with the last matrix of a layer. Each tile of the output leaves its share of a.b, a.a and
b.b (a the state before the layer, b the one after it) in the workspace; the program that completes the last tile of a
block of tokens adds the shares in the order of the tiles, whoever it is, and updates the flags. Its sums have one order
whatever the number of tokens, so a row's similarity has the same bits alone and in any batch.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverinfer.errors import InvalidRequestError

SUMS = 3  # a row's: a.b, a.a, b.b
_SUMS: tl.constexpr = tl.constexpr(SUMS)
_TILES: tl.constexpr = tl.constexpr(32)  # added side by side


@triton.jit
def leave_shares(a, b, mask, wanted, shares, tile, tiles, BM: tl.constexpr):
    """Store a tile's share of the sums of the ``wanted`` tokens. a, b float32 [rows, BM]; ``mask`` says what counts.

    shares: float32 [SUMS, tiles, BM], those of this block of tokens.
    """
    b = tl.where(mask, b, 0.0)
    at = shares + tile * BM + tl.arange(0, BM)
    tl.store(at, tl.sum(a * b, 0), mask=wanted)
    tl.store(at + tiles * BM, tl.sum(a * a, 0), mask=wanted)
    tl.store(at + 2 * tiles * BM, tl.sum(b * b, 0), mask=wanted)


@triton.jit
def load_shares(shares, live, TILES: tl.constexpr, BM: tl.constexpr):
    """Of all tiles, float32 [_TILES, BM]: row r has those of tiles r, r + _TILES, ..."""
    acc = tl.zeros((_TILES, BM), tl.float32)
    for first in tl.static_range(0, TILES, _TILES):
        tile = first + tl.arange(0, _TILES)
        at = tile[:, None] * BM + tl.arange(0, BM)[None, :]
        # Not from the L1 cache: other programs wrote them.
        acc += tl.load(shares + at, mask=(tile < TILES)[:, None] & live[None, :], other=0.0, cache_modifier=".cg")
    return acc


@triton.jit
def decide(
    arrived, parts, shares, counter, path, backbone, live, tau, limits, depth, undefined, similarities, layer, T,
    OPENED: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Count in the ``arrived`` tiles that this program completed; the last of ``parts`` * TILES updates the flags.

    backbone, live: which of the tokens were in the backbone when the launch began, and which are not finished.

    No program reads ``path`` after it changed. Every program reads it first of all, and all of a block of tokens see
    the same ``parts`` (kinds of weights that some token needs). The block is complete once ``parts`` * TILES tiles
    are, and a tile is once all of its splits have counted themselves in, which a program does after it has read
    ``path``, for each part. So each read comes before a count on a tile, which comes before the count here of whoever
    completed that tile, which comes before the change: the counts release and acquire. A block without live tokens
    counts nothing and changes nothing. Programs of other blocks read other tokens.
    """
    if arrived > 0:
        tl.debug_barrier()  # every thread's shares come before the count
        count = tl.atomic_add(counter, arrived, sem="acq_rel", scope="gpu") + arrived
        if count == parts * TILES:
            tokens = tl.program_id(0) * BM + tl.arange(0, BM)
            passed = tl.load(depth + tokens, mask=backbone, other=0) + 1
            lost = tl.load(undefined + tokens, mask=backbone, other=0)
            least, most, threshold = tl.load(limits), tl.load(limits + 1), tl.load(tau + layer)
            ab = load_shares(shares, live, TILES, BM)  # everything is on its way before the first sum waits
            aa = load_shares(shares + TILES * BM, live, TILES, BM)
            bb = load_shares(shares + 2 * TILES * BM, live, TILES, BM)
            # As torch.cosine_similarity has it, no norm is taken for less than 1e-8.
            norms = tl.maximum(tl.sqrt_rn(tl.sum(aa, 0)), 1e-8) * tl.maximum(tl.sqrt_rn(tl.sum(bb, 0)), 1e-8)
            similarity = tl.div_rn(tl.sum(ab, 0), norms)  # [BM]
            asked = backbone & (passed >= least) & (passed < most)
            opened = backbone & (passed >= most) | asked & (similarity > threshold)
            tl.debug_barrier()  # several threads have read the same element
            tl.store(depth + tokens, passed, mask=backbone)
            tl.store(undefined + tokens, lost + 1, mask=asked & (similarity != similarity))
            tl.store(path + tokens, OPENED, mask=opened)
            if similarities is not None:
                tl.store(similarities + layer * T + tokens, similarity, mask=live)
            tl.atomic_xchg(counter, 0)  # for the next launch


@dataclass(frozen=True)
class DeviceGate:
    """A ``gates.SimilarityGate`` for each of T rows, after layer ``layer`` of L. All tensors are on the device.

    A row in the backbone has passed one more layer; it goes on in the river if that makes max_depth layers, or at least
    min_depth and the similarity of its states before and after this layer exceeds ``tau[layer]``. The similarity is
    that of ``torch.cosine_similarity``, but for the order of sums, as long as their squares are finite. One that is not
    a number keeps the row in the backbone, and is counted if it was asked for.

    before: float32 [T, N], what entered the layer; apart from the layer's output.
    layer: from 0 on.
    tau: float32 [L] (``thresholds``). limits: int32 [2], min_depth and max_depth (2 ** 31 - 1 for none). Both may be
    changed between replays of a graph. A max_depth of 0 is the caller's: its rows begin in the river.
    depth: int32 [T], the backbone layers that each row has passed in this step.
    undefined: int32 [T], the layers of this step that a row passed for want of a number. The caller zeroes both.
    similarities: float32 [L, T], written for all rows that are not finished, in the river too; None: not kept.
    """

    before: Tensor
    layer: int
    tau: Tensor
    limits: Tensor
    depth: Tensor
    undefined: Tensor
    similarities: Tensor | None = None

    def check(self, rows: int, width: int, device: torch.device) -> None:
        """Raises InvalidRequestError unless all is as above for T = ``rows``, N = ``width``."""
        layers = self.tau.numel()
        expect: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
            ("before", self.before, (rows, width), torch.float32),
            ("tau", self.tau, (layers,), torch.float32),
            ("limits", self.limits, (2,), torch.int32),
            ("depth", self.depth, (rows,), torch.int32),
            ("undefined", self.undefined, (rows,), torch.int32),
            ("similarities", self.similarities, (layers, rows), torch.float32),
        ]
        for name, tensor, shape, dtype in expect:
            if tensor is None:
                continue
            fits = tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.device == device
            if not fits or not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise InvalidRequestError(
                    f"is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
                    f"not contiguous, aligned {dtype} {list(shape)} on {device}",
                    field=name,
                )
        if not 0 <= self.layer < layers:
            raise InvalidRequestError(f"is {self.layer}, and tau has {layers} layers", field="layer")


def thresholds(tau: float | Sequence[float], layers: int) -> Tensor:
    """``SimilarityGate.tau`` as float32 [layers]: the largest numbers not above it, so that > means the same.

    A number, or one per layer, of which the last serves all further layers.
    """
    taus = [tau] if isinstance(tau, (int, float)) else list(tau)
    exact = torch.tensor([taus[min(layer, len(taus) - 1)] for layer in range(layers)], dtype=torch.float64)
    nearest = exact.float()
    return torch.where(nearest.double() > exact, nearest.nextafter(torch.tensor(-torch.inf)), nearest)
