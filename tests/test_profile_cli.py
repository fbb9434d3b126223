"""``riverinfer profile`` as a command: what it prints and writes, and what it refuses before a model is loaded."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from golden_models import ROOT

from riverinfer.cli import main
from riverinfer.profiling import runner
from riverinfer.profiling.result import METRICS, SCHEMA, Machine, Profile, load_profile

MODEL = str(ROOT / "llama")
PLACE = ["--device", "cpu", "--dtype", "bfloat16", "--river-bits", "4", "--river-group", "32", "--river-method", "rtn"]
SMALL = ["--prompt-len", "10", "-n", "6", "--runs", "2", "--warmup", "0", *PLACE]


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "probe", lambda device, dtype: Machine(1e10, 1e11))


def saved(path: Path, *flags: str) -> Profile:
    assert main(["profile", MODEL, *SMALL, "--save", str(path), *flags]) == 0
    return load_profile(path)


def test_everything_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"p.{name}" for name in ("json", "html")}
    trace = tmp_path / "trace.json"
    flags = ["--save", str(files["json"]), "--report", str(files["html"]), "--trace", str(trace), "--json"]
    assert main(["profile", MODEL, "--mode", "lossless,exact,river", "--tau", "0.9", *SMALL, *flags]) == 0
    printed = capsys.readouterr()
    assert printed.out == files["json"].read_text()
    assert json.loads(printed.out)["schema"] == SCHEMA
    profile = load_profile(files["json"])
    assert list(profile.modes) == ["lossless", "exact", "river"]
    assert profile.as_json() == printed.out
    assert profile.settings["river"] == "w4g32-rtn"
    assert profile.modes["river"].label == "river, tau 0.9"
    assert all(len(mode.runs) == 2 and mode.runs[0].new_tokens == 6 for mode in profile.modes.values())
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["args"]["name"].split()[-1] for event in events if event["name"] == "process_name"} == set(
        profile.modes
    )
    assert "<html" in files["html"].read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.html", "p.json", "trace.json"]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", MODEL, "--mode", "exact", *SMALL]) == 0
    assert "time to first token" in capsys.readouterr().out
    assert main(["profile", MODEL, "--mode", "exact", "--md", *SMALL]) == 0
    assert "| exact |" in capsys.readouterr().out.replace("  ", " ")
    assert main(["profile", MODEL, "--mode", "exact", "--csv", *SMALL]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert len({len(row) for row in rows}) == 1
    assert {METRICS[0].name, METRICS[1].name} <= {cell for row in rows for cell in row}


@pytest.mark.parametrize(
    ("flags", "settings", "label"),
    [
        (["--mode", "river", "--depth", "2"], {"depth": 2, "tau": None}, "river, depth 2"),
        (["--mode", "river", "--depth", "0"], {"depth": 0, "tau": None}, "river, gate always"),
        (["--mode", "exact", "--batch", "2"], {"batch": 2}, "exact"),
        (["--mode", "exact", "--context", "20"], {"context": 20}, "exact"),
        (["--mode", "exact", "--temp", "1", "-s", "4"], {"temperature": 1.0, "seed": 4}, "exact"),
    ],
)
def test_settings_are_kept(tmp_path: Path, flags: list[str], settings: dict[str, Any], label: str) -> None:
    profile = saved(tmp_path / "a.json", *flags)
    assert {name: profile.settings[name] for name in settings} == settings
    (mode,) = profile.modes.values()
    assert mode.label == label
    if "depth" in settings:
        assert set(mode.runs[0].exit_depths[1:]) == {settings["depth"]}


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "a.json", "--mode", "exact")
    slow = json.loads(a.as_json())
    for run in slow["modes"]["exact"]["runs"]:
        run["intervals_s"] = [2 * wait for wait in run["intervals_s"]]
    (tmp_path / "b.json").write_text(json.dumps(slow))
    capsys.readouterr()
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main(["profile", "--compare", *files]) == 0
    assert "b.json" in capsys.readouterr().out
    assert main(["profile", "--json", "--compare", *files]) == 0
    assert json.loads(capsys.readouterr().out)["slower"]
    assert main(["profile", "--json", "--compare", files[0], files[0]]) == 0
    assert not json.loads(capsys.readouterr().out)["slower"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--mode", "fast"], "unknown mode 'fast'"),
        (["--mode", "exact", "--tau", "0.5"], "--tau has no effect without river mode"),
        (["--mode", "river", "--tau", "7"], "tau"),
        (["--mode", "river", "--depth", "99"], "min_depth"),
        (["--context", "5", "--batch", "2"], "needs a single sequence"),
        (["--runs", "0"], "runs"),
        (["--new-tokens", "1"], "new_tokens"),
        (["--temp", "-1"], "temperature"),
        (["--save", "a.txt"], "name it .json"),
        (["--report", "nowhere/a.html"], "no such folder"),
        (["--nvtx"], "NVIDIA"),
        (["--context", "100000"], "context"),
        (["--compare", "missing.json", "missing.json"], "missing.json"),
        (["--save", "a.json", "--trace", "./a.json"], "named for two outputs"),
    ],
)
def test_refused_in_one_line(
    flags: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [] if "--compare" in flags else [MODEL]
    assert main(["profile", *model, *SMALL, *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("riverinfer: note")]
    assert line.startswith("riverinfer: ")
    assert problem in line
    assert not list(tmp_path.iterdir())


def test_a_profile_of_another_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "a.json", "--mode", "exact")
    whole = json.loads((tmp_path / "a.json").read_text())
    changes = {
        "schema": {"schema": "riverinfer.profile/99"},
        "modes": {"modes": None},
        "machine": {"machine": {"bytes_per_s": None, "operations_per_s": 1}},
        "list": None,
    }
    for name, change in changes.items():
        bad = tmp_path / f"{name}.json"
        bad.write_text(json.dumps([] if change is None else {**whole, **change}))
        assert main(["profile", "--compare", str(bad), str(tmp_path / "a.json")]) == 2
        assert bad.name in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--csv"], ["--mode", "exact"], ["--nvtx"]])
def test_what_compare_has_no_use_for(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--compare", "a.json", "b.json", *flags]) == 2
    assert f"{flags[0]} does not go with --compare" in capsys.readouterr().err


def test_a_damaged_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    saved(path, "--mode", "exact")
    for field, value in (("intervals_s", ["a", "b"]), ("prefill_s", "x"), ("rounds", 1.5), ("new_tokens", None)):
        whole = json.loads(path.read_text())
        whole["modes"]["exact"]["runs"][0][field] = value
        bad = tmp_path / "bad.json"
        bad.write_text(json.dumps(whole))
        assert main(["profile", "--compare", str(path), str(bad)]) == 2
        assert field in capsys.readouterr().err


def test_what_was_measured_is_shown_before_a_file_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["profile", MODEL, "--mode", "exact", *SMALL, "--save", str(tmp_path / "a.json")]) == 2
    shown = capsys.readouterr()
    assert "time to first token" in shown.out
    assert "No space left" in shown.err
