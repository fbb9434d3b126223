"""Numeric building blocks against float64 definitions written out here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from riverinfer.kernels.linear import PackedLinear, PlainLinear, make_linear, packing_works
from riverinfer.kernels.torch_ops import attention, causal_mask, rms_norm, rotate, silu_mul

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(not packing_works(torch.bfloat16), reason="this CPU has no fast bfloat16")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_attention(q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
    """One query at a time over the positions it may see, in float64."""
    tokens, heads, dim = q.shape
    group = heads // k.shape[0]
    out = torch.zeros(tokens, heads, dim, dtype=torch.float64)
    for t in range(tokens):
        low = 0 if window is None else max(0, start + t - window + 1)
        for h in range(heads):
            keys = k[h // group, low : start + t + 1].double()
            scores = keys @ q[t, h].double() / math.sqrt(dim)
            out[t, h] = scores.softmax(0) @ v[h // group, low : start + t + 1].double()
    return out.view(tokens, heads * dim)


@given(
    start=st.integers(0, 20),
    tokens=st.integers(1, 12),
    window=st.none() | st.integers(1, 15),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=120, deadline=None)
def test_attention_sees_exactly_what_it_may(
    start: int, tokens: int, window: int | None, kv_heads: int, group: int
) -> None:
    end = start + tokens
    q = random(tokens, kv_heads * group, 8)
    k, v = random(kv_heads, 40, 8, seed=1), random(kv_heads, 40, 8, seed=2)
    k[:, end:] = v[:, end:] = float("nan")
    first, mask = causal_mask(start, tokens, window, CPU)
    got = attention(q, k[:, first:end], v[:, first:end], mask)
    assert torch.allclose(got.double(), naive_attention(q, k, v, start, window), atol=1e-5)


@pytest.mark.parametrize("rotary_dim", [16, 12, 4])
def test_rotation_turns_pairs_by_their_angles(rotary_dim: int) -> None:
    x, angles = random(5, 3, 16), random(5, rotary_dim // 2, seed=1)
    half = rotary_dim // 2
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    got = rotate(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    pairs = torch.complex(x[..., :half].double(), x[..., half:rotary_dim].double())
    turned = pairs * torch.polar(torch.ones(1, dtype=torch.float64), angles.double())[:, None]
    want = torch.cat((turned.real, turned.imag, x[..., rotary_dim:].double()), -1)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, atol=1e-6)


def test_rotation_of_bfloat16_rounds_only_its_input() -> None:
    x = random(4, 2, 8).bfloat16()
    cos, sin = random(4, 1, 8, seed=1), random(4, 1, 8, seed=2)
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin))


def test_norm_and_activation() -> None:
    x, weight = random(4, 32), random(32, seed=1)
    want = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert torch.allclose(rms_norm(x, weight, 1e-5).double(), want, atol=1e-6)
    gate, up = x.double().chunk(2, -1)
    assert torch.allclose(silu_mul(x.clone()).double(), gate * gate.sigmoid() * up, atol=1e-6)


@needs_packing
@given(rows=st.integers(1, 20), outputs=st.integers(1, 70), inputs=st.integers(1, 70), bias=st.booleans())
@settings(max_examples=60, deadline=None)
def test_blocked_weights_multiply_like_plain_ones(rows: int, outputs: int, inputs: int, bias: bool) -> None:
    x, weight = random(rows, inputs).bfloat16(), random(outputs, inputs, seed=1).bfloat16()
    b = random(outputs, seed=2).bfloat16() if bias else None
    packed, plain = PackedLinear(weight, b), PlainLinear(weight.float(), None if b is None else b.float())
    exact = plain(x.float())
    step = 2.0**-8  # half a unit in the last place of bfloat16, relative
    assert ((packed(x).float() - exact).abs() <= 2 * step * exact.abs() + 1e-2).all()
    assert packed.weight_bytes == weight.nbytes


@needs_packing
@pytest.mark.parametrize("shape", [(96, 64), (960, 576), (576, 1536)])
def test_a_row_does_not_depend_on_how_many_rows_there_are(shape: tuple[int, int]) -> None:
    linear = PackedLinear(random(*shape, seed=1).mul(0.05).bfloat16())
    x = random(8, shape[1]).bfloat16()
    alone = torch.cat([linear(x[i : i + 1]) for i in range(8)])
    for rows in range(1, 9):
        assert torch.equal(linear(x[:rows]), alone[:rows])


def test_the_choice_follows_device_and_dtype() -> None:
    assert isinstance(make_linear(random(8, 8)), PlainLinear)
    chosen = make_linear(random(8, 8).bfloat16())
    assert isinstance(chosen, PackedLinear if packing_works(torch.bfloat16) else PlainLinear)
    assert not packing_works(torch.float64)
