"""Teacher forcing: the exact text once more, token by token through a gate, so that positions compare.

A token that left early never leads the text astray here, as it may in use (see ``free``); what it left in the cache is
read by all later ones, as in use.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from riverinfer.errors import InvalidRequestError
from riverinfer.gates import Gate
from riverinfer.sampling import SamplingParams
from riverinfer.sequence import TokenSequence
from riverinfer.trace import Trace

if TYPE_CHECKING:
    from riverinfer.engine import Engine


@dataclass(frozen=True)
class Text:
    """A prompt, and what exact mode says after it, greedily and past any end of text: token ids."""

    name: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass
class Walked:
    """One walk over the T = len(answer) - 1 tokens that have another after them.

    logits: float32 [T, vocab], row i the prediction of ``answer[i + 1]``. depths: backbone layers of each token.
    seconds: of the walk, its repairs included. similarities: float32 [T, L], of each layer, or None. kv: the cache as
    the walk left it, float32 [L, 2, T, Hkv, D], or None.
    """

    logits: Tensor
    depths: list[int]
    seconds: float
    similarities: Tensor | None = None
    kv: Tensor | None = None


@runtime_checkable
class Listener(Protocol):
    """A gate that wants to know what its steps predicted."""

    def heard(self, logits: Tensor) -> None:
        """Called after each step with its logits, float32 [1, vocab]."""
        ...


def exact_texts(engine: Engine, prompts: Iterable[tuple[str, Sequence[int]]], tokens: int) -> list[Text]:
    """``tokens`` greedy tokens of exact mode after each of the (name, ids).

    Raises what ``Engine.generate`` raises, ContextLengthError among it.
    """
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return [
        Text(name, tuple(ids), tuple(engine.generate(ids, params, mode="exact").token_ids)) for name, ids in prompts
    ]


def cut_at_end(engine: Engine, text: Text) -> Text:
    """The same text up to its first token that ends one, that token included."""
    ends = {*engine.generation_config.eos_token_ids, engine.tokenizer.eos_token_id}
    end = next((i for i, token in enumerate(text.answer, 1) if token in ends), len(text.answer))
    return replace(text, answer=text.answer[:end])


def walk_forced(
    engine: Engine, text: Text, gate: Gate | None, *, repair: int = 0, similarities: bool = False, kv: bool = False
) -> Walked:
    """A text through ``gate`` (None: exact), its prompt exact; K and V made exact every ``repair`` tokens, 0 never.

    ``similarities``, ``kv``: keep them. Similarities are those of the layer-by-layer walk, in both copies.
    """
    sequence = TokenSequence(engine.model, engine.ctx_size)
    engine.slots.acquire(sequence)
    try:
        engine.extend(sequence, text.prompt)
        rows: list[Tensor] = []
        depths: list[int] = []
        seen: list[Tensor] = []
        began = now(engine.model.device)
        for token in text.answer[:-1]:
            if repair and len(sequence.tokens) - sequence.exact >= repair:
                with engine.stepping():
                    sequence.repair(token)
            trace = Trace(similarities=[] if similarities else None)
            rows.append(engine.extend(sequence, [token], gate=gate, trace=trace))
            if isinstance(gate, Listener):
                gate.heard(rows[-1])
            depths.append(trace.depth)
            if trace.similarities:
                seen.append(torch.stack([values[-1] for values in trace.similarities]))
        seconds = now(engine.model.device) - began
        span = slice(len(text.prompt), len(sequence.tokens))
        held = [torch.stack((k[:, span], v[:, span])).float().transpose(1, 2) for k, v in sequence._kv] if kv else []
        return Walked(
            logits=torch.cat(rows),
            depths=depths,
            seconds=seconds,
            similarities=torch.stack(seen) if seen else None,
            kv=torch.stack(held) if held else None,
        )
    finally:
        engine.slots.release(sequence, keep=False)


def now(device: torch.device) -> float:
    """Seconds on a clock, after what is queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL(exact || other) in nats of logits float32 [T, vocab]: float32 [T], none below 0.

    Raises InvalidRequestError for logits that are no numbers: what they are worth cannot be said.
    """
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    found = (p.exp() * (p - q)).sum(-1).clamp(min=0)  # equal rows give zero but for rounding
    if not bool(torch.isfinite(found).all()):
        whose = "exact mode's" if not bool(torch.isfinite(exact).all()) else "the measured walk's"
        raise InvalidRequestError(
            f"{whose} logits are no numbers", field="logits", remedy="load with dtype bfloat16 or float32 (--dtype)"
        )
    return found
