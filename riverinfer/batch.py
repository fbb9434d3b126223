"""Several prompts at once, one token of each a step: the matrices are read once for all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from riverinfer.errors import ContextLengthError, InvalidRequestError
from riverinfer.gates import Gate, undefined_steps
from riverinfer.generation import Generation, warn_of_undefined
from riverinfer.outputs import Output
from riverinfer.request_steps import repair_if_due
from riverinfer.river import RiverOptions
from riverinfer.sampling import SamplingParams
from riverinfer.sequence import TokenSequence
from riverinfer.trace import Trace

if TYPE_CHECKING:
    from riverinfer.engine import Engine


def generate_batch(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    mode: str,
    river: RiverOptions | None,
) -> list[Output]:
    """Continue each prompt to its end; see ``Engine.generate_batch``. Prompts are read one after the other."""
    if mode == "lossless":
        river = None  # side by side the backbone's matrices are read once for all: there is little left to gain
    began = time.perf_counter()
    members: list[_Member] = []
    try:
        for ids, wanted in zip(prompts, params, strict=True):
            sequence = TokenSequence(engine.model, engine.ctx_size)
            generation = engine.generation(ids, wanted, Output(), began=began)
            member = _Member(sequence, generation, river)
            members.append(member)
            engine.slots.acquire(sequence)
            logits = engine.read_prompt(sequence, generation, river, member.trace)
            generation.step(generation.choose(logits[0]), member.trace)
        together = None
        if river is not None and river.scope == "batch":
            together = river.make_gate("min")
        for member in members:
            member.generation.resume()  # the prompts after its own are not its time
        active = members
        while active := [member for member in active if not member.done]:
            for member in active:
                repair_if_due(engine, member.sequence, member.generation, river)
            decoder = engine.decoder
            if decoder is not None and len(active) <= decoder.most and together is None and _alike(active):
                _step_on_device(engine, active)
                continue
            before = undefined_steps(together)
            logits = engine.extend_batch(
                [member.sequence for member in active],
                [member.generation.context[-1] for member in active],
                gates=[together] if together is not None else [m.gate for m in active if m.gate is not None],
                traces=[member.trace for member in active if member.trace is not None],
            )
            for row, member in enumerate(active):
                member.undefined += undefined_steps(together) - before
                member.generation.step(member.generation.choose(logits[row]), member.trace)
    finally:
        for member in members:
            engine.slots.release(member.sequence, keep=False)
            member.generation.output.stats.undefined_similarities += member.undefined + undefined_steps(member.gate)
        warn_of_undefined(sum(member.generation.output.stats.undefined_similarities for member in members))
    full = next((member.generation for member in members if not member.generation.finished), None)
    outputs = [member.generation.output for member in members]
    if full is not None:
        raise ContextLengthError(
            f"the context of {engine.ctx_size} tokens is full",
            remedy="set max_tokens, or load with a larger --ctx-size (ctx_size)",
            output=full.output,
            outputs=outputs,
        )
    return outputs


def _alike(members: Sequence[_Member]) -> bool:
    """Whether the device can choose for all of them, with the same rotary frequencies, that none has to change."""
    if not all(m.generation.params.alike_every_step and not m.sequence.crosses_regime(1) for m in members):
        return False
    rope = members[0].sequence.model.rope
    return len({rope.regime(len(member.sequence.tokens) + 1) for member in members}) == 1


def _step_on_device(engine: Engine, members: list[_Member]) -> None:
    with engine.stepping():
        assert engine.decoder is not None
        pairs = [(member.sequence, member.generation) for member in members]
        told = engine.decoder.step_together(tuple(members), pairs, members[0].gate)
    for member, (sampled, depth, undefined) in zip(members, told, strict=True):
        if member.trace is not None:
            member.trace.depth = depth
        member.undefined += undefined
        member.generation.step(sampled, member.trace)


class _Member:
    """One sequence of the batch."""

    def __init__(self, sequence: TokenSequence, generation: Generation, river: RiverOptions | None) -> None:
        self.sequence, self.generation = sequence, generation
        self.gate: Gate | None = None
        self.trace: Trace | None = None
        self.undefined = 0  # steps that the gate for all kept in the backbone for want of a number
        if river is not None:
            self.trace = Trace()
            if river.scope == "sequence":
                self.gate = river.make_gate()

    @property
    def done(self) -> bool:
        return self.generation.finished or self.generation.full


def check_batch(prompts: Sequence[object], params: Sequence[object], slots: int) -> None:
    """Raise InvalidRequestError for no prompts, more than ``slots``, or parameters that do not pair with them."""
    if isinstance(prompts, str) or not prompts:
        raise InvalidRequestError("is not a list of prompts", field="prompts", remedy="give at least one")
    if len(prompts) > slots:
        raise InvalidRequestError(
            f"are {len(prompts)}, the engine holds {slots} sequences",
            field="prompts",
            remedy="give fewer at a time or load with more max_sequences",
        )
    if len(params) != len(prompts):
        raise InvalidRequestError(
            f"are {len(params)} for {len(prompts)} prompts", field="params", remedy="give one for all, or one each"
        )
