"""A profile as text: for a terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import fmean, median

from riverinfer.memory import gib
from riverinfer.profiling.result import (
    METRICS,
    OPERATORS,
    Breakdown,
    Metric,
    ModeProfile,
    Profile,
    figures,
    notes,
)

DECODE_PHASES = ("step", "draft", "verify", "host")
CSV_COLUMNS = ("kind", "mode", "run", "name", "unit", "value", "phase", "path", "layer", "count")
DASH = "-"

# Segments of a bar: operators, letter where the name does not fit, background of the 256-colour palette.
_GROUPS = {
    "embed": (("embed",), "e", 250),
    "norm": (("norm",), "n", 246),
    "qkv": (("qkv", "rope"), "q", 75),
    "attention": (("attention",), "a", 114),
    "o": (("o",), "o", 80),
    "gate_up": (("gate_up", "silu"), "u", 215),
    "down": (("down",), "d", 179),
    "gate": (("gate",), "g", 175),
    "head": (("head",), "h", 140),
    "sampling": (("sampling",), "s", 186),
    "host": (("host",), "t", 210),
}
_LETTERS = {op: (letter, shade) for ops, letter, shade in _GROUPS.values() for op in ops}
_FILLS = "░▒▓█"
_SPARKS = "▁▂▃▄▅▆▇█"
_SI_UNITS = {"ms": "s", "%": "share"}
_COVERS = {
    "cpu clock": "norm includes the residual sum before it",
    "cuda events": "norms are part of the matrix after them, residual sums and silu of the one before, and steps are"
    " started by the host one by one, which is what host has most of",
}


def terminal(profile: Profile, *, width: int = 100, color: bool = False) -> str:
    """What ``riverinfer profile`` prints, with a line break at its end.

    Figures are medians over runs with the lowest and the highest, [min..max]: of five runs that is also the 94 %
    interval of the median (Conover, Practical Nonparametric Statistics, 3.2: 1 - 2 / 2**n). Where ``width`` columns
    are too few for that, medians alone. Bars are on one scale: the slowest mode fills its line. They, operators and
    layers are of decoding, in ms a token. ``color``: ANSI colours in bars; names or letters tell segments apart
    without.
    """
    modes = list(profile.modes.values())
    shown = [line for note in notes(profile) for line in textwrap.wrap(f"Note: {note}.", width)]
    blocks = [_header(profile, width), _main_table(profile, width), shown]
    timed = [mode for mode in modes if operator_seconds(mode.breakdown)]
    if timed:
        blocks += [
            ["Where the time of a decoded token goes (one generation with clocks)", *_bars(timed, width, color)],
            _operator_table(timed, color),
            [*_layers(timed, width), *_profiler(timed, width)],
        ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def markdown(profile: Profile) -> str:
    """The figures, the operators and the environment as GitHub Markdown. Ranges are [min..max] over runs."""
    modes = list(profile.modes.values())
    rows = [["", *profile.modes], *_figure_rows(profile, ranges=True)]
    blocks = [_markdown_table(rows), *(f"Note: {note}." for note in notes(profile))]
    timed = [mode for mode in modes if operator_seconds(mode.breakdown)]
    if timed:
        found = [operator_seconds(mode.breakdown) for mode in timed]
        body = [
            [f"`{op}`", *(_with_share(times.get(op), sum(times.values())) for times in found)]
            for op in _operators(found)
        ]
        blocks.append(_markdown_table([["decode, ms a token", *(mode.mode for mode in timed)], *body]))
    blocks.append(" · ".join([*_model(profile), *_settings(profile), *_environment(profile), *_machine(profile)]))
    return "\n\n".join(blocks) + "\n"


def csv_text(profile: Profile) -> str:
    """One value a row under the header ``CSV_COLUMNS``, in SI units, shares from 0 to 1.

    kind "run": a metric of one run, counted from 0. kind "mode": limit, share of it. kind "operator":
    ``OperatorTime``, its seconds as value, prefill included. kind "profile": load time, peak memory, what the machine
    can do. Columns that a kind has not are empty.
    """
    text = io.StringIO()
    out = csv.DictWriter(text, CSV_COLUMNS, restval="", lineterminator="\n")
    out.writeheader()
    for name, unit, value in (
        ("load", "s", profile.load_s),
        ("peak memory", "bytes", "" if profile.peak_bytes is None else profile.peak_bytes),
        ("machine bandwidth", "bytes/s", profile.machine.bytes_per_s),
        ("machine operations", "operations/s", profile.machine.operations_per_s),
    ):
        out.writerow({"kind": "profile", "name": name, "unit": unit, "value": value})
    for name, mode in profile.modes.items():
        for index, run in enumerate(mode.runs):
            found = figures(run)
            for metric in METRICS:
                if found[metric.name] is not None:
                    unit = _SI_UNITS.get(metric.unit, metric.unit)
                    row = {"kind": "run", "mode": name, "run": index, "name": metric.name, "unit": unit}
                    out.writerow({**row, "value": found[metric.name]})
        limit = mode.limit
        whole = [
            ("limit", "s", limit.seconds),
            ("limit bytes", "bytes", limit.bytes),
            ("limit operations", "operations", limit.operations),
            ("limit achieved", "share", limit.achieved),
        ]
        for label, unit, value in whole:
            out.writerow({"kind": "mode", "mode": name, "name": label, "unit": unit, "value": value})
        for each in mode.breakdown.operators:
            row = {"kind": "operator", "mode": name, "name": each.op, "unit": "s", "value": each.seconds}
            row |= {"phase": each.phase, "path": each.path, "count": each.count}
            out.writerow({**row, "layer": "" if each.layer is None else each.layer})
    return text.getvalue()


def operator_seconds(
    parts: Breakdown, *, phase: str | None = None, path: str | None = None, layer: int | None = None
) -> dict[str, float]:
    """Seconds a decoded token by operator, of all decode phases or of one phase, path or layer alone.

    Empty where no token was decoded.
    """
    found: dict[str, float] = {}
    for each in parts.operators if parts.tokens else ():
        if each.phase not in DECODE_PHASES or (phase is not None and each.phase != phase):
            continue
        if (path is not None and each.path != path) or (layer is not None and each.layer != layer):
            continue
        found[each.op] = found.get(each.op, 0.0) + each.seconds / parts.tokens
    return found


def number(value: float | None, like: float | None = None) -> str:
    """Three digits, at most two decimals; as many decimals as ``like`` would have. A dash for None."""
    if value is None:
        return DASH
    size = abs(value if like is None else like)
    decimals = 2 if size < 1 else max(0, 2 - math.floor(math.log10(size)))
    return f"{value:.{decimals}f}"


def columns(rows: Sequence[Sequence[str]], gap: int = 2) -> list[str]:
    """Lines of a table: the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    space = " " * gap
    return [
        space.join(
            cell.rjust(size) if place else cell.ljust(size)
            for place, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def flow(parts: Iterable[str], width: int, between: str = " · ") -> list[str]:
    """The parts in as few lines as they fit into; a part alone may be longer."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(between) + len(part) <= width:
            lines[-1] += between + part
        else:
            lines.append(part)
    return lines


def metric_label(metric: Metric, settings: dict[str, object]) -> str:
    """A metric's name and unit, prefill and decode as llama-bench names them, such as ``pp128 @ d512``."""
    if metric.unit != "tokens/s":
        return f"{metric.name}, {metric.unit}" if metric.unit != "tokens" else metric.name
    word, count = {"prefill (pp)": ("prefill", "prompt_len"), "decode (tg)": ("decode", "new_tokens")}[metric.name]
    test = f"{'pp' if word == 'prefill' else 'tg'}{settings.get(count) or ''}"
    context = settings.get("context")
    return f"{word} {test} @ d{context}, t/s" if context else f"{word} ({test}), t/s"


def _header(profile: Profile, width: int) -> list[str]:
    peak = [] if profile.peak_bytes is None else [f"peak memory {gib(profile.peak_bytes)}"]
    lines = flow([*_model(profile), f"loaded in {number(profile.load_s)} s", *peak], width)
    lines += flow([*_environment(profile), *_machine(profile)], width)
    lines += flow(_settings(profile), width)
    labels = [mode.label for mode in profile.modes.values() if mode.label != mode.mode]
    return lines + (flow(labels, width) if labels else [])


def _model(profile: Profile) -> list[str]:
    model = profile.model
    parts = [str(model.get("name", "model")), str(model.get("dtype", ""))]
    parameters, layers = model.get("parameters"), model.get("layers")
    if parameters:
        parts.append(f"{_si(parameters)} parameters" + (f" in {layers} layers" if layers else ""))
    return [part for part in parts if part]


def _environment(profile: Profile) -> list[str]:
    env = profile.environment
    device = str(env.get("device", ""))
    name = env.get("device_name") if device.startswith("cuda") else env.get("cpu")
    parts = [": ".join(str(part) for part in (device, name) if part)]
    if env.get("threads"):
        cores = f" on {_counted(env['cores'], 'core')}" if env.get("cores") else ""
        parts.append(_counted(env["threads"], "thread") + cores)
    parts += [f"{name} {env[name]}" for name in ("riverinfer", "torch", "triton") if env.get(name)]
    parts += [str(env["date"])] if env.get("date") else []
    return [part for part in parts if part]


def _machine(profile: Profile) -> list[str]:
    machine = profile.machine
    return [f"measured {_si(machine.bytes_per_s)}B/s, {_si(machine.operations_per_s)}FLOP/s"]


def _settings(profile: Profile) -> list[str]:
    found = profile.settings
    parts = [f"{word} {found[key]}" for key, word in _SETTING_WORDS.items() if found.get(key) is not None]
    return [f"{_counted(found['runs'], 'run')}", *parts] if found.get("runs") else parts


_SETTING_WORDS = {
    "warmup": "warm-up",
    "prompt_len": "prompt",
    "new_tokens": "new tokens",
    "context": "context",
    "batch": "batch",
    "temperature": "temperature",
    "seed": "seed",
    "river": "river",
}


def _main_table(profile: Profile, width: int) -> list[str]:
    many = any(len(mode.runs) > 1 for mode in profile.modes.values())
    head = ["median [min..max] of runs" if many else "", *profile.modes]
    rows = [head, *_figure_rows(profile, ranges=True)]
    lines = columns(rows)
    if many and max(map(len, lines)) > width:
        lines = columns(rows, gap=1)
    if many and max(map(len, lines)) > width:
        lines = columns([["median of runs", *head[1:]], *_figure_rows(profile, ranges=False)])
    return lines


def _figure_rows(profile: Profile, *, ranges: bool) -> list[list[str]]:
    modes = list(profile.modes.values())
    found = [[figures(run) for run in mode.runs] for mode in modes]
    rows = []
    for metric in METRICS:
        label = metric_label(metric, profile.settings)
        rows.append([label, *(_spread([each[metric.name] for each in runs], metric, ranges) for runs in found)])
    rows += [
        ["limit, ms a token", *(f"{number(mode.limit.seconds * 1e3)} {mode.limit.bound}" for mode in modes)],
        ["reads a token", *(f"{_si(mode.limit.bytes)}B" for mode in modes)],
        ["limit reached, %", *(f"{mode.limit.achieved * 100:.0f}" for mode in modes)],
    ]
    return [row for row in rows if any(cell != DASH for cell in row[1:])]


def _spread(values: Sequence[float | None], metric: Metric, ranges: bool) -> str:
    """Median and range of the runs that have the figure."""
    known = [value * metric.scale for value in values if value is not None]
    if not known:
        return DASH
    middle = median(known)
    text = number(middle)
    if ranges and len(known) > 1:
        text += f" [{number(min(known), middle)}..{number(max(known), middle)}]"
    return text


def _bars(modes: Sequence[ModeProfile], width: int, color: bool) -> list[str]:
    found = [operator_seconds(mode.breakdown) for mode in modes]
    labels = columns([[mode.mode, f"{_ms(sum(times.values()))} ms"] for mode, times in zip(modes, found, strict=True)])
    room = max(20, width - max(map(len, labels)) - 1)
    longest = max(sum(times.values()) for times in found)
    bars = []
    for label, times in zip(labels, found, strict=True):
        cells = max(1, round(room * sum(times.values()) / longest)) if longest else 0
        bars.append(f"{label} {_bar(times, cells, color)}")
    return bars


def _bar(times: dict[str, float], cells: int, color: bool) -> str:
    parts = {name: sum(times.get(op, 0.0) for op in ops) for name, (ops, _, _) in _GROUPS.items()}
    text = ""
    for place, (name, size) in enumerate(zip(parts, _cells(list(parts.values()), cells), strict=True)):
        _, letter, shade = _GROUPS[name]
        inside = name if len(name) + 2 <= size else letter
        segment = inside.center(size, " " if color else _FILLS[place % len(_FILLS)]) if size else ""
        text += f"\x1b[30;48;5;{shade}m{segment}\x1b[0m" if color and segment else segment
    return text


def _cells(parts: Sequence[float], cells: int) -> list[int]:
    """Whole cells in proportion to ``parts`` that add up to ``cells``: the largest remainders are rounded up."""
    total = sum(parts)
    if not total:
        return [0] * len(parts)
    exact = [part / total * cells for part in parts]
    counts = [math.floor(each) for each in exact]
    by_rest = sorted(range(len(parts)), key=lambda place: counts[place] - exact[place])
    for place in by_rest[: cells - sum(counts)]:
        counts[place] += 1
    return counts


def _operator_table(modes: Sequence[ModeProfile], color: bool) -> list[str]:
    groups = [_operator_columns(mode.breakdown) for mode in modes]
    found = [next(iter(group.values())) for group in groups]
    titles: list[str] = []
    for mode, group in zip(modes, groups, strict=True):
        titles += [mode.mode, *list(group)[1:], "%"]
    rows = [["ms a token", *titles]]
    names = _operators(found)
    for op in names:
        cells = []
        for group, times in zip(groups, found, strict=True):
            cells += [_ms(column.get(op)) for column in group.values()]
            cells.append(_percent(times.get(op), sum(times.values())))
        rows.append([f"{_LETTERS[op][0] if op in _LETTERS else ' '} {op}", *cells])
    sums: list[str] = []
    for group in groups:
        sums += [*(_ms(sum(column.values())) for column in group.values()), ""]
    lines = columns([*rows, ["  sum", *sums]])
    if color:
        for place, op in enumerate(names, start=1):
            if op in _LETTERS:
                letter, shade = _LETTERS[op]
                lines[place] = f"\x1b[30;48;5;{shade}m{letter}\x1b[0m{lines[place][1:]}"
    return lines


def _operator_columns(parts: Breakdown) -> dict[str, dict[str, float]]:
    """Seconds a token by operator under each column's title; the first column is all of them."""
    found = {"all": operator_seconds(parts)}
    for kind, names in (("phase", ("draft", "verify")), ("path", ("backbone", "river"))):
        split = {name: operator_seconds(parts, **{kind: name}) for name in names}  # type: ignore[arg-type]
        if all(split.values()):
            return found | split
    return found


def _operators(found: Sequence[dict[str, float]]) -> list[str]:
    """Those that ran in any mode, in the order of a step."""
    ran = {op for times in found for op in times}
    return [op for op in OPERATORS if op in ran] + sorted(ran.difference(OPERATORS))


def _layers(modes: Sequence[ModeProfile], width: int) -> list[str]:
    """A line a mode: what a layer takes of a token's time, and the layers as bars from zero."""
    rows, series = [], []
    for mode in modes:
        numbers = sorted({each.layer for each in mode.breakdown.operators if each.layer is not None})
        times = [sum(operator_seconds(mode.breakdown, layer=layer).values()) for layer in numbers]
        if not times:
            continue
        most = max(range(len(times)), key=times.__getitem__)
        rows.append(
            [f"{mode.mode} layers", _ms(min(times)), _ms(median(times)), f"{_ms(times[most])} at {numbers[most]}"]
        )
        series.append(times)
    if not rows:
        return []
    lines = columns([["ms a layer", "least", "median", "most"], *rows])
    size = max(map(len, lines))
    return [lines[0]] + [
        f"{line.ljust(size)} {_sparkline(times, max(8, width - size - 1))}"
        for line, times in zip(lines[1:], series, strict=True)
    ]


def _sparkline(values: Sequence[float], room: int) -> str:
    """Heights from zero to the largest; more values than cells are averaged over neighbours."""
    each = math.ceil(len(values) / room)
    means = [fmean(values[begin : begin + each]) for begin in range(0, len(values), each)]
    top = max(means) or 1.0
    return "".join(_SPARKS[min(len(_SPARKS) - 1, int(value / top * len(_SPARKS)))] for value in means)


def _profiler(modes: Sequence[ModeProfile], width: int) -> list[str]:
    """What the clocks themselves cost, and which operators are part of which."""
    costs = [f"{mode.mode} {mode.breakdown.overhead * 100:+.1f}\xa0%" for mode in modes]
    mark = median(mode.breakdown.mark_s for mode in modes)
    line = f"These clocks changed a token's time: {', '.join(costs)}; a clock costs {number(mark * 1e6)} us."
    kinds = [kind for kind, _ in groupby(sorted(mode.breakdown.events for mode in modes))]
    covers = [f"By {kind}: {_COVERS[kind]}." for kind in kinds if kind in _COVERS]
    return [text.replace("\xa0", " ") for text in textwrap.wrap(" ".join([line, *covers]), width)]


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    rule = f"| --- | {' | '.join(['---:'] * (len(rows[0]) - 1))} |"
    return "\n".join([head, rule, *body])


def _with_share(seconds: float | None, total: float) -> str:
    return DASH if seconds is None else f"{_ms(seconds)} ({_percent(seconds, total)} %)"


def _ms(seconds: float | None) -> str:
    """Two decimals below 100 ms: hundredths of a token's time are what columns are added up in."""
    if seconds is None:
        return DASH
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.1f}"


def _percent(part: float | None, total: float) -> str:
    if part is None or not total:
        return DASH
    share = part / total * 100
    return "<1" if 0 < share < 1 else f"{share:.0f}"


def _counted(count: object, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _si(value: float) -> str:
    """Three digits and the prefix of a unit, such as ``21.4 G``."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{number(value / size)} {prefix}"
    return f"{number(value)} "
