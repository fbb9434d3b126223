"""Weights through two buffers: here on the CPU, where nothing is asynchronous but everything else is the same."""

from __future__ import annotations

import pytest
import torch

from riverinfer.upload import Upload


@pytest.mark.parametrize("shape", [(1,), (16,), (17,), (100, 7), (3, 5, 11), (0, 4)])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_every_element_arrives(shape: tuple[int, ...], source: torch.dtype, target: torch.dtype) -> None:
    upload = Upload(torch.device("cpu"), nbytes=64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(source)
    out = torch.full(shape, float("nan"), dtype=target)
    upload(x, out)
    assert torch.equal(out, x.to(target))


def test_a_part_of_a_larger_tensor() -> None:
    whole = torch.zeros(6, 5)
    Upload(torch.device("cpu"), nbytes=32)(torch.ones(2, 5), whole[3:5])
    assert whole.sum(1).tolist() == [0, 0, 0, 5, 5, 0]
