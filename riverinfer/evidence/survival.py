"""Where free-running texts part from exact's: after the first other token they are other texts.

Up to there both have said the same, so a text parts where river's likeliest token, walked over exact's own greedy text,
is first another one: nothing beyond that place need be walked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from torch import Tensor

from riverinfer.gates import Gate
from riverinfer.sequence import TokenSequence

if TYPE_CHECKING:
    from riverinfer.engine import Engine

SLOTS = 3  # sequences that ``parting`` holds at once


@dataclass(frozen=True)
class Survival:
    """Free-running greedy texts against exact's, the first token exact in both.

    parted: per prompt the index of the first other token, None if there was none up to the end of exact's text or the
    limit. share: of texts that were still exact's after 1, 2, .. N tokens, or ended so. median: tokens after which half
    have parted, None if fewer have.
    """

    parted: tuple[int | None, ...]
    share: tuple[float, ...]
    median: int | None


@dataclass(frozen=True)
class Parting:
    """One prompt's: indices of the first other token without repair and with, None if there was none.

    first_repair: index of the first token that a repair was made before; None if the text ended or parted first.
    tokens: how many were looked at.
    """

    river: int | None
    repaired: int | None
    first_repair: int | None
    tokens: int


def parting(engine: Engine, prompt: Sequence[int], make_gate: Callable[[], Gate], repair: int, limit: int) -> Parting:
    """Where river's and repaired river's greedy texts part from exact's.

    Ends with exact's text, at ``limit`` tokens, or where both have parted. Needs ``SLOTS`` free slots, else
    NoFreeSlotError.
    """
    stops = {*engine.generation_config.eos_token_ids, engine.tokenizer.eos_token_id}
    exact, *others = sequences = [TokenSequence(engine.model, engine.ctx_size) for _ in range(SLOTS)]
    gates = [make_gate() for _ in others]
    parted: list[int | None] = [None for _ in others]
    first_repair = None

    def likeliest(logits: Tensor) -> int:
        return int(logits[0, : engine.tokenizer.vocab_size].argmax())

    try:
        for sequence in sequences:
            engine.slots.acquire(sequence)
            logits = engine.extend(sequence, prompt)
        token, count = likeliest(logits), 1
        while count < limit and token not in stops and None in parted:
            following = likeliest(engine.extend(exact, [token]))
            for i, every in enumerate((0, repair)):
                if parted[i] is not None:
                    continue
                if every and len(others[i].tokens) - others[i].exact >= every:
                    with engine.stepping():
                        others[i].repair(token)
                    first_repair = first_repair or count
                if likeliest(engine.extend(others[i], [token], gate=gates[i])) != following:
                    parted[i] = count
            token, count = following, count + 1
    finally:
        for sequence in sequences:
            engine.slots.release(sequence, keep=False)
    return Parting(parted[0], parted[1], first_repair, count)


def survival(parted: Sequence[int | None], tokens: int) -> Survival:
    """``parted``: of each text, at least one; ``tokens``: how many the longest one was looked at for."""
    share = tuple(fmean(at is None or at > i for at in parted) for i in range(tokens))
    return Survival(tuple(parted), share, next((i + 1 for i, value in enumerate(share) if value <= 0.5), None))
