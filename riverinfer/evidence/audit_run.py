"""Measure an audit: every prompt through every setting, then long texts, then candidate gates on held-out prompts.

The logits of one text at a time are in memory, float32 [tokens, vocab] for exact and for the walk held against it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import TYPE_CHECKING

from riverinfer.checkpoint import Checkpoint
from riverinfer.errors import InvalidRequestError, RiverinferWarning
from riverinfer.evidence.audit import DRIFT_TOKENS, Audit, AuditSettings, FreeRunning
from riverinfer.evidence.audit_prompt import AUDITED, Found, OwnGates, gate_label, measure_prompt
from riverinfer.evidence.better_gates import (
    CANDIDATES,
    FEWEST,
    FOLDS,
    BetterGates,
    FittedGate,
    GateFit,
    examples,
    fit_gate,
    judged,
    wanted_depth,
)
from riverinfer.evidence.controls import Comparison, Trial, compare, run_trial
from riverinfer.evidence.drift import Drift, summarize_drift, walk_drift
from riverinfer.evidence.findings import findings
from riverinfer.evidence.forced import Text, cut_at_end, exact_texts
from riverinfer.evidence.gate_error_summary import summarize_errors
from riverinfer.evidence.prompts import require_room, require_two
from riverinfer.evidence.quality import Judge, floor_of, summarize
from riverinfer.evidence.statistics import bootstrap
from riverinfer.evidence.survival import parting, survival
from riverinfer.evidence.sweep import Point, mark_front
from riverinfer.progress import Progress
from riverinfer.river import RiverOptions

if TYPE_CHECKING:
    from riverinfer.engine import Engine


def run_audit(
    engine: Engine,
    prompts: Sequence[tuple[str, Sequence[int]]],
    settings: AuditSettings | None = None,
    *,
    own_gates: OwnGates | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Audit the engine's river at its own options (``engine.river_options``), prompts always exact.

    prompts: (text, token ids), at least two. own_gates: further gates by name, judged by the same controls. The engine
    needs a river, the whole backbone and ``drift.SLOTS`` free sequences.
    Raises InvalidRequestError for what it lacks, ContextLengthError, before anything is measured, for texts that will
    not fit, and what ``Engine.generate`` raises.
    """
    settings, began = settings or AuditSettings(), time.perf_counter()
    settings = _fitting(engine, prompts, settings)
    layers = engine.config.num_layers
    options = engine.river_options.limited(layers, engine.model.held_layers)
    texts = _texts(engine, prompts, settings.tokens, progress)
    found = Found()
    for index, text in enumerate(texts):
        measure_prompt(engine, text, index, options, settings, found, own_gates or {})
        _tell(progress, "prompts", index + 1, len(texts))
    _survival(engine, texts, options, settings, found, progress)
    drift = _drift(engine, prompts, options, settings, progress)
    better = _better(engine, texts, found, settings, progress) if settings.gates else None
    comparisons = compare(
        {gate_label(options) if name == AUDITED else name: trials for name, trials in found.trials.items()}, layers
    )
    watched = max(each.tokens for each in found.parted)
    free = FreeRunning(
        own_text=summarize([[walk] for walk in found.own], layers),
        same_tokens=bootstrap([fmean(a == b for a, b in zip(*pair, strict=True)) for pair in found.free]),
        likelihood_ratio=bootstrap(found.likelihood).exp(),
        river=survival([each.river for each in found.parted], watched),
        repaired=survival([each.repaired for each in found.parted], watched),
        parted_unrepaired=sum(each.repaired is not None and each.first_repair is None for each in found.parted),
    )
    audit = Audit(
        environment=_environment(engine),
        model=_model(engine),
        settings={
            **asdict(settings),
            "river": str(engine.river_settings),
            "river_head": "exact" if engine.model.river_head is None else "quantized",
            "options": asdict(options),
        },
        seconds=time.perf_counter() - began,
        prompts=tuple(text.name for text in texts),
        gate=gate_label(options),
        quality=comparisons[0].gate,
        floor=floor_of(found.floor, layers),
        free_running=free,
        gate_error=summarize_errors([token for tokens in found.sampled for token in tokens]),
        comparisons=comparisons,
        points=_points(found, comparisons, layers),
        lossless_same=found.lossless_same,
        drift=drift,
        better=better,
        findings=(),
    )
    return findings(audit)


def _fitting(engine: Engine, prompts: Sequence[tuple[str, Sequence[int]]], settings: AuditSettings) -> AuditSettings:
    """The settings with their ``drift_tokens``, after all that an audit needs was found."""
    if not engine.model.river:
        raise InvalidRequestError("no river is loaded", field="mode", remedy='load the engine with mode="river"')
    if engine.model.offloaded:
        raise InvalidRequestError("needs the whole backbone", field="backbone_layers", remedy="leave it out")
    if engine.config.num_layers < 2:
        raise InvalidRequestError("the model has a single layer", remedy="audit a deeper one")
    require_two(prompts)
    wanted = max(settings.tokens, settings.drift_tokens or 0)
    require_room(engine, prompts, wanted, "ask for fewer tokens (--tokens, --drift-tokens)")
    if settings.drift_tokens is not None:
        return settings
    room = engine.ctx_size - max(len(ids) for _, ids in prompts)
    return replace(settings, drift_tokens=min(DRIFT_TOKENS, room))


def _texts(
    engine: Engine, prompts: Sequence[tuple[str, Sequence[int]]], tokens: int, progress: Progress | None
) -> list[Text]:
    """Exact's answers up to their end; prompts whose answer has no second token to predict are left out."""
    texts = []
    for number, prompt in enumerate(prompts, 1):
        texts += [cut_at_end(engine, text) for text in exact_texts(engine, [prompt], tokens)]
        _tell(progress, "exact texts", number, len(prompts))
    longer = [text for text in texts if len(text.answer) > 1]
    if left_out := len(texts) - len(longer):
        said = f"{left_out} of {len(texts)} prompts are left out: exact's answer ends with its first token"
        warnings.warn(said, RiverinferWarning, stacklevel=3)
    if len(longer) < 2:
        raise InvalidRequestError("fewer than two prompts have an answer", field="prompts", remedy="give others")
    return longer


def _survival(
    engine: Engine,
    texts: Sequence[Text],
    options: RiverOptions,
    settings: AuditSettings,
    found: Found,
    progress: Progress | None,
) -> None:
    limit = max(settings.tokens, settings.drift_tokens or 0)
    for number, text in enumerate(texts, 1):
        found.parted.append(parting(engine, text.prompt, options.make_gate, settings.repair, limit))
        _tell(progress, "first other tokens", number, len(texts))


def _drift(
    engine: Engine,
    prompts: Sequence[tuple[str, Sequence[int]]],
    options: RiverOptions,
    settings: AuditSettings,
    progress: Progress | None,
) -> Drift | None:
    chosen, tokens = prompts[: settings.drift_texts], settings.drift_tokens
    if not tokens or not chosen:
        return None
    walks, total = [], len(chosen) * (tokens - 1)
    for number, (_, ids) in enumerate(chosen):

        def on_token(done: int, before: int = number * (tokens - 1)) -> None:
            _tell(progress, "drift", before + done, total, "tokens")

        seed = settings.seed + number
        walks.append(walk_drift(engine, ids, tokens, seed, options.make_gate, settings.repair, on_token))
    return summarize_drift(walks, settings.repair)


def _better(
    engine: Engine, texts: Sequence[Text], found: Found, settings: AuditSettings, progress: Progress | None
) -> BetterGates | None:
    """None where the prompts are too few to fit on."""
    layers = engine.config.num_layers
    wanted, folds = wanted_depth(layers), min(FOLDS, len(texts))
    tokens = [
        examples(sampled, confidences) for sampled, confidences in zip(found.sampled, found.confidences, strict=True)
    ]

    def fits_without(fold: int | None) -> dict[str, GateFit]:
        known = [token for index, each in enumerate(tokens) if index % folds != fold for token in each]
        return {name: fit_gate(name, known, wanted) for name in CANDIDATES}

    if min(sum(len(each) for i, each in enumerate(tokens) if i % folds != fold) for fold in range(folds)) < FEWEST:
        return None
    by_fold = [fits_without(fold) for fold in range(folds)]
    trials: dict[str, list[Trial]] = {name: [] for name in CANDIDATES}
    for index, text in enumerate(texts):
        judge = Judge(engine, text)
        for name, fit in by_fold[index % folds].items():
            trial = run_trial(judge, FittedGate(fit), shuffles=settings.shuffles, seed=settings.seed + index)
            trials[name].append(trial)
        _tell(progress, "candidate gates", index + 1, len(texts))
    return judged(fits_without(None), trials, wanted, folds, layers)


def _points(found: Found, comparisons: Sequence[Comparison], layers: int) -> tuple[Point, ...]:
    points = []
    for comparison in comparisons:
        count = len(comparison.gate.kl_by_prompt)
        depth = f"depth {comparison.gate.mean_depth:.1f}"
        family, _, setting = comparison.name.partition(", ")
        points.append(Point(family, setting, comparison.gate, count))
        points.append(Point("static", depth, comparison.static.control, count))
        if comparison.chooses:
            points.append(Point("shuffled", f"{depth} of {comparison.name}", comparison.shuffled.control, count))
    for (family, setting), walks in found.walks.items():
        points.append(Point(family, setting, summarize([[walk] for walk in walks], layers), len(walks)))
    return mark_front(points)


def _environment(engine: Engine) -> dict[str, object]:
    from riverinfer.profiling.environment import environment

    return environment(engine.model.device)


def _model(engine: Engine) -> dict[str, object]:
    config = engine.config
    return {
        "name": engine.model_dir.resolve().name,
        "family": config.family,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "parameters": Checkpoint.open(engine.model_dir).parameters,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
    }


def _tell(progress: Progress | None, label: str, done: int, total: int, unit: str = "prompts") -> None:
    if progress is not None:
        progress(f"audit: {label}", done, total, unit)
