"""Lossless mode on the golden models: whatever is drafted, and wherever it ends, the output is that of exact mode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forced_drafts import (
    after_every_round,
    distance_from_exact,
    draft_from,
    force,
    long_drafts,
    random_ids,
    random_plan,
)
from golden_models import NAMES, ROOT, copy_model, edit_json
from hypothesis import given, settings
from hypothesis import strategies as st

from riverinfer import Engine, Output, SamplingParams
from riverinfer.draft_policy import MAX_DRAFT
from riverinfer.errors import ContextLengthError
from riverinfer.kernels import few_rows
from riverinfer.kernels.linear import PlainLinear, packing_works
from riverinfer.river import RiverOptions
from riverinfer.sequence import TokenSequence
from riverinfer.session import ChatSession

PARAMS = SamplingParams(max_tokens=50, ignore_eos=True, seed=1)
SHORT = replace(PARAMS, max_tokens=24)
HOT = replace(PARAMS, temperature=1.0, seed=3)
PROMPT = "Once upon a time"
needs_packing = pytest.mark.skipif(
    not (packing_works(torch.bfloat16) and few_rows.attention_works()), reason="this CPU has no fast bfloat16"
)


def load(name: str | Path, dtype: str = "float32", **options: Any) -> Engine:
    """In lossless mode; columns of these two are no multiples of 32."""
    whole_rows = Path(name).name in ("phi3", "qwen2")
    river = {"river_bits": 8, "river_group": 0} if whole_rows else {"river_group": 32}
    common = {"device": "cpu", "ctx_size": 256, "max_sequences": 2, "draft": "river", "river_method": "rtn"}
    return Engine.load(ROOT / name, dtype=dtype, **(common | river | options))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load("llama") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def bare() -> Iterator[Engine]:
    """Without a river: for drafts that the tests make themselves."""
    with load("llama", draft="lookup") as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def no_slot_is_left_busy(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("engine", "bare"):
        if name in request.fixturenames:
            assert request.getfixturevalue(name).slots.busy == 0


def assert_same(got: Output, want: Output, *, to_the_bit: bool = False) -> None:
    """Everything that an output says about its text."""
    assert got.token_ids == want.token_ids
    assert (got.text, got.finish_reason, got.seed) == (want.text, want.finish_reason, want.seed)
    assert got.logprobs == (want.logprobs if to_the_bit else pytest.approx(want.logprobs, abs=1e-4))
    assert [[token for token, _ in top] for top in got.top_logprobs] == [
        [token for token, _ in top] for top in want.top_logprobs
    ]


# --- equal texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_exact_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = replace(PARAMS, logprobs=2)
    with load(name) as engine:
        # 40 and 60: the answer of phi3 crosses the border of its long frequencies, at 64.
        for length in (1, 40, 60):
            prompt = random_ids(length, seed=length)
            want = engine.generate(prompt, params, mode="exact")
            for plan in ([("river", MAX_DRAFT)], random_plan(length), random_plan(length + 1)):
                force(monkeypatch, plan)
                got = engine.generate(prompt, params)
                assert_same(got, want)
                assert got.stats.drafts is not None
                assert got.stats.drafts.accepted["river"] > 0
                assert got.stats.drafts.rounds < 49


@needs_packing
@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_the_probabilities_are_equal_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = replace(PARAMS, logprobs=2)
    with load(name, "bfloat16") as engine:
        for length in (7, 60):
            prompt = random_ids(length, seed=length)
            want = engine.generate(prompt, params, mode="exact")
            for plan in ([("river", MAX_DRAFT)], random_plan(length)):
                force(monkeypatch, plan)
                got = engine.generate(prompt, params)
                assert_same(got, want, to_the_bit=True)
                assert got.top_logprobs == want.top_logprobs


plans = st.lists(
    st.tuples(st.sampled_from(("river", "lookup", "none")), st.integers(1, MAX_DRAFT)), min_size=1, max_size=12
)


@given(plan=plans, length=st.integers(1, 40), tokens=st.integers(1, 40), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_no_schedule_changes_the_text(
    engine: Engine, plan: list[tuple[str, int]], length: int, tokens: int, seed: int
) -> None:
    prompt, params = random_ids(length, seed), replace(PARAMS, max_tokens=tokens)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, plan)
        assert_same(engine.generate(prompt, params), engine.generate(prompt, params, mode="exact"))


@given(wrong=st.sets(st.integers(0, 49)), length=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_wrong_drafts_are_found_wherever_they_are(bare: Engine, wrong: set[int], length: int) -> None:
    prompt = random_ids(length, seed=length)
    want = bare.generate(prompt, PARAMS, mode="exact")
    with pytest.MonkeyPatch.context() as patch:
        draft_from(patch, want.token_ids, wrong.__contains__)
        got = bare.generate(prompt, PARAMS)
    assert_same(got, want)
    # A wrong draft ends its round, whose last token is the backbone's own; a right one is that of the draft.
    assert [i for i, source in enumerate(got.sources) if source == "backbone"] == expected_corrections(wrong, 50)


def expected_corrections(wrong: set[int], tokens: int) -> list[int]:
    """Positions that nobody drafted rightly, when rounds draft all they may: the first, the wrong, the one more."""
    corrections, start = [0], 1
    while start < tokens:
        room = min(MAX_DRAFT, tokens - start - 1)
        end = next((i for i in range(start, start + room) if i in wrong), start + room)
        corrections.append(end)
        start = end + 1
    return corrections


def test_the_real_policy_and_the_real_lookup_change_nothing_either(engine: Engine) -> None:
    texts = ["One two three. One two three. One two three. One", "Alpha beta", "The the the the the"]
    for text in texts:
        for params in (PARAMS, HOT):
            assert_same(engine.generate(text, params), engine.generate(text, params, mode="exact"))


@pytest.mark.parametrize("options", [RiverOptions(gate="fixed", min_depth=2), RiverOptions(tau=0.6)], ids=str)
def test_drafts_may_pass_backbone_layers_first(
    engine: Engine, options: RiverOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_drafts(monkeypatch)
    got = engine.generate(PROMPT, PARAMS, river=options, similarities=True)
    assert_same(got, engine.generate(PROMPT, PARAMS, mode="exact"))
    drafts = got.stats.drafts
    assert drafts is not None
    assert set(drafts.by_depth) <= {2} if options.gate == "fixed" else len(drafts.by_depth) > 1
    assert drafts.by_similarity


def test_a_river_that_yields_no_numbers_only_drafts_badly() -> None:
    with load("llama", river_group=0, river_bits=8) as engine:
        down = engine.model.river[-1].down
        assert isinstance(down, PlainLinear)
        with torch.inference_mode():
            down.weight.fill_(float("nan"))
        with pytest.MonkeyPatch.context() as patch:
            long_drafts(patch)
            for params in (PARAMS, replace(HOT, min_p=0.1), replace(HOT, top_p=0.9), replace(HOT, top_k=5)):
                got = engine.generate(PROMPT, params)
                assert_same(got, engine.generate(PROMPT, params, mode="exact"))
                assert got.stats.drafts is not None
                assert got.stats.drafts.agreement is not None
                assert got.stats.drafts.agreement < 0.2


def test_batches_draft_nothing_and_say_the_same(engine: Engine) -> None:
    prompts = [random_ids(9, 1), random_ids(14, 2)]
    outputs = engine.generate_batch(prompts, PARAMS)
    for got, prompt in zip(outputs, prompts, strict=True):
        assert_same(got, engine.generate(prompt, PARAMS, mode="exact"))
        assert got.stats.drafts is None
        assert got.sources == []


def test_streams_side_by_side_and_in_threads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [random_ids(8 + i, i) for i in range(4)]
    want = [engine.generate(prompt, PARAMS, mode="exact").token_ids for prompt in prompts]
    # The real policy, whose costs and beliefs all threads share.
    left, right = engine.stream(prompts[0], PARAMS), engine.stream(prompts[1], PARAMS)
    pairs = [(a.token_id, b.token_id) for a, b in zip(left, right, strict=True)]
    assert [list(column) for column in zip(*pairs, strict=True)] == want[:2]
    long_drafts(monkeypatch)
    got: dict[int, list[int]] = {}

    def work(index: int) -> None:
        got[index] = engine.generate(prompts[index], PARAMS).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[i] for i in range(4)] == want


# --- ends inside a draft ----------------------------------------------------------------------------------------


def test_a_stop_string_inside_a_draft(bare: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bare.generate(PROMPT, HOT, mode="exact")
    draft_from(monkeypatch, whole.token_ids)
    ended_inside = 0
    for start in range(3, len(whole.text) - 3, 3):
        params = replace(HOT, stop=(whole.text[start : start + 3],))
        want = bare.generate(PROMPT, params, mode="exact")
        got = bare.generate(PROMPT, params)
        assert_same(got, want)
        assert want.finish_reason == "stop"
        ended_inside += got.sources[-1] == "river"
    assert ended_inside > 5


def test_a_stop_token_inside_a_draft(bare: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bare.generate(PROMPT, HOT, mode="exact")
    draft_from(monkeypatch, whole.token_ids)
    for token in dict.fromkeys(whole.token_ids):
        params = replace(HOT, stop_token_ids=(token,))
        assert_same(bare.generate(PROMPT, params), bare.generate(PROMPT, params, mode="exact"))


def test_the_river_drafts_nothing_behind_an_end_of_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine.generate(PROMPT, PARAMS, mode="exact")
    token = whole.token_ids[25]
    first = whole.token_ids.index(token)
    params = replace(PARAMS, stop_token_ids=(token,))
    long_drafts(monkeypatch)
    got = engine.generate(PROMPT, params)
    assert_same(got, engine.generate(PROMPT, params, mode="exact"))
    assert len(got.token_ids) == first + 1
    engine_config = engine.generation_config
    monkeypatch.setattr(engine, "generation_config", replace(engine_config, eos_token_ids=(token,)))
    assert engine.generate(PROMPT, replace(PARAMS, ignore_eos=False)).token_ids == got.token_ids


def test_max_tokens_inside_a_draft(engine: Engine, bare: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine.generate(PROMPT, PARAMS, mode="exact")
    for used in (engine, bare):
        with monkeypatch.context() as patch:
            if used is engine:
                long_drafts(patch)
            else:
                draft_from(patch, whole.token_ids)
            for count in (1, 2, 3, 15, 16, 17, 18, 50):
                got = used.generate(PROMPT, replace(PARAMS, max_tokens=count))
                assert got.token_ids == whole.token_ids[:count]
                assert got.finish_reason == "length"
                assert got.stats.drafts is not None
                assert used is engine or sum(got.stats.drafts.drafted.values()) <= count - 1


@pytest.mark.parametrize("length", [1, 12, 23, 24, 25, 39, 40])
def test_a_context_that_fills_inside_a_draft(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, params = random_ids(length, length), SamplingParams(ignore_eos=True, seed=1)
    long_drafts(monkeypatch)
    with load("llama", ctx_size=40) as engine:
        outputs = []
        for mode in ("exact", "lossless"):
            with pytest.raises(ContextLengthError, match="context of 40 tokens is full") as caught:
                engine.generate(prompt, params, mode=mode)
            assert caught.value.output is not None
            outputs.append(caught.value.output)
        assert_same(outputs[1], outputs[0])
        assert len(outputs[0].token_ids) == 41 - length
        # Ends with the last token that has room: no error.
        assert_same(
            engine.generate(prompt, replace(params, max_tokens=41 - length)),
            engine.generate(prompt, replace(params, max_tokens=41 - length), mode="exact"),
        )


# --- the cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_after_every_round_the_cache_is_that_of_a_fresh_prefill(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[float] = []

    def check(sequence: TokenSequence, context: list[int]) -> None:
        assert sequence.tokens == context[:-1]
        assert sequence.exact == len(sequence.tokens)
        rounds.append(distance_from_exact(sequence))

    after_every_round(monkeypatch, check)
    with load(name) as engine:
        for seed in (1, 2):
            force(monkeypatch, random_plan(seed))
            engine.generate(random_ids(10 + 15 * seed, seed), PARAMS)
    assert len(rounds) > 15
    assert max(rounds) < 1e-5


def test_drafts_stay_behind_the_border_of_the_long_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """phi3: what is cached is turned another way once there are more than 64 positions."""
    long_drafts(monkeypatch)
    lengths: list[int] = []
    after_every_round(monkeypatch, lambda sequence, _: lengths.append(len(sequence.tokens)))
    with load("phi3") as engine:
        for length in (45, 63, 64, 65):
            prompt = random_ids(length, length)
            lengths.clear()
            assert_same(engine.generate(prompt, PARAMS), engine.generate(prompt, PARAMS, mode="exact"))
            # Crossed by a single step, and long drafts after it.
            steps = [b - a for a, b in zip([length, *lengths], lengths, strict=False)]
            assert all(step == 1 for step, end in zip(steps, lengths, strict=True) if end - step < 65 <= end)
            assert max(steps) > 4


def test_a_rotation_that_depends_on_the_length_is_not_drafted_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_model("llama", tmp_path / "llama")
    scaling = {"rope_type": "dynamic", "factor": 8.0}
    edit_json(folder / "config.json", rope_scaling=scaling, max_position_embeddings=48)
    long_drafts(monkeypatch)
    with load(folder, ctx_size=300) as engine:
        for length in (10, 40, 60):
            prompt = random_ids(length, length)
            want = engine.generate(prompt, PARAMS, mode="exact")
            got = engine.generate(prompt, PARAMS)
            assert_same(got, want)
            scaled = max(0, 48 - length + 1)  # the first token whose step is longer than the model's own length
            assert set(got.sources[scaled:]) == {"backbone"}
            assert ("river" in got.sources) == (length == 10)
        # A second turn, for which nothing that was scaled can be reused.
        chats = [engine.session(use_template=False) for _ in range(2)]
        for text in ("Hello", "More"):
            answers = [list(chat.send(text, PARAMS, mode=mode)) for chat, mode in zip(chats, MODES, strict=True)]
            assert [s.token_id for s in answers[0]] == [s.token_id for s in answers[1]]


MODES = ("lossless", "exact")


# --- interrupts -------------------------------------------------------------------------------------------------


def interrupt(patch: pytest.MonkeyPatch, target: Any, attribute: str, call: int, *, late: bool = False) -> None:
    """Ctrl-C before, or ``late``, after the ``call``-th call."""
    original: Callable[..., Any] = getattr(target, attribute)
    calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not late:
            raise KeyboardInterrupt
        result = original(*args, **options)
        if calls == call:
            raise KeyboardInterrupt
        return result

    patch.setattr(target, attribute, interrupted)


def next_turns(engine: Engine, interrupted: ChatSession) -> None:
    """Another turn, which must be that of an exact chat whose first answer was stopped at the same token."""
    assert interrupted.last_output is not None
    said = interrupted.last_output.token_ids
    exact = engine.session()
    steps = exact.send("Hello there", PARAMS, mode="exact")
    assert [next(steps).token_id for _ in said] == said
    steps.close()  # type: ignore[attr-defined]
    assert exact.messages == interrupted.messages
    for session, mode in zip((interrupted, exact), MODES, strict=True):
        list(session.send("More", SHORT, mode=mode))
    assert exact.last_output is not None
    assert interrupted.last_output.stats.cached_tokens > 0
    assert_same(interrupted.last_output, exact.last_output)
    interrupted.close()
    exact.close()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("place", "attribute", "calls"),
    [
        ("riverinfer.engine.Engine", "draft", (1, 20)),
        ("riverinfer.engine.Engine", "extend", (3,)),
        ("riverinfer.decode", "_walk", (17, 19)),  # of a verification, and of the draft after it
        ("riverinfer.model.Model", "logits", (17, 19)),
        ("riverinfer.sequence.TokenSequence", "note", (2, 3)),
        ("riverinfer.generation.Generation", "choose", (2, 5)),
        ("riverinfer.generation.Generation", "step", (2, 9)),
    ],
)
def test_ctrl_c_inside_a_round(
    place: str, attribute: str, calls: Sequence[int], late: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    module, _, name = place.rpartition(".")
    target = importlib.import_module(place) if name == "decode" else getattr(importlib.import_module(module), name)
    long_drafts(monkeypatch)
    for call in calls:
        session = engine.session()
        with monkeypatch.context() as patch:
            interrupt(patch, target, attribute, call, late=late)
            with pytest.raises(KeyboardInterrupt):
                list(session.send("Hello there", PARAMS))
        next_turns(engine, session)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_consumer_that_stops_inside_a_round(count: int, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    long_drafts(monkeypatch)
    for leave in ("throw", "close"):
        session = engine.session()
        steps: Any = session.send("Hello there", PARAMS)
        for _ in range(count):
            next(steps)
        if leave == "close":
            steps.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                steps.throw(KeyboardInterrupt)
        output = session.last_output
        assert output is not None
        assert len(output.token_ids) == len(output.sources) == count
        assert session.cached_tokens() == len(output.prompt_token_ids) + count - 1
        drafts = output.stats.drafts
        assert drafts is not None
        assert sum(drafts.accepted.values()) == sum(source == "river" for source in output.sources)
        next_turns(engine, session)
