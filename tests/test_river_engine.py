"""River mode through the library and the command line, with a real 4-bit river of the tiny llama."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_models import ROOT

from riverinfer import Engine, SamplingParams
from riverinfer.cli import main
from riverinfer.cli.depth_colors import color, legend
from riverinfer.errors import InvalidRequestError
from riverinfer.river import RiverOptions

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIVERINFER_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def engine(cache: Path) -> Iterator[Engine]:
    with Engine.load(
        ROOT / "llama", device="cpu", dtype="float32", ctx_size=256, mode="river", tau=0.5, river_group=32
    ) as loaded:
        yield loaded


def test_the_river_is_made_once_and_kept_in_the_cache(engine: Engine, cache: Path) -> None:
    (made,) = (cache / "rivers").iterdir()
    written = made.stat().st_mtime_ns
    Engine.load(ROOT / "llama", device="cpu", ctx_size=64, mode="river", river_group=32).close()
    assert made.stat().st_mtime_ns == written


def test_tokens_exit_and_say_where(engine: Engine) -> None:
    out = engine.generate(PROMPT, PARAMS)
    layers = engine.config.num_layers
    assert len(out.exit_depths) == 20
    assert out.exit_depths[0] == layers  # the prompt's own last position is exact
    assert min(out.exit_depths) < layers
    assert sum(out.stats.exit_depths.values()) == 20
    assert out.stats.mean_exit_depth == pytest.approx(sum(out.exit_depths) / 20)
    assert set(out.stats.as_dict()) >= {"exit_depths", "mean_exit_depth"}
    steps = list(engine.stream(PROMPT, PARAMS))
    assert [step.exit_depth for step in steps] == out.exit_depths
    assert [step.token_id for step in steps] == out.token_ids


def test_exact_calls_on_a_river_engine_are_exact(engine: Engine, llama: Engine) -> None:
    exact = engine.generate(PROMPT, PARAMS, mode="exact")
    assert exact.token_ids == llama.generate(PROMPT, PARAMS).token_ids
    assert exact.exit_depths == []
    assert "exit_depths" not in exact.stats.as_dict()
    never = engine.generate(PROMPT, PARAMS, river=RiverOptions(gate="never"))
    assert never.token_ids == exact.token_ids
    assert never.logprobs == exact.logprobs
    assert set(never.exit_depths) == {engine.config.num_layers}


def test_options_apply_per_call(engine: Engine) -> None:
    fixed = engine.generate(PROMPT, PARAMS, river=RiverOptions(gate="fixed", min_depth=3))
    assert set(fixed.exit_depths[1:]) == {3}
    always = engine.generate(PROMPT, PARAMS, river=RiverOptions(gate="always"))
    assert set(always.exit_depths[1:]) == {0}
    early = engine.generate(PROMPT, PARAMS, river=RiverOptions(gate="fixed", min_depth=2, prefill="last"))
    assert set(early.exit_depths) == {2}


def test_river_layers_agree_with_the_dequantized_artifact(engine: Engine) -> None:
    from riverinfer.checkpoint import Checkpoint
    from riverinfer.weights_convert.river_artifact import LINEARS, RiverSettings, open_river

    artifact = open_river(Checkpoint.open(ROOT / "llama"), RiverSettings(bits=4, group=32))
    for index, layer in enumerate(engine.model.river):
        for name in LINEARS:
            linear = getattr(layer, name)
            x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(index))
            want = x.double() @ artifact.matrix(index, name).dequantize(torch.float64).T
            assert (linear(x).double() - want).abs().max() <= 1e-5 * want.abs().max()
        assert layer.input_norm is engine.model.layers[index].input_norm


def test_a_chat_in_river_mode_and_an_exact_turn_after_it(engine: Engine, llama: Engine) -> None:
    session, exact = engine.session(), llama.session()
    for text in ("Hello", "More"):
        list(session.send(text, PARAMS))
        assert session.last_output is not None
        assert session.last_output.exit_depths
    session.set_messages([{"role": "user", "content": "Hello"}])
    turn = list(session.regenerate(PARAMS, mode="exact"))
    want = list(exact.send("Hello", PARAMS))
    assert [step.token_id for step in turn] == [step.token_id for step in want]
    exact.close()


def test_without_a_river_river_mode_is_refused(llama: Engine) -> None:
    with pytest.raises(InvalidRequestError, match='no river is loaded; load the engine with mode="river"'):
        llama.stream(PROMPT, PARAMS, mode="river")
    with pytest.raises(InvalidRequestError, match="unknown mode 'lake'"):
        llama.generate(PROMPT, PARAMS, mode="lake")
    with pytest.raises(InvalidRequestError, match="river: no river is loaded"):
        llama.generate(PROMPT, PARAMS, river=RiverOptions())


def test_closing_lets_the_river_go_too(cache: Path) -> None:
    engine = Engine.load(ROOT / "llama", device="cpu", ctx_size=32, mode="river", river_bits=8, river_group=0)
    model = engine.model
    assert len(model.river) == 5
    engine.close()
    assert model.river == model.layers == []


def test_the_river_counts_in_the_memory_check(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}

    def remember(_: object, *, weights: int, **__: int) -> None:
        asked["weights"] = weights

    monkeypatch.setattr("riverinfer.engine_loading.require_memory", remember)
    sizes = []
    for mode in ("exact", "river"):
        Engine.load(ROOT / "llama", device="cpu", dtype="float32", ctx_size=32, mode=mode, river_group=32).close()
        sizes.append(asked["weights"])
    linears = 5 * ((64 + 2 * 32) * 64 + 64 * 64 + 2 * 160 * 64 + 64 * 160)
    assert sizes[1] - sizes[0] == linears * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tau", "1.5"], "tau: is 1.5"),
        (["--min-depth", "-1"], "min_depth: is -1"),
        (["--river-group", "128"], "128"),
        (["--river-group", "7"], "7"),
        (["--river-bits", "4", "--river-group", "0"], "group"),
        (["--min-depth", "99"], "min_depth: is 99, the model has 5 layers"),
    ],
)
def test_bad_flags_are_one_line(
    flags: list[str], message: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(ROOT / "llama"), "-p", "x", "--mode", "river", *flags]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


def test_the_command_line_reports_depths(engine: Engine, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--mode", "river", "--river-group", "32", "--device", "cpu", "--dtype", "float32", "-n", "6"]
    flags += ["--ignore-eos", "--generation-config", "none", "--no-chat-template"]
    assert main(["generate", str(ROOT / "llama"), "-p", PROMPT, "--json", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mode"] == "river"
    assert result["exit_depths"] == engine.generate(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True)).exit_depths
    assert main(["generate", str(ROOT / "llama"), "-p", PROMPT, "--stats", *flags]) == 0
    assert "mean exit depth" in capsys.readouterr().err
    assert main(["river", "info", str(ROOT / "llama")]) == 0
    assert "w4g32-hqq" in capsys.readouterr().out
    assert main(["river", "rm", str(ROOT / "llama"), "--bits", "8"]) == 2
    assert "rm takes no --bits" in capsys.readouterr().err
    assert main(["river", "rm", str(ROOT / "llama")]) == 0
    assert list((cache / "rivers").iterdir()) == []


def test_depths_colour_the_chat(
    engine: Engine, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--mode", "river", "--river-group", "32", "--device", "cpu", "--dtype", "float32", "-n", "8"]
    flags += ["--ignore-eos", "--generation-config", "none"]
    answers = []
    for extra in ([], ["--show-depth"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        assert main(["chat", str(ROOT / "llama"), *flags, *extra]) == 0
        captured = capsys.readouterr()
        answers.append(captured.out)
    assert "exit depth, in layers:" in captured.err
    assert "\x1b[38;5;" in answers[1]
    assert re.sub(r"\x1b\[[0-9;]*m", "", answers[1]) == answers[0]
    assert main(["chat", str(ROOT / "llama"), "--show-depth", "-st", "-p", "x", "-n", "1"]) == 2
    assert "only river mode has exit depths" in capsys.readouterr().err


def test_every_depth_has_a_colour_and_the_ramp_is_used() -> None:
    for layers in (1, 5, 30, 80):
        colours = [color("x", depth, layers) for depth in range(layers + 1)]
        assert colours[0] != colours[-1]
        assert len(set(colours)) == min(layers + 1, 9)
        assert legend(layers).count("+") == len(set(colours))
