"""The quantizer: never worse than rounding, as good as the HQQ reference, robust; and the packing order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import NAMES, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.make_hqq_reference import reference_matrix
from torch import Tensor

from riverinfer.checkpoint import Checkpoint
from riverinfer.errors import InvalidRequestError, WeightsError
from riverinfer.weights_convert import quantize as module
from riverinfer.weights_convert.packing import pack, unpack
from riverinfer.weights_convert.quantize import GROUPS, QuantizedMatrix, quantize

REFERENCE = json.loads((Path(__file__).parent / "oracle" / "hqq_reference.json").read_text())["cases"]
SETTINGS = [(bits, group) for bits in (4, 8) for group in GROUPS] + [(8, 0)]


def group_errors(matrix: QuantizedMatrix, weight: Tensor) -> Tensor:
    """Squared error of each group, float64 [N, K / group], by the documented formula from the stored values."""
    q = matrix.q.double().view(*matrix.scale.shape, -1) - 2 ** (matrix.bits - 1)
    restored = q * matrix.scale.double().unsqueeze(-1) + matrix.offset.double().unsqueeze(-1)
    return (restored - weight.double().view_as(restored)).square().sum(-1)


def check(weight: Tensor, bits: int, group: int) -> float:
    """Check both methods on one matrix; returns the relative L2 error of hqq."""
    rtn, hqq = (quantize(weight, bits=bits, group=group, method=method) for method in ("rtn", "hqq"))
    for matrix in (rtn, hqq):
        groups = (weight.shape[0], weight.shape[1] // (group or weight.shape[1]))
        assert (matrix.q.dtype, matrix.q.shape) == (torch.uint8, weight.shape)
        assert int(matrix.q.max()) < 2**bits
        for stored in (matrix.scale, matrix.offset):
            assert (stored.dtype, stored.shape) == (torch.bfloat16, groups)
            assert bool(stored.isfinite().all())
        assert bool(matrix.dequantize().isfinite().all())
    scale2 = weight.double().square().view(*rtn.scale.shape, -1).sum(-1)
    # Two float32 roundings of an error that is near nothing are no loss.
    assert bool((group_errors(hqq, weight) <= group_errors(rtn, weight) * (1 + 1e-4) + 1e-13 * scale2).all())
    return float((group_errors(hqq, weight).sum() / scale2.sum().clamp(min=1e-300)).sqrt())


def synthetic() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    gauss = 0.02 * torch.randn(24, 256, generator=generator)
    outliers = gauss.clone()
    outliers[::3, ::50] *= 100
    constant = torch.tensor([0.0, 0.3, -1e-5, 1e30, 100.3]).repeat_interleave(4).unsqueeze(1).expand(20, 256)
    return {
        "gauss": gauss,
        "student": reference_matrix(0.02)[:, :256],
        "wide": reference_matrix(50.0)[:, :256],
        "outliers": outliers,
        "constant": constant.contiguous(),
        "huge": gauss * 1e38,
        "small": gauss * 1e-20,
        "vanishing": gauss * 1e-40,
        "offset": gauss * 1e-3 + 7,
        "mixed": gauss * torch.logspace(-30, 30, 24).unsqueeze(1),
    }


@pytest.mark.parametrize(("bits", "group"), SETTINGS)
@pytest.mark.parametrize("name", synthetic())
def test_hqq_is_never_worse_than_rounding(name: str, bits: int, group: int) -> None:
    relative = check(synthetic()[name], bits, group)
    if name in ("gauss", "student", "wide", "huge", "small"):
        low, high = (0.05, 0.17) if bits == 4 else (0.002, 0.016)
        assert low < relative < high
    elif name in ("constant", "offset"):
        assert relative < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_hqq_is_never_worse_than_rounding_on_the_golden_models(name: str) -> None:
    checkpoint = Checkpoint.open(ROOT / name)
    with checkpoint.reader() as read:
        weights = [read(x).float() for x in checkpoint.entries if x.endswith("_proj.weight")]
    assert weights
    for weight in weights:
        for bits, group in SETTINGS:
            if group == 0 or weight.shape[1] % group == 0:
                assert check(weight, bits, group) < (0.15 if bits == 4 else 0.02)


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: f"{case['spread']}-w{case['bits']}g{case['group']}")
def test_hqq_agrees_with_the_reference(case: dict[str, Any]) -> None:
    weight = reference_matrix(case["spread"])
    top = 2 ** case["bits"] - 1
    groups = weight.view(-1, case["group"])
    steps, zero = module._half_quadratic(groups, groups.amin(1, keepdim=True), groups.amax(1, keepdim=True), top)
    plain = ((groups * steps + zero).round().clamp(0, top) - zero) / steps - groups
    assert float(plain.norm() / weight.norm()) == pytest.approx(case["relative_l2"], rel=0.02)
    assert float(plain.abs().mean()) == pytest.approx(case["mean_abs"], rel=0.02)
    refitted = quantize(weight, bits=case["bits"], group=case["group"]).dequantize() - weight
    assert float(refitted.norm() / weight.norm()) < 1.02 * case["relative_l2"]
    if case["bits"] == 4:
        assert float(refitted.norm() / weight.norm()) < 0.99 * case["relative_l2"]


def test_integers_are_the_nearest_for_the_stored_scale_and_offset() -> None:
    weight = reference_matrix(0.02)
    matrix = quantize(weight, bits=4, group=64)
    levels = torch.arange(16).double() - 8
    scale, offset = matrix.scale.double()[..., None, None], matrix.offset.double()[..., None, None]
    distance = (weight.double().view(64, 8, 64, 1) - (levels * scale + offset)).abs()  # [N, groups, 64, 16]
    chosen = distance.gather(-1, matrix.q.view(64, 8, 64, 1).long()).squeeze(-1)
    assert bool((chosen <= distance.amin(-1) * (1 + 1e-4)).all())


def test_row_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = reference_matrix(0.02)
    whole = quantize(weight, bits=4, group=64, method="rtn")
    monkeypatch.setattr(module, "_BLOCK_CPU", 3 * 512)
    blocks = quantize(weight, bits=4, group=64, method="rtn")
    assert torch.equal(whole.q, blocks.q)
    assert torch.equal(whole.scale, blocks.scale)
    assert check(weight, 4, 64) < 0.12


def test_other_dtypes_and_views_are_read_and_left_alone() -> None:
    weight = reference_matrix(0.02).to(torch.bfloat16).t()  # [512, 64], not contiguous
    before = weight.clone()
    matrix = quantize(weight, bits=8, group=32)
    assert torch.equal(weight, before)
    assert torch.allclose(matrix.dequantize(), weight.float(), atol=2e-3)
    assert matrix.dequantize(torch.bfloat16).dtype == torch.bfloat16
    q = matrix.q.clone()
    matrix.dequantize()
    assert torch.equal(matrix.q, q)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_weights_that_are_not_finite_are_refused(bad: float, method: str) -> None:
    weight = torch.zeros(4, 64)
    weight[3, 40] = bad
    with pytest.raises(WeightsError, match="NaN or inf"):
        quantize(weight, bits=4, group=32, method=method)


@pytest.mark.parametrize(
    ("shape", "bits", "group", "method", "said"),
    [
        ((4, 64), 3, 32, "hqq", "3 bits"),
        ((4, 64), 4, 16, "hqq", "group 16"),
        ((4, 64), 4, 0, "hqq", "8 bits"),
        ((4, 64), 4, 32, "gptq", "gptq"),
        ((4, 96), 4, 64, "hqq", r"\[4, 96\].*group 32, or 8 bits and group 0"),
        ((4, 112), 4, 64, "hqq", r"\[4, 112\].*use 8 bits and group 0"),
        ((64,), 4, 64, "hqq", r"\[64\]"),
        ((0, 64), 4, 64, "hqq", r"\[0, 64\]"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    shape: tuple[int, ...], bits: int, group: int, method: str, said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        quantize(torch.zeros(shape), bits=bits, group=group, method=method)


def test_the_packing_order_by_example() -> None:
    q = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [0, 15, 1, 14, 2, 13, 15, 7]], dtype=torch.uint8)
    # One group of 8: runs of two weights; word 0 holds weights 0, 2, 4, 6 and word 1 holds 1, 3, 5, 7.
    assert pack(q, 4, 8).tolist() == [[0x7531, 0x8642 - 0x10000], [0xF210 - 0x10000, 0x7DEF]]
    # Two groups of 4: runs of one weight, so a word holds four weights in order.
    assert pack(q, 4, 4).tolist() == [[0x4321, 0x8765 - 0x10000], [0xE1F0 - 0x10000, 0x7FD2]]
    assert pack(q, 8, 0) is q


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([(4, 32), (4, 64), (4, 128), (8, 64), (8, 0)]), st.integers(1, 5), st.integers(1, 3), st.data())
def test_packing_round_trip(kind: tuple[int, int], rows: int, groups: int, data: st.DataObject) -> None:
    bits, group = kind
    columns = groups * (group or 7)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack(q, bits, group)
    assert packed.nbytes == rows * columns * bits // 8
    assert torch.equal(unpack(packed, bits, group), q)
    if bits == 4:
        # The definition, weight by weight.
        g, j, c = (data.draw(st.integers(0, n - 1)) for n in (groups, 4, group // 4))
        word = packed[:, g * group // 4 + c].int()
        assert torch.equal((word >> (4 * j)) & 15, q[:, g * group + j * (group // 4) + c].int())


@pytest.mark.parametrize("case", [(torch.int32, 4, 32, 64), (torch.uint8, 5, 32, 64), (torch.uint8, 4, 32, 48)])
def test_what_cannot_be_packed_is_refused(case: tuple[torch.dtype, int, int, int]) -> None:
    dtype, bits, group, columns = case
    with pytest.raises(InvalidRequestError):
        pack(torch.zeros(2, columns, dtype=dtype), bits, group)
