"""Which river lossless mode drafts in: measured once, kept, measured again when it may no longer hold; or none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import CPU, ROOT, copy_model
from safetensors.torch import load_file, save_file
from test_lossless import assert_same, needs_packing

from riverinfer import Engine, SamplingParams, river_choice, river_loading
from riverinfer.checkpoint import Checkpoint
from riverinfer.cli import main
from riverinfer.errors import (
    ConversionError,
    EngineMemoryError,
    InvalidRequestError,
    RiverinferWarning,
    WeightsError,
)
from riverinfer.kernels.quantized_linear import CpuInt4Linear
from riverinfer.memory import gib
from riverinfer.model import Model
from riverinfer.river_loading import RiverRequest, river_bytes
from riverinfer.weights_convert.river_artifact import River, RiverSettings

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True, seed=1)
PROMPT = "One two three. One two three. One two"
FOUR, EIGHT = RiverSettings(4, 32, "rtn"), RiverSettings(8, 32, "rtn")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rivers"


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Measured:
    return Measured(monkeypatch)


class Measured:
    """Says how fast each river is, and remembers who was measured."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.speedup = {4: 1.5, 8: 1.2}
        self.asked: list[int] = []
        speeds = self

        class Measure:
            def __init__(self, model: Model, tokenizer: object, fused: bool) -> None:
                self._model = model

            def __call__(self) -> dict[str, float]:
                bits = 4 if isinstance(self._model.river[0].qkv, CpuInt4Linear) else 8
                speeds.asked.append(bits)
                return {"speedup": speeds.speedup[bits], "draft_cost": 0.5, "acceptance": 0.8}

        patch.setattr(river_choice, "_Measure", Measure)

    def since(self) -> list[int]:
        """Bits of the rivers that were measured since the last call."""
        asked, self.asked = self.asked, []
        return asked


def load(folder: str | Path = "llama", **options: Any) -> Engine:
    common = {"device": "cpu", "dtype": "bfloat16", "ctx_size": 128, "max_sequences": 1, "river_method": "rtn"}
    return Engine.load(ROOT / folder, **(common | options))


def chosen(folder: str | Path = "llama", **options: Any) -> int:
    """Bits of the river that is attached."""
    with load(folder, **options) as engine:
        assert engine.mode == "lossless"
        assert engine.river_settings in (FOUR, EIGHT)
        bits = 4 if isinstance(engine.model.river[0].qkv, CpuInt4Linear) else 8
        assert engine.river_settings == (FOUR if bits == 4 else EIGHT)
        return bits


def choice_file(cache: Path) -> Path:
    (path,) = cache.glob("*choice.json")
    return path


def entries(cache: Path) -> list[dict[str, Any]]:
    """What was chosen and kept, the newest last."""
    stored = json.loads(choice_file(cache).read_text())
    assert list(stored) == ["version", "entries"]
    return list(stored["entries"].values())


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives torch its threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- measured once ----------------------------------------------------------------------------------------------


@needs_packing
@pytest.mark.parametrize("faster", [4, 8])
def test_the_faster_is_kept_and_not_measured_again(faster: int, cache: Path, speeds: Measured) -> None:
    speeds.speedup[faster] = 2.0
    assert chosen() == faster
    assert speeds.since() == [4, 8]
    assert chosen() == faster
    assert speeds.since() == []
    (stored,) = entries(cache)
    assert stored["choice"] == str(FOUR if faster == 4 else EIGHT)
    assert set(stored["figures"]) == {str(FOUR), str(EIGHT)}
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".safetensors", ".safetensors"]


@needs_packing
def test_it_is_measured_again_for_other_weights(cache: Path, speeds: Measured, tmp_path: Path) -> None:
    folder = copy_model("llama", tmp_path / "model")
    chosen(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] += 0.01
    save_file(tensors, folder / "model.safetensors")
    speeds.since()
    chosen(folder)
    assert speeds.since() == [4, 8]
    assert len(entries(cache)) == 1  # that of the other weights is of no use any more
    chosen(folder)
    assert speeds.since() == []


class OtherTorch:
    """torch, but of another version."""

    __version__ = "9.9.9"

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@needs_packing
@pytest.mark.parametrize("condition", ["torch", "candidates", "threads"])
def test_it_is_measured_again_under_other_conditions_and_both_are_kept(
    condition: str, cache: Path, speeds: Measured, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(threads=1)
    speeds.since()
    speeds.speedup[8] = 2.0
    with monkeypatch.context() as patch:
        if condition == "torch":
            patch.setattr(river_choice, "torch", OtherTorch())
        elif condition == "candidates":
            found, another = RiverRequest.candidates, RiverSettings(8, 32)
            patch.setattr(RiverRequest, "candidates", lambda *args: [*found(*args), another])
        count = 2 if condition == "threads" else 1
        assert chosen(threads=count) == 8
        assert speeds.since() == ([4, 8, 8] if condition == "candidates" else [4, 8])
        assert chosen(threads=count) == 8
        assert speeds.since() == []
    assert chosen(threads=1) == 4
    assert speeds.since() == []
    assert [entry["choice"] for entry in entries(cache)] == [str(FOUR), str(EIGHT)]


@needs_packing
def test_the_oldest_of_many_choices_are_forgotten(cache: Path, speeds: Measured, threads: None) -> None:
    for count in range(1, 11):
        chosen(threads=count)
    assert [entry["conditions"]["threads"] for entry in entries(cache)] == list(range(3, 11))
    speeds.since()
    chosen(threads=3)
    assert speeds.since() == []
    chosen(threads=2)
    assert speeds.since() == [4, 8]
    assert [entry["conditions"]["threads"] for entry in entries(cache)] == [*range(4, 11), 2]


@needs_packing
def test_a_choice_that_is_made_again_is_the_newest(cache: Path, speeds: Measured, threads: None) -> None:
    chosen(threads=1)
    chosen(threads=2)
    stored = json.loads(choice_file(cache).read_text())
    first = next(iter(stored["entries"].values()))
    first["weights"] = "others"
    choice_file(cache).write_text(json.dumps(stored))
    chosen(threads=1)
    assert [entry["conditions"]["threads"] for entry in entries(cache)] == [2, 1]


@needs_packing
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"version": 2}',
        b'{"version": 2, "entries": []}',
        b'{"version": 2, "entries": {"x": 3, "y": {}, "z": {"choice": [], "conditions": 1}}}',
        b'{"version": 1, "entries": {}}',
        b'{"key": {"version": 1, "threads": 2}, "choice": "w4g32-rtn", "figures": {}}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
    ids=lambda content: str(content[:24]),
)
def test_a_damaged_file_is_written_anew(content: bytes, cache: Path, speeds: Measured) -> None:
    chosen()
    good = choice_file(cache).read_text()
    choice_file(cache).write_bytes(content)
    assert river_choice.read_choice(Checkpoint.open(ROOT / "llama")) is None
    speeds.since()
    assert chosen() == 4
    assert speeds.since() == [4, 8]
    assert choice_file(cache).read_text() == good


@needs_packing
@pytest.mark.parametrize(
    "change",
    [
        {"choice": "w3g32-rtn"},
        {"choice": 4},
        {"choice": None},
        {"conditions": {}},
        {"conditions": "the same"},
        {"weights": "of another"},
        {"weights": 7},
        {"figures": None},
    ],
    ids=str,
)
def test_a_damaged_entry_is_measured_anew(change: dict[str, Any], cache: Path, speeds: Measured) -> None:
    chosen()
    good = choice_file(cache).read_text()
    stored = json.loads(good)
    (entry,) = stored["entries"].values()
    entry.update(change)
    choice_file(cache).write_text(json.dumps(stored))
    speeds.since()
    assert chosen() == 4
    assert speeds.since() == [4, 8]
    assert choice_file(cache).read_text() == good


@needs_packing
def test_a_version_to_come_is_measured_anew(cache: Path, speeds: Measured) -> None:
    chosen()
    stored = json.loads(choice_file(cache).read_text())
    choice_file(cache).write_text(json.dumps(stored | {"version": stored["version"] + 1}))
    speeds.since()
    chosen()
    assert speeds.since() == [4, 8]


@needs_packing
def test_a_river_that_was_lost_is_made_again(cache: Path, speeds: Measured) -> None:
    for damage in ("lost", "cut off"):
        chosen()
        (path,) = cache.glob("*w4g32-rtn.safetensors")
        if damage == "lost":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:200])
        speeds.since()
        assert chosen() == 4
        assert speeds.since() == []


@needs_packing
def test_what_is_asked_for_by_name_is_not_measured(cache: Path, speeds: Measured) -> None:
    with load(river_bits=8, river_group=32) as engine:
        assert engine.river_settings == EIGHT
    with load(mode="river", river_group=32) as engine:
        assert engine.river_settings == FOUR
    assert speeds.since() == []
    assert list(cache.glob("*choice.json")) == []


@needs_packing
def test_the_measurement_itself(cache: Path) -> None:
    with load() as engine:
        assert engine.river_settings in (FOUR, EIGHT)
        # What was measured left no trace in the model: the text is that of an engine without a river.
        got = engine.generate(PROMPT, PARAMS)
    with load(mode="exact") as exact:
        assert_same(got, exact.generate(PROMPT, PARAMS), to_the_bit=True)
    choice = river_choice.read_choice(Checkpoint.open(ROOT / "llama"))
    assert choice is not None
    assert choice.settings in (str(FOUR), str(EIGHT))
    figures = choice.figures
    assert set(figures) == {str(FOUR), str(EIGHT)}
    for each in figures.values():
        assert 0 <= each["acceptance"] <= 1
        assert each["exact_ms"] > 0
        assert each["draft_cost"] > 0
        assert each["speedup"] >= 1
    assert figures[str(EIGHT)]["acceptance"] >= figures[str(FOUR)]["acceptance"]


@needs_packing
def test_the_command_line_shows_the_choice_and_forgets_it(
    cache: Path, speeds: Measured, threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen(threads=2) == 4
    assert main(["river", "info", str(ROOT / "llama")]) == 0
    shown = capsys.readouterr().out
    assert "lossless mode drafts in w4g32-rtn if asked for --river-method rtn; expected" in shown
    assert "with 2 threads, bfloat16 on cpu:" in shown
    assert "w8g32-rtn: 1.20x (a draft step costs 0.50 of an exact one, 80 % are accepted)" in shown
    stored = json.loads(choice_file(cache).read_text())
    (entry,) = stored["entries"].values()
    odd = {"speedup": "?", "acceptance": 1, "draft_cost": 1}
    entry.update(figures={str(FOUR): odd, str(EIGHT): {"speedup": 1.0}, "x": 1}, conditions={})
    choice_file(cache).write_text(json.dumps(stored))
    assert main(["river", "info", str(ROOT / "llama")]) == 0
    assert "lossless mode drafts in w4g32-rtn" in capsys.readouterr().out
    assert main(["river", "rm", str(ROOT / "llama")]) == 0
    assert list(cache.iterdir()) == []


@needs_packing
def test_the_command_line_shows_the_newest_choice_for_the_present_weights_only(
    cache: Path, speeds: Measured, threads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown() -> str:
        assert main(["river", "info", str(folder)]) == 0
        return capsys.readouterr().out

    folder = copy_model("llama", tmp_path / "model")
    assert chosen(folder, threads=1) == 4
    assert "drafts in w4g32-rtn" in shown()
    speeds.speedup[8] = 2.0
    assert chosen(folder, threads=2) == 8
    asked = "w8g32-rtn if asked for --river-method rtn"
    assert f"drafts in {asked}; expected speed over exact mode, measured on this machine with 2 threads" in shown()
    assert "drafts in w4g32-rtn" not in shown()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] += 0.01
    save_file(tensors, folder / "model.safetensors")
    assert "lossless mode drafts" not in shown()
    assert main(["river", "build", str(folder), "--bits", "8", "--group", "32", "--method", "rtn"]) == 0
    assert "lossless mode drafts" not in shown()  # a river of these weights, but the choice was made for others
    chosen(folder, threads=2)
    assert "drafts in w8g32-rtn" in shown()


# --- made beforehand --------------------------------------------------------------------------------------------


@needs_packing
def test_build_without_bits_makes_what_lossless_mode_uses(
    cache: Path, speeds: Measured, threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds.speedup[8] = 2.0
    where = ["--device", "cpu", "--dtype", "bfloat16", "-t", "1"]
    assert main(["river", "build", str(ROOT / "llama"), "--method", "rtn", *where]) == 0
    said = capsys.readouterr().out
    assert speeds.since() == [4, 8]
    (path,) = cache.glob("*w8g32-rtn.safetensors")
    assert f"path             {path}\n" in said
    assert "lossless mode drafts in it" in said
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(written) == 3
    assert chosen(threads=1) == 8
    assert main(["river", "build", str(ROOT / "llama"), "--method", "rtn", *where]) == 0
    assert speeds.since() == []
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == written
    chosen(threads=2)
    assert speeds.since() == [4, 8]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--bits", "8", "--group", "32"], RiverSettings(8, 32)),
        (["--group", "32"], RiverSettings(4, 32)),
        (["--river-bits", "8", "--river-group", "0", "--method", "rtn", "-t", "2"], RiverSettings(8, 0, "rtn")),
    ],
    ids=str,
)
def test_build_with_bits_or_group_makes_that_one_alone(
    flags: list[str], settings: RiverSettings, cache: Path, speeds: Measured, threads: None
) -> None:
    torch.set_num_threads(1)
    assert main(["river", "build", str(ROOT / "llama"), *flags]) == 0
    assert torch.get_num_threads() == (2 if "-t" in flags else 1)
    assert [path.name.rpartition("-w")[2] for path in cache.iterdir()] == [f"{str(settings)[1:]}.safetensors"]
    assert speeds.since() == []


def test_build_says_where_lossless_mode_has_no_river(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = ["river", "build", str(ROOT / "llama"), "--device", "cpu"]
    assert main([*build, "--dtype", "float32"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("no river was made: ")
    assert captured.out.count("\n") == 1
    assert captured.err == ""
    assert not cache.exists()


@needs_packing
def test_build_says_where_there_is_no_memory_for_a_river(
    cache: Path, memory: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, river, kv = needed(positions=2048, sequences=1)
    memory.append(backbone + river + kv - 1)
    assert main(["river", "build", str(ROOT / "llama"), "--device", "cpu", "--dtype", "bfloat16"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("no river was made: ")
    assert "do not both fit into memory" in captured.err
    assert not cache.exists()


@needs_packing
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-t", "0"], "threads: is 0"),
        (["--dtype", "int8"], "dtype: unknown dtype 'int8'"),
        (["--device", "tpu"], "device: "),
        (["--method", "rtn"], "cannot be written"),
    ],
    ids=str,
)
def test_a_build_that_fails_is_one_line(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "file"))
    for named in ([], ["--bits", "4", "--group", "32"]):
        assert main(["river", "build", str(ROOT / "llama"), *flags, *named]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1


# --- one that cannot be made --------------------------------------------------------------------------------------


def fail(patch: pytest.MonkeyPatch, *failing: RiverSettings) -> None:
    """Rivers of these settings cannot be made."""
    find = river_loading.find_river

    def found(checkpoint: Checkpoint, settings: RiverSettings, **options: Any) -> River:
        if settings in failing:
            raise (ConversionError, WeightsError)[settings == EIGHT](f"no {settings}", remedy="make room")
        return find(checkpoint, settings, **options)

    patch.setattr(river_loading, "find_river", found)


@needs_packing
@pytest.mark.parametrize("failing", [FOUR, EIGHT], ids=str)
def test_one_that_cannot_be_made_does_not_lose_the_other(
    failing: RiverSettings, cache: Path, speeds: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 8 if failing is FOUR else 4
    with monkeypatch.context() as patch:
        fail(patch, failing)
        with pytest.warns(
            RiverinferWarning, match=f"choice of the river was made without {failing} .*make room"
        ) as said:
            assert chosen() == left
        assert len(said) == 1
        assert "\n" not in str(said[0].message)
        assert speeds.since() == [left]
        assert chosen() == left
    assert chosen() == left  # nor is it tried, or spoken of, at each start
    assert speeds.since() == []
    (entry,) = entries(cache)
    assert list(entry["figures"]) == [str(EIGHT if failing is FOUR else FOUR)]


@needs_packing
def test_a_chosen_river_that_is_lost_and_cannot_be_made_again_gives_way(
    cache: Path, speeds: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen()
    fail(monkeypatch, FOUR)
    speeds.since()
    with pytest.warns(RiverinferWarning, match=f"without {FOUR}"):
        assert chosen() == 8
    assert speeds.since() == [8]


@needs_packing
def test_where_none_can_be_made_the_first_problem_is_said(
    cache: Path, speeds: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, FOUR, EIGHT)
    with pytest.raises(ConversionError, match=f"no {FOUR}"):
        load(draft="river")
    with pytest.warns(RiverinferWarning, match=f"there is no river, .*no {FOUR}") as said:
        looks_up_only()
    assert len(said) == 1


# --- no place to keep it ----------------------------------------------------------------------------------------


@needs_packing
def test_a_choice_that_cannot_be_written_is_measured_at_each_start(
    cache: Path, speeds: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for _ in range(2):
        assert chosen() == 4
        assert speeds.since() == [4, 8]
    assert sorted(path.suffix for path in cache.iterdir()) == [".safetensors", ".safetensors"]


@needs_packing
def test_a_river_that_cannot_be_kept_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "file"))
    with pytest.warns(RiverinferWarning, match=r"there is no river, drafts only repeat .*cannot be written") as caught:
        engine = load()
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert (engine.mode, engine.river_settings, engine.model.river) == ("lossless", None, [])
    got = engine.generate(PROMPT, PARAMS)
    assert_same(got, engine.generate(PROMPT, PARAMS, mode="exact"), to_the_bit=True)
    assert set(got.sources) <= {"lookup", "backbone"}
    engine.close()
    for options in ({"draft": "river"}, {"river_group": 32}, {"mode": "river", "river_group": 32}):
        with pytest.raises(ConversionError, match="cannot be written"):
            load(**options)
    flags = ["-p", "Hi", "-n", "3", "--device", "cpu", "--generation-config", "none"]
    assert main(["generate", str(ROOT / "llama"), *flags]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "river" in line.removeprefix("riverinfer: ")]
    assert len(notes) == 1


# --- no river ---------------------------------------------------------------------------------------------------


def looks_up_only(**options: Any) -> None:
    with load(**options) as engine:
        assert (engine.mode, engine.river_settings, engine.model.river) == ("lossless", None, [])
        assert engine.model.river_head is None
        got = engine.generate(PROMPT, PARAMS)
        assert_same(got, engine.generate(PROMPT, PARAMS, mode="exact"))
        assert set(got.sources) <= {"lookup", "backbone"}
        with pytest.raises(InvalidRequestError, match="no river is loaded"):
            engine.generate(PROMPT, PARAMS, mode="river")


def test_drafts_that_are_only_looked_up_need_no_river(cache: Path) -> None:
    looks_up_only(draft="lookup")
    looks_up_only(draft="lookup", river_bits=8)
    assert not cache.exists()


def test_without_a_packed_kernel_there_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks_up_only(dtype="float32")
    monkeypatch.setattr("riverinfer.kernels.quantized_linear._kernel_works", lambda _: False)
    looks_up_only()
    assert not cache.exists()


@needs_packing
@pytest.mark.parametrize(
    ("name", "options", "dtype", "device", "want"),
    [
        ("llama", {}, torch.bfloat16, CPU, ["w4g32-hqq", "w8g32-hqq"]),
        ("llama", {"draft": "river"}, torch.bfloat16, CPU, ["w4g32-hqq", "w8g32-hqq"]),
        ("mistral", {"method": "awq"}, torch.bfloat16, CPU, ["w4g32-awq", "w8g32-awq"]),
        # No packed kernel: of this dtype, on this device, for 112 columns.
        ("llama", {}, torch.float32, CPU, []),
        ("llama", {}, torch.float16, CPU, []),
        ("llama", {}, torch.bfloat16, torch.device("meta"), []),
        ("qwen2", {}, torch.bfloat16, CPU, []),
        # By name all the same, and where a river is asked for.
        ("llama", {"bits": 8, "group": 32}, torch.float32, CPU, ["w8g32-hqq"]),
        ("llama", {"group": 32, "method": "rtn"}, torch.float32, CPU, ["w4g32-rtn"]),
        ("qwen2", {"bits": 8, "group": 0}, torch.bfloat16, CPU, ["w8g0-hqq"]),
        ("llama", {"group": 32}, torch.bfloat16, torch.device("meta"), ["w4g32-hqq"]),
        ("llama", {"group": 32, "draft": "river"}, torch.float32, CPU, ["w4g32-hqq"]),
        ("llama", {"draft": "lookup"}, torch.bfloat16, CPU, []),
        ("llama", {"draft": "lookup", "bits": 8, "group": 32}, torch.bfloat16, CPU, []),
    ],
    ids=str,
)
def test_candidates(
    name: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device, want: list[str]
) -> None:
    config, request = Checkpoint.open(ROOT / name).config, RiverRequest(**options)
    assert [str(each) for each in request.candidates(config, "lossless", dtype, device)] == want
    assert request.candidates(config, "exact", dtype, device) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 128}, "group"),
        ({"bits": 8}, "group"),  # 64 does not divide 160 columns
        ({"bits": 4, "group": 0}, "group"),
        ({"draft": "river"}, "group"),  # without a packed kernel: 4 bits, group 64
        ({"bits": 3}, "bits"),
        ({"method": "gptq"}, "method"),
        ({"draft": "pond"}, "draft: is 'pond'; use auto, river or lookup"),
        ({"head": "none"}, "river_head: is 'none'; use quantized or exact"),
    ],
    ids=str,
)
def test_candidates_that_do_not_exist_or_fit_are_refused(options: dict[str, Any], message: str) -> None:
    config = Checkpoint.open(ROOT / "llama").config
    with pytest.raises(InvalidRequestError, match=message):
        RiverRequest(**options).candidates(config, "lossless", torch.float32, CPU)


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes that are said to be available: the last of the list."""
    available = [1 << 40]
    monkeypatch.setattr("riverinfer.memory.available_memory", lambda _: available[-1])
    return available


def needed(positions: int, sequences: int) -> tuple[int, int, int]:
    """Bytes of the backbone, the larger candidate, and the cache of the tiny llama in bfloat16."""
    checkpoint = Checkpoint.open(ROOT / "llama")
    both = [river_bytes(checkpoint.config, each, "quantized", torch.bfloat16, CPU) for each in (FOUR, EIGHT)]
    assert both[0] < both[1]
    kv = sequences * positions * checkpoint.config.kv_bytes_per_token(2)
    return checkpoint.parameters * 2, both[1], kv


@needs_packing
def test_without_memory_for_both_it_says_so_and_runs_exact(
    cache: Path, speeds: Measured, memory: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, river, kv = needed(positions=128, sequences=1)
    memory.append(backbone + river + kv - 1)
    message = rf"backbone and river \({re.escape(gib(backbone))} \+ {re.escape(gib(river))}\) do not both fit"
    with pytest.warns(RiverinferWarning, match=message) as said:
        engine = load()
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert "running exact mode" in str(said[0].message)
    assert (engine.mode, engine.river_settings, engine.model.river) == ("exact", None, [])
    assert speeds.since() == []
    assert not cache.exists()
    assert engine.generate(PROMPT, PARAMS).sources == []
    engine.close()
    flags = ["-p", "Hi", "-n", "3", "-c", "128", "--device", "cpu", "--dtype", "bfloat16", "--json"]
    assert main(["generate", str(ROOT / "llama"), *flags]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["mode"] == "exact"
    assert [line for line in captured.err.splitlines() if "do not both fit" in line] == [captured.err.rstrip("\n")]
    # One byte more is enough; with one too few even for the backbone there is nothing to run.
    memory.append(backbone + river + kv)
    assert chosen() == 4
    memory.append(backbone + kv - 1)
    with pytest.raises(EngineMemoryError):
        load()
    memory.append(backbone + kv)
    with pytest.raises(EngineMemoryError):
        load(mode="river", river_group=32)
