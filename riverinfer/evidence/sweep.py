"""Quality against speed: points of the Pareto plot, all teacher-forced over the same texts, but for lossless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from riverinfer.evidence.forced import Text, Walked, now
from riverinfer.evidence.kv_strategies import STRATEGIES, EarlyExit, KVShare
from riverinfer.evidence.quality import Quality, Scored
from riverinfer.gates import Gate
from riverinfer.kv_arena import KVArena
from riverinfer.sampling import SamplingParams

if TYPE_CHECKING:
    from riverinfer.engine import Engine

OTHERS: dict[str, type[EarlyExit]] = {name: kind for name, kind in STRATEGIES.items() if kind is not KVShare}


@dataclass(frozen=True)
class Point:
    """A setting. family: "exact", "lossless", "similarity", "shuffled", "static", "repaired", "full river" (no
    backbone layer), the name of a gate, or a strategy of ``kv_strategies``. setting: for people, such as "tau 0.9".

    prompts: how many it was measured on. front: no other point is both faster and closer, or equal in one of these.
    Points of fewer prompts than others have are never on it, and beat none.
    """

    family: str
    setting: str
    quality: Quality
    prompts: int
    front: bool = False


def walk_strategy(engine: Engine, kind: type[EarlyExit], text: Text, gate: Gate) -> Walked:
    """A text through one of the other answers to missing K and V, on a cache of its own.

    Raises ValueError for a model that scales its rotary frequencies at this length.
    """
    model, length = engine.model, len(text.prompt) + len(text.answer)
    arena = KVArena(model.config, slots=1, ctx_size=length, dtype=model.dtype, device=model.device)
    with engine.stepping():
        strategy = kind(model, arena.slot(0), gate)
        strategy.prefill(text.prompt)
        began = now(model.device)
        steps = [strategy.step(token) for token in text.answer[:-1]]
        seconds = now(model.device) - began
    return Walked(torch.cat([row for row, _ in steps]), [depth for _, depth in steps], seconds)


def lossless_text(engine: Engine, text: Text) -> tuple[Scored, bool]:
    """Lossless mode's rate, with the KL of zero that it has by construction; and whether it did say exact's text.

    same: whether it said exact's token at that place. Its steps after the first token are counted; depths: L each,
    since every token that is said passed the backbone.
    """
    params = SamplingParams(max_tokens=len(text.answer), ignore_eos=True)
    output = engine.generate(list(text.prompt), params, mode="lossless")
    agreed = [said == exact for said, exact in zip(output.token_ids, text.answer, strict=True)]
    count = len(text.answer) - 1
    scored = Scored(
        kl=(0.0,) * count,
        same=tuple(agreed[1:]),
        excess=(0.0,) * count,
        depths=(engine.config.num_layers,) * count,
        seconds=output.stats.decode_s,
    )
    return scored, all(agreed)


def mark_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The same points, ``front`` set."""

    def key(point: Point) -> tuple[float, float]:
        return point.quality.tokens_per_s, -point.quality.kl.mean

    most = max((point.prompts for point in points), default=0)
    whole = [key(point) for point in points if point.prompts == most]

    def beaten(mine: tuple[float, float]) -> bool:
        return any(all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for other in whole)

    return tuple(replace(point, front=point.prompts == most and not beaten(key(point))) for point in points)
