"""The drawings and tables of what exits cause, against similarity; each is empty where the audit has nothing for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING

from riverinfer.evidence.gate_error import Exit, KVError
from riverinfer.evidence.gate_error_summary import ERRORS, Correlation, GateError
from riverinfer.evidence.report_figures import GATE, SHUFFLED, STATIC
from riverinfer.profiling.figures import FAINT, INK, WIDE, _legend_above, _svg, _whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

MOST_EXITS = 250  # of one depth that are drawn
MOST_PANELS = 8
MOST_CELLS = 12  # columns of a map whose cells have room for their number
NAMES = {
    "k_cosine": "K cosine",
    "v_cosine": "V cosine",
    "last_v_cosine": "last-layer V cosine",
    "k_l2": "K L2",
    "v_l2": "V L2",
    "k_norm": "K norm",
    "v_norm": "V norm",
    "kl": "KL",
}


def scatter(errors: GateError, name: str) -> str:
    """A panel a depth, of some: each token's similarity there against ``v_cosine`` or ``last_v_cosine``."""
    depths = errors.depths(MOST_PANELS)
    if not depths:
        return ""
    columns = min(4, len(depths))
    rows = math.ceil(len(depths) / columns)
    what = {"v_cosine": "V after the exit", "last_v_cosine": "V in the last layer"}[name]

    def paint(figure: Figure) -> None:
        panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
        for axes, depth in zip(panels, depths, strict=False):
            exits = [exit for exit in errors.exits if exit.depth == depth]
            exits = exits[:: math.ceil(len(exits) / MOST_EXITS)]
            axes.plot(
                [exit.similarity for exit in exits],
                [_value(exit, name) for exit in exits],
                "o",
                color=GATE,
                markersize=2.6,
                alpha=0.6,
                markeredgewidth=0,
            )
            axes.set_title(f"after {depth} layer{'s' if depth > 1 else ''}: r = {correlation(errors, depth, name)}")
            axes.locator_params(axis="x", nbins=4)
            axes.grid(color=FAINT, linewidth=0.5)
        for axes in panels[len(depths) :]:
            axes.set_axis_off()
        figure.supxlabel("similarity that the gate sees at the exit", fontsize=9)
        figure.supylabel(f"cosine of {what} with exact's", fontsize=9)

    label = f"Similarity at the exit against cosine of {what}, a panel an exit depth"
    own = {"v_cosine": "scatter", "last_v_cosine": "scatter-last"}[name]
    return _svg(own, label, WIDE, 0.5 + 2.1 * rows, paint)


def correlations(errors: GateError) -> str:
    """Pearson's r by exit depth with its interval, and the paper's where it is of: last-layer V, early layers."""
    kinds = {
        "v_cosine": (GATE, "o", "V cosine after the exit (+1 is best)"),
        "last_v_cosine": (SHUFFLED, "s", "last-layer V cosine (+1)"),
        "kl": (STATIC, "v", "KL (-1)"),
    }
    found = [each for each in errors.correlations if each.depth is not None and each.pearson is not None]
    if not any(each.error in kinds for each in found):
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for shift, (name, (colour, marker, label)) in zip((-0.15, 0, 0.15), kinds.items(), strict=True):
            mine = [each for each in found if each.error == name]
            for each in mine:
                if each.pearson_interval is not None:
                    axes.plot([(each.depth or 0) + shift] * 2, each.pearson_interval, color=colour, linewidth=1)
            at, r = [(each.depth or 0) + shift for each in mine], [each.pearson or 0 for each in mine]
            axes.plot(at, r, marker + "-", color=colour, label=label, linewidth=1, markersize=5)
        # "Early" is the paper's word: here the first third.
        early, paper = max(2, len(errors.layers) / 3), f"the paper's: {errors.paper_r:g}, early layers, last-layer V"
        axes.plot([0.5, early], [errors.paper_r] * 2, color=INK, linestyle="--", linewidth=1.2, label=paper)
        axes.axhline(0, color="#888888", linewidth=0.7)
        axes.set_ylim(-1.02, 1.02)
        axes.set_ylabel("Pearson's r")
        axes.set_xlabel("exit after so many layers")
        _whole_numbers(axes.xaxis, most=16)
        _legend_above(axes)

    return _svg("correlations", "Correlation of similarity with the error caused, by exit depth", WIDE, 3.2, paint)


def correlation_map(errors: GateError) -> str:
    """Pearson's r and Spearman's rho of every error by exit depth, coloured by whether they help a gate."""
    depths = errors.depths()
    found = {(c.depth, c.error): c for c in errors.correlations if c.depth in depths}
    if not any(c.pearson is not None for c in found.values()):
        return ""
    kinds: list[tuple[str, Callable[[Correlation], float | None]]] = [
        ("Pearson's r", lambda c: c.pearson),
        ("Spearman's rho", lambda c: c.spearman),
    ]

    def paint(figure: Figure) -> None:
        both = list(figure.subplots(1, 2, sharey=True).flat)
        for axes, (title, pick) in zip(both, kinds, strict=True):
            values = {key: pick(c) for key, c in found.items()}
            cells = [
                [math.nan if (value := values.get((depth, name))) is None else sign * value for depth in depths]
                for name, sign in ERRORS.items()
            ]
            drawn = _map(axes, cells, "PuOr", -1, 1)
            for y, name in enumerate(ERRORS):
                for x, depth in enumerate(depths):
                    value, c = values.get((depth, name)), found.get((depth, name))
                    if value is None or c is None:
                        continue
                    colour = "white" if abs(value) > 0.6 else INK
                    if len(depths) <= MOST_CELLS:
                        style = {"weight": "bold"} if c.direction else {}
                        axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour, **style)
                    elif c.direction:
                        axes.plot(x, y, "o", color=colour, markersize=3)
            axes.set_title(title)
            _whole_ticks(axes.xaxis, depths)
            axes.set_xlabel("exit after so many layers")
        names = [f"{NAMES[name]} ({'+' if sign > 0 else '-'})" for name, sign in ERRORS.items()]
        both[0].set_yticks(range(len(ERRORS)), names)
        both[0].set_ylim(len(ERRORS) - 0.5, -0.5)
        bar = figure.colorbar(drawn, ax=both, aspect=30, pad=0.01, ticks=[-1, 0, 1])
        bar.ax.set_yticklabels(["wrong way", "none", "right way"])

    label = "Correlation of similarity with each error, Pearson's and Spearman's, by exit depth"
    return _svg("correlation-map", label, WIDE, 0.8 + 0.3 * len(ERRORS), paint)


def layer_errors(errors: GateError) -> str:
    """V's mean error in each layer after each exit depth: 1 - cosine, and L2."""
    depths = sorted({each.depth for each in errors.by_layer})
    if not depths:
        return ""
    layers = max(each.layer for each in errors.by_layer) + 1
    kinds: list[tuple[str, Callable[[KVError], float]]] = [
        ("V: 1 less the cosine with exact's", lambda error: 1 - error.v_cosine),
        ("V: size of the difference (L2, 1 = as large as V)", lambda error: error.v_l2),
    ]

    def paint(figure: Figure) -> None:
        both = list(figure.subplots(1, 2, sharey=True).flat)
        for axes, (title, pick) in zip(both, kinds, strict=True):
            values = {(each.depth, each.layer): pick(each.error) for each in errors.by_layer}
            cells = [[values.get((depth, layer), math.nan) for layer in range(layers)] for depth in depths]
            drawn = _map(axes, cells, "Blues", 0, max(max(values.values()), 1e-9))
            axes.set_title(title)
            _whole_ticks(axes.xaxis, range(1, layers + 1))
            axes.set_xlabel("error in the cache at layer")
            figure.colorbar(drawn, ax=axes, aspect=20, pad=0.01)
        _whole_ticks(both[0].yaxis, depths)
        both[0].set_ylim(len(depths) - 0.5, -0.5)
        both[0].set_ylabel("exit after so many layers")

    label = "Mean error of V that an exit leaves in the cache, by exit depth and layer"
    return _svg("layer-errors", label, WIDE, 1.0 + min(0.26 * max(3, len(depths)), 3.4), paint)


def correlation(errors: GateError, depth: int | None, name: str) -> str:
    """Pearson's r of similarity at ``depth`` (None: at all) with an error, as text."""
    found = next((c.pearson for c in errors.correlations if c.depth == depth and c.error == name), None)
    return "undefined" if found is None else f"{found:.2f}"


def correlation_rows(errors: GateError) -> list[tuple[str, list[str]]]:
    """By error and depth: depth, r, its interval, rho, its interval."""
    rows = []
    for name in ERRORS:
        for c in errors.correlations:
            if c.error == name:
                cells = ["all" if c.depth is None else str(c.depth)]
                for value, interval in ((c.pearson, c.pearson_interval), (c.spearman, c.spearman_interval)):
                    cells.append("undefined" if value is None else f"{value:.2f}")
                    cells.append("-" if interval is None else f"{interval[0]:.2f}..{interval[1]:.2f}")
                rows.append((NAMES[name], cells))
    return rows


def error_rows(errors: GateError) -> list[tuple[str, list[str]]]:
    """By exit depth: the means of similarity and of every error; of norms, of the ratio itself."""
    rows = []
    for depth in errors.depths():
        exits = [exit for exit in errors.exits if exit.depth == depth]
        means = [fmean(_value(exit, name) for exit in exits) for name in ("similarity", *ERRORS)]
        rows.append((str(depth), [f"{mean:.3f}" for mean in means]))
    return rows


def _value(exit: Exit, name: str) -> float:
    return float(getattr(exit if hasattr(exit, name) else exit.error, name))


def _map(axes: Axes, cells: list[list[float]], colours: str, low: float, high: float) -> QuadMesh:
    import matplotlib

    edges = [at - 0.5 for at in range(len(cells[0]) + 1)], [at - 0.5 for at in range(len(cells) + 1)]
    # Above 50 shades a colour bar becomes an embedded picture, which the page has none of.
    shades = matplotlib.colormaps[colours].resampled(41)
    drawn = axes.pcolormesh(*edges, cells, cmap=shades, vmin=low, vmax=high, edgecolors="white", linewidth=0.6)
    axes.tick_params(length=0)
    return drawn


def _whole_ticks(axis: Axis, values: list[int] | range) -> None:
    step = math.ceil(len(values) / MOST_CELLS)
    axis.set_ticks(range(0, len(values), step), labels=[str(value) for value in values[::step]])
