"""The paper's figures beside this machine's, as text."""

from __future__ import annotations

from collections.abc import Sequence

from riverinfer.evidence.paired import Share
from riverinfer.evidence.paper import Measured, Row, Settings
from riverinfer.evidence.paper_figures import DOUBT, SHOTS, SOURCE, PaperRow, paper_rows
from riverinfer.evidence.statistics import Interval

_HEAD = ("", "accuracy % [95 %]", "p", "speedup [95 %]", "tokens/s", "depth")
_BLANK = "-"


def table(model: str, measured: Sequence[Measured], settings: Settings) -> str:
    """One table a benchmark, and what its columns mean.

    model: the folder's name, by which the paper's columns are chosen.
    """
    parts = [f"{model}, {_described(settings)}"]
    parts += [_benchmark(model, each, _tau(settings)) for each in measured]
    parts.append(
        "accuracy: Wilson's interval. p: McNemar's exact test against exact, on the same questions. speedup: over\n"
        "exact, geometric mean over questions and its bootstrap interval; prompts not counted. depth: backbone layers\n"
        "a token. Prompts pass the backbone in all ways: beside full river stands the paper's model with every layer\n"
        f"in 4 bits, which may differ. Paper: accuracy, and speedup over its own backbone ({SOURCE};\n"
        f"{DOUBT})."
    )
    return "\n\n".join(parts)


def _described(settings: Settings) -> str:
    depths = f"depth {settings.min_depth} to {'all' if settings.max_depth is None else settings.max_depth}"
    tau = _tau(settings) + (" (certified, on prompts of its own)" if settings.certified else "")
    river = f"river {settings.river} with {settings.river_head} head"
    return f"{river}, {tau}, {depths}, greedy, answers of at most {settings.max_tokens} tokens"


def _tau(settings: Settings) -> str:
    return f"tau {settings.tau:g}" if isinstance(settings.tau, (int, float)) else "tau by layer"


def _benchmark(model: str, measured: Measured, tau: str) -> str:
    benchmark = measured.benchmark
    columns = paper_rows(model, benchmark.name)
    lines = [[*_HEAD, *(f"paper: {row.model}" for row in columns)]]
    for row in measured.rows:
        name = f"river, {tau}" if row.way == "river" else row.way
        lines.append([name, *_cells(row), *(_paper_cell(row.way, paper) for paper in columns)])
    count = len(benchmark.items)
    shots = f"{benchmark.shots} example{'s' if benchmark.shots != 1 else ''} each"
    if benchmark.shots != SHOTS[benchmark.name]:
        shots += f" (paper: {SHOTS[benchmark.name]})"
    title = f"{benchmark.name}: {count} question{'s' if count != 1 else ''} of {benchmark.source}, {shots}"
    return "\n".join([title, *_aligned(lines), *_notes(measured)])


def _cells(row: Row) -> list[str]:
    p = _BLANK if row.against_exact is None else f"{row.against_exact.p:.2g}"
    depth = _BLANK if row.mean_depth is None else f"{row.mean_depth:.1f}"
    speedup = "1" if row.way == "exact" else _BLANK if row.speedup is None else _times(row.speedup)
    return [_percent(row.accuracy), p, speedup, f"{row.tokens_per_s:.1f}", depth]


def _paper_cell(way: str, paper: PaperRow) -> str:
    accuracy = {"exact": paper.backbone, "river": paper.river, "full river": paper.full_w4}.get(way)
    parts = [] if accuracy is None else [f"{accuracy:.1f}"]
    if way == "river":
        parts += [f"{paper.speedup:.2f}x"] if paper.speedup is not None else []
        parts += [f"{paper.tokens_per_s:.1f}/s"] if paper.tokens_per_s is not None else []
    return " ".join(parts) or _BLANK


def _notes(measured: Measured) -> list[str]:
    count, differs = len(measured.benchmark.items), measured.lossless_differs
    lines = [f"lossless said what exact said: {count - len(differs)} of {count} answers"]
    if differs:
        lines[0] += f"; not in {', '.join(differs)}"
    lines += [
        f"same text as exact: {row.way} {row.same_texts} of {count}"
        for row in measured.rows
        if row.way in ("river", "full river")
    ]
    cut = ", ".join(f"{row.way} {row.cut_off}" for row in measured.rows if row.cut_off)
    return lines + ([f"cut off at the limit: {cut}"] if cut else [])


def _percent(share: Share) -> str:
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _times(interval: Interval) -> str:
    spread = "" if interval.low == interval.high else f" [{interval.low:.2f}, {interval.high:.2f}]"
    return f"{interval.mean:.2f}x{spread}"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
