"""Drawings of an audit's page: quality against speed, and what happens along a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from riverinfer.evidence.audit import Audit
from riverinfer.evidence.drift import Drift
from riverinfer.evidence.report_figures import GATE, SHUFFLED, STATIC, clean
from riverinfer.evidence.statistics import Interval
from riverinfer.evidence.sweep import OTHERS, Point
from riverinfer.profiling.figures import FAINT, HALF, INK, OTHER, WIDE, _legend_above, _svg, _whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILIES = {
    "similarity": (GATE, "s", "the gate, a threshold each"),
    "static": (STATIC, "v", "static: one depth for all"),
    "shuffled": (SHUFFLED, "^", "shuffled: the gate's depths at random"),
    "repaired": ("#56b4e9", "P", "the gate, cache repaired"),
    "full river": ("#222222", "X", "full river: no backbone layer"),
    "exact": ("#0072b2", "o", "exact"),
    "lossless": ("#e69f00", "D", "lossless"),
}
LONG = 200  # tokens, from which on survival is drawn over their logarithm
OTHER_MARKERS = "*hp<>d8H"


def pareto(points: Sequence[Point]) -> str:
    """Quality against speed: all points, on a log scale where KL spans decades, and the close ones enlarged."""
    known = [point for point in points if math.isfinite(point.quality.kl.mean)]
    if not known:
        return ""
    river = [point.quality.kl.mean for point in known if point.family in ("similarity", "full river")]
    close = [point for point in known if river and point.quality.kl.mean <= 1.5 * max(river)]
    positive = [point.quality.kl.mean for point in known if point.quality.kl.mean > 0]
    wide = bool(positive) and max(positive) > 30 * min(positive)

    def paint(figure: Figure) -> None:
        both = wide and len(close) > 2
        panels = list(figure.subplots(1, 1 + both, squeeze=False).flat)
        _paint_points(panels[0], known)
        if wide:
            from matplotlib.ticker import FuncFormatter

            # Exact and lossless are at zero, which a log scale alone lacks.
            axes, low = panels[0], 10.0 ** math.floor(math.log10(min(positive)))
            axes.set_yscale("symlog", linthresh=low, linscale=0.5)
            axes.set_ylim(-0.25 * low, 2.5 * max(positive))
            ticks = [0.0, *(low * 10.0**power for power in range(math.ceil(math.log10(max(positive) / low)) + 1))]
            axes.set_yticks([tick for tick in ticks if tick < 2.5 * max(positive)], minor=False)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0].set_title("all settings" + (" (log scale above zero)" if wide else ""), loc="left")
        if both:
            _paint_points(panels[1], close)
            panels[1].set_title("enlarged: the settings close to exact", loc="left")
        panels[-1].margins(0.07, 0.1)
        _name_settings(panels[-1], close or known)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)

    return _svg("pareto", "KL against tokens a second, all settings", WIDE, 5.0, paint)


def _paint_points(axes: Axes, points: Sequence[Point]) -> None:
    names = list(dict.fromkeys(point.family for point in points))
    others = [name for name in names if name not in FAMILIES]
    front = sorted((p.quality.tokens_per_s, p.quality.kl.mean) for p in points if p.front)
    if len(front) > 1:
        axes.plot(
            *zip(*front, strict=True),
            color="#aaaaaa",
            linewidth=1,
            zorder=0,
            drawstyle="steps-pre",
            label="front: nothing beats these",
        )
    for name in [*FAMILIES, *others]:
        mine = sorted((p.quality.tokens_per_s, p.quality.kl.mean) for p in points if p.family == name)
        if mine:
            place = others.index(name) if name in others else 0
            plain = (OTHER if name in OTHERS else GATE, OTHER_MARKERS[place % len(OTHER_MARKERS)], clean(name))
            colour, marker, label = FAMILIES.get(name, plain)
            x, y = zip(*mine, strict=True)
            axes.plot(
                x,
                y,
                marker,
                color=colour,
                label=label,
                markersize=8,
                alpha=0.85,
                markeredgecolor="white",
                markeredgewidth=0.4,
            )
    axes.set_xlabel("tokens a second: further right is faster")
    axes.set_ylabel("KL, nats a token: lower is closer")
    axes.grid(color=FAINT, linewidth=0.5)


def _name_settings(axes: Axes, points: Sequence[Point]) -> None:
    """Thresholds beside their points, the first one's above it, but for those whose names would lie on each other."""
    x, y = (axes.get_xlim(), axes.get_ylim())
    placed: list[tuple[float, float]] = []
    mine = sorted((p for p in points if p.family == "similarity"), key=lambda point: point.quality.mean_depth)
    for number, point in enumerate(mine):
        place = (point.quality.tokens_per_s, point.quality.kl.mean)
        across, up = ((at - low) / (high - low) for at, (low, high) in zip(place, (x, y), strict=True))
        if any(abs(across - a) < 0.16 and abs(up - b) < 0.06 for a, b in placed):
            continue
        placed.append((across, up))
        offset, ha, va = ((-6, -4), "right", "top") if number else ((0, 7), "center", "bottom")
        kwargs: dict[str, Any] = {"textcoords": "offset points", "ha": ha, "va": va, "fontsize": 8.5, "color": GATE}
        axes.annotate(clean(point.setting, 12), place, xytext=offset, **kwargs)


def drift(found: Drift | None) -> str:
    """KL of the three paths, and chained less one step, by position: parts that double, at equal distances, so that the
    rise in the first few tokens is as wide as what follows. Bands are intervals over texts."""
    if found is None or not found.bins:
        return ""
    kinds = {
        "chained": (STATIC, "v", "chained: on the cache that river left"),
        "repaired": (GATE, "s", f"repaired every {found.repair} tokens"),
        "one_step": ("#0072b2", "o", "one step: on an exact cache"),
    }

    def paint(figure: Figure) -> None:
        axes, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
        at = range(len(found.bins))
        for path, (colour, marker, label) in kinds.items():
            values = [part.kl[path] for part in found.bins]
            _band(axes, at, values, colour, marker, label)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("KL, nats a token")
        _band(below, at, [part.from_cache for part in found.bins], OTHER, "D", "chained less one step")
        below.axhline(0, color=INK, linewidth=0.8)
        below.set_xticks(
            at, [f"{part.first + 1}..{part.end}" if part.end - part.first > 1 else str(part.end) for part in found.bins]
        )
        below.set_xlabel("tokens of the text, each step to the right twice as many")
        below.set_ylabel("KL from the\ncache's errors")
        for panel in (axes, below):
            _legend_above(panel)

    return _svg("drift", "KL by position in a long text, one step, chained and repaired", WIDE, 4.4, paint)


def sawtooth(found: Drift | None) -> str:
    """What the cache's errors cost by how many positions have gone by since the last repair."""
    if found is None or len(found.sawtooth) < 2:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        at = [tooth.since_repair for tooth in found.sawtooth]
        _band(axes, at, [tooth.from_cache for tooth in found.sawtooth], GATE, "s", "repaired less one step")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("inexact tokens in the cache since the last repair")
        axes.set_ylabel("KL from the cache's errors")
        _whole_numbers(axes.xaxis)
        _legend_above(axes)

    return _svg("sawtooth", "KL that the cache's errors cost, by tokens since the last repair", HALF, 2.8, paint)


def survival(audit: Audit) -> str:
    """Share of free-running texts that are still exact's, by token."""
    free = audit.free_running
    if not free.river.share:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for found, colour, dashes, label in (
            (free.river, STATIC, "-", "river"),
            (free.repaired, GATE, "--", "river, repaired"),
        ):
            at = range(1, len(found.share) + 1)
            axes.step(at, [100 * share for share in found.share], dashes, where="post", color=colour, label=label)
        axes.axhline(50, color=FAINT, linewidth=0.8, zorder=0)
        axes.set_ylim(-2, 103)
        if len(free.river.share) > LONG:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            _whole_numbers(axes.xaxis)
        axes.set_xlabel("tokens said")
        axes.set_ylabel("% of texts still exact's")
        _legend_above(axes)

    return _svg("survival", "Share of texts that are still exact's, by token", HALF, 2.8, paint)


def _band(axes: Axes, at: Sequence[float], values: Sequence[Interval], colour: str, marker: str, label: str) -> None:
    low, high = [value.low for value in values], [value.high for value in values]
    axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(at, [value.mean for value in values], marker + "-", color=colour, markersize=5, label=label)
