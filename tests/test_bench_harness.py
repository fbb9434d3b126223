"""What the bench scripts share: order of runs, intervals, tables, results and figures that appear whole."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

from harness import (
    FAMILIES,
    color,
    figure,
    interleave,
    interval,
    median_interval,
    print_table,
    ratios,
    save,
)


def test_every_run_calls_each_contender_once_in_an_order_that_rotates() -> None:
    calls: list[str] = []

    def contender(name: str) -> int:
        calls.append(name)
        return len(calls)

    found = interleave({name: partial(contender, name) for name in "abc"}, runs=3)
    assert ["".join(calls[i : i + 3]) for i in range(0, 12, 3)] == ["cab", "abc", "bca", "cab"]
    assert found == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_progress_goes_to_stderr_and_warmup_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert interleave({"a": lambda: 1}, runs=2, warmup=0, progress="speed") == {"a": [1, 1]}
    shown = capsys.readouterr()
    assert "speed: run 2/2" in shown.err
    assert not shown.out


@pytest.mark.parametrize(("middle", "function"), [(3.0, interval), (2.5, median_interval)])
def test_an_interval_is_around_its_middle(
    middle: float, function: Callable[[list[float]], tuple[float, float, float]]
) -> None:
    found, low, high = function([1.0, 2.0, 3.0, 6.0])
    assert found == middle
    assert 1.0 <= low < middle < high <= 6.0
    assert function([1.0, 2.0, 3.0, 6.0]) == (found, low, high)
    assert function([2.0]) == (2.0, 2.0, 2.0)


def test_ratios_are_taken_within_runs() -> None:
    assert ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == (2.0, 2.0, 2.0)
    assert ratios([1.0, 10.0, 3.0], [10.0, 1.0, 1.0])[0] == 3.0
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_a_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["a", "b"], [["1", "2"]])
    assert capsys.readouterr().out == "| a | b |\n|---|---|\n| 1 | 2 |\n\n"


def test_results_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = save("x.json", {"rates": [1.0]}, tmp_path)
    with pytest.raises(TypeError):
        save("x.json", {"rates": {1.0}}, tmp_path)
    kept = json.loads(path.read_text())
    assert kept["rates"] == [1.0]
    assert kept["machine"]["cores"] == os.cpu_count()
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_is_written_twice_alike_and_not_at_all_when_drawing_fails(tmp_path: Path) -> None:
    def draw(height: float) -> list[bytes]:
        paths = figure("x", lambda axes: axes.bar(["a"], [height], label="mine"), title="Speed", folder=tmp_path)
        assert [path.name for path in paths] == ["x.svg", "x.png"]
        return [path.read_bytes() for path in paths]

    first = draw(1.0)
    assert b"Speed" in first[0]
    assert first[1].startswith(b"\x89PNG")
    assert draw(1.0) == first
    assert draw(2.0) != first
    draw(1.0)
    with pytest.raises(AttributeError):
        figure("x", lambda axes: axes.no_such_thing(), title="Speed", folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.png", "x.svg"]
    assert [(tmp_path / name).read_bytes() for name in ("x.svg", "x.png")] == first


def test_colors_tell_contenders_apart() -> None:
    variants = [
        *("transformers bfloat16", "transformers float32", "OpenVINO", "llama.cpp, as built"),
        *("llama.cpp, no flash attention", "llama.cpp, no extra buffers"),
        *("exact bfloat16", "exact float32", "river w4g64, tau 0.5", "river w4g64, always"),
        *("lossless, default (w4g32)", "lossless, w4g64", "lossless, lookup"),
    ]
    assert len({color(name) for name in variants}) == len(variants)
    assert color("exact bfloat16") == FAMILIES["exact"].lower()
    assert color("somebody else") == color("somebody else") not in {color(name) for name in variants}
