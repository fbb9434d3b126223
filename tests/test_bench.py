"""The bench scripts run: on a tiny model, a few tokens, no figures asserted. figure8.py: see test_kv_strategies.py."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from golden_models import ROOT

BENCH = Path(__file__).parent.parent / "bench"
FIGURES = {"decode.py": "decode-cpu", "prefill.py": "prefill-cpu", "context.py": "context-cpu"}


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        (
            "decode.py",
            ["--new-tokens", "8", "--runs", "1", "--group", "32"],
            [
                "| transformers bfloat16 |",
                "| exact float32 |",
                "| river w4g32, always |",
                "| lossless, lookup | sampled |",
                "Worst prompt of lossless, w4g32: ",
                "lossless, w4g32: token ids equal to exact mode's for 9 of 9 prompts",
                "| verify 16 tokens |",
                "| gate_up |",
            ],
        ),
        (
            "prefill.py",
            ["--lengths", "4,8", "--runs", "1", "--group", "32"],
            [
                "| llama, 1 threads: prompt tokens/s | 4 tokens | 8 tokens |",
                "| ms to the first token | 4 tokens | 8 tokens |",
                "| times as fast as transformers bfloat16 | 4 tokens | 8 tokens |",
                "| exact float32 |",
                "| river w4g32, half the layers |",
            ],
        ),
        (
            "context.py",
            ["--contexts", "4,8", "--new-tokens", "3", "--runs", "2", "--group", "32"],
            [
                "| llama, 1 threads: ms a token | 4 cached | 8 cached |",
                "| times as fast as transformers bfloat16 | 4 cached | 8 cached |",
                "| river w4g32, always |",
                "| exact bfloat16, at least |",
            ],
        ),
        (
            "river.py",
            ["--tokens", "6", "--group", "32", "--repair", "4", "--repair-tokens", "12", "--all"],
            [
                "| similarity, tau 0.5 |",
                "|   shuffled 0.5 |",
                "| fixed, first 2 layers |",
                "| 8 bits hqq, always |",
                "| 4 bits awq, tau 0.5 |",
                "| never repaired |",
                "| repaired every 4 tokens |",
            ],
        ),
    ],
)
def test_bench_scripts_print_their_tables(
    script: str,
    arguments: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, name = tmp_path / "results", FIGURES.get(script)
    if name is not None:
        arguments = [*arguments, "--save", str(folder)]
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # set by the scripts otherwise, and left
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr(sys, "argv", [script, str(ROOT / "llama"), "--threads", "1", *arguments])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(BENCH / script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    for text in expected:
        assert text in shown
    if name is not None:
        result = json.loads((folder / f"{name}.json").read_text())
        assert set(result["settings"]["packages"]) == {"transformers"}
        assert "exact bfloat16" in (folder / f"{name}.svg").read_text()
        assert (folder / f"{name}.png").stat().st_size
