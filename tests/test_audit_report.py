"""An audit's page is whole, needs nothing else, shows what was found, lets no text become markup."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from self_contained import assert_self_contained

from riverinfer.evidence import report_errors
from riverinfer.evidence.audit import Audit, FreeRunning
from riverinfer.evidence.better_gates import GateFit, judged
from riverinfer.evidence.controls import Trial, compare
from riverinfer.evidence.drift import PATHS, DriftWalk, summarize_drift
from riverinfer.evidence.findings import findings
from riverinfer.evidence.gate_error import Exit, KVError, Sampled
from riverinfer.evidence.gate_error_summary import ERRORS, Correlation, GateError, LayerError, summarize_errors
from riverinfer.evidence.quality import Scored, floor_of, summarize
from riverinfer.evidence.report import report_html, summary
from riverinfer.evidence.statistics import Interval
from riverinfer.evidence.summary import _errors
from riverinfer.evidence.survival import survival
from riverinfer.evidence.sweep import Point, mark_front

LAYERS, PROMPTS, TOKENS = 6, 8, 8
EVIL = '"><script src="http://evil.example/x.js">alert(1)</script><img onerror=x>&amp;\x00\ud800$x$'
FIGURES = ["by-prompt", "similarity", "scatter", "scatter-last", "correlations", "correlation-map", "layer-errors"]
FIGURES += ["controls", "candidates", "depths", "sweep", "pareto", "drift", "sawtooth", "survival"]


class Page(HTMLParser):
    """What a browser would make of the page; fails where elements do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def said(self, *tags: str) -> str:
        return " ".join("".join(text for tag, text in self.texts if not tags or tag in tags).split())

    @property
    def figures(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.elements if tag == "svg"]


def scored(rng: random.Random, kl: float, depths: tuple[int, ...], seconds: float = 1.0) -> Scored:
    values = tuple(kl * rng.uniform(0.5, 1.5) for _ in depths)
    return Scored(values, tuple(rng.random() > kl for _ in depths), values, depths, seconds)


def trials_of(rng: random.Random, kl: float, gain: float, deepest: int) -> list[Trial]:
    trials = []
    for _ in range(PROMPTS):
        depths = tuple(rng.randint(1, deepest) for _ in range(TOKENS))
        gate, static, shuffled = (scored(rng, each, depths) for each in (kl, kl * gain, kl * gain))
        trials.append(Trial(gate, static, (shuffled, shuffled)))
    return trials


def gate_errors(rng: random.Random) -> GateError:
    def token(prompt: int, position: int) -> Sampled:
        similarities = tuple(rng.uniform(0.8, 1.0) for _ in range(LAYERS))
        error = KVError(0.99, 0.98, 0.1, 0.2, 1.0, 1.0)
        exits = tuple(
            Exit(prompt, position, depth, similarities[depth - 1], rng.random(), True, error, rng.uniform(0.9, 1))
            for depth in (1, 3, 5)
        )
        return Sampled(prompt, position, similarities, exits, tuple((error,) * (LAYERS - e.depth) for e in exits))

    return summarize_errors([token(prompt, position) for prompt in range(PROMPTS) for position in range(4)])


def drift_walk(rng: random.Random) -> DriftWalk:
    return DriftWalk(
        (1,) * 25,
        {path: tuple(rng.random() for _ in range(24)) for path in PATHS},
        {path: tuple(rng.random() > 0.2 for _ in range(24)) for path in PATHS},
        tuple(i % 4 for i in range(24)),
        (2,) * 24,
    )


def make_audit() -> Audit:
    """Invented figures, put together by the audit's own functions."""
    rng = random.Random(0)
    whole = (LAYERS,) * TOKENS
    names = {"similarity, tau 0.5": (0.2, 1.5, 2), "similarity, tau 0.9": (0.1, 1.0, 5)}
    compared = compare({name: trials_of(rng, *values) for name, values in names.items()}, LAYERS)
    exact = summarize([[scored(rng, 0.0, whole, 2.0)]] * PROMPTS, LAYERS)
    full = summarize([[scored(rng, 0.3, (0,) * TOKENS, 0.4)]] * PROMPTS, LAYERS)
    points = [Point("exact", "", exact, PROMPTS), Point("lossless", "", exact, PROMPTS)]
    points += [Point("full river", "w4", full, PROMPTS)]
    points.append(Point("masking (D-LLM)", "tau 0.5", summarize([[scored(rng, 17.0, whole)]] * 2, LAYERS), 2))
    for each in compared:
        points += [
            Point("similarity", each.name[12:], each.gate, PROMPTS),
            Point("static", "", each.static.control, PROMPTS),
        ]
    fit = GateFit("confidence", (0.0,), (1.0,), (0.0,), (0.0, -1.0, 0.0), 0.5, 0.5, 0.1)
    parting = survival([None, 1], 4)
    floor_part = (scored(rng, 0.0, whole), scored(rng, 0.001, whole), 0.01)
    return findings(
        Audit(
            environment={"cpu": "a processor", "date": "2026-01-01"},
            model={"name": "tiny", "layers": LAYERS, "dtype": "float32", "parameters": 134515008},
            settings={
                "tokens": 9,
                "taus": [0.9],
                "river": "w4",
                "repair": 4,
                "options": {"gate": "similarity", "tau": 0.5},
            },
            seconds=3.0,
            prompts=tuple(f"prompt {i}" for i in range(PROMPTS)),
            gate="similarity, tau 0.5",
            quality=compared[0].gate,
            floor=floor_of([floor_part] * 2, LAYERS),
            free_running=FreeRunning(full, Interval(0.5, 0.4, 0.6), Interval(1.2, 1.1, 1.3), parting, parting, 0),
            gate_error=gate_errors(rng),
            comparisons=compared,
            points=mark_front(points),
            lossless_same=PROMPTS,
            drift=summarize_drift([drift_walk(rng) for _ in range(2)], 4),
            better=judged({"confidence": fit}, {"confidence": trials_of(rng, 0.1, 2.0, 4)}, 3, 4, LAYERS),
            findings=(),
        )
    )


@pytest.fixture(scope="module")
def audit() -> Audit:
    return make_audit()


@pytest.fixture(scope="module")
def text(audit: Audit) -> str:
    return report_html(audit)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_one_page_that_needs_nothing_else(page: Page, text: str) -> None:
    assert_self_contained(page, text)
    assert page.figures == FIGURES
    assert all(attrs["role"] == "img" and attrs["aria-label"] for tag, attrs in page.elements if tag == "svg")


def test_findings_and_figures_are_there(audit: Audit, page: Page) -> None:
    listed = page.said("li")
    for finding in audit.findings:
        assert " ".join(finding.split()) + "." in listed
    for line in summary(audit):
        assert line in page.said("p")
    quality, cells = audit.quality, page.said("td")
    for value in (f"{quality.kl.mean:.4f}", f"{100 * quality.agreement.mean:.1f}", f"{quality.tokens_per_s:.0f}"):
        assert value in cells
    assert "r = 0.5536" in page.said("figcaption")
    assert "the paper's: 0.5536" in page.said("text")
    assert "masking (D-LLM), tau 0.5 (2 prompts)" in page.said("th")
    assert "134,515,008" in page.said("dd")


def with_errors(audit: Audit) -> Audit:
    """Every error another constant, every correlation another number, all in the direction that a gate needs."""
    error = KVError(0.91, 0.92, 0.03, 0.04, 1.05, 1.06)
    exits = tuple(replace(e, error=error, last_v_cosine=0.77, similarity=0.5, kl=0.08) for e in audit.gate_error.exits)
    correlations = tuple(
        Correlation(depth, name, sign * at / 100, sign * (at / 100 + 0.2), 32, (0.01, at / 10), (0.02, at / 10 + 0.02))
        for depth in (1, 3, 5)
        for at, (name, sign) in enumerate(ERRORS.items(), 11)
    )
    layers = (LayerError(1, 1, KVError(0, 0.25, 0, 7, 0, 0)), LayerError(1, 2, KVError(0, 0.5, 0, 9, 0, 0)))
    errors = replace(audit.gate_error, exits=exits, correlations=correlations, by_layer=layers)
    return replace(audit, gate_error=errors)


def test_errors_stand_under_their_names(audit: Audit) -> None:
    text = report_html(with_errors(audit))
    marked = re.findall(r"<tr[^>]*>.*?</tr>", text, re.DOTALL)
    rows = [" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in marked]
    assert "exit after similarity K cosine V cosine last-layer V cosine K L2 V L2 K norm V norm KL" in rows
    assert "1 0.500 0.910 0.920 0.770 0.030 0.040 1.050 1.060 0.080" in rows
    assert "V L2 1 -0.15 0.01..1.50 -0.35 0.02..1.52" in rows
    assert "KL 5 -0.18 0.01..1.80 -0.38 0.02..1.82" in rows
    page = Page(text)
    drawn = [value for tag, value in page.texts if tag == "text"]
    assert drawn.index("after 1 layer: r = 0.12") < drawn.index("after 1 layer: r = 0.13")
    at = drawn.index("0.11")
    assert drawn[at : at + 6] == ["0.11"] * 3 + ["0.12"] * 3
    assert drawn.index("0.31") > at + 23  # Spearman's after all of Pearson's
    head, first, *_ = _errors(with_errors(audit), with_errors(audit).gate_error.depths())
    assert head[3:] == ["V cosine", "V L2", "V norm", "V cosine r/rho", "last V r/rho", "KL r/rho"]
    assert first == ["1", "0.500", "0.080", "0.920", "0.040", "1.060", "0.12/0.32", "0.13/0.33", "-0.18/-0.38"]


def test_maps_are_coloured_by_what_a_gate_needs(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[float]]] = []
    paint = report_errors._map
    monkeypatch.setattr(report_errors, "_map", lambda *args: (seen.append(args[1]), paint(*args))[1])
    errors = with_errors(audit).gate_error
    report_errors.correlation_map(errors)
    numbers = [at / 100 for at in range(11, 11 + len(ERRORS))]
    for drawn, more in zip(seen, (0, 0.2), strict=True):
        assert drawn == [pytest.approx([number + more] * 3) for number in numbers]
    seen.clear()
    report_errors.layer_errors(errors)
    (cosines,), (sizes,) = seen
    assert cosines == pytest.approx([math.nan, 0.75, 0.5], nan_ok=True)
    assert sizes == pytest.approx([math.nan, 7, 9], nan_ok=True)


def test_the_sentences_on_top(audit: Audit) -> None:
    first, second = summary(audit)
    assert f"pass {audit.quality.mean_depth:.1f} of 6 layers in full precision, 2.0x as fast" in first
    assert "Of 2 settings at which gates choose, 1 did surely better than the same depths" in second
    idle = replace(audit, comparisons=tuple(replace(each, chooses=False) for each in audit.comparisons), points=())
    (only,) = summary(idle)
    assert "as fast" not in only


def test_what_is_lacking_is_left_out(audit: Audit) -> None:
    errors = replace(audit.gate_error, exits=(), correlations=(), layers=(), by_layer=())
    free = replace(audit.free_running, river=survival([None], 0))
    bare: dict[str, Any] = {"comparisons": (), "points": (), "drift": None, "better": None, "findings": ()}
    text = report_html(replace(audit, gate_error=errors, free_running=free, settings={}, environment={}, **bare))
    page = Page(text)
    assert_self_contained(page, text)
    assert page.figures == ["by-prompt"]
    headings = [value for tag, value in page.texts if tag == "h2"]
    assert headings == ["What was asked, and what was found", "Quality", "Terms", "Settings and environment"]


def test_nothing_from_the_file_becomes_markup(audit: Audit) -> None:
    evil = replace(
        audit,
        environment={EVIL: EVIL},
        model={**audit.model, "name": EVIL},
        settings={**audit.settings, "river": EVIL},
        prompts=(EVIL,) * PROMPTS,
        gate=EVIL,
        comparisons=tuple(replace(each, name=EVIL) for each in audit.comparisons),
        points=tuple(replace(p, family=EVIL if p.family == "static" else p.family, setting=EVIL) for p in audit.points),
        findings=(EVIL,),
    )
    text = report_html(evil)
    page = Page(text)
    assert "<script" not in text
    assert "<img" not in text
    assert_self_contained(page, text.replace("http://evil.example", ""))
    assert page.said("h1").startswith(EVIL[:20])
    assert "&amp;amp;" in text
