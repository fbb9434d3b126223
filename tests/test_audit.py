"""A whole audit, through the library and the command line, on a tiny model."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from audit_models import blind, load, planted, prompts
from golden_models import ROOT
from markupsafe import escape

from riverinfer import Engine
from riverinfer.cli import main
from riverinfer.errors import ContextLengthError, InvalidRequestError, RiverinferWarning
from riverinfer.evidence.audit import SCHEMA, Audit, AuditSettings, load_audit
from riverinfer.evidence.audit_prompt import gate_label
from riverinfer.evidence.audit_run import run_audit
from riverinfer.evidence.report import report_html
from riverinfer.evidence.summary import terminal
from riverinfer.evidence.sweep import OTHERS
from riverinfer.river import RiverOptions
from riverinfer.sampling import SamplingParams

SETTINGS = AuditSettings(tokens=16, taus=(0.9,), samples=6, floor_prompts=1, drift_tokens=24)
RIVER = ["--device", "cpu", "--dtype", "float32", "--river-bits", "4", "--river-group", "32", "--river-method", "rtn"]
SMALL = ["-c", "128", "--tokens", "6", "--drift-tokens", "12", "--repair", "4", *RIVER]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load(tau=0.5) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def audit(engine: Engine) -> Audit:
    return run_audit(engine, prompts(8), SETTINGS, own_gates={"planted": planted, "coin": blind})


def test_the_report_tells_a_gate_that_knows_from_a_coin(audit: Audit) -> None:
    by_name = {comparison.name: comparison for comparison in audit.comparisons}
    assert list(by_name) == ["similarity, tau 0.5", "similarity, tau 0.9", "planted", "coin"]
    assert by_name["planted"].shuffled.beats
    assert not by_name["coin"].shuffled.beats
    shown = " ".join(terminal(audit, width=10_000).split())
    assert "Planted (mean depth 2.6) beats shuffled depths" in shown
    assert "does not surely beat shuffled depths" in next(line for line in audit.findings if line.startswith("Coin"))


def test_points_have_every_family_and_a_front(audit: Audit) -> None:
    families = {point.family for point in audit.points}
    wanted = {"exact", "lossless", "similarity", "static", "shuffled", "repaired", "full river", *OTHERS}
    assert wanted <= families
    by_family = {point.family: point for point in audit.points}
    assert by_family["exact"].quality.kl.mean == by_family["lossless"].quality.kl.mean == 0
    assert by_family["full river"].quality.mean_depth == 0
    assert by_family["full river"].quality.kl.mean > by_family["static"].quality.kl.mean
    assert {point.prompts for point in audit.points} == {8}
    front = [point for point in audit.points if point.front]
    for point in audit.points:
        quality = point.quality
        closer = [p for p in front if p.quality.kl.mean <= quality.kl.mean]
        assert any(p.quality.tokens_per_s >= quality.tokens_per_s for p in closer)
    ordered = sorted(front, key=lambda point: point.quality.tokens_per_s)
    assert all(a.quality.kl.mean <= b.quality.kl.mean for a, b in pairwise(ordered))


def test_it_is_whole(audit: Audit) -> None:
    assert audit.lossless_same == 8
    assert audit.quality == audit.comparisons[0].gate
    assert len(audit.gate_error.exits) == 8 * 6 * 4
    assert audit.drift is not None
    assert (audit.drift.tokens, audit.drift.texts) == (23, 6)
    assert "too few to call it growth" not in " ".join(audit.findings)
    assert audit.better is not None
    assert (audit.better.folds, audit.better.wanted_depth) == (4, 2)
    assert {len(each.comparison.gate.kl_by_prompt) for each in audit.better.candidates} == {8}
    assert audit.better.verdict.capitalize() in [line.capitalize() for line in audit.findings]
    free = audit.free_running
    assert len(free.river.parted) == len(free.repaired.parted) == 8
    assert len(free.river.share) == 1 + max(24 if at is None else at for at in free.river.parted)
    assert free.river.share[0] == 1  # the first token comes with the exact prompt
    assert 0 < free.same_tokens.mean < 1
    assert free.likelihood_ratio.mean > 1


def test_json_and_back(audit: Audit, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(audit.as_json())
    assert json.loads(path.read_text())["schema"] == SCHEMA == "riverinfer.audit/3"
    again = load_audit(path)
    assert again.as_json() == audit.as_json()
    assert replace(again, settings={}) == replace(audit, settings={})
    assert terminal(again) == terminal(audit)


def test_a_value_that_is_no_number_becomes_null(audit: Audit, tmp_path: Path) -> None:
    exits = (replace(audit.gate_error.exits[0], similarity=float("nan")), *audit.gate_error.exits[1:])
    path = tmp_path / "a.json"
    path.write_text(replace(audit, gate_error=replace(audit.gate_error, exits=exits)).as_json())
    assert json.loads(path.read_text())["gate_error"]["exits"][0]["similarity"] is None
    assert load_audit(path).gate_error.exits[0].similarity != load_audit(path).gate_error.exits[0].similarity


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[", "cannot be read"),
        ('{"schema": "x"}', "is 'x'"),
        (json.dumps({"schema": SCHEMA}), "not whole .environment is missing"),
    ],
)
def test_other_files_are_refused(content: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(InvalidRequestError, match=problem):
        load_audit(path)


def test_a_page_of_what_was_measured(audit: Audit) -> None:
    pytest.importorskip("matplotlib")
    page = report_html(audit)
    assert page.count("<svg") == 15
    for finding in audit.findings:
        assert str(escape(finding)) in page


def test_what_cannot_be_audited(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="only one prompt"):
        run_audit(engine, prompts(1), SETTINGS)
    with pytest.raises(ContextLengthError, match="begins 'prompt 0' has 9 tokens, with 300 of answer"):
        run_audit(engine, prompts(2), replace(SETTINGS, drift_tokens=300))
    with load(mode="exact") as exact, pytest.raises(InvalidRequestError, match="no river"):
        run_audit(exact, prompts(2), SETTINGS)
    with load(backbone_layers=3) as part, pytest.raises(InvalidRequestError, match="whole backbone"):
        run_audit(part, prompts(2), SETTINGS)
    for bad in ({"tokens": 3}, {"repair": 0}, {"drift_tokens": 3}, {"shuffles": 0}):
        with pytest.raises(InvalidRequestError):
            AuditSettings(**bad)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = tmp_path / "p.jsonl"
    asked.write_text('{"prompt": "Once"}\n{"prompt": "upon a"}\n"time"\n"Once"\n')
    saved = tmp_path / "a.json"
    flags = ["--prompts", str(asked), "--save", str(saved), "--tau", "0.9", *SMALL]
    assert main(["audit", str(ROOT / "llama"), *flags]) == 0
    printed, noted = capsys.readouterr()
    assert "1 of 4 prompts repeat others: each counts once, 3 in all" in noted
    audit = load_audit(saved)
    assert audit.gate == "similarity, tau 0.9"
    assert audit.prompts == ("Once", "upon a", "time")
    assert (audit.settings["river"], audit.settings["repair"], audit.drift.texts) == ("w4g32-rtn", 4, 3)
    assert "of 3 prompts, too few to tell which is better" in " ".join(printed.split())
    assert "The prompts are too few to judge candidate gates" in " ".join(printed.split())
    for text in ("similarity, tau 0.98", "static, depth", "KL chained", "last V r"):
        assert text in printed
    quiet = [*flags[2:], "--json", "--no-gates", "--drift-tokens", "0", "--prompts", str(asked)]
    assert main(["audit", str(ROOT / "llama"), *quiet]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["drift"] is None
    assert found["schema"] == SCHEMA


def test_answers_end_where_exacts_do(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, settings = prompts(4), AuditSettings(tokens=12, taus=(), samples=2, drift_tokens=0, gates=False)
    said = [
        engine.generate(ids, SamplingParams(max_tokens=12, ignore_eos=True), mode="exact").token_ids for _, ids in asked
    ]
    ends = [said[0][5], said[1][0]]  # the second one's answer is its end
    monkeypatch.setattr(engine, "generation_config", replace(engine.generation_config, eos_token_ids=tuple(ends)))
    lengths = [next((i for i, token in enumerate(text, 1) if token in ends), 12) for text in said]
    with pytest.warns(RiverinferWarning, match="prompts are left out: exact's answer ends with its first token"):
        audit = run_audit(engine, asked, settings)
    left = [length for length in lengths if length > 1]
    assert len(left) < 4
    assert sum(audit.quality.depths) == sum(length - 1 for length in left)
    assert audit.lossless_same == len(left) == len(audit.prompts)
    monkeypatch.setattr(
        engine,
        "generation_config",
        replace(engine.generation_config, eos_token_ids=tuple(text[0] for text in said[1:])),
    )
    with (
        pytest.warns(RiverinferWarning, match="are left out"),
        pytest.raises(InvalidRequestError, match="fewer than two prompts have an answer"),
    ):
        run_audit(engine, asked, settings)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        (RiverOptions(gate="fixed"), "fixed, 1 layer"),
        (RiverOptions(gate="fixed", min_depth=3, max_depth=4), "fixed, 3 layers"),
        (RiverOptions(gate="never"), "gate never"),
        (RiverOptions(gate="never", max_depth=4), "fixed, 4 layers"),
        (RiverOptions(gate="always", max_depth=4), "gate always"),
        (RiverOptions(tau=[0.5, 0.6], max_depth=4), "similarity, tau by layer, depth 1 to 4"),
    ],
)
def test_a_setting_is_named_by_what_it_does(options: RiverOptions, label: str) -> None:
    assert gate_label(options) == label


def test_depths_are_named_and_swept_with_the_similarity_gate_only(engine: Engine) -> None:
    settings = AuditSettings(tokens=6, taus=(0.9,), samples=1, drift_tokens=0, gates=False)

    def names(options: RiverOptions) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "river_options", options)
            return [comparison.name for comparison in run_audit(engine, prompts(2), settings).comparisons]

    limited = names(RiverOptions(0.5, min_depth=2, max_depth=4))
    assert limited == ["similarity, tau 0.5, depth 2 to 4", "similarity, tau 0.9, depth 2 to 4"]
    assert names(RiverOptions(gate="fixed", min_depth=3)) == ["fixed, 3 layers", "similarity, tau 0.9"]


@pytest.mark.filterwarnings("default::riverinfer.errors.RiverinferWarning")
def test_the_certified_tau_is_audited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path))
    asked, model = tmp_path / "p.txt", str(ROOT / "llama")
    asked.write_text("\n".join(f"Once {word}" for word in ("upon", "a", "time", "there", "was", "one")))
    river = ["--prompts", str(asked), "-c", "128", *RIVER]
    audit = ["audit", model, *river, "--tokens", "6", "--drift-tokens", "0", "--no-gates", "--json", "--tau", "auto"]
    certify = ["calibrate", model, *river, "--horizon", "6"]
    assert main([*certify, "--max-disagreement", "0.9", "--repair", "4", "--json"]) == 0
    tau = json.loads(capsys.readouterr().out)["tau"]
    assert main([*audit, "--repair", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gate"], found["settings"]["repair"]) == (f"similarity, tau {tau:g}", 4)
    assert main(audit) == 2  # certified with repair only
    assert "repair (4 there, 0 here)" in capsys.readouterr().err
    assert main(certify) == 0
    assert main(audit) == 2
    assert "--tau auto: could certify nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--taus", "0.9,2"], "tau: is 2.0; give a number from -1 to 1"),
        (["--gate", "always", "--tau", "0.9"], "--tau has no effect with --gate always"),
        (["--gate", "never", "--min-depth", "2"], "--min-depth has no effect with --gate never"),
        (["--gate", "fixed", "--max-depth", "4"], "--max-depth has no effect with --gate fixed"),
        (["--save", "nowhere/a.json"], "there is no such folder"),
        (["--save", "a.txt"], "cannot tell the format"),
        (["--prompts", "none.txt"], "none.txt: cannot be read"),
        (["--tokens", "1"], "tokens"),
        (["--repair", "0"], "repair"),
    ],
)
def test_the_command_refuses_before_it_loads(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("riverinfer.cli.audit.load_engine", lambda *_, **__: pytest.fail("loaded"))
    assert main(["audit", str(ROOT / "llama"), *flags]) == 2
    assert problem in capsys.readouterr().err


def test_the_page_is_drawn_from_the_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``report_html`` gets the audit; that the page shows it is tested with the page."""
    drawn = types.ModuleType("riverinfer.evidence.report")
    drawn.report_html = lambda audit: f"<html>{audit.gate}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "riverinfer.evidence.report", drawn)
    asked, page = tmp_path / "p.txt", tmp_path / "a.html"
    asked.write_text("Once\nupon\n")
    flags = ["--prompts", str(asked), "--report", str(page), *SMALL, "--drift-tokens", "0"]
    assert main(["audit", str(ROOT / "llama"), *flags]) == 0
    assert page.read_text() == "<html>similarity, tau 0.5"
