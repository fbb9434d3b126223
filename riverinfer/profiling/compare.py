"""Whether one profile is slower than another, or whether runs merely differ.

Run i of both has the same text, so runs are compared in pairs and, where both have as many intervals, token by token.
Intervals of one run are not independent of each other, and runs differ by more than their tokens say. Hence a paired
cluster bootstrap: it draws pairs of runs, then within them circular blocks of token positions, and takes every metric
of what was drawn (Davison and Hinkley, Bootstrap Methods and Their Application, 3.8; Politis and Romano, A Circular
Block-Resampling Procedure for Stationary Data, 1992). Blocks besides runs count the noise of tokens twice: that errs on
the safe side. Few runs make a percentile interval too narrow, so the drawn log ratios give a standard error,
widened by sqrt(n / (n - 1)) and Student's t (Hesterberg, What Teachers Should Know About the Bootstrap, 2015). That
needs several runs: of two it can tell almost nothing.

All runs of a profile share a process: where its pages lie and how its cores clock shifts all of them alike, and no
interval of one profile can show that. ``margin`` allows for it. Tail metrics need no margin of their own, their
intervals are wide enough; tests/test_profile_compare.py simulates both. What a lossless round hands over at once comes
microseconds apart: a percentile there must also change by ``margin`` of the mean inter-token time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, geometric_mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from riverinfer.errors import InvalidRequestError
from riverinfer.memory import gib
from riverinfer.profiling.result import METRICS, Metric, ModeProfile, Profile, Run, figures
from riverinfer.profiling.tables import DASH, columns, flow, metric_label, number, operator_seconds

NO_CHANGE = "no change beyond noise"
CONFIDENCE = 0.95
_MOST_CHANGED = 4
_LOG_LARGEST = 100.0  # JSON has no infinity
_COLORS = {"slower": 31, "faster": 32}
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """One metric in both profiles.

    a, b: geometric means over the paired runs, in SI units and shares; arithmetic ones where a run has zero.
    ratio: b / a; None where a run has zero. low, high: its 95 % interval; None of a single pair. verdict: "slower",
    "faster", "higher", "lower", ``NO_CHANGE``, or "" where there is no interval.
    """

    name: str
    a: float
    b: float
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class OperatorChange:
    """An operator's seconds a decoded token in the one generation each profile recorded; no interval."""

    op: str
    a: float
    b: float


@dataclass(frozen=True)
class ModeComparison:
    """One mode of both profiles.

    pairs: of runs. by_token: whether token positions were paired too. where: the operators that changed most, if the
    mean inter-token time changed beyond noise.
    """

    mode: str
    pairs: int
    by_token: bool
    changes: tuple[Change, ...]
    where: tuple[OperatorChange, ...]


@dataclass(frozen=True)
class Difference:
    """Something that is not alike in both profiles, and may explain what changed. None: not known there."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    """B held against A. load_s, bytes_per_s, peak_bytes: of A and B, single measurements. only_a, only_b: modes."""

    margin: float
    differences: tuple[Difference, ...]
    modes: tuple[ModeComparison, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    load_s: tuple[float, float]
    bytes_per_s: tuple[float, float]
    peak_bytes: tuple[int | None, int | None]
    settings: dict[str, Any]

    @property
    def slower(self) -> bool:
        """Whether any metric of any mode is slower."""
        return any(change.verdict == "slower" for mode in self.modes for change in mode.changes)

    def as_dict(self) -> dict[str, Any]:
        """Everything by name, for JSON; ``settings`` are those of B."""
        return {**asdict(self), "slower": self.slower}


def compare(a: Profile, b: Profile, *, margin: float = 0.03, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Compare the modes that both have. The same ``seed`` gives the same result.

    margin: a change counts if its whole interval lies below 1 - margin or above 1 + margin.
    Raises InvalidRequestError for no common mode, a negative or not finite margin, fewer than two resamples.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise InvalidRequestError(f"is {margin!r}", field="margin", remedy="give a share such as 0.03")
    if resamples < 2:
        raise InvalidRequestError(f"is {resamples!r}", field="resamples", remedy="give two or more")
    common = [name for name in a.modes if name in b.modes and a.modes[name].runs and b.modes[name].runs]
    if not common:
        raise InvalidRequestError(
            f"the profiles have no mode in common: {', '.join(a.modes) or 'none'}; {', '.join(b.modes) or 'none'}",
            remedy="profile the same modes",
        )
    return Comparison(
        margin=margin,
        differences=tuple(_differences(a, b)),
        modes=tuple(_mode(a.modes[name], b.modes[name], margin, resamples, seed) for name in common),
        only_a=tuple(name for name in a.modes if name not in common),
        only_b=tuple(name for name in b.modes if name not in common),
        load_s=(a.load_s, b.load_s),
        bytes_per_s=(a.machine.bytes_per_s, b.machine.bytes_per_s),
        peak_bytes=(a.peak_bytes, b.peak_bytes),
        settings=b.settings,
    )


def terminal_comparison(
    comparison: Comparison, *, names: tuple[str, str] = ("A", "B"), width: int = 100, color: bool = False
) -> str:
    """The comparison for people, with a line break at its end. ``names``: of A and B, such as their files."""
    title = [f"A: {names[0]}", f"B: {names[1]}"]
    blocks = [flow(title, width)]
    if comparison.differences:
        parts = [f"{each.name} {_shown(each.a)} -> {_shown(each.b)}" for each in comparison.differences]
        parts[0] = f"not like with like: {parts[0]}"
        blocks.append(flow(parts, width, between="; "))
    blocks += [_mode_lines(mode, comparison.settings, color) for mode in comparison.modes]
    load, speed = comparison.load_s, comparison.bytes_per_s
    rows = [
        ["measured once", "A", "B", "B/A"],
        ["load, s", *map(number, load), _ratio(*load)],
        ["machine, GB/s", *(number(each / 1e9) for each in speed), _ratio(*speed)],
    ]
    before, after = comparison.peak_bytes
    if before is not None and after is not None:
        rows.append(["peak memory", gib(before), gib(after), _ratio(before, after)])
    blocks.append(columns(rows))
    for name, modes in (("A", comparison.only_a), ("B", comparison.only_b)):
        if modes:
            blocks.append([f"only in {name}: {', '.join(modes)}"])
    blocks.append(
        flow(
            [
                "A, B: geometric means over runs.",
                "Interval of B/A: 95 %, bootstrap over pairs of runs and blocks of tokens.",
                f"A change counts if all of it lies beyond {1 - comparison.margin:g}..{1 + comparison.margin:g}.",
            ],
            width,
            between=" ",
        )
    )
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _differences(a: Profile, b: Profile) -> list[Difference]:
    """What is not alike, but for the date and for how many runs there are: pairs are compared."""
    return [
        Difference("model" if name == "name" else name, of_a.get(name), of_b.get(name))
        for of_a, of_b in ((a.model, b.model), (a.settings, b.settings), (a.environment, b.environment))
        for name in dict.fromkeys([*of_a, *of_b])
        if name not in ("date", "runs") and of_a.get(name) != of_b.get(name)
    ]


def _mode(a: ModeProfile, b: ModeProfile, margin: float, resamples: int, seed: int) -> ModeComparison:
    pairs = list(zip(a.runs, b.runs, strict=False))
    found = [(figures(of_a), figures(of_b)) for of_a, of_b in pairs]
    drawn = _resampled(pairs, resamples, seed)
    changes = []
    for metric in METRICS:
        values = [(of_a[metric.name], of_b[metric.name]) for of_a, of_b in found]
        known = [(of_a, of_b) for of_a, of_b in values if of_a is not None and of_b is not None]
        if len(known) == len(pairs):
            changes.append(_change(metric, known, drawn[metric.name], margin))
    changes = [_relevant(each, changes, margin) for each in changes]
    changed = any(each.name == "inter-token mean" and each.verdict in ("slower", "faster") for each in changes)
    return ModeComparison(
        mode=a.mode,
        pairs=len(pairs),
        by_token=all(_aligned(*pair) for pair in pairs),
        changes=tuple(changes),
        where=tuple(_where(a, b)) if changed else (),
    )


def _change(metric: Metric, values: Sequence[tuple[float, float]], drawn: _Array, margin: float) -> Change:
    """``drawn``: log ratios of the resamples, or nan."""
    of_a, of_b = zip(*values, strict=True)
    if min(*of_a, *of_b) <= 0:
        return Change(metric.name, fmean(of_a), fmean(of_b), None, None, None, "")
    mean_a, mean_b = geometric_mean(of_a), geometric_mean(of_b)
    ratio, pairs = mean_b / mean_a, len(values)
    if pairs < 2 or not np.isfinite(drawn).all():
        return Change(metric.name, mean_a, mean_b, ratio, None, None, "")
    half = student_t(pairs - 1) * math.sqrt(pairs / (pairs - 1)) * float(drawn.std())
    low, high = ratio * math.exp(-half), ratio * math.exp(min(half, _LOG_LARGEST))
    return Change(metric.name, mean_a, mean_b, ratio, low, high, _verdict(metric, low, high, margin))


def _relevant(change: Change, changes: Sequence[Change], margin: float) -> Change:
    """An inter-token figure that moves by less than ``margin`` of the mean is no change for anyone who reads."""
    mean = next((each.a for each in changes if each.name == "inter-token mean"), 0.0)
    small = change.name.startswith("inter-token") and abs(change.b - change.a) <= margin * mean
    return replace(change, verdict=NO_CHANGE) if change.verdict and small else change


def _verdict(metric: Metric, low: float, high: float, margin: float) -> str:
    if not metric.better:
        return ""  # how drafts fall into rounds depends on what was timed in that process
    if 1 - margin <= high and low <= 1 + margin:
        return NO_CHANGE
    more = low > 1 + margin
    return "faster" if more == (metric.better == "higher") else "slower"


def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t.

    With t = sqrt(degrees) tan x its density is that of cos(x) ** (degrees - 1) over x (Abramowitz and Stegun, 26.7).
    """
    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (degrees - 1)
    shares = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(degrees) * math.tan(float(np.interp(confidence, shares / shares[-1], angles)))


def _resampled(pairs: Sequence[tuple[Run, Run]], resamples: int, seed: int) -> dict[str, _Array]:
    """Mean log ratio b / a of each resample, by metric; nan where a figure is zero or missing."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(pairs), size=(resamples, len(pairs)))
    ratios = {metric.name: np.empty(picks.shape) for metric in METRICS}
    for index, (a, b) in enumerate(pairs):
        chosen = picks == index
        count = int(chosen.sum())
        blocks = _blocks(rng, count, len(a.intervals_s))
        drawn_a = _drawn(a, blocks)
        drawn_b = _drawn(b, blocks if _aligned(a, b) else _blocks(rng, count, len(b.intervals_s)))
        for name, values in ratios.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                values[chosen] = np.log(drawn_b[name] / drawn_a[name])
    return {name: values.mean(axis=1) for name, values in ratios.items()}


def _aligned(a: Run, b: Run) -> bool:
    """Whether an interval of one is of the same work as that of the other: lossless rounds end where they end."""
    return len(a.intervals_s) == len(b.intervals_s) and not (a.rounds or b.rounds)


def _blocks(rng: np.random.Generator, count: int, length: int) -> NDArray[np.int64]:
    """``count`` rows of ``length`` positions: circular blocks, long as the square root of the series."""
    if not length:
        return np.empty((count, 0), dtype=np.int64)
    size = math.ceil(math.sqrt(length))
    begins = rng.integers(length, size=(count, math.ceil(length / size), 1))
    return ((begins + np.arange(size)) % length).reshape(count, -1)[:, :length]


def _drawn(run: Run, blocks: NDArray[np.int64]) -> dict[str, _Array]:
    """``figures`` of each row of positions; what is not of tokens stays that of the run."""
    whole = {name: math.nan if value is None else value for name, value in figures(run).items()}
    found = {name: np.full(len(blocks), value) for name, value in whole.items()}
    waits = np.asarray(run.intervals_s)
    if not len(waits):
        return found
    drawn = waits[blocks]
    mean = drawn.mean(axis=1)
    p50, p90, p99 = np.quantile(drawn, (0.5, 0.9, 0.99), axis=1)
    found |= {"inter-token mean": mean, "inter-token p50": p50, "inter-token p90": p90, "inter-token p99": p99}
    found["inter-token max"] = drawn.max(axis=1)
    # Where blocks meet there is no difference of neighbours; those inside the run are drawn instead.
    steps = np.abs(np.diff(waits))
    if len(steps):
        found["jitter"] = steps[blocks % len(steps)].mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found["decode (tg)"] = whole["decode (tg)"] * whole["inter-token mean"] / mean
    return found


def _where(a: ModeProfile, b: ModeProfile) -> list[OperatorChange]:
    """The operators whose time a token changed most, the largest change first."""
    of_a, of_b = operator_seconds(a.breakdown), operator_seconds(b.breakdown)
    ops = dict.fromkeys([*of_a, *of_b])
    changes = [OperatorChange(op, of_a.get(op, 0.0), of_b.get(op, 0.0)) for op in ops]
    changes.sort(key=lambda change: -abs(change.b - change.a))
    return [change for change in changes if change.a != change.b][:_MOST_CHANGED]


def _mode_lines(mode: ModeComparison, settings: dict[str, Any], color: bool) -> list[str]:
    pairs = f"{mode.pairs} pair{'s' if mode.pairs > 1 else ''} of runs"
    rows = [[mode.mode, "A", "B", "B/A", "interval"]]
    for change in mode.changes:
        metric = next(each for each in METRICS if each.name == change.name)
        interval = DASH
        if change.low is not None and change.high is not None:
            interval = f"{_factor(change.low)}..{_factor(change.high)}"
        values = [number(value * metric.scale) for value in (change.a, change.b)]
        rows.append([metric_label(metric, settings), *values, _factor(change.ratio), interval])
    verdicts = [pairs if mode.by_token else f"{mode.pairs} run{'s' if mode.pairs > 1 else ''}, not by token"]
    for change in mode.changes:
        text = change.verdict or ("one pair tells nothing" if mode.pairs == 1 else "not judged")
        verdicts.append(f"\x1b[{_COLORS[text]}m{text}\x1b[0m" if color and text in _COLORS else text)
    lines = [f"{line}  {verdict}" for line, verdict in zip(columns(rows), verdicts, strict=True)]
    if mode.where:
        parts = [
            f"{each.op} {number(each.a * 1e3)} -> {number(each.b * 1e3)} ms ({_ratio(each.a, each.b)})"
            for each in mode.where
        ]
        lines += [f"where: {', '.join(parts[:2])}"] + ([f"       {', '.join(parts[2:])}"] if parts[2:] else [])
    return lines


def _ratio(a: float, b: float) -> str:
    return _factor(b / a if a else None)


def _factor(value: float | None) -> str:
    """Three decimals near 1, where changes are looked for."""
    if value is None:
        return DASH
    return f"{value:.3f}" if value < 10 else f"{value:.0f}" if value < 1000 else ">999"


def _shown(value: Any) -> str:
    return "unknown" if value is None else str(value)
