"""The outcome of an audit in plain sentences, means with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from riverinfer.evidence.audit import Audit
from riverinfer.evidence.drift import DRIFT_TEXTS, Drift
from riverinfer.evidence.gate_error_summary import Correlation, GateError
from riverinfer.evidence.quality import Floor
from riverinfer.evidence.statistics import TAIL, Interval


def findings(audit: Audit) -> Audit:
    """The same audit with its ``findings``."""
    lines = [_quality(audit), _floor(audit.floor), *(comparison.verdict for comparison in audit.comparisons)]
    lines += _correlations(audit.gate_error)
    lines.append(_lossless(audit))
    if audit.drift is not None:
        lines += _drift(audit.drift)
    lines.append(_free(audit))
    if audit.better is not None:
        lines.append(audit.better.verdict)
    elif audit.settings.get("gates"):
        lines.append("there are too few tokens to fit candidate gates on")
    return replace(audit, findings=tuple(line[0].upper() + line[1:] for line in lines))


def shown(interval: Interval, digits: int = 4, scale: float = 1) -> str:
    """Mean and interval, ``0.1014 (0.0921..0.1107)``."""
    values = (interval.mean, interval.low, interval.high)
    mean, low, high = (f"{round(value * scale, digits) + 0.0:.{digits}f}" for value in values)  # no "-0.0000"
    return f"{mean} ({low}..{high})"


def _quality(audit: Audit) -> str:
    quality, layers = audit.quality, audit.model["layers"]
    return (
        f"{audit.gate}: tokens pass {quality.mean_depth:.1f} of {layers} backbone layers at"
        f" {quality.tokens_per_s:.0f} tokens/s; against exact, KL {shown(quality.kl)}, same likeliest token"
        f" {shown(quality.agreement, 1, 100)} %, perplexity of exact's own greedy text times"
        f" {shown(quality.perplexity_ratio, 3)}"
    )


def _floor(floor: Floor) -> str:
    if floor.row_invariant:
        return "exact against itself in one batch of rows: equal to the bit, so no noise is in these figures"
    return (
        f"exact against itself in one batch of rows: KL {shown(floor.batched.kl, 6)}, same likeliest token"
        f" {shown(floor.batched.agreement, 2, 100)} %: so much another order of sums makes by itself"
    )


def _correlations(found: GateError) -> list[str]:
    """Where similar tokens err less: in what an exit writes after it, in the last layer, and in the outcome."""
    by_depth = [c for c in found.correlations if c.depth is not None and c.pearson is not None]
    kinds = {
        "v_cosine": "in V over the layers after it",
        "last_v_cosine": f"in the last layer's V (the paper: r = {found.paper_r} for early layers)",
        "kl": "in KL",
    }
    parts = [(text, mine) for name, text in kinds.items() if (mine := [c for c in by_depth if c.error == name])]
    lines = [f"similarity at an exit and its error {text}: {_where(mine)}" for text, mine in parts]
    if lines:
        lines[-1] += (
            ". Sure, here, is what the intervals of Pearson's r and Spearman's rho both tell from 0, each depth by"
            " itself, so that one in twenty may be luck"
        )
    return lines


def _where(found: Sequence[Correlation]) -> str:
    """At which depths one error surely falls or rises with similarity."""
    said = []
    for direction, word in ((1, "less"), (-1, "more")):
        if sure := [c for c in found if c.direction == direction]:
            depths = _runs([c.depth or 0 for c in sure])
            values = [_range("r", [c.pearson for c in sure]), _range("rho", [c.spearman for c in sure])]
            layers = "layer" if depths == "1" else "layers"
            said.append(f"{word} after {depths} {layers} ({', '.join(value for value in values if value)})")
    if all(c.pearson_interval is None for c in found):
        return f"too few prompts to tell ({_range('r', [c.pearson for c in found])})"
    if not said:
        return f"sure at none of {len(found)} depths ({_range('r', [c.pearson for c in found])})"
    rest = sum(c.direction == 0 for c in found)
    unsure = f", unsure at {rest} of {len(found)} depths" if rest else ""
    return f"similar tokens surely err {' and '.join(said)}{unsure}"


def _runs(depths: Sequence[int]) -> str:
    """Rising depths, three and more in a row as one: "1, 2, 5 to 8"."""
    runs: list[list[int]] = []
    for depth in depths:
        if runs and depth == runs[-1][-1] + 1:
            runs[-1].append(depth)
        else:
            runs.append([depth])
    parts = ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(depth) for depth in run] for run in runs)
    return ", ".join(part for each in parts for part in each)


def _range(name: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    low, high = (f"{pick(known, default=0):.2f}" for pick in (min, max))
    return "" if not known else f"{name} {low}" if low == high else f"{name} {low} to {high}"


def _lossless(audit: Audit) -> str:
    rates = {point.family: point.quality.tokens_per_s for point in audit.points}
    same, count = audit.lossless_same, len(audit.prompts)
    said = "on every prompt" if same == count else f"on {same} of {count} prompts"
    return f"lossless mode said exact's text {said}, at {rates['lossless']:.0f} tokens/s (exact {rates['exact']:.0f})"


def _drift(drift: Drift) -> list[str]:
    first, second, last = (plain_zero(each) for each in (drift.bins[0].from_cache, drift.second, drift.last))
    begins = f"from KL {first.mean:.4f} at the first token"
    if drift.texts < DRIFT_TEXTS:
        line = (
            f"goes {begins} to {second.mean:.4f} in the second quarter of the text and {last.mean:.4f} in the last, of"
            f" {drift.texts} texts: too few to call it growth"
        )
    else:
        rises = drift.p_rises <= TAIL
        further = "further" if rises else "later"
        rise = f"{'rises' if rises else 'does not clearly rise'} {begins} to {shown(second)} in the second quarter"
        if drift.p_grows <= TAIL:
            growth = f"grows {further}"
        else:
            growth = "shrinks later" if drift.p_shrinks <= TAIL else f"does not clearly grow {further}"
        line = (
            f"{rise} of the text and {growth}: {shown(last)} in the last quarter, a difference of"
            f" {shown(plain_zero(drift.growth))}"
        )
    texts = f"over {drift.tokens} tokens drawn from exact mode at temperature 1, past any end of text,"
    lines = [f"{texts} what the cache's errors cost {line}"]
    teeth = {tooth.since_repair: plain_zero(tooth.from_cache).mean for tooth in drift.sawtooth}
    if {0, drift.repair - 1} <= teeth.keys():
        lines.append(
            f"repaired every {drift.repair} tokens, that is {teeth[0]:.4f} right after a repair and"
            f" {teeth[drift.repair - 1]:.4f} right before the next"
        )
    return lines


def plain_zero(interval: Interval) -> Interval:
    """Rounded to four digits, without the sign of a negative zero."""
    return Interval(*(round(value, 4) + 0.0 for value in (interval.mean, interval.low, interval.high)))


def _free(audit: Audit) -> str:
    free, count = audit.free_running, len(audit.prompts)

    def said(median: int | None) -> str:
        return "more than half never part" if median is None else f"half have parted after {median} tokens"

    # Before their first repair both part alike by construction.
    repaired = said(free.repaired.median)
    if 2 * free.parted_unrepaired >= len(free.repaired.parted):
        who = "they" if free.parted_unrepaired == len(free.repaired.parted) else "half of them"
        repaired = f"no repair came before {who} parted, one is made every {audit.settings['repair']} tokens"

    ratio = shown(free.likelihood_ratio, 2)
    return (
        f"left to itself, {sum(at is not None for at in free.river.parted)} of {count} texts part from exact's before"
        f" its end ({said(free.river.median)}; repaired: {repaired}), and exact finds as much"
        f" of river's text as there is of its own, {audit.settings['tokens']} tokens at most,"
        f" {ratio} times as perplexing as that"
    )
