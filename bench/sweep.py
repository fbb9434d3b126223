"""Sweeps over a number of tokens: what each contender took at each of them, as tables, a figure and a result."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from harness import color, median_interval, ratios
from prompts import PROMPTS, TEXT

from riverinfer import Engine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Sweep = dict[str, dict[int, list[float]]]  # by contender and number of tokens, a run each
Formula = Callable[[int, float], float]  # of the number of tokens and the seconds, what is shown


def numbers(text: str) -> list[int]:
    """An argument: numbers from 1 on, between commas, in rising order."""
    try:
        found = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers between commas") from None
    if found[0] < 1:
        raise argparse.ArgumentTypeError("numbers start at 1")
    return found


def text_ids(engine: Engine, length: int) -> list[int]:
    """``length`` tokens of the benchmark's prompts, over and over: what is timed does not depend on the words."""
    ids = engine.tokenizer.encode(" ".join([TEXT, *PROMPTS]))
    return (ids * (length // len(ids) + 1))[:length]


def rows(seconds: Sweep, formula: Formula, digits: int) -> list[list[str]]:
    """A row a contender, a column a number of tokens: median (95 % interval)."""
    return [
        [name, *(_cell([formula(count, run) for run in runs], digits) for count, runs in by_count.items())]
        for name, by_count in seconds.items()
    ]


def ratio_rows(seconds: Sweep, reference: str) -> list[list[str]]:
    """How many times as fast as ``reference``, within runs."""
    table = []
    for name, by_count in seconds.items():
        found = [ratios(seconds[reference][count], runs) for count, runs in by_count.items()]
        table.append([name, *(f"{middle:.2f} ({low:.2f}..{high:.2f})" for middle, low, high in found)])
    return table


def _cell(values: list[float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in median_interval(values))
    return f"{middle} ({low}..{high})"


def draw_lines(
    seconds: Sweep, formula: Formula, *, x: str, y: str, log: bool = False, limits: Mapping[int, float] | None = None
) -> Callable[[Axes], None]:
    """Lines over the number of tokens, medians with 95 % intervals.

    log: both axes. limits: the least seconds that exact mode in bfloat16 can take.
    """
    from matplotlib.ticker import LogLocator

    def draw(axes: Axes) -> None:
        counts = sorted({count for by_count in seconds.values() for count in by_count})
        for name, by_count in seconds.items():
            found = [median_interval([formula(count, run) for run in runs]) for count, runs in by_count.items()]
            middles = [middle for middle, _, _ in found]
            errors = [[middle - low for middle, low, _ in found], [high - middle for middle, _, high in found]]
            axes.errorbar(list(by_count), middles, yerr=errors, marker="o", capsize=3, color=color(name), label=name)
        if limits:
            shown = [formula(count, limit) for count, limit in limits.items()]
            axes.plot(list(limits), shown, color="0.4", linestyle="--", label="exact bfloat16, at least")
        if log:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel(x)
        axes.set_ylabel(f"{y} (median, 95 % interval)")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return draw
