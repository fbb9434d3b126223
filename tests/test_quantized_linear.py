"""4- and 8-bit matrices against a float64 product with the dequantized weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from riverinfer.kernels import quantized_linear
from riverinfer.kernels.quantized_linear import (
    CpuInt4Linear,
    CpuNibblesLinear,
    dequantize,
    make_quantized_linear,
    quantized_bytes,
)


def quantized(rows: int, columns: int, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows + columns + group)
    q = torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    shape = (rows, columns // group)
    scale = (torch.rand(shape, generator=g) + 0.1).mul(0.01).bfloat16()
    return q, scale, torch.randn(shape, generator=g).mul(0.01).bfloat16()


def definition(q: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Weight by weight, in float64."""
    group = q.shape[1] // scale.shape[1]
    columns = torch.arange(q.shape[1]) // group
    return (q.double() - 2 ** (bits - 1)) * scale.double()[:, columns] + offset.double()[:, columns]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_dequantize_is_the_definition(bits: int, group: int) -> None:
    q, scale, offset = quantized(24, 256, group, bits)
    assert torch.allclose(dequantize(q, scale, offset, bits).double(), definition(q, scale, offset, bits), atol=1e-7)


@pytest.mark.parametrize("rows", [16, 48, 20])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_four_bits(rows: int, group: int, tokens: int, dtype: torch.dtype, bias: bool) -> None:
    q, scale, offset = quantized(rows, 256, group, 4)
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    b = torch.randn(rows, generator=torch.Generator().manual_seed(2)).to(dtype) if bias else None
    got = make_quantized_linear(q, scale, offset, bits=4, dtype=dtype, bias=b)(x)
    want = x.double() @ definition(q, scale, offset, 4).T + (0 if b is None else b.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1.5e-2
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("rows", [16, 24, 1096])
@pytest.mark.parametrize(("columns", "group"), [(256, 32), (256, 64), (256, 128), (256, 256), (192, 192)])
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_eight_bits_are_right_but_for_the_rounding_of_two_halves(
    rows: int, columns: int, group: int, tokens: int, bias: bool
) -> None:
    q, scale, offset = quantized(rows, columns, group, 8)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    b = torch.randn(rows, generator=torch.Generator().manual_seed(2)).bfloat16() if bias else None
    linear = make_quantized_linear(q, scale, offset, bits=8, dtype=torch.bfloat16, bias=b)
    assert isinstance(linear, CpuNibblesLinear)
    got = linear(x)
    want = x.double() @ definition(q, scale, offset, 8).T
    low = x.double() @ definition((q & 15) + 128, scale, torch.zeros_like(offset), 8).T
    e = 2**-8 * ((want - low).abs() + low.abs())
    bound = e + 2**-8 * (want.abs() + e) + 1e-6 * want.abs().max()
    if b is not None:  # another sum, rounded too
        want = want + b.double()
        bound = bound + 2**-8 * (want.abs() + bound)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= bound).all()
    assert (got.double() - want).abs().max() <= 1.5e-2 * want.abs().max()  # as for 4 bits


@pytest.mark.parametrize(
    ("rows", "columns", "group", "dtype"),
    [(20, 256, 64, torch.bfloat16), (16, 112, 112, torch.bfloat16), (16, 256, 64, torch.float32)],
    ids=["rows", "columns", "float32"],
)
def test_eight_bits_without_a_kernel_are_dequantized(rows: int, columns: int, group: int, dtype: torch.dtype) -> None:
    q, scale, offset = quantized(rows, columns, group, 8)
    linear = make_quantized_linear(q, scale, offset, bits=8, dtype=dtype)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = x.double() @ definition(q, scale, offset, 8).T
    assert not isinstance(linear, CpuNibblesLinear)
    assert (linear(x).double() - want).abs().max() <= 1.5e-2 * want.abs().max()


def test_a_matrix_packed_in_parts_is_packed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, scale, offset = quantized(48 * 16, 256, 64, 4)
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    assert quantized_linear._ROWS % 64 == 0
    monkeypatch.setattr(quantized_linear, "_ROWS", 64)
    assert torch.equal(CpuInt4Linear(q, scale, offset).weight, whole)


def test_small_weights_are_read_as_such_where_torch_can() -> None:
    four = make_quantized_linear(*quantized(48, 256, 64, 4), bits=4, dtype=torch.bfloat16)
    by_group = make_quantized_linear(*quantized(48, 256, 64, 8), bits=8, dtype=torch.bfloat16)
    by_row = make_quantized_linear(*quantized(48, 192, 192, 8), bits=8, dtype=torch.bfloat16)
    assert isinstance(four, CpuInt4Linear)
    assert isinstance(by_group, CpuNibblesLinear)
    assert isinstance(by_row, CpuNibblesLinear)
    assert (four.group, by_group.group, by_row.group) == (64, 64, 64)
    assert four.weight_bytes == 48 * 256 // 2 + 2 * 2 * 48 * 4
    assert by_group.weight_bytes == 48 * 256 + 2 * (2 * 2 * 48 * 4)
    assert by_row.weight_bytes == 48 * 192 + 2 * (2 * 2 * 48 * 3)
    for linear in (four, by_group, by_row):
        assert linear.weight_bytes == linear.weight.nbytes + linear.scales.nbytes
    cpu = torch.device("cpu")
    assert four.weight_bytes == quantized_bytes(48, 256, 4, 64, torch.bfloat16, cpu)
    assert by_group.weight_bytes == quantized_bytes(48, 256, 8, 64, torch.bfloat16, cpu)
    assert by_row.weight_bytes == quantized_bytes(48, 192, 8, 0, torch.bfloat16, cpu)
    assert quantized_bytes(48, 112, 8, 0, torch.bfloat16, cpu) == 48 * 112 * 2
    assert quantized_bytes(48, 256, 4, 64, torch.float32, cpu) == 48 * 256 * 4
