"""Drafts that do not depend on timings: schedules instead of the draft policy, and drafters that know the answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle

import pytest
import torch
from torch import Tensor

from riverinfer.decode import prefill
from riverinfer.draft_policy import BINS, MAX_DRAFT, Beliefs, Costs, Plan
from riverinfer.kv_arena import KVArena
from riverinfer.lossless import LosslessRounds
from riverinfer.outputs import Drafted, Step
from riverinfer.sequence import TokenSequence

Schedule = Iterable[tuple[str, int]]  # a round each: "river", "lookup" or "none", and how many tokens at most


def force(patch: pytest.MonkeyPatch, plan: Schedule) -> None:
    """Rounds draft as ``plan`` says, which is gone through again from its beginning for ever, over all requests."""
    rounds = cycle(list(plan))

    class Forced:
        """``DraftPolicy`` without a will of its own."""

        def __init__(self, costs: Costs, beliefs: Beliefs, *, river: bool) -> None:
            self._river = river
            self._kind, self._length = next(rounds)

        @property
        def paused(self) -> bool:
            return self._kind == "none" or not self._river

        def go_on(self, confidences: Sequence[float]) -> bool:
            return len(confidences) < self._length

        def plan(self, room: int) -> Plan:
            return Plan(min(self._length, room), [1.0] * BINS, 0.0)

        def lookup_length(self, match: int, found: int) -> int:
            return min(self._length, found) if self._kind == "lookup" else 0

        def lookup_beats_river(self, match: int, length: int) -> bool:
            return self._kind == "lookup"

        def note(self, *_: object) -> None:
            self._kind, self._length = next(rounds)

    patch.setattr("riverinfer.lossless.DraftPolicy", Forced)


def long_drafts(patch: pytest.MonkeyPatch) -> None:
    """Every round drafts all that it may."""
    force(patch, [("river", MAX_DRAFT)])


def random_plan(seed: int, rounds: int = 40) -> list[tuple[str, int]]:
    """Of all kinds and lengths."""
    rng = random.Random(seed)
    return [(rng.choice(("river", "river", "lookup", "none")), rng.randint(1, MAX_DRAFT)) for _ in range(rounds)]


def draft_from(
    patch: pytest.MonkeyPatch, answer: Sequence[int], wrong: Callable[[int], bool] = lambda _: False
) -> None:
    """Rounds draft all they may of ``answer``, the exact one; the tokens at which ``wrong`` are not its."""

    def draft(rounds: LosslessRounds, room: int) -> tuple[str, list[Drafted], int]:
        said = rounds._generation.output.stats.new_tokens
        coming = [(i, answer[i]) for i in range(said, min(said + room, len(answer)))]
        return "river", [Drafted(token ^ 1 if wrong(i) else token, 0.5) for i, token in coming], 0

    patch.setattr(LosslessRounds, "_draft", draft)


def river_and_known(patch: pytest.MonkeyPatch, answer: Sequence[int], drafted: int) -> None:
    """Every third round drafts so many tokens in the river, the others take ``answer``, with a mistake now and then:
    a long answer in little time, whose cache river drafts and refused ones touched everywhere."""
    force(patch, [("river", drafted)])
    in_the_river = LosslessRounds._draft
    draft_from(patch, answer, lambda i: i % 19 == 7)
    known = LosslessRounds._draft

    def draft(rounds: LosslessRounds, room: int) -> tuple[str | None, list[Drafted], int]:
        return (known if rounds.stats.rounds % 3 else in_the_river)(rounds, room)

    patch.setattr(LosslessRounds, "_draft", draft)


def after_every_round(patch: pytest.MonkeyPatch, check: Callable[[TokenSequence, list[int]], None]) -> None:
    """Call ``check`` with the sequence and all tokens so far at the end of each round."""
    original = LosslessRounds._round

    def checked(rounds: LosslessRounds) -> Iterator[Step]:
        yield from original(rounds)
        check(rounds._sequence, rounds._generation.context)

    patch.setattr(LosslessRounds, "_round", checked)


def distance_from_exact(sequence: TokenSequence) -> float:
    """Largest difference of the sequence's K and V from those of a fresh prefill, relative to each layer's largest."""
    model, length = sequence.model, len(sequence.tokens)
    arena = KVArena(model.config, slots=1, ctx_size=length, dtype=model.dtype, device=model.device)
    prefill(model, sequence.tokens, 0, arena.slot(0))
    worst = 0.0
    for have, want in zip(sequence._kv, arena.slot(0), strict=True):
        for a, b in zip(have, want, strict=True):
            worst = max(worst, relative(a[:, :length], b))
    return worst


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of ``b``; not a number if there is one."""
    return float(((a.double() - b.double()).abs() / b.double().abs().max()).max()) if b.numel() else 0.0


def random_ids(count: int, seed: int, low: int = 5, high: int = 300) -> list[int]:
    """Token ids of a prompt."""
    ids: list[int] = torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids
