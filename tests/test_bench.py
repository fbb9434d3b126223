"""The bench scripts run: on a tiny model, a few tokens, no figures asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_models import ROOT

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("decode.py", ["--new-tokens", "8", "--runs", "1"], ["transformers bfloat16", "riverinfer exact", "gate_up"]),
        (
            "river.py",
            ["--tokens", "6", "--group", "32"],
            ["similarity, tau 0.5", "shuffled 0.5", "fixed, first 2 layers"],
        ),
    ],
)
def test_bench_scripts_print_their_tables(
    script: str, arguments: list[str], expected: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / script), str(ROOT / "llama"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "RIVERINFER_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    for text in expected:
        assert text in done.stdout
