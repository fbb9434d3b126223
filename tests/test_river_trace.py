"""``riverinfer river trace``: its figures are the engine's, its picture shows them, and it fails early and whole."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import struct
import sys
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import ROOT

from riverinfer import Engine, SamplingParams
from riverinfer.cli import main, river_trace
from riverinfer.cli.arguments import parse_arguments
from riverinfer.errors import InvalidRequestError
from riverinfer.heat_map import DPI, LABEL_WIDTH, render, token_label

MODEL = str(ROOT / "llama")
PROMPT = "Once upon a time"
FLAGS = ["--device", "cpu", "--dtype", "float32", "--river-group", "32", "--ignore-eos", "--generation-config", "none"]
SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"

TOKENS = ["<|im_start|>", " the", "\n", "日本", "$a$", "\x00", "&<"]
SIMILARITIES = [[0.01 * token + 0.3 * layer for layer in range(4)] for token in range(len(TOKENS))]
DEPTHS = [4, 1, 1, 0, 3, 4, 2]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIVERINFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        with Engine.load(MODEL, device="cpu", dtype="float32", ctx_size=256, mode="river", river_group=32) as loaded:
            yield loaded


def trace(path: Path, *flags: str) -> int:
    return main(["river", "trace", MODEL, "-p", PROMPT, "-o", str(path), *FLAGS, *flags])


def trace_json(path: Path, *flags: str) -> Any:
    assert trace(path, *flags) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_json_holds_what_the_engine_says(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    path.write_text("an older file")
    found = trace_json(path, "--no-chat-template", "-n", "12", "-s", "3")
    want = engine.generate(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True, seed=3), similarities=True)
    assert [token["token_id"] for token in found["tokens"]] == want.token_ids
    assert [token["token"] for token in found["tokens"]] == [engine.tokenizer.token_text(i) for i in want.token_ids]
    assert [token["exit_depth"] for token in found["tokens"]] == want.exit_depths
    assert [tuple(token["similarities"]) for token in found["tokens"]] == [tuple(row) for row in want.similarities]
    assert {len(row) for row in want.similarities} == {found["layers"]} == {5}
    assert (found["text"], found["prompt"], found["finish_reason"], found["seed"]) == (want.text, PROMPT, "length", 3)
    assert (found["model"], found["gate"], found["tau"]) == ("llama", "similarity", 0.5)
    mean = sum(want.exit_depths) / 12
    assert found["mean_exit_depth"] == pytest.approx(mean)
    captured = capsys.readouterr()
    assert captured.out == f"{path}: 12 tokens, mean exit depth {mean:.1f} of 5 layers, seed 3\n"
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_exits_follow_the_similarities_and_the_flags(engine: Engine, tmp_path: Path) -> None:
    found = trace_json(tmp_path / "out.json", "--tau", "0.7", "-n", "12")
    for token in found["tokens"][1:]:
        opened = [layer + 1 for layer, value in enumerate(token["similarities"]) if value > 0.7]
        assert token["exit_depth"] == min([*opened, 5])
    fixed = trace_json(tmp_path / "fixed.json", "--gate", "fixed", "--min-depth", "2", "-n", "3")
    assert [token["exit_depth"] for token in fixed["tokens"]] == [5, 2, 2]


def test_the_prompt_is_a_user_message_as_in_generate(engine: Engine, tmp_path: Path) -> None:
    found = trace_json(tmp_path / "out.json", "-n", "6")
    session = engine.session()
    want = list(session.send(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True)))
    session.close()
    assert [token["token_id"] for token in found["tokens"]] == [step.token_id for step in want]


def test_a_context_that_fills_is_said_after_what_there_is_was_written(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trace(tmp_path / "out.json", "--no-chat-template", "-c", "32", "-n", "-1") == 2
    captured = capsys.readouterr()
    assert "the context of 32 tokens is full" in captured.err
    assert "out.json: " in captured.out
    assert json.loads((tmp_path / "out.json").read_text())["finish_reason"] is None


def test_pictures_of_a_model(engine: Engine, tmp_path: Path) -> None:
    found = trace_json(tmp_path / "out.json", "-n", "8")
    assert trace(tmp_path / "out.svg", "-n", "8") == 0
    root = ET.parse(tmp_path / "out.svg").getroot()
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert set(texts) >= {token_label(token["token"]) for token in found["tokens"]}
    assert any("tau 0.5" in text for text in texts if text)
    assert exit_steps(root) == [token["exit_depth"] for token in found["tokens"]]
    assert trace(tmp_path / "out.PNG", "-n", "2", "--gate", "never") == 0
    assert (tmp_path / "out.PNG").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def find(root: ET.Element, gid: str) -> ET.Element:
    return next(element for element in root.iter() if element.get("id") == gid)


def exit_steps(root: ET.Element) -> list[int]:
    """The depth of each token as the exit line has it, in cells of the image under it."""
    matrix = re.findall(r"[-\d.]+", str(find(root, "cells").get("transform")))
    width, _, _, height, left, bottom = map(float, matrix)
    path = str(find(root, "exit-line")[-1].get("d"))
    corners = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)]
    cells = [((x - left) / width, (y - bottom) / height) for x, y in corners]
    steps = [(a, b) for a, b in pairwise(cells) if b[0] - a[0] > 0.5]
    for token, (a, b) in enumerate(steps):
        assert (a[0], b[0], a[1]) == pytest.approx((token, token + 1, b[1]), abs=1e-3)
        assert a[1] == pytest.approx(round(a[1]), abs=1e-3)
    return [round(a[1]) for a, _ in steps]


def test_the_svg_has_a_cell_for_each_token_and_layer_the_exits_and_the_texts() -> None:
    content = render(TOKENS, SIMILARITIES, DEPTHS, title="A $title$, tau 0.5", tau=0.5)
    assert content == render(TOKENS, SIMILARITIES, DEPTHS, title="A $title$, tau 0.5", tau=0.5)
    root = ET.fromstring(content)
    assert exit_steps(root) == DEPTHS
    texts = [element.text for element in root.iter(f"{SVG}text")]
    for text in ("<|im_start|>", "·the", "\\n", "日本", "$a$", "\\x00", "&<", "A $title$, tau 0.5"):
        assert text in texts
    assert "layer (0 at the bottom)" in texts
    find(root, "tau")
    from matplotlib.image import imread

    _, _, encoded = str(find(root, "cells").get(LINK)).partition("base64,")
    pixels = imread(io.BytesIO(base64.b64decode(encoded)))
    assert pixels.shape == (4, len(TOKENS), 4)
    # Green only grows along viridis; the transform puts the image's first row at the bottom.
    order = np.argsort(np.array(SIMILARITIES).T, axis=None)
    assert (np.diff(pixels[:, :, 1].ravel()[order]) >= 0).all()


def test_a_png_has_the_size_of_its_content_and_spells_what_the_font_lacks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sizes = []
        for count in (1, 60, 1000):
            rows = [[0.1, 0.9, 0.99]] * count
            texts = ["日本", "नम"] * (count // 2) + ["\ud800"] * (count % 2)
            assert render(texts, rows, [2] * count, title="日本\n\ud800", kind="svg")
            content = render(texts, rows, [2] * count, title="日本\n\ud800", kind="png")
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
            sizes.append(struct.unpack(">II", content[16:24]))
    assert [height for _, height in sizes] == [sizes[0][1]] * 3
    assert sizes[0][0] < sizes[1][0] < sizes[2][0] <= 20 * DPI


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.99, 1.0, 1.0000001, math.nan])
def test_any_similarity_can_be_drawn(value: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tau in (None, -1.0, 1.0):
            assert render(["a", "b"], [[value] * 3, [value] * 3], [3, 0], title="t", tau=tau)


def test_lengths_must_agree() -> None:
    for tokens, rows, depths in ([], [], []), (["a"], [[0.5]], [1, 1]), (["a"], [[]], [0]):
        with pytest.raises(InvalidRequestError, match="give as many of each"):
            render(tokens, rows, depths, title="t")


def test_labels_are_short_and_visible() -> None:
    assert token_label("  a b") == "··a b"
    assert token_label("\r\n\t") == "\\r\\n\\t"
    assert token_label("\ud800\u200b") == "\\ud800\\u200b"
    assert token_label("x" * 99) == "x" * (LABEL_WIDTH - 1) + "…"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(river_trace, "load_engine", refuse)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.pdf", "cannot tell the format from '.pdf'; name it .svg, .png, .json"),
        ("out", "cannot tell the format from ''"),
        ("folder.svg", "is a folder"),
        ("no/such/out.svg", "there is no such folder"),
        ("file/out.svg", "cannot be written to"),
    ],
)
def test_what_cannot_be_written_is_refused_before_loading(
    name: str, message: str, tmp_path: Path, no_loading: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").touch()
    assert trace(tmp_path / name) == 2
    assert message in one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.svg"]


def test_without_matplotlib_the_remedy_is_named_and_json_still_works(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert trace(tmp_path / "out.json", "-n", "2") == 0
    capsys.readouterr()
    monkeypatch.setattr(river_trace, "load_engine", None)
    assert trace(tmp_path / "out.svg") == 2
    assert "pip install 'riverinfer[plots]'" in one_line(capsys)
    assert not (tmp_path / "out.svg").exists()


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_older_file(
    problem: BaseException,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out.json").write_text("older")
    write = Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        write(path, content[: len(content) // 2])
        raise problem

    monkeypatch.setattr(Path, "write_bytes", half)
    assert trace(tmp_path / "out.json", "-n", "2") == (2 if isinstance(problem, OSError) else 130)
    if isinstance(problem, OSError):
        assert "out.json: cannot be written (No space left on device)" in one_line(capsys)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.json", "older")]


def test_the_actions_of_river_have_their_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_arguments(["river", "trace", "-o", "x.svg", "--max_tokens", "7", "--tau", "0.9"])
    assert (args.action, args.mode, args.max_tokens, args.tau, args.model_dir) == ("trace", "river", 7, 0.9, None)
    assert parse_arguments(["river", "trace", "-o", "x.svg"]).max_tokens == 48
    assert parse_arguments(["generate", "M"]).max_tokens is None
    args = parse_arguments(["river", "build", "M", "--river_bits", "8", "--group", "0", "--debug"])
    assert (args.action, args.model_dir, args.bits, args.group, args.debug) == ("build", Path("M"), 8, 0, True)
    for words in (["trace"], ["trace", "-o", "x.svg", "--mode", "exact"], ["info", "--tau", "1"], ["sing"], []):
        with pytest.raises(SystemExit) as caught:
            parse_arguments(["river", *words])
        assert caught.value.code == 2
        assert "usage: riverinfer" in capsys.readouterr().err
