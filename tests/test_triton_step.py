"""The ends of steps and rounds on the device, without a GPU: interpreted, and compiled for NVIDIA's architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_process import LARGEST, collect, compile_kernel, needs_triton


@needs_triton
def test_what_a_step_begins_and_ends_with(tmp_path: Path) -> None:
    collect(__file__, "interpreted_", tmp_path, TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_hopper_and_ampere(tmp_path: Path) -> None:
    collect(__file__, "compiled_", tmp_path)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- interpreted ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("most", [0, 5])
def interpreted_begin(dtype: torch.dtype, most: int) -> None:
    """Embeddings of the rows that are live; the gate is open from the start where no layer is the backbone's."""
    from riverinfer.kernels.triton_dual_linear import BACKBONE, FINISHED, RIVER
    from riverinfer.kernels.triton_step import begin

    table = torch.randn(20, 1100, generator=torch.Generator().manual_seed(0)).to(dtype)
    h, path, depth, undefined = torch.full((3, 1100), 7.0), ints(5, 5, 5), ints(4, 4, 4), ints(3, 3, 3)
    begin(
        torch.tensor([19, 10**6, 0]), ints(1, 0, 1), ints(0, most), table,
        h=h, path=path, depth=depth, undefined=undefined,
    )  # fmt: skip
    assert torch.equal(h[0], table[19].float())
    assert torch.equal(h[2], table[0].float())
    assert not h[1].any()
    first = RIVER if most == 0 else BACKBONE
    assert path.tolist() == [first, FINISHED, first]
    assert not depth.any()
    assert not undefined.any()


def interpreted_advance() -> None:
    """What was chosen is the next input, and noted for the host; idle rows stay, and idle steps do not count."""
    from riverinfer.kernels.triton_step import RECORD, advance

    ring, count = torch.zeros(4, 3, RECORD, dtype=torch.float64), torch.tensor([5])
    tokens, position, drawn = torch.tensor([1, 2, 3]), ints(10, 20, 30), ints(11, 21, 31)
    live = ints(1, 0, 1)

    def step() -> None:
        advance(
            torch.tensor([100_000, 200_000, 2**40]), torch.tensor([-1.5, 0.0, -0.25]),
            ints(7, 8, 9), ints(0, 1, 2), live,
            tokens=tokens, position=position, drawn=drawn, ring=ring, count=count,
        )  # fmt: skip

    step()
    assert count.item() == 6
    assert tokens.tolist() == [100_000, 2, 2**40]
    assert (position.tolist(), drawn.tolist()) == ([11, 20, 31], [12, 21, 32])
    assert ring[1].tolist() == [[100_000, -1.5, 7, 0], [0, 0, 0, 0], [2**40, -0.25, 9, 2]]
    assert not ring[[0, 2, 3]].any()
    live.zero_()
    step()
    assert count.item() == 6
    assert position.tolist() == [11, 20, 31]


def interpreted_rounds() -> None:
    """A round opens, drafts until the product of chances is too small or a text ends, and is put together."""
    from riverinfer.kernels.triton_step import RoundState

    state = RoundState(6, 10, "cpu")
    tokens, position, drawn, live = (
        torch.zeros(8, dtype=torch.int64),
        *(torch.zeros(8, dtype=torch.int32) for _ in "pdl"),
    )
    first = tokens[:1], position[:1], drawn[:1], live[:1]
    state.chances.copy_(torch.arange(1, 11) / 10)
    state.bound.fill_(0.3)
    state.stops[:2] = torch.tensor([70, 71])

    def open_round(*command: int) -> None:
        state.command[: len(command)] = torch.tensor(command)
        state.open(*first)

    def propose(token: int, confidence: float) -> None:
        state.propose(torch.tensor([token]), torch.tensor([confidence]), *first)

    open_round(9, 40, 41, 0)
    assert [int(x) for x in first] == [9, 40, 41, 1]
    propose(50, 0.95)
    propose(51, 0.55)  # 1.0 * 0.6
    assert [int(x) for x in first] == [51, 42, 43, 1]
    propose(52, 0.49)  # 0.3: no more than the bound
    propose(53, 1.0)
    assert (state.count.item(), state.drafts[:3].tolist()) == (3, [50, 51, 52])
    assert state.confidences[:3].tolist() == pytest.approx([0.95, 0.55, 0.49])
    state.assemble(tokens, position, drawn, live)
    assert tokens[:4].tolist() == [9, 50, 51, 52]
    assert position.tolist() == list(range(40, 48))
    assert drawn.tolist() == list(range(41, 49))
    assert live.tolist() == [1] * 4 + [0] * 4

    open_round(9, 40, 41, 0)
    propose(71, 1.0)
    propose(1, 1.0)
    assert (state.count.item(), live[0].item()) == (1, 0)

    open_round(8, 3, 4, 2, 60, 61)
    state.assemble(tokens[:4], position[:4], drawn[:4], live[:4])
    assert tokens[:3].tolist() == [8, 60, 61]
    assert live[:4].tolist() == [1, 1, 1, 0]


def interpreted_errors() -> None:
    from riverinfer.errors import InvalidRequestError
    from riverinfer.kernels.triton_step import advance, begin

    two = ints(0, 0)
    good: dict[str, Any] = {"h": torch.zeros(2, 8), "path": two, "depth": two, "undefined": two}
    for field, change in (
        ("h", {"h": torch.zeros(2, 8).half()}),
        ("path", {"path": two.long()}),
        ("depth", {"depth": ints(0)}),
    ):
        with pytest.raises(InvalidRequestError, match=rf"^{field}: "):
            begin(torch.tensor([0, 1]), two, two, torch.zeros(4, 8), **{**good, **change})
    with pytest.raises(InvalidRequestError, match=r"^table: "):
        begin(torch.tensor([0, 1]), two, two, torch.zeros(4, 9), **good)
    with pytest.raises(InvalidRequestError, match=r"^ring: "):
        advance(
            torch.tensor([0]), torch.zeros(1), ints(0), ints(0), ints(0), tokens=torch.tensor([0]), position=ints(0),
            drawn=ints(0), ring=torch.zeros(4, 1, 3), count=torch.tensor([0]),
        )  # fmt: skip


# --- compiled ---

I32, I64, F32, F64 = "*i32", "*i64", "*fp32", "*fp64"


@pytest.mark.parametrize("capability", [80, 90])
def compiled_kernels(capability: int) -> None:
    from riverinfer.kernels import triton_step

    rows: dict[str, str] = {"tokens": I64, "position": I32, "drawn": I32, "live": I32, "path": I32, "depth": I32}
    rows |= {"undefined": I32, "limits": I32, "h": F32, "chosen": I64, "logprob": F32, "confidence": F32}
    rows |= {"table": "*bf16", "row_stride": "i32", "ring": F64, "count": I64, "size": "i32", "command": I64}
    rounds = {
        **rows,
        "drafts": I64,
        "confidences": F32,
        "count": I32,
        "kept": F32,
        "chances": F32,
        "bound": F32,
        "stops": I64,
    }
    for kernel, types, constants in (
        (triton_step.begin_kernel, rows, {"H": 4096, "BLOCK": 1024}),
        (triton_step.advance_kernel, rows, {"RECORD": 4, "ROWS": 8, "PADDED": 8}),
        (triton_step.open_round_kernel, rounds, {"MAX": 15, "PADDED": 16}),
        (triton_step.propose_kernel, rounds, {"BINS": 10, "STOPS": 16}),
        (triton_step.assemble_kernel, rounds, {"ROWS": 16, "PADDED": 16}),
    ):
        made = compile_kernel(
            kernel, types, constants, warps=4 if kernel is triton_step.begin_kernel else 1, capability=capability
        )
        assert made.spills == made.local == 0
        assert made.shared <= LARGEST
