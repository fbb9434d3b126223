"""``riverinfer paper``: paired statistics, what is measured, and the table beside the paper's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluated import GSM, MODEL, PLACE, load
from golden_models import copy_model
from test_calibrate import certify

from riverinfer import Engine
from riverinfer.cli import main
from riverinfer.evidence.benchmark import Benchmark, Item, ask
from riverinfer.evidence.paired import Paired, mcnemar, wilson
from riverinfer.evidence.paper import WAYS, Answers, Settings, _row, measure
from riverinfer.evidence.paper_figures import ROWS, paper_rows
from riverinfer.evidence.paper_table import table
from riverinfer.outputs import Output
from riverinfer.river import RiverOptions


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load() as loaded:
        yield loaded


def test_wilson() -> None:
    half = wilson(5, 10)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.23659, 0.76341), abs=1e-5)
    none, every = wilson(0, 20), wilson(20, 20)
    assert (none.low, none.high) == pytest.approx((0, 0.16113), abs=1e-5)
    assert (every.low, every.high) == pytest.approx((0.83887, 1), abs=1e-5)
    assert wilson(0, 0).value != wilson(0, 0).value


def test_mcnemar() -> None:
    # 1 against 8: 2 (1 + 9) / 2^9.
    first = [True] + [False] * 8 + [True] * 3
    second = [False] + [True] * 8 + [True] * 3
    assert mcnemar(first, second) == Paired(1, 8, 20 / 512)
    assert mcnemar(second, first) == Paired(8, 1, 20 / 512)
    assert mcnemar([True, False], [False, True]).p == 1
    assert mcnemar([True, False], [True, False]) == Paired(0, 0, 1)
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True], [])


def test_paper_rows_of_the_model_that_is_named() -> None:
    assert [row.model for row in paper_rows("Llama-3.2-1B-Instruct", "GSM8K")] == ["Llama3.2-1B"]
    assert paper_rows("phi-4-mini", "MATH") == [], "the paper's model, of which this figure is not known"
    assert len(paper_rows("SmolLM2-135M-Instruct", "GSM8K")) == 4
    assert all(row.river is not None for row in ROWS)


def _toy() -> Benchmark:
    items = tuple(
        Item(f"GSM8K/{i}", (), f"Question: {word}\nAnswer:") for i, word in enumerate(("one", "two", "three"))
    )
    return Benchmark("GSM8K", "toy", 0, items, lambda said, _: [True] * len(said))


def test_measure(engine: Engine) -> None:
    found = measure(engine, _toy(), chat=False, max_tokens=12)
    assert [row.way for row in found.rows] == list(WAYS)
    exact, _, full, lossless = found.rows
    assert (exact.mean_depth, full.mean_depth, lossless.mean_depth) == (5.0, 0.0, None)
    assert (exact.against_exact, exact.speedup, exact.same_texts) == (None, None, 3)
    assert (lossless.same_texts, found.lossless_differs) == (3, [])
    assert full.speedup is not None
    assert full.speedup.low <= full.speedup.mean <= full.speedup.high
    said = [
        engine.generate(item.text, ask(engine, item, chat=False, max_tokens=12)[1], mode="exact").text
        for item in found.benchmark.items
    ]
    assert found.answers[0].texts == said
    found.answers[3].texts[1] += "!"
    assert found.lossless_differs == ["GSM8K/1"]
    settings = Settings.of(engine, certified=False, chat=False, max_tokens=12)
    assert "2 of 3 answers; not in GSM8K/1" in table("toy", [found], settings)
    by_layer = table("toy", [found], replace(settings, tau=[0.5] * 5))
    assert by_layer.startswith("toy, river w4g32-hqq with exact head, tau by layer, depth 1 to all, greedy,")
    assert "\nriver, tau by layer " in by_layer


@pytest.mark.parametrize(
    ("options", "depth"), [(RiverOptions(-1, min_depth=2), 2.0), (RiverOptions(1, max_depth=3), 3.0)]
)
def test_river_exits_by_the_engines_options(
    engine: Engine, options: RiverOptions, depth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "river_options", options)
    found = measure(engine, _toy(), chat=False, max_tokens=6)
    assert {row.way: row.mean_depth for row in found.rows[:3]} == {"exact": 5.0, "river": depth, "full river": 0.0}


def test_the_first_token_is_the_prompts() -> None:
    output = Output(text="abc", finish_reason="length", exit_depths=[5, 1, 3])
    output.stats.new_tokens, output.stats.decode_s = 3, 0.5
    answers = Answers("river")
    answers.add(output)
    answers.add(Output(finish_reason="stop"))
    assert (answers.texts, answers.rates, answers.cut_off) == (["abc", ""], [4.0, 0.0], 1)
    assert answers.depths == {1: 1, 3: 1}


def test_rows_by_hand() -> None:
    exact = Answers("exact", ["a", "b"], [True, True], [10, 10], [1.0, 2.0])
    river = Answers("river", ["a", "c"], [True, False], [20, 40], [1.0, 2.0], 1)
    river.depths.update([1, 3])
    row = _row(river, exact, 5)
    assert row.speedup is not None
    assert row.speedup.mean == pytest.approx(8**0.5), "twice and four times as fast"
    assert (row.tokens_per_s, row.mean_depth, row.same_texts, row.cut_off) == (20.0, 2.0, 1, 1)
    assert row.against_exact == Paired(1, 0, 1.0)


def test_paper_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["paper", MODEL, "--gsm8k", str(GSM), "--shots", "1", "--limit", "2", "-n", "8", "-c", "1024", *PLACE]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "llama, river w4g32-hqq with exact head, tau 0.5, depth 1 to all, greedy, answers of at most 8 tokens"
    )
    assert lines[2] == f"GSM8K: 2 questions of {GSM}, 1 example each (paper: 5)"
    head, rows = lines[3], lines[4:8]
    assert head.split("  ")[-1].strip() == "paper: Ministral3-8B"
    column = head.index("paper: Llama3.2-1B")
    assert [row[column:].split()[0] for row in rows] == ["33.2", "29.3", "25.1", "-"]
    assert [row[: head.index("accuracy")].strip() for row in rows] == [
        "exact",
        "river, tau 0.5",
        "full river",
        "lossless",
    ]
    assert lines[8] == "lossless said what exact said: 2 of 2 answers"
    assert "second-hand readings" in lines[-1]

    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "riverinfer.paper/1"
    (benchmark,) = found["benchmarks"]
    assert [row["way"] for row in benchmark["here"]] == list(WAYS)
    assert benchmark["here"][1]["against_exact"]["p"] == 1.0
    assert set(benchmark["questions"][1]["answers"]) == set(WAYS)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A paper command on a model whose certificates no other test sees, of the river that ``certify`` makes."""
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "cache"))
    model = str(copy_model("llama", tmp_path / "llama"))
    return ["paper", model, "--gsm8k", str(GSM), "--shots", "0", "--limit", "2", "-n", "8", *PLACE]


def _asked(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Settings, and mean depths by way."""
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return found["settings"], {row["way"]: row["mean_depth"] for row in found["benchmarks"][0]["here"]}


def test_paper_options(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tau", "-1", "--min-depth", "2", "--max-depth", "4", "--river-method", "awq", "--river-bits", "8"]
    command = [*asked, *flags, "--dtype", "bfloat16"]
    settings, depths = _asked(command, capsys)
    assert settings == {
        "tau": -1.0,
        "certified": False,
        "min_depth": 2,
        "max_depth": 4,
        "river": "w8g32-awq",
        "river_head": "quantized",
        "chat": True,
        "max_tokens": 8,
    }
    assert depths["river"] == 2.0
    assert main([*command, "--river-head", "exact"]) == 0
    assert capsys.readouterr().out.startswith("llama, river w8g32-awq with exact head, tau -1, depth 2 to 4, greedy,")


def test_paper_takes_the_certified_tau(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = [*asked, "--river-method", "rtn", "--max-depth", "4"]
    certify(Path(asked[1]), 0.01, max_depth=4)
    assert main([*command, "--tau", "auto"]) == 0
    shown = capsys.readouterr().out
    river = "river w4g32-rtn with exact head, tau 0.7 (certified, on prompts of its own), depth 1 to 4"
    assert shown.startswith(f"llama, {river}, greedy,")
    assert "\nriver, tau 0.7 " in shown
    settings, depths = _asked([*command, "--tau", "auto"], capsys)
    assert (settings["tau"], settings["certified"]) == (0.7, True)
    assert depths == _asked([*command, "--tau", "0.7"], capsys)[1]
    assert depths != _asked([*command, "--tau", "0.5"], capsys)[1]
    assert main([*command, "--tau", "auto", "--no-chat-template"]) == 2
    assert "--no-chat-template does not go with --tau auto" in capsys.readouterr().err
    assert main([*command, "--tau", "auto", "--min-depth", "2"]) == 2
    assert "these differ: min_depth (1 there, 2 here)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("certificate", "problem"),
    [(True, "--tau: a calibration could certify no tau for this river"), (False, "no tau is certified for this river")],
)
def test_paper_where_no_tau_is_certified(
    asked: list[str], certificate: bool, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if certificate:
        certify(Path(asked[1]), 0.5)
    assert main([*asked, "--river-method", "rtn", "--tau", "auto"]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert "riverinfer calibrate MODEL_DIR --prompts FILE" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "nothing to ask"),
        (["--samples", "x"], "--samples has no effect"),
        (["--gsm8k", "no/such.jsonl"], "cannot be read"),
        (["--gsm8k", str(GSM), "--limit", "0"], "--limit"),
        (["--gsm8k", str(GSM), "--shots", "25"], "has 25 problems"),
        (["--gsm8k", str(GSM), "--min-depth", "9"], "min_depth: is 9, the model has 5 layers"),
        (["--gsm8k", str(GSM), "--min-depth", "3", "--max-depth", "2"], "max_depth"),
        (["--gsm8k", str(GSM), "--tau", "2"], "tau: is 2"),
    ],
)
def test_paper_refuses(flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", MODEL, *flags]) == 2
    assert problem in capsys.readouterr().err
