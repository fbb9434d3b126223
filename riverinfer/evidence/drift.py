"""Drift: does the error grow with the text, as K and V that the river wrote pile up in the cache?

Each token of a long text goes through the gate three times. One step: on a cache that is the backbone's throughout, so
that only this token's own exit errs. Chained: on the cache that the gate's own earlier steps left. Repaired: the same,
but the backbone rewrites K and V once R tokens are not exact, before the next token. Chained less one step is what the
cache's errors cost; repaired, this should fall to zero after every repair and grow until the next (a sawtooth).

The text is drawn from exact mode at temperature 1: so the mean KL is that of the two distributions over texts, a token
at a time, and the text does not fall into loops, in which any copy of the model would agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from torch import Tensor

from riverinfer.evidence.forced import divergence
from riverinfer.evidence.statistics import Interval, bootstrap, paired, sign_flip
from riverinfer.gates import Gate
from riverinfer.sampling import Sampler, SamplingParams
from riverinfer.sequence import TokenSequence
from riverinfer.trace import Trace

if TYPE_CHECKING:
    from riverinfer.engine import Engine

SLOTS = 3  # sequences that ``walk_drift`` holds at once
DRIFT_TEXTS = 6  # the fewest of which ``sign_flip`` can show growth
PATHS = ("one_step", "chained", "repaired")


@dataclass(frozen=True)
class DriftWalk:
    """One long text: KL in nats and agreement of each path of ``PATHS`` at each of its T tokens but the last.

    answer: the T tokens. since_repair: positions before each token whose K and V the repaired path has not made exact.
    depths: of the chained path.
    """

    answer: tuple[int, ...]
    kl: dict[str, tuple[float, ...]]
    same: dict[str, tuple[bool, ...]]
    since_repair: tuple[int, ...]
    depths: tuple[int, ...]


@dataclass(frozen=True)
class DriftBin:
    """Tokens ``first`` .. ``end`` - 1 of all texts: KL and agreement of each path of ``PATHS``, means over texts.

    from_cache: chained KL less one-step KL, with its interval over texts.
    """

    first: int
    end: int
    kl: dict[str, Interval]
    agreement: dict[str, float]
    from_cache: Interval


@dataclass(frozen=True)
class Tooth:
    """Tokens after a text's first repair with ``since_repair`` inexact positions before them: KL of the repaired path
    and of one step, and the difference with its interval over texts."""

    since_repair: int
    repaired: float
    one_step: float
    from_cache: Interval
    tokens: int


@dataclass(frozen=True)
class Drift:
    """tokens: of each of ``texts`` texts. repair: R. bins: 1, 1, 2, 4, 8, .. tokens long, the last what remains.
    sawtooth: by ``since_repair``; empty unless each text was repaired.

    second, last: from_cache in the second and the last quarter of the texts. rise: the second quarter's less that of
    the first bin, where nothing in the cache errs yet. growth: the last quarter's less the second's.
    p_rises, p_grows, p_shrinks: ``sign_flip`` of the rise, of the growth and of its opposite, text by text.
    """

    tokens: int
    texts: int
    repair: int
    mean_depth: float
    bins: tuple[DriftBin, ...]
    sawtooth: tuple[Tooth, ...]
    second: Interval
    last: Interval
    rise: Interval
    growth: Interval
    p_rises: float
    p_grows: float
    p_shrinks: float


def walk_drift(
    engine: Engine,
    prompt: Sequence[int],
    tokens: int,
    seed: int,
    make_gate: Callable[[], Gate],
    repair: int,
    on_token: Callable[[int], None] | None = None,
) -> DriftWalk:
    """Draw ``tokens`` tokens, at least one, from exact mode at temperature 1, past any end of text, along all paths.

    Needs ``SLOTS`` free slots, else NoFreeSlotError. ``on_token`` is called with how many tokens are done.
    """
    choose = Sampler(SamplingParams(temperature=1.0, seed=seed), engine.tokenizer.vocab_size)
    sequences = [TokenSequence(engine.model, engine.ctx_size) for _ in range(SLOTS)]
    exact, chained, repaired = sequences
    gates = [make_gate() for _ in range(SLOTS)]
    kl: dict[str, list[float]] = {path: [] for path in PATHS}
    same: dict[str, list[bool]] = {path: [] for path in PATHS}
    since, depths = [], []
    try:
        for sequence in sequences:
            engine.slots.acquire(sequence)
            wanted = engine.extend(sequence, prompt)
        answer = [choose(wanted[0], prompt).token_id]
        for number in range(1, tokens):
            token = answer[-1]
            if len(repaired.tokens) - repaired.exact >= repair:
                with engine.stepping():
                    repaired.repair(token)
            since.append(len(repaired.tokens) - repaired.exact)
            trace = Trace()
            # The draft's K and V are overwritten by the exact step after it.
            rows: dict[str, Tensor] = {"one_step": engine.draft(exact, token, 0, gate=gates[0])}
            wanted = engine.extend(exact, [token])
            rows["chained"] = engine.extend(chained, [token], gate=gates[1], trace=trace)
            rows["repaired"] = engine.extend(repaired, [token], gate=gates[2])
            depths.append(trace.depth)
            answer.append(choose(wanted[0], [*prompt, *answer]).token_id)
            for path, logits in rows.items():
                kl[path].append(float(divergence(wanted, logits)))
                same[path].append(int(wanted.argmax()) == int(logits.argmax()))
            if on_token is not None:
                on_token(number)
    finally:
        for sequence in sequences:
            engine.slots.release(sequence, keep=False)
    return DriftWalk(
        tuple(answer),
        {path: tuple(values) for path, values in kl.items()},
        {path: tuple(values) for path, values in same.items()},
        tuple(since),
        tuple(depths),
    )


def summarize_drift(walks: Sequence[DriftWalk], repair: int) -> Drift:
    """``walks``: of texts of one length, at least one. Of fewer than three tokens, parts of a text coincide."""
    length = len(walks[0].depths)
    bins = [_bin(walks, low, high) for low, high in pairwise(_edges(length))]
    start = min(max(1, length // 4), length - 1)
    half = max(start + 1, length // 2)
    first, second, last = (_from_cache(walks, *part) for part in ((0, 1), (start, half), (3 * length // 4, length)))
    rises, growths = ([b - a for a, b in zip(*pair, strict=True)] for pair in ((first, second), (second, last)))
    return Drift(
        tokens=length,
        texts=len(walks),
        repair=repair,
        mean_depth=fmean(depth for walk in walks for depth in walk.depths),
        bins=tuple(bins),
        sawtooth=tuple(_teeth(walks)),
        second=bootstrap(second),
        last=bootstrap(last),
        rise=bootstrap(rises),
        growth=bootstrap(growths),
        p_rises=sign_flip(rises),
        p_grows=sign_flip(growths),
        p_shrinks=sign_flip([-growth for growth in growths]),
    )


def _edges(length: int) -> list[int]:
    """0, 1, 2, 4, 8, .. ``length``; a last part shorter than half of the one before is joined to it."""
    edges = [0, 1]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    if len(edges) > 3 and 2 * (edges[-1] - edges[-2]) < edges[-2] - edges[-3]:
        del edges[-2]
    return edges


def _from_cache(walks: Sequence[DriftWalk], low: int, high: int) -> list[float]:
    return [fmean(walk.kl["chained"][low:high]) - fmean(walk.kl["one_step"][low:high]) for walk in walks]


def _bin(walks: Sequence[DriftWalk], low: int, high: int) -> DriftBin:
    return DriftBin(
        low,
        high,
        kl={path: bootstrap([fmean(walk.kl[path][low:high]) for walk in walks]) for path in PATHS},
        agreement={path: fmean(fmean(walk.same[path][low:high]) for walk in walks) for path in PATHS},
        from_cache=bootstrap(_from_cache(walks, low, high)),
    )


def _teeth(walks: Sequence[DriftWalk]) -> list[Tooth]:
    """By ``since_repair``, for those numbers that every text has after its first repair."""
    begins = [_first_repair(walk.since_repair) for walk in walks]
    common = set.intersection(*(set(walk.since_repair[begin:]) for walk, begin in zip(walks, begins, strict=True)))
    teeth = []
    for since in sorted(common):
        at = [
            [i for i, each in enumerate(walk.since_repair) if i >= begin and each == since]
            for walk, begin in zip(walks, begins, strict=True)
        ]
        repaired, one_step = (
            [fmean(walk.kl[path][i] for i in places) for walk, places in zip(walks, at, strict=True)]
            for path in ("repaired", "one_step")
        )
        tokens = sum(len(places) for places in at)
        teeth.append(Tooth(since, fmean(repaired), fmean(one_step), paired(repaired, one_step), tokens))
    return teeth


def _first_repair(since: Sequence[int]) -> int:
    """The first token before which a repair was made, the end if there is none: nothing else takes ``since`` to 0."""
    return next((i for i in range(1, len(since)) if since[i - 1] > since[i] == 0), len(since))
