"""4- and 8-bit matrices against a float64 product with the dequantized weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from riverinfer.kernels.quantized_linear import (
    CpuInt4Linear,
    CpuInt8Linear,
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


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_eight_bits_by_row_and_by_group(tokens: int) -> None:
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    for group in (256, 64):
        q, scale, offset = quantized(48, 256, group, 8)
        linear = make_quantized_linear(q, scale, offset, bits=8, dtype=torch.bfloat16)
        want = x.double() @ definition(q, scale, offset, 8).T
        assert (linear(x).double() - want).abs().max() <= 1.5e-2 * want.abs().max()


def test_small_weights_are_read_as_such_where_torch_can() -> None:
    four = make_quantized_linear(*quantized(48, 256, 64, 4), bits=4, dtype=torch.bfloat16)
    q, scale, offset = quantized(48, 256, 256, 8)
    eight = make_quantized_linear(q, scale, offset, bits=8, dtype=torch.bfloat16)
    assert isinstance(four, CpuInt4Linear)
    assert isinstance(eight, CpuInt8Linear)
    assert four.weight_bytes == 48 * 256 // 2 + 2 * 2 * 48 * 4
    assert eight.weight_bytes == 48 * 256 + 4 * 48
    cpu = torch.device("cpu")
    assert four.weight_bytes == quantized_bytes(48, 256, 4, 64, torch.bfloat16, cpu)
    assert eight.weight_bytes == quantized_bytes(48, 256, 8, 0, torch.bfloat16, cpu)
    assert quantized_bytes(48, 256, 8, 64, torch.bfloat16, cpu) == 48 * 256 * 2
    assert quantized_bytes(48, 256, 4, 64, torch.float32, cpu) == 48 * 256 * 4
