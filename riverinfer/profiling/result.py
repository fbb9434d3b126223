"""What a profile holds, and its JSON form. Times are seconds, sizes bytes; a profile is data alone, without an engine.

The JSON form is that of the dataclasses below, field by field: objects by name, tuples as lists. ``SCHEMA`` names its
version; fields may be added under one version, none changes its meaning. README.md says the same for users.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from riverinfer.json_tree import load_tree

SCHEMA = "riverinfer.profile/1"
REPETITIVE = 0.2  # share of repeated 4-grams from which on lossless mode's figures need a word

# Operators in the order of a step. On a GPU norms are part of the matrix that follows, sums and gate of the one before.
OPERATORS = (
    "embed",
    "norm",
    "qkv",
    "rope",
    "attention",
    "o",
    "gate_up",
    "silu",
    "down",
    "gate",
    "head",
    "sampling",
    "host",
)


@dataclass(frozen=True)
class Run:
    """One generation, or one batch of them side by side; nothing looked on but a clock at each token.

    ttft_s: from the call to the first token. prefill_s: the part of it in which the prompt passed the layers.
    intervals_s: between tokens that follow each other, as whoever reads the stream sees them: a lossless round hands
    over several tokens at once. Of a batch, those of its steps. total_s: from the call to the last token.
    new_tokens, prompt_tokens: of all sequences. prompt_tokens without cached ones.
    exit_depths: in river mode, of each token. rounds, drafted, accepted, agreement, draft_s, verify_s: in lossless
    mode (``outputs.DraftStats``); agreement None where none was judged. river_drafted: those of drafted that the river
    made; the others were looked up. repeats: share of the text's token 4-grams that stood in it before; 0 to 1.
    """

    ttft_s: float
    prefill_s: float
    total_s: float
    intervals_s: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    exit_depths: tuple[int, ...] = ()
    rounds: int = 0
    drafted: int = 0
    river_drafted: int = 0
    accepted: int = 0
    agreement: float | None = None
    draft_s: float = 0.0
    verify_s: float = 0.0
    repeats: float = 0.0


@dataclass(frozen=True)
class Limit:
    """What one token of decoding must cost at least, from the shapes that were loaded and what was measured of exits.

    bytes, operations: a token's share of what a step must read (weights and cache) and compute. seconds: the larger of
    bytes over bandwidth and operations over the peak. bound: which of the two, "bandwidth" or "compute".
    achieved: that share of the measured time per token, 0 to 1 (above 1: caches served it).
    """

    bytes: float
    operations: float
    seconds: float
    bound: str
    achieved: float


@dataclass(frozen=True)
class OperatorTime:
    """All the time of one operator at one place.

    phase: "prefill" (up to the first token), "step" (a token in exact or river mode), "draft", "verify", or "host"
    (between a token and the next pass). path: "backbone", "river", or "" for what is of neither. layer: None outside
    layers. op: of ``OPERATORS``. count: how often it ran.
    """

    phase: str
    path: str
    layer: int | None
    op: str
    seconds: float
    count: int


@dataclass(frozen=True)
class Breakdown:
    """Where the time of one generation with clocks between the operators went.

    operators: those of the whole generation. They follow each other without gaps. total_s: the same time by one clock
    around it; decode_s: the part after the first token, and step_s its shares, one a step (a token, or a lossless
    round). tokens: after the first. overhead: how much longer a decoded token took than without these clocks, as a
    share (0.02 is 2 %), median over alternating pairs; mark_s: what one clock costs by itself.
    events: "cpu clock" or "cuda events".
    """

    operators: tuple[OperatorTime, ...]
    total_s: float
    decode_s: float
    step_s: tuple[float, ...]
    tokens: int
    overhead: float
    mark_s: float
    events: str


@dataclass(frozen=True)
class ModeProfile:
    """One mode: its runs, in the order they were taken, what limits it, and where its time goes.

    label: for people, with the mode's settings, such as "river, tau 0.5".
    """

    mode: str
    label: str
    runs: tuple[Run, ...]
    limit: Limit
    breakdown: Breakdown


@dataclass(frozen=True)
class Machine:
    """What the machine can do, measured at the time. bytes_per_s: reading, on a GPU copying. operations_per_s: of
    matrix products in the model's dtype, a product and a sum counted as two."""

    bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True)
class Profile:
    """A profile. environment, model, settings: for people and for telling whether two profiles compare.

    load_s: ``Engine.load``. peak_bytes: the most memory until the last run, of all that is loaded, of the process on a
    CPU, by torch on a GPU; None where it cannot be told. modes: by name, "exact", "river", "lossless", as asked for.
    """

    environment: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    load_s: float
    peak_bytes: int | None
    machine: Machine
    modes: dict[str, ModeProfile] = field(default_factory=dict)

    def as_json(self) -> str:
        """The JSON text, with a line break at its end."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False) + "\n"


def percentile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between the sorted values, as numpy's default; ``share`` from 0 to 1."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def jitter(values: Sequence[float]) -> float:
    """Mean absolute difference of intervals that follow each other; 0.0 of fewer than two."""
    return fmean(abs(b - a) for a, b in pairwise(values)) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Metric:
    """A figure of one run. ``better``: "lower", "higher" or "" for what is neither. scale: from SI to ``unit``."""

    name: str
    unit: str
    scale: float
    better: str


METRICS = (
    Metric("time to first token", "ms", 1e3, "lower"),
    Metric("inter-token mean", "ms", 1e3, "lower"),
    Metric("inter-token p50", "ms", 1e3, "lower"),
    Metric("inter-token p90", "ms", 1e3, "lower"),
    Metric("inter-token p99", "ms", 1e3, "lower"),
    Metric("inter-token max", "ms", 1e3, "lower"),
    Metric("jitter", "ms", 1e3, "lower"),
    Metric("prefill (pp)", "tokens/s", 1, "higher"),
    Metric("decode (tg)", "tokens/s", 1, "higher"),
    Metric("exit depth", "layers", 1, ""),
    Metric("tokens a round", "tokens", 1, ""),
    Metric("drafts accepted", "%", 100, ""),
)


def figures(run: Run) -> dict[str, float | None]:
    """The figures of ``METRICS`` of one run, in SI units and shares; None for those that the run has not."""
    waits = run.intervals_s
    return {
        "time to first token": run.ttft_s,
        "inter-token mean": fmean(waits) if waits else None,
        "inter-token p50": percentile(waits, 0.5) if waits else None,
        "inter-token p90": percentile(waits, 0.9) if waits else None,
        "inter-token p99": percentile(waits, 0.99) if waits else None,
        "inter-token max": max(waits) if waits else None,
        "jitter": jitter(waits) if waits else None,
        "prefill (pp)": run.prompt_tokens / run.prefill_s if run.prefill_s else None,
        "decode (tg)": _decode_rate(run),
        "exit depth": _decoded_depth(run),
        # The first token comes with the prompt.
        "tokens a round": (run.new_tokens - 1) / run.rounds if run.rounds else None,
        "drafts accepted": run.accepted / run.drafted if run.drafted else None,
    }


def _decoded_depth(run: Run) -> float | None:
    """Mean over tokens after the first ones, which come with their prompts and passed every layer."""
    each = len(run.intervals_s) + 1
    depths = [depth for i, depth in enumerate(run.exit_depths) if i % each]
    return fmean(depths) if depths else None


def _decode_rate(run: Run) -> float | None:
    """Tokens after the first ones over the time after them."""
    seconds = sum(run.intervals_s)
    if not seconds:
        return None
    sequences = run.new_tokens / (len(run.intervals_s) + 1)
    return len(run.intervals_s) * sequences / seconds


def notes(profile: Profile) -> list[str]:
    """What to know before figures are compared with each other."""
    found = []
    batch = profile.settings.get("batch", 1)
    if batch > 1:
        found.append(
            f"inter-token figures are of a step, which gives {batch} tokens;"
            " the limit and operators are a token's share of it"
        )
    mode = profile.modes.get("lossless")
    share = fmean(run.repeats for run in mode.runs) if mode is not None and mode.runs else 0.0
    if share >= REPETITIVE:
        found.append(
            f"{share * 100:.0f} % of lossless mode's text repeats itself (4-grams), which makes it easy to draft:"
            " --temp 1 writes another"
        )
    return found


def load_profile(path: Path) -> Profile:
    """Read a profile's JSON file. Raises InvalidRequestError for what is none, or of another version."""
    return load_tree(path, Profile, SCHEMA, "riverinfer profile --save")
