"""The outcome of an audit in plain sentences, each with its interval."""

from __future__ import annotations

from dataclasses import replace

from riverinfer.evidence.audit import Audit
from riverinfer.evidence.drift import DRIFT_TEXTS, Drift
from riverinfer.evidence.quality import Floor
from riverinfer.evidence.statistics import TAIL, Interval


def findings(audit: Audit) -> Audit:
    """The same audit with its ``findings``."""
    lines = [_quality(audit), _floor(audit.floor), *(comparison.verdict for comparison in audit.comparisons)]
    if (line := _correlation(audit)) is not None:
        lines.append(line)
    lines.append(_lossless(audit))
    if audit.drift is not None:
        lines += _drift(audit.drift)
    lines.append(_free(audit))
    if audit.better is not None:
        lines.append(audit.better.verdict)
    return replace(audit, findings=tuple(line[0].upper() + line[1:] for line in lines))


def shown(interval: Interval, digits: int = 4, scale: float = 1) -> str:
    """Mean and interval, ``0.1014 (0.0921..0.1107)``."""
    mean, low, high = (f"{value * scale:.{digits}f}" for value in (interval.mean, interval.low, interval.high))
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
        f" {shown(floor.batched.agreement, 2, 100)} %; differences of that size say nothing"
    )


def _correlation(audit: Audit) -> str | None:
    found = [c for c in audit.gate_error.correlations if c.error == "last_v_cosine" and c.pearson is not None]
    by_depth = [c for c in found if c.depth is not None]
    if not by_depth:
        return None
    low, high = min(c.pearson or 0 for c in by_depth), max(c.pearson or 0 for c in by_depth)
    pooled = next((f", over all {c.pearson:.2f}" for c in found if c.depth is None), "")
    return (
        f"similarity at an exit and cosine of the last layer's V after it: Pearson r {low:.2f} to {high:.2f} by exit"
        f" depth{pooled}; the paper reports {audit.gate_error.paper_r}"
    )


def _lossless(audit: Audit) -> str:
    rates = {point.family: point.quality.tokens_per_s for point in audit.points}
    same, count = audit.lossless_same, len(audit.prompts)
    said = "on every prompt" if same == count else f"on {same} of {count} prompts"
    return f"lossless mode said exact's text {said}, at {rates['lossless']:.0f} tokens/s (exact {rates['exact']:.0f})"


def _drift(drift: Drift) -> list[str]:
    word = "grows" if drift.p_grows <= TAIL else "shrinks" if drift.p_shrinks <= TAIL else "does not clearly grow"
    parts = drift.bins[0].from_cache, drift.bins[-1].from_cache
    if drift.texts < DRIFT_TEXTS:
        change = f"from KL {parts[0].mean:.4f} in the first part to {parts[1].mean:.4f} in the last"
        line = f"goes {change}, of {drift.texts} texts: too few to call it growth"
    else:
        line = (
            f"{word}: from KL {shown(parts[0])} in the first eighth to {shown(parts[1])} in the last, a difference of"
            f" {shown(drift.growth)}"
        )
    lines = [f"over {drift.tokens} tokens what the cache's errors cost {line}"]
    if len(drift.sawtooth) > 1:
        first, last = drift.sawtooth[0], drift.sawtooth[-1]
        lines.append(
            f"repaired every {drift.repair} tokens, that is {first.from_cache.mean:.4f} right after a repair and"
            f" {last.from_cache.mean:.4f} right before the next"
        )
    return lines


def _free(audit: Audit) -> str:
    free, count = audit.free_running, len(audit.prompts)

    def said(median: int | None) -> str:
        return "more than half never part" if median is None else f"half have parted after {median} tokens"

    return (
        f"left to itself, {sum(at is not None for at in free.river.parted)} of {count} texts part from exact's before"
        f" its end ({said(free.river.median)}; repaired: {said(free.repaired.median)}), and exact finds river's text,"
        f" its first {audit.settings['tokens']} tokens, {free.likelihood_ratio:.2f} times as perplexing as its own"
    )
