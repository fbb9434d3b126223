"""How far a walk is from the exact one: KL, agreement and perplexity ratio, prompt by prompt.

All walks go over the same text: what exact mode said greedily after the prompt. So the perplexity ratio is that of
this text, which exact itself finds likelier than any other text finds it; a text of other origin would give less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from riverinfer.evidence.forced import Text, Walked, divergence, now, walk_forced
from riverinfer.evidence.statistics import Interval, bootstrap
from riverinfer.gates import Gate
from riverinfer.sequence import TokenSequence

if TYPE_CHECKING:
    from riverinfer.engine import Engine


@dataclass(frozen=True)
class Scored:
    """A walk held against the exact one, a value a token.

    kl: KL(exact || walk) in nats. same: whether both find the same token likeliest. excess: by how many nats less
    likely than exact the walk finds the token that follows. depths: backbone layers. seconds: of the whole walk.
    """

    kl: tuple[float, ...]
    same: tuple[bool, ...]
    excess: tuple[float, ...]
    depths: tuple[int, ...]
    seconds: float


def score(exact: Tensor, logits: Tensor, following: Sequence[int], depths: Sequence[int], seconds: float) -> Scored:
    """``exact`` and ``logits``: float32 [T, vocab]; ``following``: the T tokens that they predict."""
    said = torch.tensor(following, device=exact.device)[:, None]
    excess = (exact.log_softmax(-1) - logits.log_softmax(-1)).gather(1, said)[:, 0]
    same = exact.argmax(-1) == logits.argmax(-1)
    kl = divergence(exact, logits)
    return Scored(tuple(kl.tolist()), tuple(same.tolist()), tuple(excess.tolist()), tuple(depths), seconds)


@dataclass(frozen=True)
class Quality:
    """A setting over all prompts.

    kl: nats a token. agreement: share of tokens whose likeliest next one is exact's. perplexity_ratio: over exact's,
    of exact's own greedy text. Each is a mean over prompts (the ratio a geometric one). kl_by_prompt: in their order.
    mean_depth: backbone layers a token. depths: how many tokens had depth 0, 1, .. L. tokens_per_s: the
    median walk's.
    """

    kl: Interval
    agreement: Interval
    perplexity_ratio: Interval
    kl_by_prompt: tuple[float, ...]
    mean_depth: float
    depths: tuple[int, ...]
    tokens_per_s: float


def summarize(prompts: Sequence[Sequence[Scored]], layers: int) -> Quality:
    """Of each prompt one walk or several, which count as one by their mean. ``layers``: L."""
    kl = [fmean(fmean(walk.kl) for walk in walks) for walks in prompts]
    every = [walk for walks in prompts for walk in walks]
    depths = [0] * (layers + 1)
    for walk in every:
        for depth in walk.depths:
            depths[depth] += 1
    tokens = sum(depths)
    return Quality(
        kl=bootstrap(kl),
        agreement=bootstrap([fmean(fmean(walk.same) for walk in walks) for walks in prompts]),
        perplexity_ratio=bootstrap([fmean(fmean(walk.excess) for walk in walks) for walks in prompts]).exp(),
        kl_by_prompt=tuple(kl),
        mean_depth=sum(depth * count for depth, count in enumerate(depths)) / tokens,
        depths=tuple(depths),
        tokens_per_s=median(len(walk.depths) / max(walk.seconds, 1e-9) for walk in every),
    )


class Judge:
    """The exact walk over one text, and others held against it. Raises what ``walk_forced`` raises."""

    def __init__(self, engine: Engine, text: Text) -> None:
        self.engine, self.text = engine, text
        self.exact: Walked = walk_forced(engine, text, None)

    def score(self, walked: Walked) -> Scored:
        """A walk over the same text."""
        return score(self.exact.logits, walked.logits, self.text.answer[1:], walked.depths, walked.seconds)

    def walk(self, gate: Gate | None, *, repair: int = 0) -> Scored:
        """The text through ``gate``, K and V made exact every ``repair`` tokens (0: never)."""
        return self.score(walk_forced(self.engine, self.text, gate, repair=repair))


@dataclass(frozen=True)
class Floor:
    """Exact mode against itself (A/A): below this, a difference says nothing.

    again: token by token a second time. batched: all tokens of a text in one pass, as lossless mode verifies drafts
    and a repair rewrites K and V. largest: the largest difference of two logits in such a pass. row_invariant: whether
    all logits were equal to the bit, so that the floor is zero.
    """

    again: Quality
    batched: Quality
    largest: float
    row_invariant: bool


def exact_again(judge: Judge) -> tuple[Scored, Scored, float]:
    """One text's part of ``Floor``: again, batched, largest."""
    text, engine = judge.text, judge.engine
    sequence = TokenSequence(engine.model, engine.ctx_size)
    engine.slots.acquire(sequence)
    try:
        engine.extend(sequence, text.prompt)
        began = now(engine.model.device)
        rows = engine.extend(sequence, text.answer[:-1], all_logits=True)
        seconds = now(engine.model.device) - began
    finally:
        engine.slots.release(sequence, keep=False)
    exact = judge.exact
    batched = score(exact.logits, rows, text.answer[1:], exact.depths, seconds)
    return judge.walk(None), batched, float((rows - exact.logits).abs().max())


def floor_of(parts: Sequence[tuple[Scored, Scored, float]], layers: int) -> Floor:
    """Over all texts."""
    largest = max(part[2] for part in parts)
    return Floor(
        again=summarize([[part[0]] for part in parts], layers),
        batched=summarize([[part[1]] for part in parts], layers),
        largest=largest,
        row_invariant=largest == 0,
    )
