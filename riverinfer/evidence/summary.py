"""An audit as text for a terminal: what it found in sentences, then tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from riverinfer.evidence.audit import Audit
from riverinfer.evidence.drift import PATHS, Drift
from riverinfer.evidence.findings import plain_zero, shown
from riverinfer.evidence.gate_error_summary import GateError
from riverinfer.evidence.statistics import TAIL

Rows = list[list[str]]
MOST_DEPTHS = 8  # of exits that the terminal shows


def terminal(audit: Audit, *, width: int = 100) -> str:
    """What ``riverinfer audit`` prints, with a line break at its end. ``width`` wraps sentences; tables keep theirs."""
    settings, model = audit.settings, audit.model
    head = (
        f"Audit of {model['name']} ({model['layers']} layers, {model['dtype']}), river {settings['river']},"
        f" {audit.gate}; {len(audit.prompts)} prompts x up to {settings['tokens']} tokens, {audit.seconds:.0f} s."
        " In brackets 95 % intervals, bootstrap over prompts."
    )
    blocks = [textwrap.wrap(head, width)]
    blocks.append([line for finding in audit.findings for line in _bullet(finding, width)])
    blocks.append(["Quality against speed, teacher-forced (* on the front)", *_table(_points(audit))])
    title = (
        "Gates against their controls: KL of the control less the gate's, and how likely luck alone gives as much that"
        " way (p: sign flips over prompts, one-sided, Holm's correction for the settings that are judged together;"
        f" {TAIL:g} or less is sure, whatever a single interval says)"
    )
    blocks.append([*textwrap.wrap(title, width), *_table(_controls(audit))])
    all_depths, depths = audit.gate_error.depths(), audit.gate_error.depths(MOST_DEPTHS)
    some = "" if len(depths) == len(all_depths) else f", {len(depths)} of {len(all_depths)} depths"
    title = f"Errors that exits cause (r/rho: Pearson and Spearman of similarity; V over the layers after it){some}"
    blocks.append([title, *_table(_errors(audit, depths))])
    if audit.drift is not None:
        blocks.append(
            [f"Drift over {audit.drift.tokens} tokens, {audit.drift.texts} texts", *_table(drift_rows(audit.drift))]
        )
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _bullet(text: str, width: int) -> list[str]:
    return textwrap.wrap(text + ".", width, initial_indent="- ", subsequent_indent="  ")


def _table(rows: Rows) -> list[str]:
    """The first row heads; the first column is flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _points(audit: Audit) -> Rows:
    rows = [["", "depth", "KL", "top-1 %", "perplexity x", "tokens/s"]]
    for point in sorted(audit.points, key=lambda point: -point.quality.tokens_per_s):
        quality = point.quality
        name = f"{'*' if point.front else ' '} {point.family}{', ' if point.setting else ''}{point.setting}"
        few = "" if point.prompts == len(audit.prompts) else f" ({point.prompts} prompts)"
        rows.append(
            [
                name + few,
                f"{quality.mean_depth:.1f}",
                shown(quality.kl, 3),
                f"{quality.agreement.mean * 100:.1f}",
                f"{quality.perplexity_ratio.mean:.3f}",
                f"{quality.tokens_per_s:.0f}",
            ]
        )
    return rows


def _controls(audit: Audit) -> Rows:
    rows = [["gate", "depth", "KL", "shuffled less it", "p", "static less it", "p"]]
    held_out = [candidate.comparison for candidate in audit.better.candidates] if audit.better is not None else []
    named = [(each.name, each) for each in audit.comparisons] + [(f"{each.name}, held out", each) for each in held_out]
    for name, each in named:
        rows.append(
            [
                name,
                f"{each.gate.mean_depth:.1f}",
                f"{each.gate.kl.mean:.4f}",
                *(
                    cell
                    for against in (each.shuffled, each.static)
                    for cell in (
                        (
                            shown(against.difference),
                            f"{against.p:.2g}" if against.judged else "too few",
                        )
                        if each.chooses
                        else ("the same", "")
                    )
                ),
            ]
        )
    return rows


def _errors(audit: Audit, depths: Sequence[int]) -> Rows:
    found: GateError = audit.gate_error
    names, against = ("v_cosine", "v_l2", "v_norm"), {"v_cosine": "V cosine", "last_v_cosine": "last V", "kl": "KL"}
    heads = ["V cosine", "V L2", "V norm", *(f"{text} r/rho" for text in against.values())]
    rows = [["depth", "similarity", "KL", *heads]]
    for depth in depths:
        exits = [exit for exit in found.exits if exit.depth == depth]
        by_error = {c.error: c for c in found.correlations if c.depth == depth}
        rows.append(
            [
                str(depth),
                _mean([exit.similarity for exit in exits]),
                _mean([exit.kl for exit in exits]),
                *(_mean([getattr(exit.error, name) for exit in exits]) for name in names),
                *(f"{_r(by_error[name].pearson)}/{_r(by_error[name].spearman)}" for name in against),
            ]
        )
    return rows


def _r(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


def drift_rows(drift: Drift) -> Rows:
    """By part of the text, a row each below the heads: tokens, KL of each path, what the cache cost, agreement."""
    rows = [
        [
            "tokens",
            *(f"KL {path.replace('_', ' ')}" for path in PATHS),
            "chained less one step",
            *(f"top-1 % {path.replace('_', ' ')}" for path in PATHS),
        ]
    ]
    parts = (
        [
            str(part.end) if part.end - part.first == 1 else f"{part.first + 1}..{part.end}",
            *(f"{part.kl[path].mean:.4f}" for path in PATHS),
            shown(plain_zero(part.from_cache)),
            *(f"{part.agreement[path] * 100:.1f}" for path in PATHS),
        ]
        for part in drift.bins
    )
    return [*rows, *parts]
