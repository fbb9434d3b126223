"""Lossless mode on the demo model: twenty prompts of all kinds, 256 tokens each, equal to exact mode to the bit.

``tests/oracle/lossless_float32.py`` does the same in float32, where equality is that of the tokens; it takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forced_drafts import distance_from_exact, force, random_plan, river_and_known
from lossless_prompts import PROMPTS, prompt_ids
from test_lossless import assert_same, needs_packing
from test_lossless_sampling import FILTERS

from riverinfer import Engine, Output, SamplingParams

TOKENS = 256
PARAMS = SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=1, logprobs=2)


def load(folder: Path, dtype: str, **options: Any) -> Engine:
    """With a river that any machine makes in seconds, and that errs more often than the one users get."""
    river = {"river_bits": 4, "river_group": 64, "river_method": "rtn", "draft": "river"}
    return Engine.load(folder, device="cpu", dtype=dtype, ctx_size=1024, **(river | options))


@pytest.fixture(scope="module")
def engine(demo_dir: Path) -> Iterator[Engine]:
    with load(demo_dir, "bfloat16", max_sequences=10) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def exact(engine: Engine) -> list[Output]:
    """Side by side, which gives the bits that each alone has (see the test below) in a third of the time."""
    ids = [prompt_ids(engine, prompt) for prompt in PROMPTS]
    return [
        *engine.generate_batch(ids[:10], PARAMS, mode="exact"),
        *engine.generate_batch(ids[10:], PARAMS, mode="exact"),
    ]


@needs_packing
@pytest.mark.parametrize("number", range(len(PROMPTS)), ids=lambda i: f"{PROMPTS[i].kind} {i}")
def test_texts_and_probabilities_are_those_of_exact_mode(
    number: int, engine: Engine, exact: list[Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = exact[number]
    river_and_known(monkeypatch, want.token_ids, 3 + number % 5)
    got = engine.generate(want.prompt_token_ids, PARAMS)
    assert_same(got, want, to_the_bit=True)
    assert got.top_logprobs == want.top_logprobs
    drafts = got.stats.drafts
    assert drafts is not None
    assert drafts.accepted["river"] > TOKENS / 2
    assert len(drafts.by_position) > 2


@needs_packing
def test_side_by_side_exact_mode_says_what_it_says_alone(engine: Engine, exact: list[Output]) -> None:
    params = SamplingParams(max_tokens=48, ignore_eos=True, seed=1, logprobs=2)
    for want in exact[::7]:
        got = engine.generate(want.prompt_token_ids, params, mode="exact")
        assert (got.token_ids, got.logprobs) == (want.token_ids[:48], want.logprobs[:48])
        assert got.top_logprobs == want.top_logprobs[:48]


@needs_packing
def test_with_the_real_policy_and_lookup_too(engine: Engine, exact: list[Output]) -> None:
    params = SamplingParams(max_tokens=96, ignore_eos=True, seed=1, logprobs=2)
    sources = set[str]()
    for number in (0, 5, 11, 12):
        want = exact[number]
        got = engine.generate(want.prompt_token_ids, params)
        assert (got.token_ids, got.logprobs) == (want.token_ids[:96], want.logprobs[:96])
        sources |= set(got.sources)
    assert sources == {"backbone", "lookup", "river"}


@needs_packing
def test_a_chat_goes_on_from_what_drafts_left(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, [("river", 5), ("lookup", 8), ("river", 2)])
    params = SamplingParams(max_tokens=40, seed=1)
    sessions = {mode: engine.session() for mode in ("lossless", "exact")}
    for text in ("What is the capital of France?", "And of Italy?", "List both, with their countries."):
        outputs = []
        for mode, session in sessions.items():
            list(session.send(text, params, mode=mode))
            assert session.last_output is not None
            outputs.append(session.last_output)
        assert_same(outputs[0], outputs[1], to_the_bit=True)
        assert outputs[0].stats.cached_tokens == outputs[1].stats.cached_tokens
    assert "Rome" in outputs[0].text
    for session in sessions.values():
        session.close()


@needs_packing
@pytest.mark.parametrize("filters", FILTERS[2:], ids=str)
def test_sampled_texts_too(filters: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True, seed=3, **filters)
    want = engine.generate("Tell me about a strange dream.", params, mode="exact")
    force(monkeypatch, [("river", 6), ("river", 2), ("lookup", 9)])
    assert_same(engine.generate("Tell me about a strange dream.", params), want, to_the_bit=True)


def test_in_float32_the_tokens_are_those_of_exact_mode(demo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=32, ignore_eos=True, seed=1)
    with load(demo_dir, "float32", max_sequences=1) as engine:
        for number in (1, 6, 16):
            ids = prompt_ids(engine, PROMPTS[number])
            want = engine.generate(ids, params, mode="exact")
            force(monkeypatch, random_plan(number))
            assert_same(engine.generate(ids, params), want)
        # The cache that a draft leaves, checked once on the real model.
        session = engine.session()
        list(session.send("Hi", params))
        assert distance_from_exact(session._sequence) < 1e-5
        assert session._sequence.exact == len(session._sequence.tokens)
        session.close()
