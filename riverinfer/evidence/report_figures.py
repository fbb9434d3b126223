"""The drawings of an audit's page, as SVG elements; each is empty where the audit has nothing for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from riverinfer.evidence.audit import Audit
from riverinfer.evidence.controls import Comparison
from riverinfer.evidence.quality import Quality
from riverinfer.evidence.statistics import Interval
from riverinfer.evidence.sweep import Point
from riverinfer.profiling.figures import FAINT, INK, OTHER, WIDE, _legend_above, _svg, _whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any colour vision, and by their markers without any.
GATE, STATIC, SHUFFLED = "#009e73", "#d55e00", "#7b4fa3"
MOST_DEPTHS = 36  # columns of the heat map


def clean(text: str, width: int = 44) -> str:
    """Text that any drawing may hold: no control characters, not longer than ``width``."""
    shown = "".join(each if each.isprintable() else "\ufffd" for each in text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def by_prompt(audit: Audit) -> str:
    """KL of each prompt on a log scale, sorted, beside the mean and the floor."""
    values = sorted(value for value in audit.quality.kl_by_prompt if value > 0)
    if not values or not audit.quality.kl.mean > 0:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        mean, floor = audit.quality.kl, audit.floor.batched.kl.mean
        axes.plot(range(1, len(values) + 1), values, "o", color=GATE, markersize=5, label="a prompt")
        axes.axhspan(mean.low, mean.high, color=GATE, alpha=0.15, linewidth=0)
        axes.axhline(mean.mean, color=GATE, linewidth=1.2, label="mean and its interval")
        if floor > 0:
            axes.axhline(floor, color=INK, linestyle="--", linewidth=1, label="floor: exact against itself")
        _log(axes, [*values, *([floor] if floor > 0 else []), mean.mean])
        axes.set_ylabel("KL, nats a token (log scale)")
        axes.set_xlabel("prompts, in order of KL")
        _whole_numbers(axes.xaxis)
        _legend_above(axes)

    return _svg("by-prompt", "KL of each prompt beside the mean and the floor", WIDE, 2.7, paint)


def similarity(audit: Audit) -> str:
    """What the gate sees at each layer."""
    layers = audit.gate_error.layers
    if not layers:
        return ""
    options = audit.settings.get("options") or {}
    tau = options.get("tau") if options.get("gate") == "similarity" else None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        at = [each.layer + 1 for each in layers]
        axes.fill_between(
            at,
            [each.low for each in layers],
            [each.high for each in layers],
            color=GATE,
            alpha=0.2,
            linewidth=0,
            label="nine tokens in ten",
        )
        axes.plot(at, [each.median for each in layers], "o-", color=GATE, markersize=4, label="median token")
        if isinstance(tau, (int, float)):
            for other in audit.settings.get("taus") or ():
                axes.axhline(other, color=FAINT, linewidth=0.8, zorder=0)
            label = f"audited threshold, {tau:g} (grey: others that were tried)"
            axes.axhline(tau, color=INK, linestyle="--", linewidth=1, label=label)
        axes.set_xlabel("after so many backbone layers")
        axes.set_ylabel("similarity")
        _whole_numbers(axes.xaxis, most=16)
        _legend_above(axes)

    return _svg("similarity", "Similarity of a layer's input and output, by layer", WIDE, 2.9, paint)


def controls(name: str, comparisons: Sequence[Comparison]) -> str:
    """By how much each gate beats its two controls, with intervals; gates that choose nothing are left out."""
    rows = [each for each in comparisons if each.chooses]
    if not rows:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=1)
        for place, each in enumerate(rows):
            for shift, colour, marker, against in (
                (-0.15, SHUFFLED, "^", each.shuffled),
                (0.15, STATIC, "v", each.static),
            ):
                sure = against.beats or against.loses
                _bar(axes, place + shift, against.difference, colour, marker, sideways=True, filled=sure)
        for colour, marker, label in (
            (SHUFFLED, "^", "against its own depths in random order"),
            (STATIC, "v", "against one depth for all"),
        ):
            axes.plot([], [], marker, color=colour, label=label)
        axes.set_yticks(range(len(rows)), [f"{clean(each.name)} (depth {each.gate.mean_depth:.1f})" for each in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("← gate is worse  |  KL of the control less the gate's, nats a token  |  gate is better →")
        axes.grid(axis="x", color=FAINT, linewidth=0.5)
        _legend_above(axes)

    label = "KL of the controls less the gate's, with intervals"
    return _svg(name, label, WIDE, 0.95 + 0.42 * max(2, len(rows)), paint)


def depths(comparisons: Sequence[Comparison]) -> str:
    """Share of tokens by exit depth, a row a gate, in %."""
    if not comparisons:
        return ""
    step = math.ceil(len(comparisons[0].gate.depths) / MOST_DEPTHS)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        rows = []
        for each in comparisons:
            counts, total = each.gate.depths, max(1, sum(each.gate.depths))
            rows.append([100 * sum(counts[at : at + step]) / total for at in range(0, len(counts), step)])
        edges = [at - 0.5 for at in range(len(rows[0]) + 1)]
        height = [at - 0.5 for at in range(len(rows) + 1)]
        # The root keeps small shares visible beside large ones.
        roots = [[math.sqrt(share) for share in row] for row in rows]
        axes.pcolormesh(edges, height, roots, cmap="Blues", vmin=0, vmax=10, edgecolors="white", linewidth=0.8)
        for y, row in enumerate(rows):
            for x, share in enumerate(row):
                if share > 0:
                    text = f"{share:.0f}" if share >= 0.5 else "·"
                    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color="white" if share > 36 else INK)
        axes.set_yticks(range(len(rows)), [clean(each.name) for each in comparisons])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        every = range(0, len(rows[0]), 1 if len(rows[0]) <= 20 else 2)
        axes.set_xticks(every, [str(at * step) for at in every])
        axes.set_xlabel("left after so many backbone layers" + (f" (and up to {step - 1} more)" if step > 1 else ""))
        axes.tick_params(length=0)

    label = "Share of tokens by exit depth, a row a gate"
    return _svg("depths", label, WIDE, 0.7 + 0.36 * max(2, len(comparisons)), paint)


def sweep(comparisons: Sequence[Comparison], full: Point | None) -> str:
    """KL and agreement of each gate and of its controls."""
    if not comparisons:
        return ""
    kinds: list[tuple[str, str, str, float, Callable[[Comparison], Quality]]] = [
        (GATE, "s", "the gate", -0.2, lambda each: each.gate),
        (SHUFFLED, "^", "its depths shuffled", 0.0, lambda each: each.shuffled.control),
        (STATIC, "v", "one depth for all", 0.2, lambda each: each.static.control),
    ]

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for axes, title, scale, pick in (
            (left, "KL, nats a token: lower is closer", 1, lambda quality: quality.kl),
            (right, "same likeliest token, %: higher is closer", 100, lambda quality: quality.agreement),
        ):
            for colour, marker, label, shift, side in kinds:
                for place, each in enumerate(comparisons):
                    _bar(axes, place + shift, pick(side(each)), colour, marker, scale=scale)
                axes.plot([], [], marker, color=colour, label=label)
            if full is not None:
                axes.axhline(
                    scale * pick(full.quality).mean, color=OTHER, linestyle=":", linewidth=1.2, label="full river"
                )
            names = [clean(each.name.replace("similarity, ", ""), 14) for each in comparisons]
            ticks = [f"{name}\n{each.gate.mean_depth:.1f}" for name, each in zip(names, comparisons, strict=True)]
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_xlabel("gate, and below it its mean depth")
            axes.set_ylabel(title)
            axes.grid(axis="y", color=FAINT, linewidth=0.5)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)

    return _svg("sweep", "KL and agreement by gate, with its controls", WIDE, 3.2, paint)


def _bar(
    axes: Axes,
    place: float,
    value: Interval,
    colour: str,
    marker: str,
    *,
    scale: float = 1,
    sideways: bool = False,
    filled: bool = True,
) -> None:
    """A mean with the ends of its interval."""
    ends, mean = [scale * value.low, scale * value.high], scale * value.mean
    line, dot = ((ends, [place] * 2), (mean, place)) if sideways else (([place] * 2, ends), (place, mean))
    axes.plot(*line, color=colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot(*dot, marker, color=colour, markersize=6.5, markerfacecolor=colour if filled else "white")


def _log(axes: Axes, values: Sequence[float]) -> None:
    """A log scale over ``values`` with plain numbers."""
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.6, max(values) * 1.6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter("")
