"""bench/load.py and bench/memory.py run on a tiny model; their formula, sums and page cache; no timings asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from golden_models import ROOT

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import load
import load_page_cache
import memory
from harness import figure
from memory_formula import (
    GIB,
    LLAMA_8B,
    PAPER,
    Shapes,
    engine_parts,
    ours_as_paper,
    ours_over_paper,
    packed,
    paper_sums,
)

from riverinfer import Engine
from riverinfer.checkpoint import Checkpoint

GROUP = 32
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
needs_packed = pytest.mark.skipif(not memory.is_packed(ROOT / "llama", GROUP), reason="no 4-bit kernel here")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RIVERINFER_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def threads_stay() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- load -----------------------------------------------------------------------------------------------------------


def test_starts_are_measured_shown_and_saved(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--only", "exact", "--runs", "1", "--warmup", "0", "--first-starts", "1", "--threads", "1"]
    load.main([str(ROOT / "llama"), *arguments, "--save", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "| lossless, first start |" in shown
    result = json.loads((tmp_path / "out" / "load-cpu.json").read_text())
    starts = {(start["contender"], start["files"]): start for start in result["starts"]}
    assert {name for name, _ in starts} == {"exact", load.FIRST}
    for start in starts.values():
        assert all(second > 0 for run in start["seconds"] for second in run)
        assert [len(run) for run in start["seconds"]] == [len(load.STAGES)]
    assert starts["exact", "warm"]["cached"] == [1.0]
    assert load.FIRST in (tmp_path / "out" / "load-cpu.svg").read_text()
    assert not list(cache.iterdir())  # the first start's own folder is gone, and ours was not written to


def test_a_start_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"nobody ended with status 1\n[\s\S]*KeyError: 'nobody'"):
        load.Contender("nobody", {}, list).start("warm")
    assert not load.works(load.Contender("nobody", {}, list))


def test_rivers_count_as_files_of_ours_alone(cache: Path) -> None:
    known = load.make_contenders(ROOT / "llama", 1, None)
    assert (ROOT / "llama" / "model.safetensors") in known["exact"].files()
    before = len(known["river"].files())
    Engine.load(
        ROOT / "llama", device="cpu", dtype="bfloat16", mode="river", river_bits=4, river_group=GROUP, ctx_size=32
    ).close()
    rivers = known["river"].files()[before:]
    assert [path.parent for path in rivers] == [cache / "rivers"]
    others = [peer.files() for name, peer in known.items() if name in load.PEERS]
    assert not any(river in files for files in others for river in rivers)


def test_rows_pair_totals_within_runs_and_show_the_worst_share_still_cached() -> None:
    def starts(*totals: float, cached: float) -> list[load.Start]:
        return [load.Start((1.0, total - 1.5, 0.5), cached) for total in totals]

    found = {
        ("exact", "cold"): [*starts(2.0, cached=0.0), *starts(4.0, cached=0.25)],
        ("river", "cold"): starts(6.0, 12.0, cached=0.0),
        (load.FIRST, "cold"): starts(9.0, cached=0.0),
    }
    exact, river, first = load.rows(found, "exact")
    assert exact == ["exact", "cold", "1.00", "1.50", "0.50", "3.00 (2.00..4.00)", "1.00 (1.00..1.00)", "25"]
    assert river[-2:] == ["3.00 (3.00..3.00)", "0"]
    assert first[-3:] == ["9.00 (9.00..9.00)", "–", "0"]


@pytest.mark.skipif(not load_page_cache.CAN_DROP, reason="no posix_fadvise here")
def test_files_leave_the_page_cache_and_come_back(tmp_path: Path) -> None:
    path, empty = tmp_path / "x", tmp_path / "empty"
    path.write_bytes(bytes(2**22))
    empty.touch()
    files = [path, empty]
    assert load_page_cache.resident_share(files) == 1.0
    load_page_cache.drop(files)
    if load_page_cache.resident_share(files) == 1.0:
        pytest.skip("this file system keeps its files in memory")
    assert load_page_cache.resident_share(files) < 0.5
    load_page_cache.read(files)
    assert load_page_cache.resident_share(files) == 1.0
    assert load_page_cache.resident_share([empty]) == 0.0


# --- memory ---------------------------------------------------------------------------------------------------------


@needs_proc
@needs_packed
def test_memory_is_measured_beside_the_formula(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = memory.settings
    monkeypatch.setattr(memory, "settings", lambda *sizes: dict(list(every(*sizes).items())[2:3]))
    monkeypatch.setattr(memory, "draw", lambda *_: None)
    arguments = ["--contexts", "16384", "--layers", "2", "--group", str(GROUP), "--runs", "1", "--threads", "1"]
    memory.main([str(ROOT / "llama"), *arguments, "--save", str(tmp_path / "out")])
    assert "| EE-LLM | 26.47 | no plain sum is known |" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "memory-cpu.json").read_text())
    (row,) = result["bytes"]
    assert (row["setting"], row["context"]) == ("river, 2 backbone layers", 16384)
    assert row["report"] == sum(row["formula"].values())
    assert row["held"] >= row["formula"]["kv"] == 2 * 5 * 2 * 16 * 16384 * 2
    (run,) = result["raw"][0]["runs"]
    assert run["peaks"]["prompt"] >= run["before"]["VmRSS"] + row["formula"]["kv"]
    # More positions than the model has: measured in a copy, whose river is not in our cache.
    assert result["settings"]["scratch copy"]
    assert not cache.exists()


def test_a_copy_claims_more_positions_and_an_engine_believes_it() -> None:
    with memory.long_enough(ROOT / "llama", 2048) as folder:
        assert folder == ROOT / "llama"
    with memory.long_enough(ROOT / "llama", 4096) as folder:
        assert Checkpoint.open(folder).config.context_limit == 4096
        assert (folder / "model.safetensors").is_symlink()
    assert not folder.exists()
    assert Checkpoint.open(ROOT / "llama").config.context_limit == 2048


@needs_packed
@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_the_formula_is_what_an_engine_reports(name: str) -> None:
    checkpoint = Checkpoint.open(ROOT / name)
    shapes = Shapes.of(checkpoint.config, tied=checkpoint.head_name != "lm_head.weight")
    for options in memory.settings(shapes.layers, 2, GROUP).values():
        with Engine.load(
            ROOT / name, device="cpu", dtype="bfloat16", ctx_size=256, max_sequences=1, **options
        ) as engine:
            report = engine.memory()
        parts = memory.formula(shapes, 256, options)
        found = {part: getattr(report, part) for part in parts if part != "embedding"}
        assert found == {part: value for part, value in parts.items() if part != "embedding"}
        assert report.total == sum(parts.values())


def test_the_formula_by_hand() -> None:
    shapes = Shapes(hidden=8, intermediate=12, layers=3, heads=4, kv_heads=2, head_dim=2, vocab=10, tied=False)
    layer = 8 * 8 + 2 * (4 * 8) + 8 * 8 + 3 * (8 * 12)  # q, k and v, o, gate and up and down
    assert shapes.layer == layer
    assert shapes.weights == 3 * layer + 2 * 80 + 7 * 8
    assert Shapes(8, 12, 3, 4, 2, 2, 10, tied=True).weights == shapes.weights - 80
    assert shapes.kv(100) == 2 * 3 * 2 * 2 * 100 * 2
    assert packed(64, None) == 32
    assert packed(64, 32) == 32 + 2 * 4
    parts = engine_parts(shapes, 100, backbone=1, group=8)
    assert parts == {
        "backbone": layer * 2,
        "river": 3 * layer // 2 + 3 * layer // 8 * 4,
        "head": 80 * 2 + 80 // 2 + 80 // 8 * 4,
        "embedding": 80 * 2,
        "other": (7 * 8 + 2 * 100 * 2) * 4,
        "kv": shapes.kv(100),
    }
    exact = engine_parts(shapes, 100, backbone=3, group=None, mapped=True)
    assert (exact["backbone"], exact["river"], exact["head"], exact["embedding"]) == (3 * layer * 2, 0, 160, 0)


def test_a_summary_is_over_what_was_taken_before() -> None:
    def run(held: int) -> dict[str, object]:
        before = {"RssAnon": 10, "VmRSS": 15}
        peaks = {"load": 16, "step": 18, "prompt": 25}
        return {"before": before, "tokenizer": 2, "held": {"RssAnon": held}, "peaks": peaks, "report": {"total": 5}}

    found = memory.summary([run(19), run(17), run(40)])
    assert found == {
        "report": 5,
        "held": 9,
        "tokenizer": 2,
        "peak of loading": 1,
        "peak of a step": 3,
        "peak of a prompt's end": 10,
    }
    figures = {name: value * memory.MIB for name, value in found.items()}
    row = memory.memory_row(("exact", 64), figures, 6 * memory.MIB)
    assert row == ["exact", "64", "6.0", "5.0", "9.0", "2.0", "1.0", "1.0", "3.0", "10.0"]


def test_a_figure_has_every_setting(tmp_path: Path) -> None:
    shapes = Shapes(8, 12, 3, 4, 2, 2, 10, tied=False)
    options = memory.settings(3, 2, 4)
    found = {
        (name, context): {"held": 2**20 * context, "peak of a prompt's end": 2**21 * context}
        for name in options
        for context in (64, 4096)
    }
    svg, _ = figure("m", lambda axes: memory.draw(axes, shapes, options, found), title="t", folder=tmp_path)
    for text in (*options, "formula", "4K"):
        assert text in svg.read_text()


def test_sums_give_the_papers_figures_to_two_decimals() -> None:
    assert LLAMA_8B.weights == 8_030_261_248  # as the checkpoint of Llama-3.1-8B says
    sums = paper_sums()
    assert set(PAPER) - set(sums) == {"EE-LLM"}
    assert {name: round(total, 2) for name, (_, total) in sums.items()} == {name: PAPER[name] for name in sums}


@pytest.mark.parametrize("group", memory.GROUPS)
def test_what_is_over_the_papers_sum_is_told_in_full(group: int) -> None:
    sums, ours = paper_sums(), ours_as_paper(group)
    assert set(ours) == {"backbone", "full W4", "River"}
    for name, parts in ours.items():
        over = sum(ours_over_paper(name, group).values())
        assert sum(parts.values()) - over == pytest.approx(sums[name][1] * GIB, abs=1)
    cells = {row[0]: row for row in memory.paper_rows()}
    place = 4 + 2 * memory.GROUPS.index(group)
    held = sum(ours["River"].values()) / GIB
    assert cells["River"][place : place + 2] == [f"{held:.2f}", f"{held - PAPER['River']:+.2f}"]
    assert cells["EE-LLM"][place : place + 2] == ["–", "–"]
