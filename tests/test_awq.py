"""Awq rivers: the search for channel scales, their folding into norms and rows of up, the file, the commands."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_models import CPU, ROOT, copy_model, edit_json, make_cache, open_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_river_walk import independent_walk
from torch import Tensor

from riverinfer import Engine, SamplingParams
from riverinfer.calibration import BackboneCalibration, calibrate
from riverinfer.calibration_prompts import TEXTS
from riverinfer.checkpoint import Checkpoint
from riverinfer.cli import main
from riverinfer.decode import decode_one, prefill
from riverinfer.errors import InvalidRequestError, WeightsError
from riverinfer.gates import always
from riverinfer.kernels.linear import PlainLinear
from riverinfer.kernels.torch_ops import rms_norm
from riverinfer.model import DecoderLayer, Model
from riverinfer.river import attach_river
from riverinfer.tokenizer import Tokenizer
from riverinfer.trace import Trace
from riverinfer.weights_convert import channel_scales
from riverinfer.weights_convert.channel_scales import LayerScaling, output_error, search_channel_scales
from riverinfer.weights_convert.quantize import quantize
from riverinfer.weights_convert.river_artifact import (
    LINEARS,
    RiverSettings,
    build_river,
    find_river,
    list_rivers,
    open_river,
    river_path,
)

AWQ = RiverSettings(4, 32, "awq")
IDS = [[9, 10, 11, 12, 13, 14, 15], [20, 21, 22]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(folder: Path, river_settings: RiverSettings = AWQ) -> tuple[Checkpoint, Path]:
    """An awq river made with ``IDS``."""
    checkpoint, model = Checkpoint.open(folder), open_model(folder)
    return checkpoint, build_river(checkpoint, river_settings, calibrate=lambda: BackboneCalibration(model, IDS))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


# --- the search -------------------------------------------------------------------------------------------------


def test_strong_channels_are_kept_better_than_by_hqq_alone() -> None:
    weight = 0.02 * torch.randn(96, 256, generator=seeded(1))
    inputs = torch.randn(200, 256, generator=seeded(2))
    inputs[:, ::50] *= 40
    scale = search_channel_scales(weight, inputs, bits=4, group=64)
    assert scale.dtype == torch.float32
    assert float(scale[::50].min()) > 2 * float(scale[1:50].max())
    others = torch.randn(200, 256, generator=seeded(3))  # tokens that the search has not seen
    others[:, ::50] *= 40

    def error(scale: Tensor) -> float:
        restored = quantize(weight * scale, bits=4, group=64).dequantize() / scale
        return float((others @ (restored - weight).T).square().sum())

    assert error(scale) < 0.5 * error(torch.ones(256))


@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 9),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    dead=st.sampled_from([1, 2, 64]),
    bits=st.sampled_from([(4, 32), (4, 64), (8, 0)]),
)
@settings(max_examples=25, deadline=None)
def test_never_worse_than_no_scaling_by_its_own_measure(
    seed: int, tokens: int, spread: float, dead: int, bits: tuple[int, int]
) -> None:
    generator = seeded(seed)
    weight = torch.randn(8, 64, generator=generator)
    inputs = torch.randn(tokens, 64, generator=generator) * (spread * torch.randn(64, generator=generator)).exp()
    inputs[:, dead - 1 :: dead] = 0  # a dead channel, every other, or all
    scale = search_channel_scales(weight, inputs, bits=bits[0], group=bits[1])
    assert bool(((scale > 0) & scale.isfinite()).all())
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)
    kept, plain = (output_error(weight, inputs, x, bits=bits[0], group=bits[1]) for x in (scale, torch.ones(64)))
    assert kept <= plain


def test_many_rows_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = torch.randn(90, 64, generator=seeded(1)), torch.randn(20, 64, generator=seeded(2)).exp()
    monkeypatch.setattr(channel_scales, "_ROWS", 30)
    every_third = search_channel_scales(weight[::3].contiguous(), inputs, bits=4, group=32)
    assert torch.equal(search_channel_scales(weight, inputs, bits=4, group=32), every_third)


def test_inputs_that_are_no_numbers_are_refused() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(WeightsError, match="NaN or infinite"):
            search_channel_scales(torch.ones(2, 32), torch.full((1, 32), bad), bits=4, group=32)


# --- the calibration --------------------------------------------------------------------------------------------


def test_the_inputs_are_those_of_the_backbone() -> None:
    model = open_model(ROOT / "llama")
    layers = list(BackboneCalibration(model, IDS))
    assert len(layers) == model.config.num_layers
    start = 0
    for ids in IDS:
        trace = Trace.full()
        prefill(model, ids, 0, make_cache(model), trace=trace)
        assert trace.states is not None
        for layer, inputs, h in zip(model.layers, layers, trace.states, strict=False):
            got = inputs["qkv"][start : start + len(ids)]
            assert close(got, rms_norm(h, layer.input_norm, layer.eps), 1e-5)
        # h + o(...) and with it the norm of gate_up follow from the layer's output and what down read.
        for layer, inputs, h_next in zip(model.layers, layers, trace.states[1:], strict=True):
            before = h_next - layer.down(inputs["down"][start : start + len(ids)])
            got = inputs["gate_up"][start : start + len(ids)]
            assert close(got, rms_norm(before, layer.post_norm, layer.eps))
        start += len(ids)


def test_every_text_is_read_and_the_digest_tells_tokens_apart() -> None:
    model, tokenizer = open_model(ROOT / "llama"), Tokenizer.load(ROOT / "llama")
    built_in = calibrate(model, tokenizer)
    tokens = len(next(iter(built_in))["qkv"])
    assert 256 <= tokens <= 512
    assert len(TEXTS) >= 12
    digests = {x.digest for x in (built_in, BackboneCalibration(model, IDS), BackboneCalibration(model, [IDS[0]]))}
    assert len(digests) == 3
    assert calibrate(model, tokenizer).digest == built_in.digest


# --- the folding ------------------------------------------------------------------------------------------------


def folded(layer: DecoderLayer, scaling: LayerScaling) -> DecoderLayer:
    """The layer with all scales in place and nothing quantized."""
    new, norms = {}, {}
    for name, norm in (("qkv", "input_norm"), ("o", ""), ("down", ""), ("gate_up", "post_norm")):
        linear = getattr(layer, name)
        assert isinstance(linear, PlainLinear)
        weight, scale = scaling(name, linear.weight)
        new[name] = PlainLinear(weight, linear.bias)
        assert (scale is None) == (norm == "")
        if scale is not None:
            norms[norm] = getattr(layer, norm) / scale
    return replace(layer, **new, **norms)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2", "qwen3"])
@pytest.mark.parametrize("drawn", [False, True], ids=["searched", "drawn"])
def test_scales_without_quantization_change_nothing(name: str, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if drawn:
        monkeypatch.setattr(
            channel_scales,
            "search_channel_scales",
            lambda weight, *_, **__: torch.randn(weight.shape[1], generator=seeded(4)).exp(),
        )
    model = open_model(ROOT / name)
    ids = torch.tensor(IDS[0])
    step, h = model.step_context(0, len(ids), len(ids)), model.embed(ids)
    for layer, inputs in zip(model.layers, BackboneCalibration(model, IDS), strict=True):
        other = folded(layer, LayerScaling(inputs, bits=8, group=0))
        assert other.o.weight is layer.o.weight  # type: ignore[attr-defined]
        (k, v), (other_k, other_v) = make_cache(model, len(ids))[0], make_cache(model, len(ids))[0]
        h_next = layer(h, step, k, v)
        assert close(other(h, step, other_k, other_v), h_next)
        assert close(other_k, k)
        assert close(other_v, v)
        h = h_next


def test_powers_of_two_fold_into_up_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        channel_scales,
        "search_channel_scales",
        lambda weight, *_, **__: torch.exp2(torch.randint(-3, 4, (weight.shape[1],), generator=seeded(5))),
    )
    layer = open_model(ROOT / "llama").layers[0]
    assert isinstance(layer.down, PlainLinear)
    assert isinstance(layer.gate_up, PlainLinear)
    scaling = LayerScaling({"down": torch.ones(1, 160)}, bits=4, group=32)
    down, at_run_time = scaling("down", layer.down.weight)
    gate_up, at_norm = scaling("gate_up", layer.gate_up.weight)
    assert at_run_time is at_norm is None
    assert torch.equal(gate_up[:160], layer.gate_up.weight[:160])
    other = replace(layer, gate_up=PlainLinear(gate_up), down=PlainLinear(down))
    model = open_model(ROOT / "llama")
    ids = torch.tensor(IDS[0])
    step, h, kv = model.step_context(0, 7, 7), model.embed(ids), make_cache(model, 7)
    assert not torch.equal(down, layer.down.weight)
    assert torch.equal(other(h, step, *kv[0]), layer(h, step, *kv[1]))


# --- the river --------------------------------------------------------------------------------------------------


def reference_layers(model: Model, checkpoint: Checkpoint, river_settings: RiverSettings) -> list[DecoderLayer]:
    """The backbone's norms, and float64 matrices from which the stored scales are divided out again."""
    river, layers = open_river(checkpoint, river_settings), []
    for index, layer in enumerate(model.layers):
        linears = {}
        for name in LINEARS:
            weight = river.matrix(index, name).dequantize(torch.float64)
            scale = river.channel_scale(index, name)
            assert (scale is None) == (name in ("o", "down"))
            linears[name] = PlainLinear(weight if scale is None else weight / scale.double(), getattr(layer, name).bias)
        layers.append(replace(layer, **linears))
    return layers


@pytest.mark.parametrize(
    ("name", "river_settings"),
    [("llama", AWQ), ("llama", RiverSettings(8, 32, "awq")), ("phi3", RiverSettings(8, 0, "awq")), ("qwen2", None)],
)
def test_every_layer_agrees_with_the_dequantized_file_in_float64(
    name: str, river_settings: RiverSettings | None
) -> None:
    river_settings = river_settings or RiverSettings(8, 0, "awq")
    checkpoint, _ = build(ROOT / name, river_settings)
    model = open_model(ROOT / name)
    attach_river(model, open_river(checkpoint, river_settings))
    ids, first = [9, 10, 11, 30, 31, 32, 33, 34, 35], 3
    kv = make_cache(model, len(ids))
    prefill(model, ids[:first], 0, kv)
    for position in range(first, len(ids)):
        decode_one(model, ids[position], position, kv, gate=always())
    real, model.river = model.river, reference_layers(model, checkpoint, river_settings)
    depths = [model.config.num_layers] * first + [0] * (len(ids) - first)
    for (k, v), (want_k, want_v) in zip(kv, independent_walk(model, ids, depths), strict=True):
        assert close(k, want_k)
        assert close(v, want_v)
    # K and V do not show the last layer's o and MLP.
    for layer, reference in zip(real, model.river, strict=True):
        x = torch.randn(3, layer.qkv.in_features, generator=seeded(6))
        normed = x.double() / (x.double().square().mean(-1, keepdim=True) + layer.eps).sqrt()
        gate, up = (normed * reference.post_norm.double() @ reference.gate_up.weight.T).chunk(2, 1)  # type: ignore[attr-defined]
        want = (gate * gate.sigmoid() * up) @ reference.down.weight.T  # type: ignore[attr-defined]
        gate, up = layer.gate_up(rms_norm(x, layer.post_norm, layer.eps)).chunk(2, 1)
        assert close(layer.down(gate * gate.sigmoid() * up), want)
        mixed = torch.randn(3, layer.o.in_features, generator=seeded(7))
        assert close(layer.o(mixed), mixed.double() @ reference.o.weight.T)  # type: ignore[attr-defined]


def test_o_is_not_scaled_and_the_integers_are_those_of_hqq() -> None:
    checkpoint, _ = build(ROOT / "llama")
    model, river = open_model(ROOT / "llama"), open_river(checkpoint, AWQ)
    for index, (layer, inputs) in enumerate(zip(model.layers, BackboneCalibration(model, IDS), strict=True)):
        scaled = folded(layer, LayerScaling(inputs, bits=4, group=32))
        for name in LINEARS:
            wanted = quantize(getattr(scaled, name).weight, bits=4, group=32)
            matrix = river.matrix(index, name)
            assert torch.equal(matrix.q, wanted.q)
            assert torch.equal(matrix.scale, wanted.scale)
        plain = quantize(layer.o.weight, bits=4, group=32)  # type: ignore[attr-defined]
        assert torch.equal(river.matrix(index, "o").q, plain.q)
    attach_river(model, river)
    for layer, backbone in zip(model.river, model.layers, strict=True):
        assert not torch.equal(layer.input_norm, backbone.input_norm)
        assert (layer.num_kv_heads, layer.head_dim) == (backbone.num_kv_heads, backbone.head_dim)


def test_where_up_has_a_bias_down_is_not_scaled(tmp_path: Path) -> None:
    folder = copy_model("llama", tmp_path / "biased")
    edit_json(folder / "config.json", mlp_bias=True)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(5):
        for name, rows in (("gate", 160), ("up", 160), ("down", 64)):
            bias = torch.randn(rows, generator=seeded(layer)).bfloat16()
            tensors[f"model.layers.{layer}.mlp.{name}_proj.bias"] = bias
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checkpoint, _ = build(folder)
    river, model = open_river(checkpoint, AWQ), open_model(folder)
    for index, layer in enumerate(model.layers):
        plain = quantize(layer.down.weight, bits=4, group=32)  # type: ignore[attr-defined]
        assert torch.equal(river.matrix(index, "down").q, plain.q)
        assert river.channel_scale(index, "gate_up") is not None


# --- the file ---------------------------------------------------------------------------------------------------


def test_without_calibration_awq_is_refused(cache: Path) -> None:
    checkpoint = Checkpoint.open(ROOT / "llama")
    for make in (build_river, find_river):
        with pytest.raises(InvalidRequestError, match="method: awq needs"):
            make(checkpoint, AWQ)
    assert not cache.exists()
    with pytest.raises(InvalidRequestError, match=r"unknown method 'gptq'; use hqq, awq, rtn"):
        RiverSettings(4, 32, "gptq")


def test_a_river_that_exists_is_not_calibrated_again() -> None:
    checkpoint, path = build(ROOT / "llama")
    before = path.stat().st_mtime_ns

    def never() -> BackboneCalibration:
        raise AssertionError

    assert build_river(checkpoint, AWQ, calibrate=never) == path
    find_river(checkpoint, AWQ)
    build_river(checkpoint, RiverSettings(4, 32, "rtn"), calibrate=never)
    assert path.stat().st_mtime_ns == before


def test_the_file_says_how_it_was_calibrated_and_other_methods_do_not_read_it() -> None:
    checkpoint, path = build(ROOT / "llama")
    with safe_open(path, framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["method"] == "awq"
    assert metadata["calibration"] == BackboneCalibration(open_model(ROOT / "llama"), IDS).digest
    scales = {f"layers.{i}.{name}.channel_scale" for i in range(5) for name in ("qkv", "gate_up")}
    assert {name for name in names if name.endswith("channel_scale")} == scales
    hqq = RiverSettings(4, 32, "hqq")
    shutil.copy(path, river_path(checkpoint, hqq))
    with pytest.raises(WeightsError, match="method: is awq, not hqq"):
        open_river(checkpoint, hqq)
    plain = build_river(checkpoint, hqq)
    with safe_open(plain, framework="pt") as file:
        assert set(file.keys()) == names - scales
        assert set(file.metadata()) == set(metadata) - {"calibration"}
    shutil.copy(plain, path)
    with pytest.raises(WeightsError, match="method: is hqq, not awq"):
        open_river(checkpoint, AWQ)
    river = open_river(checkpoint, hqq)
    assert all(river.channel_scale(0, name) is None for name in LINEARS)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), None])
def test_bad_channel_scales_are_refused_by_name(bad: float | None) -> None:
    checkpoint, path = build(ROOT / "llama")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, field = load_file(path), "layers.1.qkv.channel_scale"
    if bad is None:
        del tensors[field]
    else:
        tensors[field][7] = bad
    save_file(tensors, path, metadata)
    with pytest.raises(WeightsError, match="is missing" if bad is None else "not positive and finite") as caught:
        open_river(checkpoint, AWQ)
    assert (caught.value.file, caught.value.field) == (str(path), field)
    assert "riverinfer river build" in str(caught.value)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = copy_model("llama", tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"^layers\.2\.down: reads NaN"):
        build(folder)
    assert not list_rivers()


# --- the engine and the commands --------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Iterator[Engine]:
    common = {"device": "cpu", "dtype": "float32", "ctx_size": 64, "mode": "river", "river_group": 32}
    with Engine.load(ROOT / "llama", **common, river_method="awq") as loaded:  # type: ignore[arg-type]
        yield loaded


def test_the_engine_makes_and_uses_it(engine: Engine) -> None:
    (info,) = list_rivers()
    assert info.settings == AWQ
    out = engine.generate("Once upon a time", SamplingParams(max_tokens=5, ignore_eos=True))
    assert out.exit_depths
    with pytest.raises(InvalidRequestError, match="unknown method 'gptq'"):
        Engine.load(ROOT / "llama", river_method="gptq")


def test_a_backbone_in_part_uses_a_river_but_does_not_make_one() -> None:
    common = {"device": "cpu", "dtype": "float32", "ctx_size": 64, "mode": "river", "river_group": 32}
    common |= {"river_method": "awq", "min_depth": 1, "backbone_layers": 2, "prefill": "fixed", "prefill_depth": 2}
    with pytest.raises(InvalidRequestError, match="backbone_layers: an awq river is made with the whole backbone"):
        Engine.load(ROOT / "llama", **common)  # type: ignore[arg-type]
    build(ROOT / "llama")
    with Engine.load(ROOT / "llama", **common) as engine:  # type: ignore[arg-type]
        out = engine.generate("Once upon a time", SamplingParams(max_tokens=5, ignore_eos=True))
        assert max(out.exit_depths) <= 2


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(ROOT / "llama")
    assert main(["river", "build", model, "--method", "awq", "--group", "32"]) == 0
    captured = capsys.readouterr()
    assert "w4g32-awq" in captured.out
    assert "bits per weight  5." in captured.out
    (info,) = list_rivers()
    written = info.path.stat().st_mtime_ns
    with safe_open(info.path, framework="pt") as file:
        digest = file.metadata()["calibration"]
    assert digest == calibrate(open_model(ROOT / "llama"), Tokenizer.load(ROOT / "llama")).digest
    assert main(["river", "info", model]) == 0
    said = capsys.readouterr().out
    assert "w4g32-awq" in said
    assert "valid" in said
    flags = ["--mode", "river", "--river-method", "awq", "--river-group", "32", "-n", "4", "-p", "Hi", "--json"]
    assert main(["generate", model, *flags, "--device", str(CPU)]) == 0
    assert '"exit_depths"' in capsys.readouterr().out
    assert info.path.stat().st_mtime_ns == written
