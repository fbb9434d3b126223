"""What the benchmark scripts share: order of runs, intervals, the machine, tables, figures, files that appear whole."""

from __future__ import annotations

import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

import riverinfer
from riverinfer.profiling.environment import cpu_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"

# Colours of Okabe and Ito, which colour-blind readers tell apart: one a family of contenders, by its name's beginning;
# a variant is paler.
FAMILIES = {
    "exact": "#0072B2",
    "river": "#009E73",
    "lossless": "#CC79A7",
    "transformers": "#E69F00",
    "llama.cpp": "#D55E00",
}
OTHERS = ("#56B4E9", "#8C6D1F", "#000000", "#999999")
PALER = {
    "float32": 0.5,
    "no flash attention": 0.3,
    "no extra buffers": 0.6,
    "always": 0.5,
    "lossless, w4": 0.3,
    "lookup": 0.6,
}
STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "0.88",
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.bbox": "tight",
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "riverinfer",  # the same figure is the same file
}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "riverinfer": riverinfer.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def turn(contenders: Mapping[str, Callable[[], T]], number: int) -> dict[str, T]:
    """Call each contender once, beginning with the one at place ``number`` (modulo how many there are)."""
    names = list(contenders)
    first = number % len(names)
    return {name: contenders[name]() for name in names[first:] + names[:first]}


def interleave(
    contenders: Mapping[str, Callable[[], T]], *, runs: int, warmup: int = 1, progress: str | None = None
) -> dict[str, list[T]]:
    """What each contender gave in each run; runs are paired: all contenders had their turn in each.

    Every run calls each contender once, in an order that rotates from run to run, so that a drift of the machine
    meets all of them. ``warmup`` runs go before, and are dropped. ``progress``: a label for stderr.
    """
    found: dict[str, list[T]] = {name: [] for name in contenders}
    for run in range(-warmup, runs):
        for name, value in turn(contenders, run).items():
            if run >= 0:
                found[name].append(value)
        if progress is not None:
            print(f"{progress}: run {max(0, run + 1)}/{runs}", end="\r", file=sys.stderr, flush=True)
    if progress is not None:
        print(file=sys.stderr)
    return found


def bootstrap(values: Sequence[float], statistic: Callable[[Sequence[float]], float]) -> tuple[float, float, float]:
    """A statistic and its 95 % bootstrap interval; the same values give the same interval."""
    rng = random.Random(0)
    resampled = sorted(statistic(rng.choices(values, k=len(values))) for _ in range(2000))
    return statistic(values), resampled[50], resampled[1949]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval, over prompts as a rule."""
    return bootstrap(values, statistics.mean)


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval, over runs as a rule."""
    return bootstrap(values, statistics.median)


def ratios(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Median and 95 % bootstrap interval of the ratios within runs: ``values`` over ``reference``, pair by pair."""
    return median_interval([a / b for a, b in zip(values, reference, strict=True)])


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A markdown table and an empty line."""
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def replace(path: Path, content: bytes) -> None:
    """Write a file that is whole whenever it is there: the old one stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    print(f"saved {path}")


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``result`` and the machine as JSON to ``folder``; the old file stays until the new one is whole."""
    path = folder / name
    replace(path, (json.dumps({"machine": machine(), **result}, indent=1) + "\n").encode())
    return path


def color(name: str) -> str:
    """A contender's colour, the same in every figure: its family's, paler for a variant."""
    from matplotlib.colors import to_hex, to_rgb

    families = [family for family in FAMILIES if name.startswith(family)]
    plain = FAMILIES[max(families, key=len)] if families else OTHERS[zlib.crc32(name.encode()) % len(OTHERS)]
    share = max((share for part, share in PALER.items() if part in name), default=0.0)
    return to_hex([channel + (1 - channel) * share for channel in to_rgb(plain)])


def figure(name: str, draw: Callable[[Axes], None], *, title: str, folder: Path = RESULTS) -> list[Path]:
    """Draw one pair of axes into NAME.svg and NAME.png; the same drawing gives the same files.

    Raises ImportError without matplotlib (the extra "plots").
    """
    import matplotlib
    from matplotlib.figure import Figure

    pictures = {}
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(8, 4.5), layout="constrained")
        axes = drawing.subplots()
        axes.set_title(title, loc="left")
        draw(axes)
        for kind in ("svg", "png"):
            content = io.BytesIO()
            drawing.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
            pictures[folder / f"{name}.{kind}"] = content.getvalue()
    for path, picture in pictures.items():
        replace(path, picture)
    return list(pictures)
