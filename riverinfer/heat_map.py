"""A picture of a generation in river mode: tokens by layers, coloured by similarity, the exits as a line over it."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from riverinfer.errors import InvalidRequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

CEILING = 0.9999  # on a log scale the last hair to 1 has no end
TOP_SHARE = 0.02  # cells that share the top colour: the few near 1 of an outlier token would take half the scale
BAR_TICKS = (-1, -0.5, 0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
LABEL_WIDTH = 14  # characters of a token that are shown
LINE, CASING, NOT_A_NUMBER = "#e8112d", "white", "0.7"
DPI = 150
INCHES_PER_TOKEN, INCHES_PER_LAYER = 0.16, 0.13
WIDTHS, HEIGHTS = (6.5, 20.0), (3.8, 11.0)  # least and most, in inches
MOST_LAYER_LABELS = 16


def require_matplotlib() -> None:
    """Raise InvalidRequestError, naming the remedy, if pictures cannot be drawn here."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as exc:
        raise InvalidRequestError(
            f"drawing needs matplotlib ({exc})", remedy="pip install 'riverinfer[plots]', or write a .json file"
        ) from exc


def render(
    tokens: Sequence[str],
    similarities: Sequence[Sequence[float]],
    exit_depths: Sequence[int],
    *,
    title: str,
    tau: float | None = None,
    kind: str = "svg",
) -> bytes:
    """The picture as the content of a file; ``kind`` is "svg" or "png".

    tokens: the text of each. similarities: [tokens][layers], cosines; what is not a number is grey. exit_depths: how
    many backbone layers each token passed, 0 to the number of layers. tau: marked on the colour bar.

    Colours are even in log(1 - similarity), so that 0.9 and 0.99 are as far apart as 0 and 0.9. The SVG's texts are
    texts; its element "cells" is an image of one pixel a cell, "exit-line" the line, "tau" the mark.

    Raises InvalidRequestError without matplotlib, or if the lengths do not agree.
    """
    layers = len(similarities[0]) if similarities else 0
    if not layers or not len(tokens) == len(similarities) == len(exit_depths):
        raise InvalidRequestError(
            f"{len(tokens)} tokens, {len(similarities)} rows of similarities, {len(exit_depths)} exit depths",
            remedy="give as many of each, at least one",
        )
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text can be searched, and the viewer may have the fonts that are missing here
        "svg.hashsalt": "riverinfer",  # the same picture is the same file
        "path.simplify": False,
        "text.usetex": False,
        "text.parse_math": False,
    }
    lines = [_visible(line) for line in title.split("\n")]
    metadata = {"Title": "; ".join(lines), **({"Date": None} if kind == "svg" else {})}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph|Matplotlib currently does not support")
        if kind == "png":
            lines, tokens = _spell_missing_glyphs(lines), _spell_missing_glyphs(tokens)
        width = _between(WIDTHS, 1.8 + INCHES_PER_TOKEN * len(tokens))
        height = _between(HEIGHTS, 2.0 + INCHES_PER_LAYER * layers)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        _draw_cells(figure, axes, np.array(similarities, dtype=float).T, tau)
        _draw_exits(figure, axes, exit_depths, points=72 * width / len(tokens))
        _label(
            axes, [token_label(token) for token in tokens], layers, "\n".join(lines), most=int(width / INCHES_PER_TOKEN)
        )
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
    return file.getvalue()


def token_label(text: str) -> str:
    """A token in a few visible characters: leading spaces as ``·``, line breaks and the like escaped."""
    visible = _visible(text)
    body = visible.lstrip(" ")
    label = "·" * (len(visible) - len(body)) + body
    return label if len(label) <= LABEL_WIDTH else label[: LABEL_WIDTH - 1] + "…"


def _draw_cells(figure: Figure, axes: Axes, values: Any, tau: float | None) -> None:
    """``values`` [layers, tokens] as an image, layer 0 at the bottom, and the colour bar."""
    import matplotlib

    low, high, highest = _range(values, tau)
    norm = _log_distance(low, high)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=NOT_A_NUMBER)
    image = axes.imshow(values, cmap=colours, norm=norm, origin="lower", aspect="auto", interpolation="none")
    image.set_gid("cells")
    ends = "max" if highest > high else "neither"
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05, aspect=30, extend=ends)
    bar.set_ticks([tick for tick in BAR_TICKS if low <= tick <= high], labels=None)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    bar.ax.minorticks_off()
    marked = tau is not None and low < tau < high
    bar.set_label("similarity (tau marked)" if marked else "similarity")
    if tau is not None and marked:
        bar.ax.axhline(tau, color=CASING, linewidth=3.8)
        bar.ax.axhline(tau, color=LINE, linewidth=1.8, gid="tau")


def _range(values: Any, tau: float | None) -> tuple[float, float, float]:
    """Least and greatest similarity that the colours tell apart, ``tau`` among them if it can be; and the highest."""
    known = np.clip(values[np.isfinite(values)], -1.0, 1.0)
    if not known.size:
        return 0.0, 0.9, 0.9
    low, high, highest = float(known.min()), float(np.quantile(known, 1 - TOP_SHARE)), float(known.max())
    if tau is not None:
        high = max(high, min(tau + (1 - tau) / 10, highest))
    return min(low, CEILING - 0.01), max(min(high, CEILING), low + 0.001), highest


def _log_distance(low: float, high: float) -> Normalize:
    """A norm from ``low`` to ``high`` that is even in log(1 - similarity)."""
    from matplotlib.colors import FuncNorm

    def forward(similarity: Any) -> Any:
        return -np.log(1 - np.clip(similarity, -2.0, CEILING))

    def inverse(value: Any) -> Any:
        return 1 - np.exp(-np.asarray(value))

    return FuncNorm((forward, inverse), vmin=low, vmax=high, clip=True)


def _draw_exits(figure: Figure, axes: Axes, exit_depths: Sequence[int], *, points: float) -> None:
    """A step line above the last backbone layer of each token, thinner where a column is only a few ``points``."""
    from matplotlib.patheffects import Normal, Stroke

    width = _between((0.6, 1.8), points / 4)
    line = axes.stairs(
        np.array(exit_depths) - 0.5,
        np.arange(len(exit_depths) + 1) - 0.5,
        baseline=None,
        color=LINE,
        linewidth=width,
        label="exit: backbone below, river above",
        path_effects=[Stroke(linewidth=2.1 * width, foreground=CASING), Normal()],
        clip_on=False,  # at depth 0 and at the last layer it runs along the frame
        zorder=3,
        gid="exit-line",
    )
    figure.legend(handles=[line], loc="outside upper right", frameon=False)


def _label(axes: Axes, labels: Sequence[str], layers: int, title: str, *, most: int) -> None:
    """Up to ``most`` tokens under their columns, evenly thinned; round numbers of layers."""
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(-0.5, layers - 0.5)
    every = math.ceil(len(labels) / most)
    places = range(0, len(labels), every)
    axes.set_xticks(places, [labels[place] for place in places], rotation=90, fontsize=7)
    axes.tick_params(axis="x", length=2, pad=1)
    rows = next(step for step in (1, 2, 5, 10, layers) if layers <= step * MOST_LAYER_LABELS)
    axes.set_yticks(range(0, layers, rows))
    thinned = "" if every == 1 else f"; one name in {every} is shown"
    axes.set_xlabel(f"generated token (the column is the position that predicted it{thinned})")
    axes.set_ylabel("layer (0 at the bottom)")
    axes.set_title(title, loc="left", fontsize=10)


def _spell_missing_glyphs(texts: Sequence[str]) -> list[str]:
    """The texts with every character that the font lacks as ``\\uXXXX``: a PNG would show a box for each of them."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties())).get_charmap()
    return ["".join(c if ord(c) in glyphs or not c.isprintable() else _escape(c) for c in text) for text in texts]


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _between(limits: tuple[float, float], value: float) -> float:
    return min(max(value, limits[0]), limits[1])
