"""Every figure of an audit comes from the place that it claims: the walks are made once more, and compared."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from audit_models import load, prompts
from golden_models import ROOT

from riverinfer import Engine
from riverinfer.cli import main
from riverinfer.evidence import audit_prompt, audit_run, quality, report_figures
from riverinfer.evidence.audit import Audit, AuditSettings
from riverinfer.evidence.audit_prompt import Found, measure_prompt
from riverinfer.evidence.better_gates import FittedGate, GateFit
from riverinfer.evidence.controls import Comparison, Trial, compare
from riverinfer.evidence.forced import Text, exact_texts, now, walk_forced
from riverinfer.evidence.quality import Judge, Quality, Scored, exact_again, score
from riverinfer.evidence.statistics import bootstrap
from riverinfer.evidence.summary import terminal
from riverinfer.evidence.sweep import OTHERS, Point, lossless_text, walk_strategy
from riverinfer.gates import Gate
from riverinfer.river import RiverOptions
from riverinfer.sampling import SamplingParams
from riverinfer.sequence import TokenSequence

PROMPTS, UNLIKE = 5, 1  # of prompt UNLIKE the fixture says that lossless mode did not say exact's text
AUDITED = RiverOptions(0.9, 2, 4)
SETTINGS = AuditSettings(
    tokens=10,
    taus=(),
    shuffles=1,
    samples=4,
    exits=2,
    floor_prompts=2,
    drift_tokens=24,
    drift_texts=2,
    repair=2,
    seed=3,
)


@dataclass
class Seen:
    """What the audit did: texts by prompt, fits with the prompts they know, trials of fitted gates, drift's seeds."""

    texts: dict[int, Text] = field(default_factory=dict)
    fits: list[tuple[GateFit, set[int]]] = field(default_factory=list)
    tried: list[tuple[Text, GateFit]] = field(default_factory=list)
    lossless: list[Scored] = field(default_factory=list)
    drift_seeds: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load(tau=AUDITED.tau, min_depth=AUDITED.min_depth, max_depth=AUDITED.max_depth) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def watched(engine: Engine) -> tuple[Audit, Seen]:
    seen = Seen()

    def measure(engine: Engine, text: Text, index: int, *rest: Any) -> None:
        seen.texts[index] = text
        measure_prompt(engine, text, index, *rest)

    def fit(name: str, tokens: Sequence[Any], depth: float) -> GateFit:
        made = fit_gate(name, tokens, depth)
        seen.fits.append((made, {token.sampled.prompt for token in tokens}))
        return made

    def trial(judge: Judge, gate: Any, **options: Any) -> Trial:
        seen.tried.append((judge.text, gate.fit))
        return run_trial(judge, gate, **options)

    def lossless(engine: Engine, text: Text) -> tuple[Scored, bool]:
        scored, same = lossless_text(engine, text)
        seen.lossless.append(scored)
        return scored, same and text.name != f"prompt {UNLIKE}"

    def drift(engine: Engine, ids: Sequence[int], tokens: int, seed: int, *rest: Any) -> Any:
        seen.drift_seeds.append(seed)
        return walk_drift(engine, ids, tokens, seed, *rest)

    fit_gate, run_trial, walk_drift = audit_run.fit_gate, audit_run.run_trial, audit_run.walk_drift
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_run, "measure_prompt", measure)
        patch.setattr(audit_run, "fit_gate", fit)
        patch.setattr(audit_run, "run_trial", trial)
        patch.setattr(audit_run, "walk_drift", drift)
        patch.setattr(audit_prompt, "lossless_text", lossless)
        return audit_run.run_audit(engine, prompts(PROMPTS), SETTINGS), seen


@pytest.fixture(scope="module")
def audit(watched: tuple[Audit, Seen]) -> Audit:
    return watched[0]


@pytest.fixture(scope="module")
def seen(watched: tuple[Audit, Seen]) -> Seen:
    return watched[1]


@pytest.fixture(scope="module")
def judges(engine: Engine, seen: Seen) -> list[Judge]:
    return [Judge(engine, seen.texts[index]) for index in range(PROMPTS)]


def measured(exact: torch.Tensor, other: torch.Tensor, answer: Sequence[int]) -> tuple[float, float, float]:
    """Mean KL, agreement and log perplexity ratio of rows that predict the tokens after the first, from doubles."""
    p, q = exact.double().softmax(-1), other.double().softmax(-1)
    said = list(answer)[1:]
    rows = range(len(said))
    excess = [math.log(float(p[i, token])) - math.log(float(q[i, token])) for i, token in zip(rows, said, strict=True)]
    kl = float((p * (p / q).log()).sum(-1).mean())
    return kl, fmean(int(p[i].argmax()) == int(q[i].argmax()) for i in rows), fmean(excess)


def check(found: Quality, judges: Sequence[Judge], walk: Callable[[Judge], torch.Tensor]) -> None:
    """``found`` is what ``walk``'s logits give."""
    kl, same, excess = zip(*(measured(j.exact.logits, walk(j), j.text.answer) for j in judges), strict=True)
    assert found.kl_by_prompt == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert found.agreement.mean == pytest.approx(fmean(same))
    assert math.log(found.perplexity_ratio.mean) == pytest.approx(fmean(excess), rel=1e-3, abs=1e-6)


def forced(judge: Judge, options: RiverOptions = AUDITED, repair: int = 0) -> torch.Tensor:
    return walk_forced(judge.engine, judge.text, options.make_gate(), repair=repair).logits


def point_of(audit: Audit, family: str) -> Point:
    (found,) = (point for point in audit.points if point.family == family)
    return found


def said_alone(engine: Engine, text: Text, gate: Gate) -> tuple[int, ...]:
    """Greedy river mode, step by step."""
    sequence, size = TokenSequence(engine.model, engine.ctx_size), engine.tokenizer.vocab_size
    engine.slots.acquire(sequence)
    try:
        said = [int(engine.extend(sequence, text.prompt)[0, :size].argmax())]
        while len(said) < len(text.answer):
            said.append(int(engine.extend(sequence, said[-1:], gate=gate)[0, :size].argmax()))
    finally:
        engine.slots.release(sequence, keep=False)
    return tuple(said)


def likelihood(engine: Engine, text: Text) -> float:
    """Mean log probability that exact gives the text's tokens after the first."""
    rows = walk_forced(engine, text, None).logits.double().log_softmax(-1)
    return fmean(float(row[token]) for row, token in zip(rows, text.answer[1:], strict=True))


def test_teacher_forced_figures(engine: Engine, audit: Audit, judges: list[Judge]) -> None:
    params = SamplingParams(max_tokens=SETTINGS.tokens, ignore_eos=True)
    for judge in judges:
        said = engine.generate(list(judge.text.prompt), params, mode="exact").token_ids
        assert judge.text.answer == tuple(said[: len(judge.text.answer)])
    check(audit.quality, judges, forced)
    check(point_of(audit, "similarity").quality, judges, forced)
    repaired = point_of(audit, "repaired")
    check(repaired.quality, judges, partial(forced, repair=SETTINGS.repair))
    assert repaired.quality.kl_by_prompt != pytest.approx(audit.quality.kl_by_prompt, rel=0.01)


def test_other_strategies_leave_by_the_audited_gate(engine: Engine, audit: Audit, judges: list[Judge]) -> None:
    def walk(judge: Judge, kind: Any, options: RiverOptions = AUDITED) -> torch.Tensor:
        return walk_strategy(engine, kind, judge.text, options.make_gate()).logits

    for name, kind in OTHERS.items():
        check(point_of(audit, name).quality, judges, partial(walk, kind=kind))
        with pytest.raises(AssertionError):  # so that it would be seen if another gate were walked
            check(point_of(audit, name).quality, judges, partial(walk, kind=kind, options=RiverOptions()))


def test_river_on_its_own(engine: Engine, audit: Audit, judges: list[Judge]) -> None:
    texts = [replace(j.text, answer=said_alone(engine, j.text, AUDITED.make_gate())) for j in judges]
    own = [Judge(engine, text) for text in texts]
    check(audit.free_running.own_text, own, forced)
    assert min(audit.free_running.own_text.kl_by_prompt) > 1e-4
    pairs = zip(texts, judges, strict=True)
    same = [a == b for text, j in pairs for a, b in zip(text.answer, j.text.answer, strict=True)]
    assert audit.free_running.same_tokens.mean == pytest.approx(fmean(same))
    gaps = [likelihood(engine, j.text) - likelihood(engine, text) for j, text in zip(judges, texts, strict=True)]
    assert fmean(gaps) > 0.1
    ratio, wanted = audit.free_running.likelihood_ratio, bootstrap(gaps)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx(
        [math.exp(end) for end in (wanted.mean, wanted.low, wanted.high)], rel=1e-4
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (AUDITED, "tau"),
        (replace(AUDITED, min_depth=3), "min_depth"),
        (replace(AUDITED, max_depth=3), "max_depth"),
        (replace(AUDITED, gate="fixed"), "gate"),
    ],
)
def test_river_on_its_own_has_each_option_that_is_measured(engine: Engine, options: RiverOptions, name: str) -> None:
    few = replace(SETTINGS, samples=1, exits=1, gates=False)
    (text,) = exact_texts(engine, prompts(9)[8:], 40)
    found = Found()
    measure_prompt(engine, text, few.floor_prompts, options, few, found, {})
    said = said_alone(engine, text, options.make_gate())
    assert [(tuple(a), tuple(b)) for a, b in found.free] == [(text.answer, said)]
    own = Judge(engine, replace(text, answer=said))
    assert found.own[0].kl == pytest.approx(own.walk(options.make_gate()).kl, abs=1e-6)
    assert found.floor == []
    # It would be seen if this option were left at its default, or the engine's own options were taken.
    without = replace(options, **{name: getattr(RiverOptions(), name)})
    assert said != said_alone(engine, text, without.make_gate())
    assert (said == said_alone(engine, text, AUDITED.make_gate())) == (options == AUDITED)


def test_survival_is_that_of_texts_that_were_generated(engine: Engine, audit: Audit) -> None:
    params = SamplingParams(max_tokens=SETTINGS.drift_tokens, ignore_eos=True)

    def parts(ids: Sequence[int], repair: int) -> int | None:
        exact = engine.generate(list(ids), params, mode="exact").token_ids
        river = engine.generate(list(ids), params, mode="river", river=replace(AUDITED, repair=repair)).token_ids
        return next((i for i, (a, b) in enumerate(zip(exact, river, strict=True)) if a != b), None)

    plain, repaired = (tuple(parts(ids, every) for _, ids in prompts(PROMPTS)) for every in (0, SETTINGS.repair))
    assert audit.free_running.river.parted == plain
    assert audit.free_running.repaired.parted == repaired
    assert audit.free_running.parted_unrepaired == sum(at is not None and at <= SETTINGS.repair for at in repaired)
    assert plain != repaired
    assert max(at or 0 for at in repaired) > SETTINGS.tokens


def test_candidates_are_judged_on_prompts_they_were_not_fitted_on(
    audit: Audit, seen: Seen, judges: list[Judge]
) -> None:
    assert audit.better is not None
    known = {id(fit): prompts for fit, prompts in seen.fits}
    used: dict[str, dict[int, GateFit]] = {}
    for text, fit in seen.tried:
        index = next(i for i, other in seen.texts.items() if other == text)
        used.setdefault(fit.name, {})[index] = fit
        assert index not in known[id(fit)]
        assert len(known[id(fit)]) >= PROMPTS // 2
    for candidate in audit.better.candidates:
        assert known[id(candidate.fit)] == set(range(PROMPTS))
        mine = used[candidate.comparison.name]
        kl = [fmean(j.walk(FittedGate(mine[i])).kl) for i, j in enumerate(judges)]
        assert candidate.comparison.gate.kl_by_prompt == pytest.approx(kl, rel=1e-3, abs=1e-6)


def test_all_features_of_a_fitted_gate_count() -> None:
    def opens(weights: tuple[float, float, float], heard: Sequence[float], similar: float = 0.0) -> bool:
        """Whether the sum of weighted features is below 0.1: similarity 0 or 1, means of confidence 0.5."""
        gate = FittedGate(GateFit("combination", (0.0,), (1.0,), (0.0,), weights, 0.5, 0.5, 0.1))
        for value in heard:
            gate.heard(torch.tensor([[value, 1 - value]]).log())
        gate.start()
        h = torch.tensor([[1.0, 0.0]])
        return gate(0, h, h if similar else h.flip(-1))

    for heard, last, recent in (([0.6, 0.6, 0.6, 0.9], False, False), ([0.9, 0.9, 0.9, 0.5], True, False)):
        assert opens((0.0, 1.0, 0.0), heard) == last
        assert opens((0.0, 0.0, 1.0), heard) == recent
        assert opens((0.0, 0.0, -1.0), heard) != recent
    assert opens((0.0, 0.0, 1.0), [0.99, 0.5, 0.5, 0.5, 0.5])  # the fifth last is none of the recent ones
    assert not opens((1.0, 0.0, 0.0), [0.5], similar=1.0)
    assert opens((1.0, 0.0, 0.0), [0.5])


def test_a_fitted_gate_hears_each_step(judges: list[Judge]) -> None:
    heard: list[torch.Tensor] = []

    class Listening(FittedGate):
        def heard(self, logits: torch.Tensor) -> None:
            heard.append(logits)
            super().heard(logits)

    gate = Listening(GateFit("confidence", (0.0,) * 5, (1.0,) * 5, (0.0,) * 5, (0.0, 1.0, 1.0), 0.5, 0.5, 0.1))
    assert torch.equal(walk_forced(judges[0].engine, judges[0].text, gate).logits, torch.cat(heard))


def test_lossless_is_held_against_exact(engine: Engine, audit: Audit, seen: Seen, judges: list[Judge]) -> None:
    assert audit.lossless_same == PROMPTS - 1
    rates = sorted(len(walk.kl) / walk.seconds for walk in seen.lossless)
    assert point_of(audit, "lossless").quality.tokens_per_s == pytest.approx(rates[PROMPTS // 2])
    text, asked = judges[0].text, []

    def generate(ids: Sequence[int], params: SamplingParams, *, mode: str) -> Any:
        asked.append((tuple(ids), params.max_tokens, mode))
        return SimpleNamespace(token_ids=list(text.answer), stats=SimpleNamespace(decode_s=0.125 * len(asked)))

    stub: Any = SimpleNamespace(generate=generate, config=engine.config)
    scored, same = lossless_text(stub, text)
    assert (scored.seconds, same) == (0.125, True)
    assert asked[0] == (text.prompt, len(text.answer), "lossless")
    scored, same = lossless_text(stub, replace(text, answer=(*text.answer[:-1], text.answer[-1] + 1)))
    assert (scored.seconds, same) == (0.25, False)


def test_the_floor_is_that_of_other_passes(
    engine: Engine, audit: Audit, judges: list[Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    floor, count = audit.floor, SETTINGS.floor_prompts
    assert len(floor.again.kl_by_prompt) == len(floor.batched.kl_by_prompt) == count
    judge, extend = judges[0], engine.extend

    def louder(sequence: TokenSequence, ids: Sequence[int], **options: Any) -> torch.Tensor:
        return extend(sequence, ids, **options) * (1.5 if options.get("all_logits") else 1.25)

    monkeypatch.setattr(engine, "extend", louder)
    again, batched, largest = exact_again(judge)
    exact = judge.exact.logits
    for found, scale in ((again, 1.25), (batched, 1.5)):
        kl, same, excess = measured(exact, exact * scale, judge.text.answer)
        assert kl > 0.01
        assert fmean(found.kl) == pytest.approx(kl, rel=1e-3)
        assert fmean(found.same) == same
        assert fmean(found.excess) == pytest.approx(excess, rel=1e-3)
    assert largest == pytest.approx(0.5 * float(exact.abs().max()), rel=1e-3)


def test_the_excess_is_that_of_the_tokens_that_follow(engine: Engine, judges: list[Judge]) -> None:
    judge, exact = judges[0], judges[0].exact
    following = []

    def spy(*given: Any) -> Scored:
        following.append(list(given[2]))
        return score(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "score", spy)
        judge.score(exact)
        exact_again(judge)
    assert following == [list(judge.text.answer[1:])] * 3
    assert exact.logits[:, : engine.tokenizer.vocab_size].argmax(-1).tolist() == following[0]


def test_the_command_passes_its_numbers_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    taken: list[AuditSettings] = []

    def stop(engine: Engine, asked: Any, settings: AuditSettings, **_: Any) -> None:
        taken.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(audit_run, "run_audit", stop)
    asked = tmp_path / "p.txt"
    asked.write_text("Once\nupon\n")
    river = ["--device", "cpu", "--dtype", "float32", "--river-bits", "4", "--river-group", "32"]
    numbers = ["--tokens", "7", "--drift-tokens", "13", "--drift-texts", "5", "--repair", "3", "--seed", "11"]
    command = ["audit", str(ROOT / "llama"), "-c", "64", "--prompts", str(asked), "--river-method", "rtn", *river]
    with contextlib.suppress(KeyboardInterrupt):
        main([*command, *numbers, "--no-gates"])
    (settings,) = taken
    wanted: dict[str, Any] = {
        "tokens": 7,
        "drift_tokens": 13,
        "drift_texts": 5,
        "repair": 3,
        "seed": 11,
        "gates": False,
    }
    assert settings == replace(AuditSettings(), **wanted)


def test_seeds_and_counts_of_drift(audit: Audit, seen: Seen) -> None:
    assert audit.drift is not None
    assert audit.drift.texts == SETTINGS.drift_texts
    assert seen.drift_seeds == [3, 4]


def test_the_clock_waits_for_what_a_gpu_has_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    monkeypatch.setattr("time.perf_counter", lambda: calls.append("read") or 7.0)
    assert now(torch.device("cuda", 1)) == 7.0
    assert calls == [torch.device("cuda", 1), "read"]
    assert now(torch.device("cpu")) == 7.0
    assert calls[2:] == ["read"]


def unlike_controls() -> tuple[Comparison, ...]:
    """Two gates whose controls differ from each other by far."""

    def walk(kl: float, prompt: int) -> Scored:
        values = (kl + 0.01 * prompt,) * 2
        return Scored(values, (kl < 0.6, prompt < 2 + 3 * kl), (0.0, 0.0), (1, 3), 1.0)

    def trials(gate: float, static: float, shuffled: float) -> list[Trial]:
        return [Trial(walk(gate, i), walk(static, i), (walk(shuffled, 2 * i),)) for i in range(7)]

    return compare({"first": trials(0.1, 0.3, 0.7), "second": trials(0.5, 0.2, 0.9)}, 5)


def test_the_terminal_keeps_the_controls_apart(audit: Audit) -> None:
    text = terminal(replace(audit, comparisons=unlike_controls(), better=None, findings=()), width=10_000)
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("gate  "))
    heads, *rows = (re.split(r"\s{2,}", line) for line in lines[at : at + 3])
    shuffled, static = (next(i for i, head in enumerate(heads) if head.startswith(k)) for k in ("shuffled", "static"))
    for row, each in zip(rows, unlike_controls(), strict=True):
        assert row[0] == each.name
        assert float(row[2]) == pytest.approx(each.gate.kl.mean, abs=1e-4)
        for place, against in ((shuffled, each.shuffled), (static, each.static)):
            given = [float(value) for value in re.findall(r"-?\d+\.\d+", row[place])]
            wanted = against.difference
            assert given == pytest.approx([wanted.mean, wanted.low, wanted.high], abs=1e-4)
            assert float(row[place + 1]) == pytest.approx(against.p, rel=0.05)


class Drawn:
    """The lines of a drawing: under ``label`` the data of all that share the colour of its entry in the legend."""

    def __init__(self, paint: Callable[[Any], None]) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure()
        paint(self.figure)

    def dots(self, axes: int, label: str) -> list[tuple[float, float]]:
        lines: list[Any] = [*self.figure.axes[axes].lines]
        (entry,) = (line for line in lines if label in str(line.get_label()))
        mine = [line for line in lines if line.get_color() == entry.get_color() and line.get_marker() != "None"]
        return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in mine if len(line.get_xdata())]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    pytest.importorskip("matplotlib")
    made: list[Drawn] = []

    def keep(*given: Any) -> str:
        made.append(Drawn(given[-1]))
        return ""

    monkeypatch.setattr(report_figures, "_svg", keep)
    return made


def test_the_figures_keep_the_controls_apart(drawn: list[Drawn]) -> None:
    found = unlike_controls()
    report_figures.controls("controls", found)
    report_figures.sweep(found, None)
    bars, both = drawn
    for label, pick in (("random order", lambda each: each.shuffled), ("one depth", lambda each: each.static)):
        assert [x for x, _ in bars.dots(0, label)] == pytest.approx([pick(each).difference.mean for each in found])
    sides: list[tuple[str, Callable[[Comparison], Quality]]] = [
        ("the gate", lambda each: each.gate),
        ("shuffled", lambda each: each.shuffled.control),
        ("one depth", lambda each: each.static.control),
    ]
    for label, side in sides:
        assert [y for _, y in both.dots(0, label)] == pytest.approx([side(each).kl.mean for each in found])
        shares = [100 * side(each).agreement.mean for each in found]
        assert [y for _, y in both.dots(1, label)] == pytest.approx(shares)
