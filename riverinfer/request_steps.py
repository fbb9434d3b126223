"""The steps of one request on an engine: a token each, or lossless mode's rounds; on the host or on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from riverinfer.gates import FixedDepth, Gate, undefined_steps
from riverinfer.generation import Generation, warn_of_undefined
from riverinfer.lossless import LosslessRounds
from riverinfer.outputs import Step
from riverinfer.river import RiverOptions
from riverinfer.sequence import TokenSequence
from riverinfer.trace import Trace

if TYPE_CHECKING:
    from riverinfer.engine import Engine


def request_steps(
    engine: Engine,
    sequence: TokenSequence,
    generation: Generation,
    how: tuple[str, RiverOptions | None],
    similarities: bool,
) -> Iterator[Step]:
    """``Engine.run`` for a request that is made."""
    mode, river = how
    gate = None if river is None else river.make_gate()
    try:
        if mode == "lossless":
            logits = engine.read_prompt(sequence, generation, None)
            yield from _rounds(engine, sequence, generation, gate, similarities).run(logits)
        else:
            yield from _one_by_one(engine, sequence, generation, river, gate, similarities)
    finally:
        stats = generation.output.stats
        stats.undefined_similarities += undefined_steps(gate)
        warn_of_undefined(stats.undefined_similarities)


def _rounds(
    engine: Engine, sequence: TokenSequence, generation: Generation, gate: Gate | None, similarities: bool
) -> LosslessRounds:
    kind: type[LosslessRounds] = LosslessRounds
    straight = gate is None or (isinstance(gate, FixedDepth) and gate.depth == 0)
    if engine.rounds is not None and straight and generation.params.alike_every_step and not similarities:
        from riverinfer.device_rounds import DeviceRounds as kind
    return kind(engine, sequence, generation, gate=gate, similarities=similarities)


def _one_by_one(
    engine: Engine,
    sequence: TokenSequence,
    generation: Generation,
    river: RiverOptions | None,
    gate: Gate | None,
    similarities: bool,
) -> Iterator[Step]:
    """Exact and river mode: every step a token."""
    trace = None if river is None else Trace(similarities=[] if similarities else None)
    logits = engine.read_prompt(sequence, generation, river, trace)
    alone = not similarities and not (river and river.repair) and generation.params.alike_every_step
    if engine.decoder is not None and alone:
        yield generation.step(generation.choose(logits[0]), trace)
        yield from engine.decoder.single_steps(engine, sequence, generation, gate, trace)
        return
    while True:
        yield generation.step(generation.choose(logits[0]), trace)
        if generation.finished:
            return
        generation.require_room()
        generation.resume()
        repair_if_due(engine, sequence, generation, river)
        logits = engine.extend(sequence, generation.context[-1:], gate=gate, trace=trace)


def repair_if_due(engine: Engine, sequence: TokenSequence, generation: Generation, river: RiverOptions | None) -> None:
    """Rewrite K and V exactly where those of ``river.repair`` tokens are not, and count it in the stats."""
    if river is None or not river.repair or len(sequence.tokens) - sequence.exact < river.repair:
        return
    stats, began = generation.output.stats, time.perf_counter()
    with engine.stepping():
        rewritten, others = sequence.repair(generation.context[-1])
    stats.repaired += rewritten
    stats.repair_disagreements += others
    stats.repair_s += time.perf_counter() - began
