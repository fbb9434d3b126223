"""Which river lossless mode drafts in: measured once, kept, measured again when it may no longer hold; or none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import CPU, ROOT, copy_model
from safetensors.torch import load_file, save_file
from test_lossless import assert_same, needs_packing

from riverinfer import Engine, SamplingParams, river_choice
from riverinfer.checkpoint import Checkpoint
from riverinfer.cli import main
from riverinfer.errors import ConversionError, InvalidRequestError, RiverinferWarning
from riverinfer.kernels.quantized_linear import CpuInt4Linear
from riverinfer.model import Model
from riverinfer.river_loading import RiverRequest
from riverinfer.weights_convert.river_artifact import RiverSettings

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
            def __init__(self, model: Model, tokenizer: object) -> None:
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


# --- measured once ----------------------------------------------------------------------------------------------


@needs_packing
@pytest.mark.parametrize("faster", [4, 8])
def test_the_faster_is_kept_and_not_measured_again(faster: int, cache: Path, speeds: Measured) -> None:
    speeds.speedup[faster] = 2.0
    assert chosen() == faster
    assert speeds.since() == [4, 8]
    assert chosen() == faster
    assert speeds.since() == []
    stored = json.loads(choice_file(cache).read_text())
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
    chosen(folder)
    assert speeds.since() == []


@needs_packing
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"choice": []}',
        b'{"choice": {"a": 1}, "key": 3}',
        b'{"choice": "w4g32-rtn"}',
        b'{"choice": "w3g32-rtn", "key": {}}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
    ids=lambda content: str(content[:24]),
)
def test_a_damaged_file_is_written_anew(content: bytes, cache: Path, speeds: Measured) -> None:
    chosen()
    good = choice_file(cache).read_text()
    choice_file(cache).write_bytes(content)
    speeds.since()
    assert chosen() == 4
    assert speeds.since() == [4, 8]
    assert choice_file(cache).read_text() == good


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
    choice, figures = river_choice.read_choice(Checkpoint.open(ROOT / "llama"))
    assert choice in (str(FOUR), str(EIGHT))
    assert set(figures) == {str(FOUR), str(EIGHT)}
    for each in figures.values():
        assert 0 <= each["acceptance"] <= 1
        assert each["exact_ms"] > 0
        assert each["draft_cost"] > 0
        assert each["speedup"] >= 1
    assert figures[str(EIGHT)]["acceptance"] >= figures[str(FOUR)]["acceptance"]


@needs_packing
def test_the_command_line_shows_the_choice_and_forgets_it(
    cache: Path, speeds: Measured, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen() == 4
    assert main(["river", "info", str(ROOT / "llama")]) == 0
    shown = capsys.readouterr().out
    assert "lossless mode drafts in w4g32-rtn" in shown
    assert "w8g32-rtn: 1.20x (a draft step costs 0.50 of an exact one, 80 % are accepted)" in shown
    choice_file(cache).write_text('{"choice": "w4g32-rtn", "figures": {"w4g32-rtn": {"speedup": "?"}, "x": 1}}')
    assert main(["river", "info", str(ROOT / "llama")]) == 0
    assert main(["river", "rm", str(ROOT / "llama")]) == 0
    assert list(cache.iterdir()) == []


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
def test_candidates_are_what_packed_kernels_read() -> None:
    def of(name: str, **options: Any) -> list[str]:
        config = Checkpoint.open(ROOT / name).config
        return [str(each) for each in RiverRequest(**options).candidates(config, "lossless", torch.bfloat16, CPU)]

    assert of("llama") == of("llama", draft="river") == ["w4g32-hqq", "w8g32-hqq"]
    assert of("mistral", method="awq") == ["w4g32-awq", "w8g32-awq"]
    assert of("qwen2") == []  # 112 columns


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes that are said to be available: the last of the list."""
    available = [1 << 40]
    monkeypatch.setattr("riverinfer.memory.available_memory", lambda _: available[-1])
    return available
