"""An audit as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from importlib import resources
from typing import Any

from riverinfer.evidence import report_curves as curves
from riverinfer.evidence import report_errors as caused
from riverinfer.evidence import report_figures as drawings
from riverinfer.evidence.audit import Audit
from riverinfer.evidence.findings import shown
from riverinfer.evidence.quality import Quality
from riverinfer.evidence.statistics import Interval
from riverinfer.evidence.summary import drift_rows
from riverinfer.profiling.report import _plain


def report_html(audit: Audit) -> str:
    """The page, to be written as UTF-8; the same audit gives the same text.

    Raises InvalidRequestError without matplotlib.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    errors, better = audit.gate_error, audit.better
    full = next((point for point in audit.points if point.family == "full river"), None)
    figures = {
        "by_prompt": drawings.by_prompt(audit),
        "similarity": drawings.similarity(audit),
        "scatter": caused.scatter(errors, "v_cosine"),
        "scatter_last": caused.scatter(errors, "last_v_cosine"),
        "correlations": caused.correlations(errors),
        "correlation_map": caused.correlation_map(errors),
        "layer_errors": caused.layer_errors(errors),
        "controls": drawings.controls("controls", audit.comparisons),
        "candidates": drawings.controls(
            "candidates", [each.comparison for each in better.candidates] if better else []
        ),
        "depths": drawings.depths(audit.comparisons),
        "sweep": drawings.sweep(audit.comparisons, full),
        "pareto": curves.pareto(audit.points),
        "drift": curves.drift(audit.drift),
        "sawtooth": curves.sawtooth(audit.drift),
        "survival": curves.survival(audit),
    }
    page = environment.from_string(source).render(
        title=str(audit.model.get("name") or "a model"),
        audit=audit,
        layers=audit.model.get("layers"),
        river=audit.settings.get("river"),
        tokens=audit.settings.get("tokens"),
        repair=audit.settings.get("repair"),
        summary=summary(audit),
        subtitle=_subtitle(audit),
        figures={name: Markup(drawn) for name, drawn in figures.items()},
        quality=_quality(audit),
        pooled=caused.correlation(errors, None, "last_v_cosine"),
        correlation_rows=caused.correlation_rows(errors),
        error_heads=list(caused.NAMES.values()),
        error_rows=caused.error_rows(errors),
        idle=[each.name for each in audit.comparisons if not each.chooses],
        points=_points(audit),
        drift_rows=drift_rows(audit.drift) if audit.drift else [],
        facts=_facts(audit),
    )
    # Lone surrogates have no UTF-8, and HTML has no NUL.
    return page.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")


def summary(audit: Audit) -> list[str]:
    """What to know if nothing else is read: how fast, how true, and whether choosing per token is worth anything."""
    quality, layers = audit.quality, audit.model.get("layers")
    exact = next((point.quality.tokens_per_s for point in audit.points if point.family == "exact"), None)
    speed = f", {quality.tokens_per_s / exact:.1f}x as fast as the whole model" if exact else ""
    lines = [
        f"Words that are generated pass {quality.mean_depth:.1f} of {layers} layers in full precision{speed};"
        f" {100 * quality.agreement.mean:.0f} % of the time the whole model would have liked the same next word best."
    ]
    choosing = [each for each in audit.comparisons if each.chooses]
    if choosing:
        counts = sum(each.shuffled.beats for each in choosing), sum(each.static.beats for each in choosing)
        settings = f"{len(choosing)} setting{'s' if len(choosing) > 1 else ''} at which gates choose"
        lines.append(
            f"Of {settings}, {counts[0]} did surely better than the same depths dealt out at random,"
            f" {counts[1]} surely better than one depth for all."
        )
    return lines


def _quality(audit: Audit) -> list[tuple[str, list[str]]]:
    free = audit.free_running
    named = [
        (f"river, {audit.gate}", audit.quality),
        *[(point.family, point.quality) for point in audit.points if point.family == "full river"],
        ("river, over its own text", free.own_text),
        ("floor: exact once more", audit.floor.again),
        ("floor: exact, tokens in one batch", audit.floor.batched),
    ]
    return [(name, _row(quality)) for name, quality in named]


def _points(audit: Audit) -> list[tuple[str, bool, list[str]]]:
    found = []
    for point in sorted(audit.points, key=lambda point: -point.quality.tokens_per_s):
        name = ", ".join(part for part in (point.family, point.setting) if part)
        few = "" if point.prompts == len(audit.prompts) else f" ({point.prompts} prompts)"
        found.append((name + few, point.front, _row(point.quality)))
    return found


def _row(quality: Quality) -> list[str]:
    ratio = quality.perplexity_ratio
    return [
        f"{quality.mean_depth:.1f}",
        shown(quality.kl, 4 if quality.kl.mean >= 0.01 or quality.kl.mean == 0 else 6),
        shown(quality.agreement, 1, 100),
        shown(ratio, 3) if ratio.mean < 1000 else _large(ratio),
        f"{quality.tokens_per_s:.0f}",
    ]


def _large(interval: Interval) -> str:
    return f"{interval.mean:.0e} ({interval.low:.0e}..{interval.high:.0e})"


def _subtitle(audit: Audit) -> str:
    env, model = audit.environment, audit.model
    device = env.get("device_name") or env.get("cpu") or env.get("device")
    parts = [model.get("dtype"), device, f"{audit.seconds:.0f} s", env.get("date")]
    return " · ".join(str(part) for part in parts if part)


def _facts(audit: Audit) -> dict[str, dict[str, str]]:
    settings: dict[str, Any] = {}
    for name, value in audit.settings.items():
        if isinstance(value, dict):
            settings.update({f"river {key}": each for key, each in value.items()})
        else:
            settings[name] = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return {
        "Machine": _plain(audit.environment),
        "Model": _plain(audit.model),
        "Settings": _plain(settings),
    }
