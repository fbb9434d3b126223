"""The two ends of a decode step on the device: the tokens' embeddings, and what it hands to the next one and the host.

So a step can follow another without the host: the token that was chosen is the next one's input, its position one more.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverinfer.errors import InvalidRequestError
from riverinfer.kernels.triton_dual_linear import FINISHED, RIVER

_FINISHED: tl.constexpr = tl.constexpr(FINISHED)
_RIVER: tl.constexpr = tl.constexpr(RIVER)
_BLOCK = 1024
RECORD = 4  # float64 a row: token, logprob, depth, undefined similarities


@triton.jit
def begin_kernel(
    tokens, live, limits, table, h, path, depth, undefined, row_stride, H: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    wanted = tl.load(live + row) != 0
    token = tl.load(tokens + row, mask=wanted, other=0)
    mask = column < H
    v = tl.load(table + token * row_stride + column, mask=mask & wanted, other=0.0)
    tl.store(h + row * H + column, v.to(tl.float32), mask=mask)
    if block == 0:
        first = tl.where(tl.load(limits + 1) <= 0, _RIVER, 0)
        tl.store(path + row, tl.where(wanted, first, _FINISHED))
        tl.store(depth + row, 0)
        tl.store(undefined + row, 0)


def begin(
    tokens: Tensor,
    live: Tensor,
    limits: Tensor,
    table: Tensor,
    *,
    h: Tensor,
    path: Tensor,
    depth: Tensor,
    undefined: Tensor,
) -> None:
    """Embed R tokens and set every row's flags to those of a step's beginning.

    tokens int64 [R]; live int32 [R], 0 for rows that the step is to leave alone (their path is FINISHED);
    limits int32 [2], of which the second, the depth where every row is in the river, opens the gate from the start if
    it is 0; table bfloat16 or float32 [V, H]. Writes h float32 [R, H] (zeros for rows that are not live), path, depth
    and undefined int32 [R]. Raises InvalidRequestError for other tensors.
    """
    rows, width = h.shape
    for name, tensor, size, dtype in (
        ("tokens", tokens, (rows,), torch.int64),
        ("live", live, (rows,), torch.int32),
        ("limits", limits, (2,), torch.int32),
        ("h", h, (rows, width), torch.float32),
        ("path", path, (rows,), torch.int32),
        ("depth", depth, (rows,), torch.int32),
        ("undefined", undefined, (rows,), torch.int32),
    ):
        _require(tensor.shape == size and tensor.dtype == dtype and tensor.is_contiguous(), name, tensor)
    _require(table.dim() == 2 and table.shape[1] == width and table.stride(1) == 1, "table", table)
    begin_kernel[rows, triton.cdiv(width, _BLOCK)](
        tokens, live, limits, table, h, path, depth, undefined, table.stride(0), H=width, BLOCK=_BLOCK, num_warps=4
    )


@triton.jit(do_not_specialize=["size"])
def advance_kernel(
    chosen, logprob, depth, undefined, live, tokens, position, drawn, ring, count, size,
    RECORD: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, PADDED)
    mask = row < ROWS
    wanted = mask & (tl.load(live + row, mask=mask, other=0) != 0)
    token = tl.load(chosen + row, mask=wanted, other=0)
    tl.store(tokens + row, token, mask=wanted)
    tl.store(position + row, tl.load(position + row, mask=wanted, other=0) + 1, mask=wanted)
    tl.store(drawn + row, tl.load(drawn + row, mask=wanted, other=0) + 1, mask=wanted)
    step = tl.load(count)
    at = ring + ((step % size) * ROWS + row) * RECORD
    tl.store(at, token.to(tl.float64), mask=wanted)
    tl.store(at + 1, tl.load(logprob + row, mask=wanted, other=0.0).to(tl.float64), mask=wanted)
    tl.store(at + 2, tl.load(depth + row, mask=wanted, other=0).to(tl.float64), mask=wanted)
    tl.store(at + 3, tl.load(undefined + row, mask=wanted, other=0).to(tl.float64), mask=wanted)
    tl.debug_barrier()  # every thread has read the count
    tl.store(count, step + tl.max(wanted.to(tl.int64), 0))


def advance(
    chosen: Tensor,
    logprob: Tensor,
    depth: Tensor,
    undefined: Tensor,
    live: Tensor,
    *,
    tokens: Tensor,
    position: Tensor,
    drawn: Tensor,
    ring: Tensor,
    count: Tensor,
) -> None:
    """What R sequences, a row each, chose becomes their next input, and is recorded.

    chosen int64 [R], logprob float32 [R], depth and undefined int32 [R], live int32 [R] (rows with 0 stay as they
    are). tokens int64 [R] get the choice; position int32 [R] (of the input) and drawn int32 [R] (of the next choice)
    grow by one. ring float64 [steps, R, RECORD]: entry ``count`` modulo its length gets the record; count int64 [1]
    grows by one if any row is live. Raises InvalidRequestError for other tensors.
    """
    rows = len(tokens)
    for name, tensor, dtype in (
        ("chosen", chosen, torch.int64),
        ("logprob", logprob, torch.float32),
        ("depth", depth, torch.int32),
        ("undefined", undefined, torch.int32),
        ("live", live, torch.int32),
        ("tokens", tokens, torch.int64),
        ("position", position, torch.int32),
        ("drawn", drawn, torch.int32),
    ):
        _require(tensor.shape == (rows,) and tensor.dtype == dtype and tensor.is_contiguous(), name, tensor)
    fits = ring.dim() == 3 and ring.shape[1:] == (rows, RECORD) and ring.dtype == torch.float64 and ring.is_contiguous()
    _require(fits, "ring", ring)
    _require(count.shape == (1,) and count.dtype == torch.int64, "count", count)
    advance_kernel[(1,)](
        chosen, logprob, depth, undefined, live, tokens, position, drawn, ring, count, len(ring),
        RECORD=RECORD, ROWS=rows, PADDED=triton.next_power_of_2(rows), num_warps=1,
    )  # fmt: skip


@triton.jit
def open_round_kernel(
    command, tokens, position, drawn, live, drafts, count, kept, MAX: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    tl.store(tokens, tl.load(command))
    tl.store(position, tl.load(command + 1).to(tl.int32))
    tl.store(drawn, tl.load(command + 2).to(tl.int32))
    tl.store(live, 1)
    tl.store(count, tl.load(command + 3).to(tl.int32))
    tl.store(kept, 1.0)
    i = tl.arange(0, PADDED)
    tl.store(drafts + i, tl.load(command + 4 + i, mask=i < MAX, other=0), mask=i < MAX)


@triton.jit
def propose_kernel(
    chosen, confidence, tokens, position, drawn, live, drafts, confidences, count, kept, chances, bound, stops,
    BINS: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    if tl.load(live) != 0:
        token, sure = tl.load(chosen), tl.load(confidence)
        n = tl.load(count)
        tl.store(drafts + n, token)
        tl.store(confidences + n, sure)
        tl.store(count, n + 1)
        tl.store(tokens, token)
        tl.store(position, tl.load(position) + 1)
        tl.store(drawn, tl.load(drawn) + 1)
        chance = tl.load(kept) * tl.load(chances + tl.minimum(tl.maximum((sure * BINS).to(tl.int32), 0), BINS - 1))
        tl.store(kept, chance)
        ended = tl.sum((tl.load(stops + tl.arange(0, STOPS)) == token).to(tl.int32), 0) > 0
        if (chance <= tl.load(bound)) | ended:
            tl.store(live, 0)


@triton.jit
def assemble_kernel(
    command, drafts, count, tokens, position, drawn, live, ROWS: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, PADDED)
    mask = i < ROWS
    draft = tl.load(drafts + i - 1, mask=mask & (i > 0), other=0)
    tl.store(tokens + i, tl.where(i == 0, tl.load(command), draft), mask=mask)
    tl.store(position + i, tl.load(command + 1).to(tl.int32) + i, mask=mask)
    tl.store(drawn + i, tl.load(command + 2).to(tl.int32) + i, mask=mask)
    tl.store(live + i, (i <= tl.load(count)).to(tl.int32), mask=mask)


class RoundState:
    """Device tensors of a round of lossless decoding on one sequence, of up to ``drafts`` drafted tokens.

    command int64 [4 + drafts]: last token, its position, the number of the draw that follows it, how many tokens are
    drafted already, and those. A round goes on drafting while the product ``kept`` of the believed ``chances``
    (float32 [bins], by the confidence of each draft) exceeds ``bound`` float32 [1], and up to one of ``stops`` (int64,
    padded with -1). drafts int64, confidences float32, count int32 [1]: what was drafted.
    """

    STOPS = 16

    def __init__(self, drafts: int, bins: int, device: torch.device | str) -> None:
        self.command = torch.zeros(4 + drafts, dtype=torch.int64, device=device)
        self.drafts = torch.zeros(drafts, dtype=torch.int64, device=device)
        self.confidences = torch.zeros(drafts, dtype=torch.float32, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self.kept = torch.zeros(1, dtype=torch.float32, device=device)
        self.chances = torch.zeros(bins, dtype=torch.float32, device=device)
        self.bound = torch.zeros(1, dtype=torch.float32, device=device)
        self.stops = torch.full((self.STOPS,), -1, dtype=torch.int64, device=device)

    def open(self, tokens: Tensor, position: Tensor, drawn: Tensor, live: Tensor) -> None:
        """Row 0 of the step's tensors becomes the one that ``command`` says, and what it has drafted is noted."""
        most = len(self.drafts)
        open_round_kernel[(1,)](
            self.command, tokens, position, drawn, live, self.drafts, self.count, self.kept,
            MAX=most, PADDED=triton.next_power_of_2(most), num_warps=1,
        )  # fmt: skip

    def propose(
        self, chosen: Tensor, confidence: Tensor, tokens: Tensor, position: Tensor, drawn: Tensor, live: Tensor
    ) -> None:
        """What row 0 chose is a draft, and its next input; where it is not worth while to go on, ``live`` becomes 0.

        At most as many calls a round as there is room for drafts.
        """
        propose_kernel[(1,)](
            chosen, confidence, tokens, position, drawn, live, self.drafts, self.confidences, self.count, self.kept,
            self.chances, self.bound, self.stops, BINS=len(self.chances), STOPS=self.STOPS, num_warps=1,
        )  # fmt: skip

    def assemble(self, tokens: Tensor, position: Tensor, drawn: Tensor, live: Tensor) -> None:
        """The rows of the verification: the last token and all drafts, at consecutive positions; others are idle."""
        rows = len(tokens)
        assemble_kernel[(1,)](
            self.command, self.drafts, self.count, tokens, position, drawn, live,
            ROWS=rows, PADDED=triton.next_power_of_2(rows), num_warps=1,
        )  # fmt: skip


def _require(condition: bool, field: str, tensor: Tensor) -> None:
    if not condition:
        raise InvalidRequestError(f"is {tensor.dtype} {list(tensor.shape)}, which does not fit", field=field)
