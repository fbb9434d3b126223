"""A profile's page is whole, needs nothing else, shows the figures of every mode, lets no text become markup."""

from __future__ import annotations

import re
import sys
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from statistics import median
from typing import Any

import fake_profiles
import pytest
from self_contained import assert_self_contained

from riverinfer.errors import InvalidRequestError
from riverinfer.profiling import figures as drawings
from riverinfer.profiling.report import MOST_TOKENS, report_html, summary
from riverinfer.profiling.result import METRICS, Machine, ModeProfile, Profile, Run, figures
from riverinfer.profiling.spans import Recording
from riverinfer.profiling.tables import number

VOID = {"meta", "br", "hr", "img", "link", "input"}
EVIL = '"><script src="http://evil.example/x.js">alert(1)</script><img onerror=x>&amp;\x00\ud800$x$'


class Page(HTMLParser):
    """What a browser would make of the page; fails where elements do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.table: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        self.texts.append((where, data))
        if {"td", "th"} & set(self.open):
            self.table[-1][-1] += f" {data}"

    def said(self, *tags: str) -> str:
        return "".join(text for tag, text in self.texts if not tags or tag in tags)


@pytest.fixture(scope="module")
def made() -> tuple[Profile, list[Recording]]:
    return fake_profiles.profile(tokens=24, runs=3)


@pytest.fixture(scope="module")
def text(made: tuple[Profile, list[Recording]]) -> str:
    return report_html(*made)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def one_mode(profile: Profile, name: str, **changes: Any) -> Profile:
    return replace(profile, modes={name: replace(profile.modes[name], **changes)})


def svg(markup: str) -> ET.Element:
    return ET.fromstring(markup)


def points(element: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", element.get("d", ""))]


def test_one_page_that_needs_nothing_else(page: Page, text: str) -> None:
    assert_self_contained(page, text)
    assert len(text) < 1_500_000
    drawn = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert [attrs["id"] for attrs in drawn] == ["latency", "histogram", "roofline", "token-bars", "layer-bars"]
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawn)
    assert page.said("h2").count("Where a token") == 1
    assert "peak memory 659.0 MiB" in text
    headings = [value for tag, value in page.texts if tag == "h2"]
    assert headings == [
        "Figures",
        "Latency over tokens",
        "How long a token is waited for",
        "How far from the limit",
        "Where a token's time goes",
        "What was generated",
        "How the figures were taken",
        "Terms",
        "Environment",
    ]


def test_the_same_profile_gives_the_same_page(made: tuple[Profile, list[Recording]], text: str) -> None:
    assert report_html(*made) == text


def test_every_mode_with_its_figures(made: tuple[Profile, list[Recording]], page: Page) -> None:
    profile, _ = made
    head, *rows = [[" ".join(cell.split()) for cell in row] for row in page.table]
    assert [cell.split()[0] for cell in head[1:]] == ["exact", "river", "lossless"]
    assert "river, tau 0.5" in head[2]
    assert len(rows) == len(METRICS) + 2
    for metric, row in zip(METRICS, rows, strict=False):
        for mode, cell in zip(profile.modes.values(), row[1:], strict=True):
            values = [value * metric.scale for run in mode.runs if (value := figures(run)[metric.name]) is not None]
            if not values:
                assert cell == "-"
                continue
            middle = median(values)
            want = number(middle)
            if max(values) > min(values):
                want += f" {number(min(values), middle)} to {number(max(values), middle)}"
            assert cell == want
    assert [cell.split()[0] for cell in rows[-1][1:]] == [
        f"{100 * mode.limit.achieved:.0f}" for mode in profile.modes.values()
    ]


def test_the_sentence_on_top(made: tuple[Profile, list[Recording]]) -> None:
    profile, _ = made

    def runs(wait: float) -> tuple[Run, ...]:
        return (Run(0.1, 0.1, 0.1 + 4 * wait, (wait,) * 4, 10, 5),)

    waits = {"exact": 0.02, "river": 0.01, "lossless": 0.0125}
    modes = {
        name: replace(mode, runs=runs(waits[name]), limit=replace(mode.limit, achieved=0.81))
        for name, mode in profile.modes.items()
    }
    assert summary(replace(profile, modes=modes)) == (
        "River answers 2.0x as fast as exact, lossless 1.6x; "
        "exact decodes 50.0 tokens a second: 81 % of what this machine's memory allows."
    )
    limit = replace(modes["river"].limit, bound="compute")
    assert summary(one_mode(profile, "river", runs=runs(0.01), limit=limit)) == (
        f"River decodes 100 tokens a second, {100 * limit.achieved:.0f} % of what this machine's arithmetic allows."
    )
    alone = (Run(0.1, 0.1, 0.1, (), 10, 1),)
    assert summary(one_mode(profile, "exact", runs=alone)) == "No token after the first was generated."


def test_environment_and_how_it_was_taken(page: Page) -> None:
    facts = dict(pairwise(value for tag, value in page.texts if tag in ("dt", "dd")))
    assert facts["cpu"] == "AMD EPYC 9354 32-Core Processor"
    assert facts["parameters"] == "134,515,008"
    assert facts["memory bandwidth"] == "20.7 GB/s"
    assert facts["matrix products"] == "118 Gop/s"
    assert facts["tau"] == "0.5"
    said = page.said("p")
    assert "exact +1.3\xa0%, river +1.3\xa0%, lossless +1.3\xa0%, and one of them costs 0.40 µs" in said
    assert "unobserved" in said
    assert "cpu clock" in said
    for term in ("TTFT", "Inter-token latency", "Jitter", "Exit depth", "acceptance", "Limit"):
        assert term in page.said("dt")


def test_texts_with_where_their_tokens_came_from(made: tuple[Profile, list[Recording]], page: Page) -> None:
    _, recordings = made
    spans = [attrs for tag, attrs in page.elements if tag == "span" and attrs.get("title", "").startswith("token ")]
    tokens = [token for recording in recordings for token in recording.tokens]
    assert len(spans) == len(tokens)
    for attrs, token in zip(spans, tokens, strict=True):
        assert f"{number(1e3 * (token.end - token.begin))} ms" in attrs["title"]
        assert (f"exit depth {token.exit_depth}" in attrs["title"]) == (token.exit_depth is not None)
        shade = f"s-{token.source}" if token.source else ""
        if token.exit_depth is not None:
            shade = f"d{min(4, round(4 * token.exit_depth / 6))}"
        assert attrs.get("class", "") == shade
    said = "".join(value for tag, value in page.texts if tag == "span")
    assert "".join(token.text for token in recordings[1].tokens) in said
    long = fake_profiles.recording("exact", tokens=4)
    long = replace(long, tokens=long.tokens * 150)
    text = report_html(fake_profiles.profile(("exact",), tokens=2)[0], [long])
    assert f"… and {600 - MOST_TOKENS} tokens more" in text
    assert text.count('title="token ') == MOST_TOKENS


def test_nothing_from_the_file_becomes_markup(made: tuple[Profile, list[Recording]]) -> None:
    profile, recordings = made
    exact = profile.modes["exact"]
    bad = ModeProfile(EVIL, EVIL, exact.runs, exact.limit, exact.breakdown)
    parts = exact.breakdown.operators
    odd = replace(
        exact.breakdown, events=EVIL, operators=(*parts, replace(parts[-1], op=EVIL, phase="step", seconds=9.0))
    )
    profile = Profile(
        {"cpu": EVIL, "date": EVIL, EVIL: EVIL},
        {"name": EVIL, "dtype": EVIL},
        {"river": EVIL, "runs": None},
        1.0,
        None,
        profile.machine,
        {EVIL: bad, "river": replace(exact, mode="river", breakdown=odd)},
    )
    tokens = tuple(replace(token, text=EVIL, source=EVIL) for token in recordings[0].tokens)
    text = report_html(profile, [replace(recordings[0], mode=EVIL, tokens=tokens)])
    page = Page(text)
    assert "<script" not in text
    assert "<img" not in text
    shown = EVIL.replace("\ud800", "?")
    assert_self_contained(page, text.replace("http://evil.example", ""))
    assert next(value for tag, value in page.texts if tag == "h1").startswith(shown[:20])
    assert "&amp;amp;" in text


def test_what_the_line_of_latencies_shows(made: tuple[Profile, list[Recording]]) -> None:
    profile, _ = made
    waits = (0.010, 0.020, 0.010, 0.040)
    runs = [Run(0.1, 0.1, 0.2, tuple(wait * factor for wait in waits), 8, 5) for factor in (1.0, 0.9, 1.5)]
    root = svg(drawings.latency(one_mode(profile, "exact", runs=tuple(runs))))
    stroke = f"stroke: {drawings.MODE_COLOURS['exact']}"
    (line,) = [points(each) for each in root.iter("path") if stroke in each.get("style", "") and len(points(each)) == 4]
    heights = [line[0][1] - y for _, y in line]
    assert heights == pytest.approx([0, heights[3] / 3, 0, heights[3]], abs=0.01)
    assert heights[3] > 20
    said = "".join(root.itertext())
    assert "exact: 20.0 ms on average" in said
    assert "exit depth" not in said


def test_rounds_and_exits_have_panels(made: tuple[Profile, list[Recording]]) -> None:
    profile, _ = made
    said = "".join(svg(drawings.latency(profile)).itertext())
    assert "exact: 17" in said
    assert "a line is a round" in said
    assert "river: exit depth" in said
    batch = tuple(replace(run, exit_depths=run.exit_depths * 2) for run in profile.modes["river"].runs)
    assert "exit depth" not in "".join(svg(drawings.latency(one_mode(profile, "river", runs=batch))).itertext())


@pytest.mark.parametrize("draw", [drawings.token_bars, drawings.layer_bars])
def test_areas_of_bars_are_times(made: tuple[Profile, list[Recording]], draw: Any) -> None:
    profile, _ = made
    for name, mode in profile.modes.items():
        times = drawings.milliseconds(mode)
        areas = bar_areas(svg(draw(one_mode(profile, name))))
        want: dict[tuple[str, bool], float] = {}
        for (path, layer, op), size in times.items():
            if layer is not None:
                key = (drawings.OPERATOR_COLOURS[op], path == "river")
                want[key] = want.get(key, 0.0) + size
        scale = sum(areas[key] for key in want) / sum(want.values())
        assert {key: areas[key] / scale for key in want} == pytest.approx(want, rel=0.01, abs=0.002)


def bar_areas(root: ET.Element) -> dict[tuple[str, bool], float]:
    """By colour, and whether it is hatched, the areas of what has a white rim; fails where bars lie on each other."""
    fills = {pattern.attrib["id"]: pattern[0].get("fill", "") for pattern in root.iter("pattern")}
    areas: dict[tuple[str, bool], float] = {}
    seen: list[tuple[float, float, float, float]] = []
    for element in root.iter("path"):
        style = element.get("style", "")
        fill = re.search(r"fill: (?:url\(#(.*?)\)|(#\w+))", style)
        # White itself are the lines of a pattern.
        if fill is None or fill[2] == "#ffffff" or "stroke: #ffffff" not in style:
            continue
        key = (fills.get(fill[1], "") or fill[2], fill[1] is not None)
        for box in element.get("d", "").split("z"):
            corners = re.findall(r"[ML] (\S+) (\S+)", box)
            if corners:
                x, y = ([float(corner[axis]) for corner in corners] for axis in (0, 1))
                left, right, top, bottom = min(x), max(x), min(y), max(y)
                areas[key] = areas.get(key, 0.0) + (right - left) * (bottom - top)
                eps = 0.01
                assert not any(
                    left < east - eps and west < right - eps and top < south - eps and north < bottom - eps
                    for west, east, north, south in seen
                )
                seen.append((left, right, top, bottom))
    return areas


def test_times_of_a_token_leave_prefill_out(made: tuple[Profile, list[Recording]]) -> None:
    mode = made[0].modes["exact"]
    parts = mode.breakdown
    want = sum(each.seconds for each in parts.operators if each.phase != "prefill") / parts.tokens
    assert sum(drawings.milliseconds(mode).values()) == pytest.approx(1e3 * want)
    assert drawings.milliseconds(mode)["backbone", 7, "qkv"] == pytest.approx(
        1e3 * sum(e.seconds for e in parts.operators if (e.phase, e.layer, e.op) == ("step", 7, "qkv")) / parts.tokens
    )


def test_the_roofline_says_what_was_reached(made: tuple[Profile, list[Recording]]) -> None:
    profile, _ = made
    said = "".join(svg(drawings.roofline(profile)).itertext())
    for name, mode in profile.modes.items():
        limit = mode.limit
        rate = limit.operations / (limit.seconds / limit.achieved)
        assert f"{name}: {drawings.prefixed(rate)}op/s, {100 * limit.achieved:.0f} % of the roof" in said
    assert "compute: 118 Gop/s" in said
    assert "memory: 20.7 GB/s" in said
    unknown = replace(profile, machine=Machine(0.0, 0.0))
    assert drawings.roofline(unknown) == ""


def test_the_least_that_can_be_profiled(made: tuple[Profile, list[Recording]]) -> None:
    for modes in (("exact",), ("lossless",)):
        profile, recordings = fake_profiles.profile(modes, tokens=2, runs=1)
        text = report_html(profile, recordings)
        page = Page(text)
        assert_self_contained(page, text)
        assert "Of one run." in page.said("p")
        assert "exit depth, layers" not in page.said("th")
        assert len([tag for tag, _ in page.elements if tag == "svg"]) == 5
    exact = profile.modes["lossless"]
    first = replace(exact, runs=(Run(0.1, 0.1, 0.1, (), 8, 1),), limit=replace(exact.limit, achieved=0.0))
    first = replace(first, breakdown=replace(first.breakdown, operators=(), tokens=0))
    bare = report_html(replace(profile, environment={}, model={}, settings={}, modes={"lossless": first}), [])
    assert "<svg" not in bare
    assert "<h1>a model</h1>" in bare
    assert "Latency over tokens" not in bare
    Page(bare)
    Page(report_html(replace(profile, modes={}), []))


def test_long_runs_are_drawn_in_few_points(made: tuple[Profile, list[Recording]]) -> None:
    profile, _ = made
    river = profile.modes["river"].runs[0]
    waits = tuple(0.01 + 0.001 * (place % 7) for place in range(20_000))
    long = replace(
        river, intervals_s=waits, exit_depths=(30, *(1 + place % 5 for place in range(20_000))), new_tokens=20_001
    )
    assert len(drawings.latency(one_mode(profile, "river", runs=(long,)))) < 700_000


def test_quiet_about_glyphs_and_clear_without_matplotlib(
    made: tuple[Profile, list[Recording]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = replace(made[0].modes["exact"], mode="日本$a$")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "日本$a$" in drawings.histogram(replace(made[0], modes={mode.mode: mode}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidRequestError, match="needs matplotlib"):
        report_html(*made)


@pytest.mark.parametrize(
    ("value", "want"),
    [(0, "0 "), (1.5, "1.5 "), (999, "999 "), (20.7e9, "20.7 G"), (999.9e6, "1 G"), (134e15, "134 P")],
)
def test_prefixes(value: float, want: str) -> None:
    assert drawings.prefixed(value) == want
