"""The river file: made once, opened exactly, refused when anything about it or its source differs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import ROOT, copy_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from riverinfer.checkpoint import Checkpoint
from riverinfer.cli import main
from riverinfer.errors import ConversionError, InvalidRequestError, WeightsError
from riverinfer.weights_convert import river_artifact as artifact
from riverinfer.weights_convert.packing import pack
from riverinfer.weights_convert.quantize import quantize
from riverinfer.weights_convert.river_artifact import (
    LINEARS,
    RiverSettings,
    build_river,
    head_group,
    list_rivers,
    open_river,
    remove_rivers,
    river_path,
)

SETTINGS = RiverSettings(4, 32, "rtn")
ROWS = RiverSettings(8, 0)  # fits every shape


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    """A copy of the tiny llama that a test may change."""
    return Checkpoint.open(copy_model("llama", tmp_path / "llama"))


def fused(checkpoint: Checkpoint, layer: int, linear: str) -> Tensor:
    """The linear by the plain names, independently of the builder."""
    names = {"qkv": ["q", "k", "v"], "o": ["o"], "gate_up": ["gate", "up"], "down": ["down"]}[linear]
    part = "self_attn" if linear in ("qkv", "o") else "mlp"
    if checkpoint.config.fused_checkpoint:
        names = [linear]
    with checkpoint.reader() as read:
        return torch.cat([read(f"model.layers.{layer}.{part}.{x}_proj.weight").float() for x in names])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", RiverSettings(4, 32)), ("llama", RiverSettings(8, 32)), ("phi3", ROWS), ("qwen2", ROWS)],
)
def test_round_trip(name: str, settings: RiverSettings) -> None:
    checkpoint = Checkpoint.open(ROOT / name)
    path = build_river(checkpoint, settings)
    river = open_river(checkpoint, settings)
    assert path == river.path == river_path(checkpoint, settings)
    stored = load_file(path)
    assert river.nbytes == sum(tensor.nbytes for tensor in stored.values())
    weights = 0
    for layer in range(checkpoint.config.num_layers):
        for linear in LINEARS:
            weight = fused(checkpoint, layer, linear)
            weights += weight.numel()
            wanted = quantize(weight, bits=settings.bits, group=settings.group)
            matrix = river.matrix(layer, linear)
            assert (matrix.bits, matrix.group) == (settings.bits, settings.group)
            for part in ("q", "scale", "offset"):
                assert torch.equal(getattr(matrix, part), getattr(wanted, part))
            packed = river.packed(layer, linear)
            assert torch.equal(packed[0], pack(wanted.q, settings.bits, settings.group))
            for part, tensor in zip(("q", "scale", "offset"), packed, strict=True):
                assert torch.equal(stored.pop(f"layers.{layer}.{linear}.{part}"), tensor)
    with checkpoint.reader() as read:
        head = read(checkpoint.head_name)
    weights += head.numel()
    group = head_group(checkpoint.config, settings)
    wanted = quantize(head, bits=4, group=group)
    matrix = river.head()
    assert matrix is not None
    assert (matrix.bits, matrix.group, group) == (4, group, 32 if settings.group or name == "phi3" else 64)
    for part in ("q", "scale", "offset"):
        assert torch.equal(getattr(matrix, part), getattr(wanted, part))
        packed_part = pack(wanted.q, 4, group) if part == "q" else getattr(wanted, part)
        assert torch.equal(stored.pop(f"head.{part}"), packed_part)
    assert not stored
    assert weights == river.weights
    for layer, linear in ((checkpoint.config.num_layers, "o"), (-1, "o"), (0, "up")):
        with pytest.raises(InvalidRequestError):
            river.packed(layer, linear)


def test_a_valid_river_is_not_made_again(model: Checkpoint) -> None:
    steps: list[tuple[str, int, int, str]] = []
    path = build_river(model, SETTINGS, progress=lambda *step: steps.append(step))
    layers = [step for step in steps if step[0] == "Making the river (4-bit)"]
    assert layers == [("Making the river (4-bit)", i, 6, "layers") for i in range(1, 7)]
    assert [step for step in steps if step[1] == step[2]] == [
        ("Hashing the weights", *[(model.model_dir / "model.safetensors").stat().st_size] * 2, "B"),
        layers[-1],
    ]
    before = path.stat()
    steps.clear()
    assert build_river(model, SETTINGS, progress=lambda *step: steps.append(step)) == path
    assert not steps
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_missing_and_other_settings(model: Checkpoint) -> None:
    with pytest.raises(WeightsError, match=r"no such river.*riverinfer river build"):
        open_river(model, SETTINGS)
    path = build_river(model, SETTINGS)
    for other in (RiverSettings(4, 32, "hqq"), RiverSettings(8, 32, "rtn")):
        with pytest.raises(WeightsError, match="no such river"):
            open_river(model, other)
        shutil.copy(path, river_path(model, other))
        with pytest.raises(WeightsError, match=r"(method|bits): is (rtn|4), not"):
            open_river(model, other)


def test_a_river_of_another_model_is_refused(model: Checkpoint, tmp_path: Path) -> None:
    path = build_river(model, ROWS)
    for name, said in (("llama-untied", "layers of this model"), ("qwen2", "not")):
        other = Checkpoint.open(ROOT / name)
        shutil.copy(path, river_path(other, ROWS))
        with pytest.raises(WeightsError, match=said):
            open_river(other, ROWS)
    # Same shapes, other weights, the same folder name.
    twin = copy_model("llama", tmp_path / "elsewhere" / "llama")
    change_weights(twin)
    other = Checkpoint.open(twin)
    assert river_path(other, ROWS) != path
    shutil.copy(path, river_path(other, ROWS))
    with pytest.raises(WeightsError, match="other weights"):
        open_river(other, ROWS)


def change_weights(folder: Path, *, keep_time: bool = False) -> None:
    """One weight more or less, the size as before."""
    path = folder / "model.safetensors"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("keep_time", [False, True])
def test_changed_weights_of_the_same_size_are_noticed(model: Checkpoint, keep_time: bool) -> None:
    path = build_river(model, SETTINGS)
    old = open_river(model, SETTINGS)
    change_weights(model.model_dir, keep_time=keep_time)
    with pytest.raises(WeightsError, match="other weights"):
        open_river(model, SETTINGS)
    assert build_river(model, SETTINGS) == path
    assert open_river(model, SETTINGS).source_hash != old.source_hash
    with pytest.raises(WeightsError, match="replaced"):
        old.packed(0, "o")


def test_only_samples_of_big_files_are_read_unless_times_differ(
    model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "_READ_WHOLE", 1000)
    monkeypatch.setattr(artifact, "_SAMPLES", 3)
    build_river(model, SETTINGS)
    path = model.model_dir / "model.safetensors"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1  # between the samples
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="other weights"):  # by the full hash
        open_river(model, SETTINGS)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    open_river(model, SETTINGS)  # the documented limit
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(WeightsError, match="other weights"):  # by a sample
        open_river(model, SETTINGS)


def test_a_touch_is_accepted(model: Checkpoint) -> None:
    path = build_river(model, SETTINGS)
    before = path.stat()
    os.utime(model.model_dir / "model.safetensors", ns=(1, 1))
    assert open_river(model, SETTINGS).matrix(0, "o").q.shape == (64, 64)
    assert build_river(model, SETTINGS) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_truncated_files_are_refused(model: Checkpoint) -> None:
    path = build_river(model, SETTINGS)
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, 3000, *range(4000, len(data), len(data) // 23), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError, match="damaged"):
            open_river(model, SETTINGS)
        assert list_rivers()[0].problem
    path.write_bytes(data + b"x")
    with pytest.raises(WeightsError, match="damaged"):
        open_river(model, SETTINGS)
    build_river(model, SETTINGS)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "change",
    [
        {"format": "0"},
        {"format": ...},
        {"bits": "8"},
        {"group": "64"},
        {"method": "hqq"},
        {"fingerprint": ...},
        {"fingerprint": "{"},
        {"fingerprint": "[1]"},
    ],
)
def test_other_metadata_is_refused(model: Checkpoint, change: dict[str, Any]) -> None:
    path = build_river(model, SETTINGS)
    with safe_open(path, framework="pt") as file:
        metadata = {k: v for k, v in (file.metadata() | change).items() if v is not ...}
    save_file(load_file(path), path, metadata)
    with pytest.raises(WeightsError, match=f"{next(iter(change))}: is|other weights"):
        open_river(model, SETTINGS)


def test_other_shapes_are_refused(model: Checkpoint) -> None:
    path = build_river(model, SETTINGS)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["layers.1.o.scale"] = tensors["layers.1.o.scale"].float()
    save_file(tensors, path, metadata)
    with pytest.raises(WeightsError, match=r"layers\.1\.o\.scale: is F32"):
        open_river(model, SETTINGS)
    del tensors["layers.1.o.scale"]
    save_file(tensors, path, metadata)
    with pytest.raises(WeightsError, match="layers of this model"):
        open_river(model, SETTINGS)


def test_groups_that_do_not_fit_are_refused_before_any_work(cache: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"down: has shape \[96, 112\].*8 bits and group 0"):
        build_river(Checkpoint.open(ROOT / "phi3"), RiverSettings(4, 32))
    assert not cache.exists()
    for bad in ({"bits": 2}, {"group": 48}, {"group": 0}, {"method": "gptq"}):
        with pytest.raises(InvalidRequestError):
            RiverSettings(**bad)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(28, "No space left on device")])
def test_an_interrupted_build_leaves_nothing(
    model: Checkpoint, monkeypatch: pytest.MonkeyPatch, error: BaseException | type[BaseException]
) -> None:
    calls = 0

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise error
        return quantize(*args, **kwargs)

    monkeypatch.setattr(artifact, "quantize", stop)
    wanted = ConversionError if isinstance(error, OSError) else error
    with pytest.raises(wanted):  # type: ignore[arg-type]
        build_river(model, SETTINGS)
    assert not list(river_path(model, SETTINGS).parent.iterdir())
    build_river(model, SETTINGS)
    open_river(model, SETTINGS)


def test_files_of_killed_builds_are_removed(model: Checkpoint) -> None:
    path = river_path(model, SETTINGS)
    path.parent.mkdir(parents=True)
    dead, alive = (path.parent / f".{path.name}.partial-{pid}" for pid in (2**22 + 1, os.getppid()))
    dead.write_bytes(b"x")
    alive.write_bytes(b"x")
    build_river(model, SETTINGS)
    assert sorted(path.parent.iterdir()) == sorted([path, alive])


def test_weights_that_change_during_the_build(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: Any, **kwargs: Any) -> Any:
        os.utime(model.model_dir / "model.safetensors")
        return quantize(*args, **kwargs)

    monkeypatch.setattr(artifact, "quantize", touched)
    with pytest.raises(ConversionError, match="changed while"):
        build_river(model, SETTINGS)
    assert not list_rivers()


def test_damaged_weights_are_named(model: Checkpoint) -> None:
    path = model.model_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"layers\.2\.gate_up.*NaN"):
        build_river(Checkpoint.open(model.model_dir), SETTINGS)
    assert not list_rivers()


def test_the_command(model: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    def run(action: str, folder: Path | None = model.model_dir, *flags: str) -> str:
        where = [] if folder is None else [str(folder)]
        assert main(["river", action, *where, *flags]) == 0
        return capsys.readouterr().out

    assert "no river of" in run("info")
    assert "bits per weight  5.00" in run("build", model.model_dir, "--bits", "4", "--group", "32", "--method", "rtn")
    build_river(Checkpoint.open(ROOT / "qwen2"), ROWS)
    said = run("info")
    assert "w4g32-rtn" in said
    assert "valid" in said
    assert "qwen2" not in said
    change_weights(model.model_dir)
    assert "other weights" in run("info")
    assert "qwen2" in run("info", None)
    assert "removed 1 river\n" in run("rm")
    assert "removed 1 river\n" in run("rm", None)
    assert "no rivers" in run("info", None)
    assert remove_rivers(None) == 0


def test_what_a_river_says_about_itself(model: Checkpoint) -> None:
    path = build_river(model, SETTINGS)
    (info,) = list_rivers(model)
    assert (info.path, info.settings, info.problem) == (path, SETTINGS, None)
    assert (info.source_name, Path(info.source_folder)) == ("llama", model.model_dir.resolve())
    assert info.source_hash == open_river(model, SETTINGS).source_hash
    with safe_open(path, framework="pt") as file:
        fingerprint = json.loads(file.metadata()["fingerprint"])
    assert set(fingerprint[0]) == {"name", "size", "mtime_ns", "sampled"}
