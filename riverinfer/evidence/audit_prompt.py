"""Everything about one prompt of an audit: each setting over exact's text, exits that are forced, and free running."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING

from riverinfer.evidence.audit import AuditSettings
from riverinfer.evidence.better_gates import confidence, wanted_depth
from riverinfer.evidence.controls import Trial, run_trial
from riverinfer.evidence.forced import Text, walk_forced
from riverinfer.evidence.gate_error import Sampled, exit_depths, sample_errors
from riverinfer.evidence.quality import Judge, Scored, exact_again
from riverinfer.evidence.survival import Parting
from riverinfer.evidence.sweep import OTHERS, lossless_text, walk_strategy
from riverinfer.gates import FixedDepth, Gate, always
from riverinfer.river import RiverOptions
from riverinfer.sampling import SamplingParams

if TYPE_CHECKING:
    from riverinfer.engine import Engine

AUDITED = "audited"

OwnGates = Mapping[str, Callable[[Judge], Gate]]
"""Gates by name, made for each text; a gate may know what the judge knows of it, exact's own walk."""


@dataclass
class Found:
    """What was measured, a value a prompt in each list."""

    trials: dict[str, list[Trial]] = field(default_factory=dict)
    walks: dict[tuple[str, str], list[Scored]] = field(default_factory=dict)  # by family and setting
    floor: list[tuple[Scored, Scored, float]] = field(default_factory=list)
    own: list[Scored] = field(default_factory=list)
    likelihood: list[float] = field(default_factory=list)  # log of exact's perplexity ratio of the two texts
    free: list[tuple[Sequence[int], Sequence[int]]] = field(default_factory=list)
    parted: list[Parting] = field(default_factory=list)
    sampled: list[list[Sampled]] = field(default_factory=list)
    confidences: list[list[float]] = field(default_factory=list)
    lossless_same: int = 0


def gate_label(options: RiverOptions) -> str:
    """The audited setting for people."""
    gate = options.make_gate()
    if isinstance(gate, FixedDepth):
        if options.gate == "never" and options.max_depth is None:
            return "gate never"
        return "gate always" if gate.depth == 0 else f"fixed, {gate.depth} layer{'' if gate.depth == 1 else 's'}"
    label = f"similarity, tau {options.tau:g}" if isinstance(options.tau, (int, float)) else "similarity, tau by layer"
    least, most = options.min_depth, options.max_depth
    if (least, most) != (RiverOptions.min_depth, None):
        label += f", depth {least} to {'all' if most is None else most}"
    return label


def measure_prompt(
    engine: Engine,
    text: Text,
    index: int,
    options: RiverOptions,
    settings: AuditSettings,
    found: Found,
    own_gates: OwnGates,
) -> None:
    """Add a prompt's figures to ``found``. Raises what ``walk_forced`` and ``Engine.generate`` raise."""
    judge = Judge(engine, text)

    def note(family: str, setting: str, scored: Scored) -> None:
        found.walks.setdefault((family, setting), []).append(scored)

    gates: dict[str, Gate] = {AUDITED: options.make_gate()}
    swept = options if options.gate == "similarity" else RiverOptions()
    for tau in settings.taus:
        at = replace(swept, tau=tau)
        if gate_label(at) != gate_label(options):
            gates[gate_label(at)] = at.make_gate()
    gates |= {name: make(judge) for name, make in own_gates.items()}
    for name, gate in gates.items():
        trial = run_trial(judge, gate, shuffles=settings.shuffles, seed=settings.seed + index)
        found.trials.setdefault(name, []).append(trial)
    note("exact", "", judge.score(judge.exact))
    note("repaired", f"every {settings.repair} tokens", judge.walk(options.make_gate(), repair=settings.repair))
    river = walk_forced(engine, text, always())
    note("full river", str(engine.river_settings), judge.score(river))
    if settings.gates:
        half = walk_forced(engine, text, FixedDepth(wanted_depth(engine.config.num_layers)))
        found.confidences.append([confidence(row) for row in half.logits])
    if not engine.model.rope.scaled_by_length(len(text.prompt + text.answer)):
        for name, kind in OTHERS.items():
            note(name, gate_label(options), judge.score(walk_strategy(engine, kind, text, options.make_gate())))
    scored, same = lossless_text(engine, text)
    note("lossless", "", scored)
    found.lossless_same += same
    if index < settings.floor_prompts:
        found.floor.append(exact_again(judge))
    depths = exit_depths(engine.config.num_layers, settings.exits)
    found.sampled.append(sample_errors(engine, text, index, depths, settings.samples, seed=settings.seed))
    _run_free(engine, judge, options, settings, found)


def _run_free(engine: Engine, judge: Judge, options: RiverOptions, settings: AuditSettings, found: Found) -> None:
    text = judge.text
    params = SamplingParams(max_tokens=len(text.answer), ignore_eos=True)
    how = RiverOptions(options.tau, options.min_depth, options.max_depth, options.gate)
    said = tuple(engine.generate(list(text.prompt), params, mode="river", river=how).token_ids)
    found.free.append((text.answer, said))
    own = Judge(engine, Text(text.name, text.prompt, said))
    found.own.append(own.walk(options.make_gate()))
    found.likelihood.append(_nll(own) - _nll(judge))


def _nll(judge: Judge) -> float:
    """Nats a token that exact finds its text unlikely by."""
    logits = judge.exact.logits.log_softmax(-1)
    return -fmean(float(row[token]) for row, token in zip(logits, judge.text.answer[1:], strict=True))
