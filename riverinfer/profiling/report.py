"""A profile as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from statistics import median
from typing import Any

from riverinfer.memory import gib
from riverinfer.profiling import figures as drawings
from riverinfer.profiling.result import METRICS, ModeProfile, Profile, figures, notes
from riverinfer.profiling.spans import Recording, TokenSpan
from riverinfer.profiling.tables import DASH, metric_label, number

MOST_TOKENS = 400  # of a generation's text that are shown
SOURCES = ("river", "lookup", "backbone")


@dataclass(frozen=True)
class Cell:
    """A figure of one mode: the median over runs, and where the runs differ their range."""

    middle: str
    spread: str = ""


def report_html(profile: Profile, recordings: Sequence[Recording]) -> str:
    """The page, to be written as UTF-8; the same arguments give the same text.

    recordings: the generations with clocks, whose texts are shown; without them the page lacks that part alone.
    Raises InvalidRequestError without matplotlib.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    modes = list(profile.modes.values())
    page = environment.from_string(source).render(
        title=str(profile.model.get("name") or "a model"),
        summary=summary(profile),
        notes=notes(profile),
        subtitle=_subtitle(profile),
        modes=modes,
        colours=drawings.MODE_COLOURS,
        other=drawings.OTHER,
        rows=list(_rows(profile)),
        runs=max((len(mode.runs) for mode in modes), default=0),
        latency=Markup(drawings.latency(profile)),
        histogram=Markup(drawings.histogram(profile)),
        roofline=Markup(drawings.roofline(profile)),
        token_bars=Markup(drawings.token_bars(profile)),
        layer_bars=Markup(drawings.layer_bars(profile)),
        overheads=[f"{mode.mode} {100 * mode.breakdown.overhead:+.1f}\xa0%" for mode in modes],
        mark=number(1e6 * median(mode.breakdown.mark_s for mode in modes)) if modes else DASH,
        clocks=" and ".join(dict.fromkeys(mode.breakdown.events for mode in modes)),
        texts=[_text(recording) for recording in recordings if recording.tokens],
        facts=_facts(profile),
    )
    # Lone surrogates have no UTF-8, and HTML has no NUL.
    return page.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")


def summary(profile: Profile) -> str:
    """What to know if nothing else is read: how fast, how much faster than exact, how far from the limit."""
    rates = {name: rate for name, mode in profile.modes.items() if (rate := _middle(mode, "decode (tg)"))}
    if not rates:
        return "No token after the first was generated."
    base = "exact" if "exact" in rates else next(iter(rates))
    others = sorted((name for name in rates if name != base), key=rates.__getitem__, reverse=True)
    parts = [f"{name.capitalize()} answers {rates[name] / rates[base]:.1f}x as fast as {base}" for name in others[:1]]
    parts += [f"{name} {rates[name] / rates[base]:.1f}x" for name in others[1:]]
    limit = profile.modes[base].limit
    bound = "memory" if limit.bound == "bandwidth" else "arithmetic"
    name = base if others else base.capitalize()
    speed = f"{name} decodes {number(rates[base])} tokens a second" + (": " if others else ", ")
    reach = f"{100 * limit.achieved:.0f} % of what this machine's {bound} allows"
    return "; ".join([", ".join(parts), speed + reach]) + "." if others else f"{speed}{reach}."


def _subtitle(profile: Profile) -> str:
    env, model = profile.environment, profile.model
    device = env.get("device_name") if str(env.get("device", "")).startswith("cuda") else env.get("cpu")
    threads = f"{env['threads']} threads" if env.get("threads") and env.get("device") == "cpu" else None
    peak = None if profile.peak_bytes is None else f"peak memory {gib(profile.peak_bytes)}"
    parts = [model.get("dtype"), device or env.get("device"), threads, peak, env.get("date")]
    return " · ".join(str(part) for part in parts if part)


def _middle(mode: ModeProfile, name: str) -> float | None:
    known = [value for run in mode.runs if (value := figures(run)[name]) is not None]
    return median(known) if known else None


def _rows(profile: Profile) -> Iterator[tuple[str, list[Cell]]]:
    """Label and a cell a mode, of all metrics that any mode has, and of what limits each mode."""
    modes = list(profile.modes.values())
    found = [[figures(run) for run in mode.runs] for mode in modes]
    for metric in METRICS:
        values = [[each[metric.name] for each in runs] for runs in found]
        cells = [_cell([value * metric.scale for value in each if value is not None]) for each in values]
        if any(cell.middle != DASH for cell in cells):
            yield metric_label(metric, profile.settings), cells
    yield "limit, ms a token", [Cell(number(1e3 * mode.limit.seconds), f"by {mode.limit.bound}") for mode in modes]
    yield (
        "limit reached, %",
        [Cell(f"{100 * mode.limit.achieved:.0f}", f"reads {drawings.prefixed(mode.limit.bytes)}B") for mode in modes],
    )


def _cell(values: Sequence[float]) -> Cell:
    if not values:
        return Cell(DASH)
    middle, low, high = median(values), min(values), max(values)
    return Cell(number(middle), f"{number(low, middle)} to {number(high, middle)}" if high > low else "")


def _text(recording: Recording) -> dict[str, Any]:
    """The first sequence's text, each token with its class of colour and what it says when pointed at."""
    mine = [token for token in recording.tokens if token.sequence == recording.tokens[0].sequence]
    # The first token comes with the prompt, which passes all layers.
    deepest = max((token.exit_depth for token in mine[1:] if token.exit_depth is not None), default=0)
    return {
        "mode": recording.mode,
        "by": "depth" if deepest else "source" if any(token.source for token in mine) else "",
        "tokens": [(token.text, _shade(token, deepest), _hint(token)) for token in mine[:MOST_TOKENS]],
        "left_out": max(0, len(mine) - MOST_TOKENS),
    }


def _shade(token: TokenSpan, deepest: int) -> str:
    if token.exit_depth is not None and deepest:
        return f"d{min(round(4 * token.exit_depth / deepest), 4)}"
    return f"s-{token.source}" if token.source in SOURCES else ""


def _hint(token: TokenSpan) -> str:
    parts = [f"token {token.index}", f"{number(1e3 * (token.end - token.begin))} ms"]
    if token.exit_depth is not None:
        parts.append(f"exit depth {token.exit_depth}")
    if token.source is not None:
        parts.append(f"from the {token.source}")
    return ", ".join(parts)


def _facts(profile: Profile) -> dict[str, dict[str, str]]:
    machine = profile.machine
    measured = {
        "memory bandwidth": f"{drawings.prefixed(machine.bytes_per_s)}B/s",
        "matrix products": f"{drawings.prefixed(machine.operations_per_s)}op/s",
        "time to load": f"{number(profile.load_s)} s",
    }
    return {
        "Machine": {**_plain(profile.environment), **measured},
        "Model": _plain(profile.model),
        "Settings": _plain(profile.settings),
    }


def _plain(values: Mapping[str, Any]) -> dict[str, str]:
    known = {name: value for name, value in values.items() if value is not None and value != ""}
    return {
        name.replace("_", " "): f"{value:,}" if isinstance(value, int) and abs(value) > 9999 else str(value)
        for name, value in known.items()
    }
