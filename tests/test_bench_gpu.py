"""The GPU benchmark without a GPU: every section under Triton's interpreter, and what it does with what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from convert_fixtures import Ggml, write_golden_gguf
from triton_process import needs_triton, run

BENCH = Path(__file__).parent.parent / "bench"
SECTIONS = ("machine", "checks", "steps", "memory", "kernels", "text", "peers")


@needs_triton
def test_every_section_runs_dry(tmp_path: Path) -> None:
    """On a model that came as a GGUF in two parts."""
    whole = tmp_path / "model.gguf"
    write_golden_gguf(whole, "llama", Ggml.BF16)
    parts = [tmp_path / "a", tmp_path / "b"]
    content = whole.read_bytes()
    for part, half in zip(parts, (content[:100_000], content[100_000:]), strict=True):
        part.write_bytes(half)
    options = ["--dry", "--out", str(tmp_path), "--gguf-parts", *map(str, parts)]
    done = run([str(BENCH / "gpu.py"), *options], tmp_path, RIVERINFER_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "FAIL" not in done.stdout
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert set(SECTIONS) <= result["seconds"].keys()
    failed = {name: kept for section in SECTIONS for name, kept in problems(result[section]).items()}
    assert not failed
    assert all(check["passed"] for check in result["checks"])
    assert {"tiny steps", "tiny gated steps", "tiny down dual", "tiny sampling"} <= {
        c["check"] for c in result["checks"]
    }
    assert result["steps"]["tiny lossless, computed"]["computed"]
    assert result["text"]["summary"]["equal"] == result["text"]["summary"]["texts"] == 1
    assert sum("tokens_per_s" in each for each in result["peers"].values()) == 4
    assert {target["verdict"] for target in result["targets"]} == {"met", "not measured"}


def problems(section: Any) -> dict[str, Any]:
    """What failed or was left out in a section."""
    items = section.items() if isinstance(section, dict) else ((each["check"], each) for each in section)
    return {name: kept for name, kept in items if isinstance(kept, dict) and ("error" in kept or "skipped" in kept)}


DYING = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {bench!r})
import gpu_run

gpu_run._GRACE = 0.5

def section(part):
    part.attempt("first", lambda: 1)
    part.attempt("wrong", lambda: 1 / 0)
    part.attempt("dies", lambda: os.kill(os.getpid(), signal.SIGKILL))
    part.attempt("after", lambda: part.attempt("inside", lambda: 2))
    part.attempt("slow", lambda: time.sleep(60), needs=0)
    part.attempt("never", lambda: 3)

def shared(part):
    while (number := part.claim()) < 40:
        part.attempt(str(number), lambda: os.getpid())

folder = Path({folder!r})
seen = []
found = gpu_run.in_processes("x", section, folder, 3.0, seen.append, known={{"first": 0}})
assert found["first"] == 0, found
assert found["wrong"]["error"] == "ZeroDivisionError: division by zero", found
assert "exit status -9" in found["dies"]["error"], found
assert found["after"] == found["inside"] == 2, found
assert "out of time" in found["slow"]["error"], found
assert "never" not in found, found
assert seen[-1] == found
every = gpu_run.in_processes("y", shared, folder, 30.0, seen.append, processes=3)
assert sorted(map(int, every)) == list(range(40)), every
assert os.getpid() not in every.values()
"""


def test_a_measurement_that_ends_its_process_is_one_measurement(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(bench=str(BENCH), folder=str(tmp_path)))
    done = run([str(script)], tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


TARGETS = """
import json, sys
sys.path[:0] = [{bench!r}, {root!r}]
import gpu_targets
print(json.dumps(gpu_targets.rows(json.loads({results!r}))))
"""


@needs_triton
@pytest.mark.parametrize(("share", "verdict"), [(0.9, "met"), (0.5, "NOT met"), (None, "not measured")])
def test_targets_are_met_or_not_or_not_measured(share: float | None, verdict: str, tmp_path: Path) -> None:
    exact = {"ms": 5.0} if share is None else {"ms": 5.0, "share": share}
    results = {"steps": {"Llama-3.1-8B exact": exact, "Llama-3.1-8B verify 4": {"ms": 5.1}}}
    script = tmp_path / "targets.py"
    script.write_text(TARGETS.format(bench=str(BENCH), root=str(BENCH.parent), results=json.dumps(results)))
    done = run([str(script)], tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    rows = {name: rest for name, *rest in json.loads(done.stdout)}
    assert rows["8B exact step, of copy bandwidth"][2] == verdict
    assert rows["8B verify 4, exact steps"] == ["<= 1.05", "1.02", "met"]
