"""Norm and attention of a few rows: against ``torch_ops``, and to the bit independent of how many rows there are."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from golden_models import CPU, NAMES, ROOT, make_cache, open_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from riverinfer.decode import walk
from riverinfer.kernels import few_rows, torch_ops
from riverinfer.kernels.few_rows import FEW, spans
from riverinfer.kernels.linear import packing_works
from riverinfer.model import Model

DTYPES = [torch.float32, torch.bfloat16]
HALF_STEP = 2.0**-8  # of bfloat16, relative
needs_attention = pytest.mark.skipif(not few_rows.attention_works(), reason="torch lacks the CPU attention operator")
needs_packing = pytest.mark.skipif(
    not (packing_works(torch.bfloat16) and few_rows.attention_works()), reason="this CPU has no fast bfloat16"
)
# (query heads, key/value heads, dimension): groups of 1, 2, 3 (the demo model's), 4, 6, 11, 16, 33 and 64.
SHAPES = [
    (4, 4, 16),
    (4, 2, 16),
    (9, 3, 64),
    (8, 2, 128),
    (12, 2, 12),
    (11, 1, 64),
    (16, 1, 64),
    (33, 1, 16),
    (64, 1, 8),
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    rows=st.integers(1, FEW + 2),
    size=st.integers(1, 700),
    magnitude=st.sampled_from([1e-12, 1e-3, 1.0, 1e4, 1e15]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None)
def test_the_norm_is_that_of_torch_ops(rows: int, size: int, magnitude: float, dtype: torch.dtype, seed: int) -> None:
    x = magnitude * torch.randn(rows, size, generator=seeded(seed))
    weight = torch.randn(size, generator=seeded(seed + 1))
    got = few_rows.rms_norm(x, weight, 1e-5, dtype)
    want = torch_ops.rms_norm(x.double(), weight.double(), 1e-5)
    assert got.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else HALF_STEP
    assert ((got.double() - want).abs() <= tolerance * want.abs() + 1e-30).all()


def test_the_norm_of_what_is_no_number_is_none_and_that_of_nothing_nothing() -> None:
    weight = torch.ones(4)
    for bad in (float("nan"), float("inf")):
        for rows in (1, 2):
            x = torch.ones(rows, 4)
            x[0, 1] = bad
            normed = few_rows.rms_norm(x, weight, 1e-5, torch.float32)
            assert normed[0, 1].isnan()
            assert torch.equal(normed[1:], few_rows.rms_norm(x[1:], weight, 1e-5, torch.float32))
    assert not few_rows.rms_norm(torch.zeros(1, 4), weight, 1e-5, torch.float32).any()


@pytest.mark.parametrize("size", [32, 64, 100, 576, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_norm_does_not_depend_on_how_many_rows_there_are(size: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(FEW, size, generator=seeded(size)), torch.randn(size, generator=seeded(1))
    alone = torch.cat([few_rows.rms_norm(row[None], weight, 1e-5, dtype) for row in x])
    for rows in range(1, FEW + 1):
        assert torch.equal(few_rows.rms_norm(x[:rows], weight, 1e-5, dtype), alone[:rows])


def heads_of(
    shape: tuple[int, int, int], positions: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """FEW queries and a cache whose positions from ``positions`` on are NaN."""
    heads, kv_heads, dim = shape
    g = seeded(seed)
    q = torch.randn(FEW, heads, dim, generator=g).to(dtype)
    k, v = (torch.randn(kv_heads, positions + 5, dim, generator=g).to(dtype) for _ in "kv")
    k[:, positions:] = v[:, positions:] = float("nan")
    return q, k, v


@needs_attention
@given(
    shape=st.sampled_from(SHAPES),
    start=st.integers(0, 70),
    rows=st.integers(1, FEW),
    window=st.none() | st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=120, deadline=None)
def test_attention_is_that_of_torch_ops_and_reads_nothing_beyond(
    shape: tuple[int, int, int], start: int, rows: int, window: int | None, dtype: torch.dtype, seed: int
) -> None:
    q, k, v = heads_of(shape, start + rows, dtype, seed)
    if window is not None:
        # What lies before the first row's window is not read either.
        k[:, : max(0, start + 1 - window)] = v[:, : max(0, start + 1 - window)] = float("nan")
    got = few_rows.attention(q[:rows], k, v, spans(start, rows, window, shape[0] // shape[1], dtype))
    first, mask = torch_ops.causal_mask(start, rows, window, CPU)
    want = torch_ops.attention(
        q[:rows].double(), k[:, first : start + rows].double(), v[:, first : start + rows].double(), mask
    )
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2)


@needs_packing
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 24])
def test_a_rows_attention_does_not_depend_on_how_many_rows_there_are(
    shape: tuple[int, int, int], window: int | None
) -> None:
    group = shape[0] // shape[1]
    # Sums in another order mostly round to the same bfloat16: one try would not tell.
    for start, seed in product((0, 1, 7, 15, 16, 17, 48, 60, 63, 100, 127, 500, 512), range(4)):
        q, k, v = heads_of(shape, start + FEW, torch.bfloat16, seed)

        def attend(first: int, count: int) -> Tensor:
            parts = spans(start + first, count, window, group, torch.bfloat16)  # noqa: B023
            return few_rows.attention(q[first : first + count], k, v, parts)  # noqa: B023

        alone = torch.cat([attend(row, 1) for row in range(FEW)])
        for rows in range(2, FEW + 1):
            assert torch.equal(attend(0, rows), alone[:rows]), (start, rows)
        for row in range(1, FEW):
            assert torch.equal(attend(row, FEW - row), alone[row:]), (start, row)


@torch.inference_mode()
def assert_rows_walk_alike(model: Model, start: int) -> None:
    """Logits, K and V of n tokens at once equal those of one at a time, to the bit, for every n up to FEW."""
    ids = torch.randint(5, model.config.vocab_size, (start + FEW,), generator=seeded(start))
    begun = make_cache(model, start + FEW)
    if start:
        walk(model, ids[:start], 0, begun)

    def copied() -> list[tuple[Tensor, Tensor]]:
        return [(k.clone(), v.clone()) for k, v in begun]

    singly = copied()
    want = torch.cat([model.logits(walk(model, ids[[row]], row, singly)) for row in range(start, start + FEW)])
    for count in range(1, FEW + 1):
        end, cache = start + count, copied()
        assert torch.equal(model.logits(walk(model, ids[start:end], start, cache)), want[:count]), (start, count)
        for (k, v), (want_k, want_v) in zip(cache, singly, strict=True):
            assert torch.equal(k[:, :end], want_k[:, :end])
            assert torch.equal(v[:, :end], want_v[:, :end])


@needs_packing
@pytest.mark.parametrize("name", NAMES)
def test_a_walk_of_several_tokens_equals_single_ones(name: str) -> None:
    model = open_model(ROOT / name, torch.bfloat16)
    for start in (0, 3, 15, 16, 40):  # below 64: phi3 turns all K the other way there
        assert_rows_walk_alike(model, start)


@needs_packing
def test_a_walk_of_several_tokens_equals_single_ones_on_the_demo_model(demo_dir: Path) -> None:
    model = open_model(demo_dir, torch.bfloat16)
    for start in (0, 60):
        assert_rows_walk_alike(model, start)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("group", [1, 2, 16, 64, 100])
def test_spans_cover_every_row_once_with_what_it_sees(window: int | None, group: int) -> None:
    for start in (0, 9, 31, 48):
        rows: list[int] = []
        for span in spans(start, FEW, window, group, torch.float32):
            count = span.end_row - span.first_row
            assert (count == 1) == (span.mask is None)
            for offset, row in enumerate(range(span.first_row, span.end_row)):
                visible = torch.zeros(span.end - span.first)
                if span.mask is not None:
                    assert span.mask.shape == (1, 1, count * group, span.end - span.first)
                    (visible,) = span.mask[0, 0, offset * group : (offset + 1) * group].unique(dim=0)
                seen = [span.first + i for i, hidden in enumerate(visible.tolist()) if hidden == 0]
                last = start + row
                assert seen == list(range(0 if window is None else max(0, last + 1 - window), last + 1))
                rows.append(row)
        assert rows == list(range(FEW))


def test_without_the_operator_nothing_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    few_rows.attention_works.cache_clear()
    monkeypatch.setattr(few_rows, "_operator", None)
    try:
        assert not few_rows.attention_works()
        assert open_model(ROOT / "llama").step_context(0, 1, 1).spans is None

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("no such operator")

        few_rows.attention_works.cache_clear()
        monkeypatch.setattr(few_rows, "_operator", broken)
        assert not few_rows.attention_works()
    finally:
        few_rows.attention_works.cache_clear()
