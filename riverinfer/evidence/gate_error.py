"""The error that leaving the backbone actually causes, against the similarity that the gate sees there.

Definition. For a sampled token, everything before it in the cache is the backbone's. The token leaves after exactly d
backbone layers, whatever a gate would say, and passes the rest in the river. Its similarity is that of backbone layer
d - 1, the last one it passed: what a gate decides on. Its error is what it wrote into the cache in layers d .. L - 1
against what the backbone writes there, and the KL of its logits. So nothing but this one exit differs from exact.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from riverinfer.evidence.forced import Text, divergence
from riverinfer.gates import FixedDepth
from riverinfer.sequence import TokenSequence
from riverinfer.trace import Trace

if TYPE_CHECKING:
    from riverinfer.engine import Engine


@dataclass(frozen=True)
class KVError:
    """K and V of a token against exact ones: means over key/value heads, of one layer or of several.

    cosine; l2: norm of the difference over the exact norm; norm: the norm over the exact norm.
    """

    k_cosine: float
    v_cosine: float
    k_l2: float
    v_l2: float
    k_norm: float
    v_norm: float


@dataclass(frozen=True)
class Exit:
    """One token leaving after ``depth`` layers. prompt, position: which token, by index of the text and in its answer.

    similarity: at that exit. kl: nats. same: whether the likeliest next token stays. error: means over the layers from
    ``depth`` on. last_v_cosine: of V in the last layer.
    """

    prompt: int
    position: int
    depth: int
    similarity: float
    kl: float
    same: bool
    error: KVError
    last_v_cosine: float


@dataclass(frozen=True)
class Sampled:
    """A token, its similarity at every backbone layer (L values), and its exits by depth."""

    prompt: int
    position: int
    similarities: tuple[float, ...]
    exits: tuple[Exit, ...]
    by_layer: tuple[tuple[KVError, ...], ...]  # of each exit, the layers from its depth on


def exit_depths(layers: int, count: int | None = None) -> list[int]:
    """All depths from 1 to L - 1, or at most ``count`` of them, evenly spread, 1 and 2 among them."""
    if count is None:
        return list(range(1, layers))
    spread = np.linspace(min(2, layers - 1), layers - 1, max(count - 1, 1)).round()
    return sorted({1, *(int(depth) for depth in spread)})[:count]


def sample_errors(
    engine: Engine, text: Text, prompt: int, depths: Sequence[int], tokens: int, *, seed: int = 0
) -> list[Sampled]:
    """Force ``tokens`` tokens of a text's answer, drawn at random, to leave at each of ``depths`` (1 .. L - 1).

    ``prompt``: the text's index, for the record. Costs 1 + len(depths) steps a token, and a prefill of the text.
    """
    count = len(text.answer) - 1
    positions = sorted(random.Random(f"{seed} {prompt}").sample(range(count), min(tokens, count)))
    sequence = TokenSequence(engine.model, engine.ctx_size)
    engine.slots.acquire(sequence)
    try:
        engine.extend(sequence, text.prompt)
        found, known = [], 0
        for position in positions:
            if position > known:
                engine.extend(sequence, text.answer[known:position])
                known = position
            found.append(_sample(engine, sequence, text.answer[position], prompt, position, depths))
        return found
    finally:
        engine.slots.release(sequence, keep=False)


def _sample(
    engine: Engine, sequence: TokenSequence, token: int, prompt: int, position: int, depths: Sequence[int]
) -> Sampled:
    def step(gate: FixedDepth | None, trace: Trace) -> tuple[Tensor, Tensor]:
        """Logits [1, vocab], and K and V [L, 2, Hkv, D], of a token that the sequence does not keep."""
        logits = engine.draft(sequence, token, 0, gate=gate, trace=trace)
        at = len(sequence.tokens)
        return logits, torch.stack([torch.stack((k[:, at], v[:, at])).float() for k, v in sequence._kv])

    trace = Trace(similarities=[])
    exact, exact_kv = step(None, trace)
    similarities = trace.last_similarities()
    exits, by_layer = [], []
    for depth in depths:
        logits, kv = step(FixedDepth(depth), Trace())
        errors = [_kv_error(got, want) for got, want in zip(kv[depth:], exact_kv[depth:], strict=True)]
        exits.append(
            Exit(
                prompt=prompt,
                position=position,
                depth=depth,
                similarity=similarities[depth - 1],
                kl=float(divergence(exact, logits)),
                same=int(exact.argmax()) == int(logits.argmax()),
                error=mean_error(errors),
                last_v_cosine=errors[-1].v_cosine,
            )
        )
        by_layer.append(tuple(errors))
    return Sampled(prompt, position, similarities, tuple(exits), tuple(by_layer))


def _kv_error(got: Tensor, want: Tensor) -> KVError:
    """Of one layer, both float32 [2, Hkv, D]."""
    size = want.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    cosine = torch.cosine_similarity(got, want, dim=-1).mean(-1)
    l2, norm = ((got - want).norm(dim=-1) / size).mean(-1), (got.norm(dim=-1) / size).mean(-1)
    return KVError(*(float(x) for pair in (cosine, l2, norm) for x in pair))


def mean_error(errors: Sequence[KVError]) -> KVError:
    """Of each figure."""
    return KVError(*(fmean(getattr(error, field.name) for error in errors) for field in fields(KVError)))
