"""Profiles as text: every figure in its place, nothing wider than the terminal, and bars in proportion."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import pytest

from riverinfer.profiling.report import report_html
from riverinfer.profiling.result import (
    METRICS,
    Breakdown,
    Limit,
    Machine,
    ModeProfile,
    OperatorTime,
    Profile,
    Run,
    figures,
)
from riverinfer.profiling.tables import CSV_COLUMNS, csv_text, markdown, number, operator_seconds, terminal

TOKENS, LAYERS = 127, 30
ANSI = re.compile(r"\x1b\[[0-9;]*m")
SHARES = {"norm": 0.04, "qkv": 0.15, "rope": 0.02, "attention": 0.15, "o": 0.08, "gate_up": 0.31, "down": 0.25}
# Of each mode: phase, path, layers and share of its layers' time.
PLACES = {
    "exact": [("step", "backbone", range(LAYERS), 1.0)],
    "river": [("step", "backbone", range(18), 0.8), ("step", "river", range(10, LAYERS), 0.2)],
    "lossless": [("draft", "river", range(LAYERS), 0.4), ("verify", "backbone", range(LAYERS), 0.6)],
}
TOKEN_S = {"exact": 0.0182, "river": 0.0094, "lossless": 0.0121}


def fake_run(rng: np.random.Generator, mode: str = "exact", token_s: float = 0.0182, tokens: int = TOKENS) -> Run:
    waits = token_s * rng.lognormal(0.0, 0.02, tokens)
    prefill = 0.2 * rng.lognormal(0.0, 0.01)
    run = Run(prefill + 0.002, prefill, prefill + waits.sum(), tuple(waits.tolist()), 128, tokens + 1)
    if mode == "river":
        return replace(run, exit_depths=tuple(rng.integers(4, LAYERS, tokens + 1).tolist()))
    return replace(run, rounds=42, drafted=150, accepted=86) if mode == "lossless" else run


def fake_breakdown(mode: str, factors: dict[str, float] | None = None) -> Breakdown:
    """``factors``: how much longer some operators took."""
    total, factors = TOKENS * TOKEN_S[mode], factors or {}
    found = [OperatorTime("prefill", "backbone", 0, "qkv", 99.0, 1)]
    found += [
        OperatorTime(phase, path, layer, op, total * 0.8 * part * share * factors.get(op, 1) / len(layers), TOKENS)
        for phase, path, layers, part in PLACES[mode]
        for layer in layers
        for op, share in SHARES.items()
    ]
    phase = "verify" if mode == "lossless" else "step"
    found += [OperatorTime(phase, "", None, "head", total * 0.17, TOKENS)]
    found += [OperatorTime("host", "", None, "host", total * 0.03, TOKENS)]
    seconds = sum(each.seconds for each in found)
    return Breakdown(tuple(found), seconds, total, (total / TOKENS,) * TOKENS, TOKENS, 0.021, 3.1e-7, "cpu clock")


def fake_mode(rng: np.random.Generator, mode: str, runs: int = 5) -> ModeProfile:
    label = {"river": "river, tau 0.5"}.get(mode, mode)
    limit = Limit(2.7e8, 5.4e8, 0.0145, "bandwidth", 0.8)
    found = tuple(fake_run(rng, mode, TOKEN_S[mode]) for _ in range(runs))
    return ModeProfile(mode, label, found, limit, fake_breakdown(mode))


def fake_profile(seed: int = 0, modes: Sequence[str] = tuple(PLACES), runs: int = 5) -> Profile:
    rng = np.random.default_rng(seed)
    env = {"device": "cpu", "cpu": "A Processor", "cores": 4, "threads": 2, "torch": "2.13.0", "riverinfer": "0.1.0"}
    model = {"name": "small", "layers": LAYERS, "parameters": 134_515_008, "dtype": "bfloat16"}
    settings = {"prompt_len": 128, "new_tokens": 128, "context": 0, "batch": 1, "runs": runs, "river": None}
    return Profile(
        env,
        model,
        settings,
        1.24,
        400 * 2**20,
        Machine(18.6e9, 212e9),
        {mode: fake_mode(rng, mode, runs) for mode in modes},
    )


def row(text: str, label: str) -> list[str]:
    """The cells of the line that begins with ``label``: a median with its range, or a word."""
    (line,) = [line for line in text.splitlines() if line.startswith(label)]
    return re.findall(r"[^ ]+(?: \[[^]]*\])?", line[len(label) :])


@pytest.mark.parametrize("context", [0, 512])
@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_terminal_is_wide_and_high_enough(width: int, context: int) -> None:
    profile = fake_profile()
    profile.settings["context"] = context
    lines = terminal(profile, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 60
    assert "[" in "".join(lines), "the ranges fit"


def test_ranges_go_before_a_line_grows_too_long() -> None:
    lines = terminal(fake_profile(), width=72).splitlines()
    (decode,) = [line for line in lines if line.startswith("decode (tg128)")]
    assert "[" not in decode
    assert len(decode) <= 72
    assert any(line.startswith("median of runs ") for line in lines), "the header says so"


def test_the_middle_and_both_ends_of_the_runs_are_shown() -> None:
    profile = fake_profile()
    runs = profile.modes["river"].runs
    values = sorted(run.ttft_s * 1e3 for run in runs)
    expected = f"{median(values):.0f} [{values[0]:.0f}..{values[-1]:.0f}]"
    assert row(terminal(profile), "time to first token, ms")[1] == expected
    rates = sorted(TOKENS / sum(run.intervals_s) for run in profile.modes["exact"].runs)
    assert row(terminal(profile), "decode (tg128), t/s")[0] == f"{rates[2]:.1f} [{rates[0]:.1f}..{rates[4]:.1f}]"


def test_a_row_has_dashes_for_modes_without_it_and_goes_if_none_has_it() -> None:
    text = terminal(fake_profile())
    cells = row(text, "exit depth, layers")
    assert cells[0] == cells[2] == "-" != cells[1]
    assert row(text, "drafts accepted, %")[2].startswith("57.3")
    assert "exit depth" not in terminal(fake_profile(modes=["exact"]))


def test_tests_are_named_as_llama_bench_names_them() -> None:
    profile = fake_profile()
    profile.settings.update(prompt_len=256, new_tokens=64, context=512)
    assert "\nprefill pp256 @ d512, t/s" in terminal(profile)
    assert "\ndecode tg64 @ d512, t/s" in terminal(profile)


def test_limit_and_memory() -> None:
    text = terminal(fake_profile(modes=["exact"]))
    assert row(text, "limit, ms a token") == ["14.5", "bandwidth"]
    assert row(text, "reads a token") == ["270", "MB"]
    assert row(text, "limit reached, %") == ["80"]
    assert "peak memory 400.0 MiB" in text
    assert "measured 18.6 GB/s, 212 GFLOP/s" in text


def test_operators_are_those_of_decoding() -> None:
    parts = fake_breakdown("river")
    times = operator_seconds(parts)
    assert sum(times.values()) == pytest.approx(TOKEN_S["river"])
    assert times["qkv"] == pytest.approx(TOKEN_S["river"] * 0.8 * SHARES["qkv"]), "no prefill"
    assert operator_seconds(parts, path="river")["down"] == pytest.approx(times["down"] * 0.2)
    assert operator_seconds(replace(parts, tokens=0)) == {}


def test_the_operator_table_splits_where_both_halves_exist() -> None:
    text = terminal(fake_profile())
    assert " ".join(row(text, "ms a token")) == "exact % river backbone river % lossless draft verify %"
    cells = row(text, "d down")
    share = SHARES["down"] * 0.8
    assert cells[:2] == [f"{TOKEN_S['exact'] * 1e3 * share:.2f}", f"{share * 100:.0f}"]
    river, draft = TOKEN_S["river"] * 1e3 * share, TOKEN_S["lossless"] * 1e3 * share * 0.4
    assert cells[2:5] == [f"{river:.2f}", f"{river * 0.8:.2f}", f"{river * 0.2:.2f}"]
    assert cells[7] == f"{draft:.2f}"
    assert row(text, "h head")[3:5] == ["-", "-"]


@pytest.mark.parametrize("color", [False, True])
def test_bars_are_on_one_scale_and_segments_in_proportion(color: bool) -> None:
    lines = terminal(fake_profile(), width=120, color=color).splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith("Where the time"))
    bars = [re.split(r" ms ", ANSI.sub("", line), maxsplit=1)[1] for line in lines[begin + 1 : begin + 4]]
    room = len(bars[0])
    assert room >= 100
    for mode, bar in zip(TOKEN_S, bars, strict=True):
        assert len(bar) == pytest.approx(room * TOKEN_S[mode] / TOKEN_S["exact"], abs=1)
    if not color:
        segment = re.search("▒+gate_up▒+", bars[0])
        assert segment is not None
        assert len(segment.group()) == pytest.approx(room * 0.8 * SHARES["gate_up"], abs=1)
    assert ("\x1b[" in "".join(lines)) is color


def test_color_changes_nothing_else() -> None:
    plain, colored = (terminal(fake_profile(), color=color).splitlines() for color in (False, True))
    differ = [place for place, line in enumerate(colored) if ANSI.sub("", line) != plain[place]]
    assert len(differ) == len(PLACES), "the bars, whose fill is a colour"


def test_layers_name_the_slowest() -> None:
    profile = fake_profile(modes=["exact"])
    mode = profile.modes["exact"]
    slow = tuple(
        replace(each, seconds=each.seconds * 2) if each.layer == 7 else each for each in mode.breakdown.operators
    )
    profile.modes["exact"] = replace(mode, breakdown=replace(mode.breakdown, operators=slow))
    layer = TOKEN_S["exact"] * 1e3 * 0.8 / LAYERS
    (*cells, spark) = row(terminal(profile), "exact layers")
    assert cells == [f"{layer:.2f}", f"{layer:.2f}", f"{layer * 2:.2f}", "at", "7"]
    assert spark == "▅" * 7 + "█" + "▅" * 22


def test_the_clocks_own_cost_is_named() -> None:
    profile = fake_profile(modes=["exact"])
    text = " ".join(terminal(profile).split())
    assert "changed a token's time: exact +2.1 %; a clock costs 0.31 us. By cpu clock: norm includes" in text
    mode = profile.modes["exact"]
    profile.modes["exact"] = replace(mode, breakdown=replace(mode.breakdown, events="cuda events"))
    assert "norms are part of the matrix after them" in " ".join(terminal(profile).split())


def test_what_is_missing_is_left_out() -> None:
    profile = fake_profile(modes=["exact"], runs=1)
    mode = profile.modes["exact"]
    empty = Breakdown((), 1.0, 0.0, (), 0, 0.0, 0.0, "cpu clock")
    short = replace(mode.runs[0], intervals_s=(), new_tokens=1)
    bare = replace(mode, runs=(short,), breakdown=empty)
    text = terminal(replace(profile, peak_bytes=None, environment={}, model={}, settings={}, modes={"exact": bare}))
    assert "[" not in text
    assert "inter-token" not in text
    assert "peak memory" not in text
    assert "Where" not in text
    assert row(text, "prefill (pp), t/s") == [number(128 / short.prefill_s)]
    assert markdown(replace(profile, modes={"exact": bare})).count("\n| ---") == 1


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0.00"), (0.526, "0.53"), (9.43, "9.43"), (54.71, "54.7"), (1234.5, "1234")]
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_markdown_tables_are_whole() -> None:
    profile = fake_profile()
    main, operators, environment = markdown(profile).strip().split("\n\n")
    for table, count in ((main, len(profile.modes)), (operators, len(profile.modes))):
        lines = table.splitlines()
        assert {line.count("|") for line in lines} == {count + 2}
        assert re.fullmatch(r"\| --- \|( ---: \|)+", lines[1])
    assert "| `down` | " in operators
    assert "small · bfloat16" in environment
    assert "cpu: A Processor · 2 threads on 4 cores" in environment
    assert "\n" not in environment


def test_csv_has_every_figure_in_si() -> None:
    profile = fake_profile()
    rows = list(csv.DictReader(io.StringIO(csv_text(profile))))
    assert tuple(rows[0]) == CSV_COLUMNS
    found = {(row["mode"], int(row["run"]), row["name"]): float(row["value"]) for row in rows if row["kind"] == "run"}
    expected = {
        (name, index, metric.name): figures(run)[metric.name]
        for name, mode in profile.modes.items()
        for index, run in enumerate(mode.runs)
        for metric in METRICS
        if figures(run)[metric.name] is not None
    }
    assert found == expected
    units = {row["name"]: row["unit"] for row in rows if row["kind"] == "run"}
    assert units["time to first token"] == "s"
    assert units["drafts accepted"] == "share"
    assert units["decode (tg)"] == "tokens/s"
    operators = [row for row in rows if row["kind"] == "operator" and row["mode"] == "river"]
    assert [float(row["value"]) for row in operators] == [
        each.seconds for each in profile.modes["river"].breakdown.operators
    ]
    assert {row["layer"] for row in operators if row["name"] == "host"} == {""}
    assert {row["layer"] for row in operators if row["name"] == "qkv"} == {str(layer) for layer in range(LAYERS)}


@pytest.mark.parametrize(("share", "noted"), [(0.0, False), (0.19, False), (0.5, True)])
def test_a_text_that_repeats_itself_is_named(share: float, noted: bool) -> None:
    profile = fake_profile()
    mode = profile.modes["lossless"]
    runs = tuple(replace(run, repeats=share) for run in mode.runs)
    profile = replace(profile, modes={**profile.modes, "lossless": replace(mode, runs=runs)})
    for shown in (terminal(profile), markdown(profile), report_html(profile, [])):
        assert ("repeats itself" in shown.replace("\n", " ")) == noted
