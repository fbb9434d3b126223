"""The walk in whole runs of layers equals the readable one to the bit: states, K, V and depths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden_models import NAMES, ROOT, make_cache, open_model
from torch import Tensor

from riverinfer.decode import walk
from riverinfer.fast_walk import can_walk_fast, fast_walk
from riverinfer.gates import FixedDepth, Gate, SimilarityGate, always, never
from riverinfer.kernels.few_rows import FEW
from riverinfer.kernels.linear import AbsentLinear
from riverinfer.kernels.quantized_linear import make_quantized_linear
from riverinfer.kernels.scripted import script_layers
from riverinfer.kv_ledger import KVLedger
from riverinfer.model import DecoderLayer, Model
from riverinfer.trace import Trace
from riverinfer.weights_convert.quantize import quantize

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=[(name, dtype) for name in NAMES for dtype in DTYPES], ids=str)
def model(request: pytest.FixtureRequest) -> Model:
    name, dtype = request.param
    model = open_model(ROOT / name, dtype)
    model.river = [other_layer(layer, index) for index, layer in enumerate(model.layers)]
    model.script()
    return model


def other_layer(layer: DecoderLayer, index: int) -> DecoderLayer:
    """The layer with random quantized matrices of its shapes: 4 bits on even layers, 8 on odd ones."""
    generator = torch.Generator().manual_seed(index)
    changes = {}
    for name in ("qkv", "o", "gate_up", "down"):
        linear = getattr(layer, name)
        rows = linear(torch.zeros(1, linear.in_features, dtype=dtype_of(layer))).shape[1]
        weight = torch.randn(rows, linear.in_features, generator=generator) * 0.1
        fits = linear.in_features % 32 == 0
        matrix = quantize(weight, bits=4 if fits and index % 2 == 0 else 8, group=32 if fits else 0)
        changes[name] = make_quantized_linear(
            matrix.q, matrix.scale, matrix.offset, bits=matrix.bits, dtype=dtype_of(layer), bias=linear.bias
        )
    return replace(layer, **changes)


def dtype_of(layer: DecoderLayer) -> torch.dtype:
    try:
        layer.o(torch.zeros(1, layer.o.in_features, dtype=torch.bfloat16))
    except RuntimeError:
        return torch.float32
    return torch.bfloat16


GATES: list[Gate | None] = [
    None,
    never(),
    always(),
    FixedDepth(2),
    SimilarityGate(0.3),
    SimilarityGate(0.8, max_depth=3),
]


@torch.inference_mode()
def run(model: Model, how: object, gate: Gate | None) -> tuple[list[Tensor], list[int], list[tuple[Tensor, Tensor]]]:
    """Steps of several lengths, around a block of sixteen positions and a window."""
    assert callable(how)
    cache, trace, states, depths, position = make_cache(model, 64), Trace(), [], [], 0
    generator = torch.Generator().manual_seed(1)
    for count in (3, 1, 1, 8, 1, 5, 16, 1, 2):
        ids = torch.randint(5, model.config.vocab_size, (count,), generator=generator)
        states.append(how(model, ids, position, cache, gate=gate, trace=trace))
        depths.append(trace.depth)
        position += count
    return states, depths, cache


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: str(gate)[:24])
def test_fast_equals_plain_to_the_bit(model: Model, gate: Gate | None) -> None:
    assert can_walk_fast(model, 1, make_cache(model, 8), gate, None)
    want, want_depths, want_cache = run(model, walk, gate)
    got, depths, cache = run(model, fast_walk, gate)
    assert depths == want_depths
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for (k, v), (want_k, want_v) in zip(cache, want_cache, strict=True):
        assert torch.equal(k[:, :38], want_k[:, :38])
        assert torch.equal(v[:, :38], want_v[:, :38])


def test_what_the_fast_walk_leaves_to_the_plain_one(model: Model) -> None:
    cache = make_cache(model, 8)
    assert not can_walk_fast(model, 1, list(cache), None, None)
    assert not can_walk_fast(model, FEW + 1, cache, None, None)
    assert can_walk_fast(model, FEW, cache, None, Trace())
    assert not can_walk_fast(model, 1, cache, None, Trace.full())
    assert not can_walk_fast(model, 1, cache, None, Trace(ledger=KVLedger(1, 1)))
    kept, model.river_script = model.river_script, None
    assert can_walk_fast(model, 1, cache, None, None)
    assert not can_walk_fast(model, 1, cache, never(), None)
    model.river_script = kept
    assert script_layers([]) is None
    assert script_layers([replace(model.layers[0], o=AbsentLinear())]) is None


def test_without_torchscript_the_plain_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("no TorchScript here")

    monkeypatch.setattr(torch.jit, "script", broken)
    model = open_model(ROOT / "llama")
    model.script()
    assert model.backbone_script is None
    assert not can_walk_fast(model, 1, make_cache(model, 8), None, None)
