"""Log-likelihoods of continuations, by prefill and through the decode path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from evaluated import load, score_of

from riverinfer import Engine
from riverinfer.errors import ContextLengthError, InvalidRequestError
from riverinfer.evidence.scoring import Scorer
from riverinfer.river import RiverOptions


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load() as loaded:
        yield loaded


def _scorer(engine: Engine, **options: Any) -> Scorer:
    river = RiverOptions(**options) if options else None
    return Scorer(engine, decode=bool(options), make_gate=lambda: None if river is None else river.make_gate())


def test_scores(engine: Engine) -> None:
    context = [5, 9, 31, 77, 12]
    likely = [int(engine.logits(context)[-1].argmax())]
    pairs = [
        (context, [3, 4, 5]),
        (context, likely),
        (context, [*likely, 3]),
        (context[:2], context[2:]),  # all of it is cached, and half of it must be read again
        ([7], [8] * 300),
        (context, []),
    ]
    got = list(_scorer(engine).scores(pairs))
    for (prefix, continuation), score in zip(pairs[:-1], got, strict=False):
        logprob, greedy = score_of(engine, prefix, continuation)
        assert score.logprob == pytest.approx(logprob, abs=1e-3)
        assert score.greedy == greedy
    assert (got[0].greedy, got[1].greedy, got[-1]) == (False, True, (0.0, True))


def test_scores_by_decoding(engine: Engine) -> None:
    pairs = [([5, 9, 31, 77], [3, 4, 5]), ([5, 9, 31, 77], [6])]
    backbone, never = _scorer(engine, gate="never"), _scorer(engine, gate="fixed", min_depth=2)
    exact = [score_of(engine, *pair)[0] for pair in pairs]
    assert [score.logprob for score in backbone.scores(pairs)] == pytest.approx(exact, abs=1e-4)
    assert backbone.depths == {5: 4}
    early = [score.logprob for score in never.scores(pairs)]
    assert never.depths == {2: 4}, "the prediction after the context's last token exits too"
    assert all(abs(a - b) > 1e-4 for a, b in zip(early, exact, strict=True))
    # What a river walk left in the cache is not taken for the next one's exact context.
    longer = ([5, 9, 31, 77, 3, 4], [6, 7])
    alone = next(_scorer(engine, gate="always").scores([longer]))
    *_, after = _scorer(engine, gate="always").scores([pairs[0], longer])
    assert after.logprob == pytest.approx(alone.logprob, abs=1e-4)


def test_scores_cut_from_the_left_and_refuse(engine: Engine) -> None:
    long = [3 + i % 90 for i in range(600)]
    score = next(_scorer(engine).scores([(long, [4, 5])]))
    assert score.logprob == pytest.approx(score_of(engine, long[-511:], [4, 5])[0], abs=1e-3)
    for pair, error in (
        (([], [1]), InvalidRequestError),
        (([1], [1] * 513), ContextLengthError),
        (([1], [9999]), InvalidRequestError),
    ):
        with pytest.raises(error):
            list(_scorer(engine).scores([pair]))
    assert engine.logits([5]).shape[0] == 1, "the slot is free again"
