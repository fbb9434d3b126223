"""The bench scripts run: on a tiny model, a few tokens, no figures asserted. figure8.py: see test_kv_strategies.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_models import ROOT

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

from harness import interval, print_table, save  # noqa: E402


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
    script: str, arguments: list[str], expected: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / script), str(ROOT / "llama"), "--threads", "1", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "RIVERINFER_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    for text in expected:
        assert text in done.stdout


def test_an_interval_is_around_its_mean_and_a_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    mean, low, high = interval([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert 1.0 <= low < mean < high <= 6.0
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
