"""The drawings of a profile's page, as SVG elements for the middle of an HTML page."""

from __future__ import annotations

import io
import math
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from riverinfer.heat_map import require_matplotlib, token_label
from riverinfer.profiling.result import OPERATORS, ModeProfile, Profile, Run, percentile
from riverinfer.profiling.tables import DECODE_PHASES, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Times = dict[tuple[str, int | None, str], float]  # by path, layer and operator

# Okabe and Ito's colours: told apart with any colour vision.
MODE_COLOURS = {"exact": "#0072b2", "river": "#009e73", "lossless": "#d55e00"}
MODE_MARKERS = {"exact": "o", "river": "s", "lossless": "D"}
# Blues for attention, oranges for the feed-forward part, greys for what is small; what is of one hue differs in
# lightness from its neighbours in a bar.
OPERATOR_COLOURS = {
    "embed": "#1b7837",
    "norm": "#c9c9c9",
    "qkv": "#2166ac",
    "rope": "#bfdcf0",
    "attention": "#67a9cf",
    "o": "#123f6d",
    "gate_up": "#e08214",
    "silu": "#fee0b6",
    "down": "#b35806",
    "gate": "#e78ac3",
    "head": "#6a51a3",
    "sampling": "#c2b5dd",
    "host": "#6e6e6e",
}
OTHER, INK, FAINT = "#444444", "#222222", "#d9d9d9"
WIDE, HALF = 11.0, 4.9  # inches
MOST_POINTS = 800  # along an axis of tokens
LEAST_WAIT = 1e-6  # seconds: on a log scale nothing can be at 0
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.usetex": False,
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": "white",
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
}


def latency(profile: Profile) -> str:
    """Time between tokens by position: the median of the runs, and a band from their least to their most.

    Modes that hand over several tokens at once, and the exit depths, have panels of their own. Empty without tokens
    after the first.
    """
    modes = [mode for mode in profile.modes.values() if any(run.intervals_s for run in mode.runs)]
    smooth = [mode for mode in modes if not _in_rounds(mode)]
    bursts = [mode for mode in modes if _in_rounds(mode)]
    exits = [mode for mode in smooth if any(_depths(run) for run in mode.runs)]
    if not modes:
        return ""

    def paint(figure: Figure) -> None:
        heights = [2.4] * bool(smooth) + [1.5] * len(bursts) + [0.9] * len(exits)
        panels = iter(
            figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}).flat
        )
        if smooth:
            _paint_lines(next(panels), smooth)
        for mode in bursts:
            _paint_bursts(next(panels), mode)
        for mode in exits:
            _paint_exits(next(panels), mode)
        last = figure.axes[-1]
        last.set_xlabel("token after the first")
        _whole_numbers(last.xaxis)
        longest = max(len(run.intervals_s) for mode in modes for run in mode.runs)
        last.set_xlim(0.5, longest + 0.5)

    height = 0.8 + 2.6 * bool(smooth) + 1.7 * len(bursts) + 1.2 * len(exits)
    return _svg("latency", "Time between tokens by position in the answer, a line a mode", WIDE, height, paint)


def histogram(profile: Profile) -> str:
    """How often tokens waited how long, a row a mode on one axis, with lines at p50 and p99; empty without waits."""
    waits = {
        name: [max(each, LEAST_WAIT) for run in mode.runs for each in run.intervals_s]
        for name, mode in profile.modes.items()
    }
    waits = {name: values for name, values in waits.items() if values}
    if not waits:
        return ""
    low, high = min(map(min, waits.values())) * 1e3, max(map(max, waits.values())) * 1e3
    log = high > 20 * low
    edges = np.geomspace(low * 0.8, high * 1.25, 60) if log else np.linspace(low * 0.9, high * 1.1, 60)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(waits), 1, sharex=True, squeeze=False).flat
        for axes, (name, values) in zip(panels, waits.items(), strict=True):
            found = [1e3 * value for value in values]
            axes.hist(found, edges, weights=[100 / len(found)] * len(found), color=_colour(name))
            for share, dashes in ((0.5, (4, 2)), (0.99, (1, 1.5))):
                axes.axvline(percentile(found, share), color=INK, linewidth=0.9, dashes=dashes)
            middle, late = percentile(found, 0.5), percentile(found, 0.99)
            axes.set_title(token_label(name), loc="left", color=_colour(name), fontweight="bold")
            axes.set_title(f"p50 {number(middle)} (dashes), p99 {number(late)} ms (dots)", loc="right", fontsize=8.5)
            axes.set_ylabel("% of tokens")
        last = figure.axes[-1]
        if log:
            last.set_xscale("log")
            last.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        last.set_xlim(edges[0], edges[-1])
        last.set_xlabel("ms between tokens" + (" (log scale)" if log else ""))

    height = 0.6 + 1.35 * max(2, len(waits))
    return _svg("histogram", "Histogram of the time between tokens, a row a mode", HALF, height, paint)


def roofline(profile: Profile) -> str:
    """Operations a second over operations a byte: the machine's roof, each mode, and what is between them.

    After Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 52 (4), 2009. A mode
    that has no bytes, operations or measured time is left out; empty if that is all.
    """
    machine = profile.machine
    points = {}
    for name, mode in profile.modes.items():
        limit = mode.limit
        if min(limit.bytes, limit.operations, limit.seconds, limit.achieved) > 0:
            points[name] = (limit.operations / limit.bytes, limit.operations * limit.achieved / limit.seconds)
    if not points or min(machine.bytes_per_s, machine.operations_per_s) <= 0:
        return ""
    ridge = machine.operations_per_s / machine.bytes_per_s

    def roof(intensity: float) -> float:
        return min(machine.operations_per_s, intensity * machine.bytes_per_s)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = [place for place, _ in points.values()]
        low, high = min(*places, ridge) / 3, max(*places, ridge) * 4
        ends = [low, ridge, high]
        axes.plot(ends, [roof(end) for end in ends], color=INK, linewidth=1.6)
        axes.fill_between(ends, [roof(end) for end in ends], roof(low) / 1e6, color="#f4f4f4", linewidth=0)
        for name, (place, rate) in points.items():
            top = roof(place)
            axes.plot([place, place], [rate, top], color=_colour(name), linewidth=1.1, linestyle="--")
            label = f"{token_label(name)}: {prefixed(rate)}op/s, {100 * rate / top:.0f} % of the roof"
            marker = MODE_MARKERS.get(name, "o")
            axes.plot(
                [place], [rate], marker, color=_colour(name), markersize=6.5, label=label, markeredgecolor="white"
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        rates = [rate for _, rate in points.values()]
        axes.set_ylim(min([*rates, machine.operations_per_s / 10]) / 2, max(*rates, machine.operations_per_s) * 2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: prefixed(value).rstrip())
            axis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel("operations a byte read")
        axes.set_ylabel("operations a second")
        peak = f"compute: {prefixed(machine.operations_per_s)}op/s"
        axes.annotate(peak, (high, machine.operations_per_s), (-2, 4), textcoords="offset points", ha="right")
        bandwidth = f"memory: {prefixed(machine.bytes_per_s)}B/s"
        axes.annotate(bandwidth, (0.7 * ridge, roof(0.7 * ridge)), (-6, 2), textcoords="offset points", ha="right")
        figure.legend(loc="outside lower left")

    height = 0.6 + 1.35 * max(2, len(profile.modes))
    return _svg("roofline", "Roofline: operations a second over operations a byte", HALF, height, paint)


def token_bars(profile: Profile) -> str:
    """A bar a mode: the time of a decoded token by operator. Empty without a breakdown."""
    modes = _timed(profile)
    if not modes:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        longest = max(sum(milliseconds(mode).values()) for mode in modes)
        for row, mode in enumerate(modes):
            times = milliseconds(mode)
            left = 0.0
            for op in _operators(times):
                for hatched in (False, True):
                    size = sum(t for (path, _, name), t in times.items() if name == op and (path == "river") == hatched)
                    if not size:
                        continue
                    _paint_bars(axes, [(left, row - 0.36, size, 0.72)], op, hatched)
                    if size > 0.055 * longest:
                        _name_bar(axes, left + size / 2, row, op)
                    left += size
            axes.text(left + 0.008 * longest, row, f"{number(left)} ms", va="center", fontweight="bold")
        axes.set_xlim(0, longest * 1.08)
        axes.set_ylim(len(modes) - 0.5, -0.5)
        axes.set_yticks(range(len(modes)), [token_label(mode.mode) for mode in modes])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("ms a decoded token")

    return _svg("token-bars", "Time of a decoded token by operator, a bar a mode", WIDE, 0.75 + 0.5 * len(modes), paint)


def layer_bars(profile: Profile) -> str:
    """A bar a layer, stacked by operator, a row a mode; beside them what is outside layers. Empty without any."""
    modes = _timed(profile)
    if not modes:
        return ""

    def paint(figure: Figure) -> None:
        grid = figure.subplots(
            len(modes), 2, sharex="col", sharey="col", squeeze=False, gridspec_kw={"width_ratios": [5.5, 1]}
        )
        drawn: dict[str, None] = {}
        for (layers, ends), mode in zip(grid, modes, strict=True):
            times = milliseconds(mode)
            drawn |= dict.fromkeys(_operators(times))
            outside = [op for op in _operators(times) if any(layer is None and op == o for _, layer, o in times)]
            _paint_stacks(layers, {key: t for key, t in times.items() if key[1] is not None})
            _paint_stacks(ends, {("", outside.index(op), op): _sum(times, None, op) for op in outside})
            in_layers = sum(t for (_, layer, _), t in times.items() if layer is not None)
            title = f"{number(in_layers)} of {number(sum(times.values()))} ms in layers"
            layers.set_title(token_label(mode.mode), loc="left", color=_colour(mode.mode), fontweight="bold")
            layers.set_title(title, loc="right", fontsize=8.5)
            layers.set_ylabel("ms a token")
            ends.set_xticks(range(len(outside)), [token_label(op) for op in outside], rotation=35, ha="right")
        grid[0, 1].set_title("outside layers (own scale)", loc="left", fontsize=8.5)
        layers.set_xlabel("layer")
        _whole_numbers(layers.xaxis)
        layers.margins(x=0.01)
        figure.legend(handles=_legend(drawn, modes), loc="outside lower left", ncols=10, columnspacing=1.2)

    return _svg("layer-bars", "Time by layer and operator, a row a mode", WIDE, 1.3 + 1.55 * len(modes), paint)


def milliseconds(mode: ModeProfile) -> Times:
    """The time of a decoded token; empty where none was decoded."""
    found: Times = {}
    parts = mode.breakdown
    for each in parts.operators if parts.tokens else ():
        if each.phase in DECODE_PHASES and each.seconds > 0:
            key = (each.path, each.layer, each.op)
            found[key] = found.get(key, 0.0) + 1e3 * each.seconds / parts.tokens
    return found


def prefixed(value: float) -> str:
    """Three digits and an SI prefix, after a space: ``20.7 G``; below 1000 ``1.5 ``."""
    value = float(f"{value:.3g}")
    power = min(max(math.floor(math.log10(value) / 3), 0), 5) if value > 0 else 0
    return f"{value / 1000**power:g} {' kMGTP'[power].strip()}"


def _svg(name: str, label: str, width: float, height: float, paint: Callable[[Figure], None]) -> str:
    """``paint``'s figure as an element whose size the page sets. Its ids begin with ``name``: they are the page's.

    Raises InvalidRequestError without matplotlib.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph|Matplotlib currently does not support")
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    for parent in [*root.iter()]:
        for child in [*parent]:
            # matplotlib's style would hold for the page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: _own(key, value, name) for key, value in element.attrib.items()}
    # Sizes in the page's CSS.
    kept = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label, "id": name}
    root.attrib.clear()
    root.attrib.update(kept)
    return ET.tostring(root, encoding="unicode")


def _own(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    return value.replace("url(#", f"url(#{name}-")


def _paint_lines(axes: Axes, modes: Sequence[ModeProfile]) -> None:
    tops = []
    for mode in modes:
        at, middle, low, high = _by_position([[1e3 * wait for wait in run.intervals_s] for run in mode.runs])
        colour = _colour(mode.mode)
        marker = "o" if len(at) < 4 else ""
        label = f"{token_label(mode.mode)}: {number(fmean(middle))} ms on average"
        axes.fill_between(at, low, high, color=colour, alpha=0.22, linewidth=0)
        axes.plot(at, middle, color=colour, linewidth=1.3, marker=marker, label=label)
        tops.append(min(max(high), 3 * max(middle)))
    axes.set_ylim(0, 1.05 * max(tops))
    axes.set_ylabel("ms")
    axes.locator_params(axis="y", nbins=5)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    _legend_above(axes)


def _paint_bursts(axes: Axes, mode: ModeProfile) -> None:
    """Each token's wait as a line from 0: those that came with others are at 0."""
    at, middle, low, high = _by_position([[1e3 * wait for wait in run.intervals_s] for run in mode.runs], most=max)
    colour = _colour(mode.mode)
    mean = fmean(1e3 * wait for run in mode.runs for wait in run.intervals_s)
    apart = [math.nan] * len(at)
    for ends, width, alpha in (((low, high), 3.5, 0.3), (([0.0] * len(at), middle), 1.4, 1.0)):
        x = [each for trio in zip(at, at, apart, strict=True) for each in trio]
        y = [each for trio in zip(*ends, apart, strict=True) for each in trio]
        axes.plot(x, y, color=colour, linewidth=width, alpha=alpha, solid_capstyle="butt")
    label = (
        f"{token_label(mode.mode)}: {number(mean)} ms on average (dashes); a line is a round, its tokens come at once"
    )
    axes.axhline(mean, color=colour, linewidth=1.2, linestyle="--", label=label)
    axes.set_ylim(0, 1.05 * min(max(high), 3 * max(middle)))
    axes.set_ylabel("ms")
    axes.locator_params(axis="y", nbins=5)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    _legend_above(axes)


def _paint_exits(axes: Axes, mode: ModeProfile) -> None:
    at, middle, _, high = _by_position([_depths(run) for run in mode.runs])
    colour = _colour(mode.mode)
    size = 0.8 * (at[1] - at[0] if len(at) > 1 else 1)
    axes.bar(at, middle, width=size, color=colour, label=f"{token_label(mode.mode)}: exit depth, median of the runs")
    if high != middle:
        axes.bar(at, high, width=size, color=colour, alpha=0.25, linewidth=0, label="deepest", zorder=0)
    axes.set_ylim(0, 1.08 * max(1, *high))
    axes.set_ylabel("layers")
    _whole_numbers(axes.yaxis, most=4)
    _legend_above(axes)


def _paint_stacks(axes: Axes, times: Times) -> None:
    """Stacked bars, one a layer, backbone below river, operators in the order of a step."""
    heights: dict[int, float] = {}
    top = axes.get_ylim()[1] if axes.patches or not axes.get_autoscaley_on() else 0.0  # of rows on the same scale
    for hatched in (False, True):
        for op in _operators(times):
            boxes = []
            for (path, layer, name), size in times.items():
                if name == op and (path == "river") == hatched:
                    place = layer or 0
                    boxes.append((place - 0.42, heights.get(place, 0.0), 0.84, size))
                    heights[place] = heights.get(place, 0.0) + size
            if boxes:
                _paint_bars(axes, boxes, op, hatched)
    axes.set_ylim(0, max([top, *(1.06 * height for height in heights.values())]) or 1.0)
    axes.set_xlim(min(heights, default=0) - 0.6, max(heights, default=0) + 0.6)


def _paint_bars(axes: Axes, boxes: Sequence[tuple[float, float, float, float]], op: str, hatched: bool) -> None:
    """Rectangles (left, bottom, width, height) as one element of the page."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    parts = []
    for left, bottom, width, height in boxes:
        right, top = left + width, bottom + height
        parts.append(Path([(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)], closed=True))
    patch = PathPatch(Path.make_compound_path(*parts), facecolor=OPERATOR_COLOURS.get(op, OTHER))
    patch.set(edgecolor="white", linewidth=0.4, hatch="///" if hatched else None)
    axes.add_patch(patch)


def _name_bar(axes: Axes, x: float, y: float, op: str) -> None:
    from matplotlib.colors import to_rgb

    colour = OPERATOR_COLOURS.get(op, OTHER)
    light = float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114))) > 0.6
    box = {"facecolor": colour, "linewidth": 0, "pad": 1.5}
    axes.text(x, y, token_label(op), ha="center", va="center", fontsize=8.5, color=INK if light else "white", bbox=box)


def _legend(drawn: Sequence[str] | dict[str, None], modes: Sequence[ModeProfile]) -> list[Any]:
    from matplotlib.patches import Patch

    names = [op for op in OPERATORS if op in drawn] + sorted(set(drawn).difference(OPERATORS))
    handles = [Patch(facecolor=OPERATOR_COLOURS.get(op, OTHER), label=token_label(op)) for op in names]
    if any(path == "river" for mode in modes for path, _, _ in milliseconds(mode)):
        handles.append(Patch(facecolor="#777777", edgecolor="white", hatch="///", label="hatched: in the river"))
    return handles


def _sum(times: Times, layer: int | None, op: str) -> float:
    return sum(size for (_, at, name), size in times.items() if (at, name) == (layer, op))


def _whole_numbers(axis: Axis, most: int = 10) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=3, borderaxespad=0.2, handlelength=1.6)


def _by_position(
    series: Sequence[Sequence[float]], most: Callable[[Sequence[float]], float] = median
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Places from 1, and median, least and most of the series there; neighbours that share a point by ``most``."""
    length = max(map(len, series))
    step = math.ceil(length / MOST_POINTS)
    at, middle, low, high = [], [], [], []
    for begin in range(0, length, step):
        columns = [*_columns(series, begin, min(begin + step, length))]
        at.append(begin + (len(columns) + 1) / 2)
        middle.append(most([median(column) for column in columns]))
        low.append(min(map(min, columns)))
        high.append(max(map(max, columns)))
    return at, middle, low, high


def _columns(series: Sequence[Sequence[float]], begin: int, end: int) -> Iterator[list[float]]:
    for place in range(begin, end):
        yield [values[place] for values in series if place < len(values)]


def _depths(run: Run) -> tuple[int, ...]:
    """Exit depths after the first token, if each belongs to one interval: those of a batch do not."""
    return run.exit_depths[1:] if len(run.exit_depths) == len(run.intervals_s) + 1 else ()


def _in_rounds(mode: ModeProfile) -> bool:
    return any(run.rounds for run in mode.runs)


def _timed(profile: Profile) -> list[ModeProfile]:
    return [mode for mode in profile.modes.values() if milliseconds(mode)]


def _operators(times: Times) -> list[str]:
    found = {op for _, _, op in times}
    return [op for op in OPERATORS if op in found] + sorted(found.difference(OPERATORS))


def _colour(mode: str) -> str:
    return MODE_COLOURS.get(mode, OTHER)
