"""The library's calls on the tiny llama: generate, stream, logits, stop conditions, errors, threads."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import replace

import pytest
import torch
from golden_models import ROOT, Golden

from riverinfer import Engine, Output, SamplingParams
from riverinfer.errors import (
    ContextLengthError,
    EngineClosedError,
    InvalidRequestError,
    NoFreeSlotError,
    RiverinferWarning,
)

PROMPT = "Once upon a time"
LONG = SamplingParams(max_tokens=40, ignore_eos=True)


def test_generate_continues_the_golden_prompts(llama: Engine, goldens: dict[str, Golden]) -> None:
    t = goldens["llama"].tensors
    for prompt in ("prompt1", "prompt2"):
        out = llama.generate(t[f"{prompt}.input_ids"].tolist(), SamplingParams(max_tokens=24, ignore_eos=True))
        assert out.token_ids == t[f"f32.{prompt}.greedy_ids"].tolist()
        assert out.finish_reason == "length"
        assert out.text == llama.tokenizer.decode(out.token_ids)


def test_logits_are_float32_rows_for_every_token(llama: Engine, goldens: dict[str, Golden]) -> None:
    t = goldens["llama"].tensors
    logits = llama.logits(t["prompt2.input_ids"].tolist())
    assert logits.dtype == torch.float32
    assert logits.shape == t["f32.prompt2.logits"].shape
    assert torch.allclose(logits, t["f32.prompt2.logits"], atol=1e-3)


def test_stream_yields_one_step_a_token_whose_texts_join(llama: Engine) -> None:
    want = llama.generate(PROMPT, LONG)
    output = Output()
    steps = list(llama.stream(PROMPT, LONG, output=output))
    assert [step.token_id for step in steps] == want.token_ids
    assert "".join(step.text for step in steps) == want.text == output.text
    assert [step.finish_reason for step in steps] == [None] * 39 + ["length"]
    # In float32 a verified batch may differ from single tokens in the last bits.
    assert [step.logprob for step in steps] == pytest.approx(want.logprobs, abs=1e-4)


def test_logprobs_are_those_of_the_logits(llama: Engine) -> None:
    out = llama.generate(PROMPT, replace(LONG, max_tokens=8, logprobs=3))
    ids = out.prompt_token_ids + out.token_ids
    rows = llama.logits(ids).log_softmax(-1)[len(out.prompt_token_ids) - 1 : -1]
    for row, token, logprob, top in zip(rows, out.token_ids, out.logprobs, out.top_logprobs, strict=True):
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [t for t, _ in top] == row.topk(3).indices.tolist()


def test_stats_count_tokens_and_time(llama: Engine) -> None:
    stats = llama.generate(PROMPT, LONG).stats
    assert stats.prompt_tokens == len(llama.tokenizer.encode(PROMPT))
    assert (stats.cached_tokens, stats.new_tokens) == (0, 40)
    assert 0 < stats.prefill_s < stats.ttft_s
    assert stats.decode_tokens_per_s == pytest.approx(39 / stats.decode_s)
    assert set(stats.as_dict()) >= {"ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s"}


def test_a_stop_string_ends_the_text_before_it_even_across_tokens(llama: Engine) -> None:
    hot = replace(LONG, temperature=1.0, seed=3)
    whole = llama.generate(PROMPT, hot)
    pieces = [step.text for step in llama.stream(PROMPT, hot)]
    borders = [len("".join(pieces[:i])) for i in range(2, 39) if pieces[i - 1] and pieces[i]]
    border = next(b for b in borders if whole.text.find(whole.text[b - 2 : b + 2]) == b - 2)
    stop = whole.text[border - 2 : border + 2]
    out = llama.generate(PROMPT, replace(hot, stop=(stop,)))
    assert out.text == whole.text[: border - 2]
    assert out.finish_reason == "stop"
    shown = ""
    for step in llama.stream(PROMPT, replace(hot, stop=(stop,))):
        shown += step.text
        assert whole.text.startswith(shown)
        assert len(shown) <= border - 2


def test_a_stop_token_ends_the_text_and_is_not_shown(llama: Engine) -> None:
    whole = llama.generate(PROMPT, LONG)
    token = whole.token_ids[5]
    first = whole.token_ids.index(token)
    out = llama.generate(PROMPT, replace(LONG, stop_token_ids=(token,)))
    assert out.token_ids == whole.token_ids[: first + 1]
    assert out.finish_reason == "stop"
    assert out.text == llama.tokenizer.decode(whole.token_ids[:first])


def test_eos_ids_of_generation_config_stop_unless_ignored(llama: Engine) -> None:
    whole = llama.generate(PROMPT, LONG)
    engine_config = llama.generation_config
    try:
        llama.generation_config = replace(engine_config, eos_token_ids=(whole.token_ids[3],))
        stopped = llama.generate(PROMPT, replace(LONG, ignore_eos=False))
        ignored = llama.generate(PROMPT, LONG)
    finally:
        llama.generation_config = engine_config
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) <= 4
    assert ignored.token_ids == whole.token_ids


def test_the_same_seed_gives_the_same_text_and_the_seed_is_reported(llama: Engine) -> None:
    hot = replace(LONG, temperature=1.2, top_p=0.9)
    first = llama.generate(PROMPT, replace(hot, seed=5))
    again = llama.generate(PROMPT, replace(hot, seed=5))
    other = llama.generate(PROMPT, replace(hot, seed=6))
    assert first.token_ids == again.token_ids != other.token_ids
    drawn = llama.generate(PROMPT, hot)
    assert drawn.seed is not None
    assert llama.generate(PROMPT, replace(hot, seed=drawn.seed)).token_ids == drawn.token_ids


def test_running_out_of_context_is_a_typed_error_that_keeps_the_output() -> None:
    with Engine.load(ROOT / "llama", device="cpu", dtype="float32", ctx_size=20) as engine:
        ids = list(range(10, 22))
        with pytest.raises(ContextLengthError, match="context of 20 tokens is full") as caught:
            engine.generate(ids, SamplingParams(ignore_eos=True))
        output = caught.value.output
        streamed = Output()
        with pytest.raises(ContextLengthError) as again:
            list(engine.stream(ids, SamplingParams(ignore_eos=True), output=streamed))
        assert again.value.output is streamed
        assert output is not None
        # 12 prompt tokens leave 8 positions; the token after the last position is still predicted.
        assert len(output.token_ids) == 9
        assert output.finish_reason is None
        exact = engine.generate(ids, SamplingParams(ignore_eos=True, max_tokens=9))
        assert (exact.token_ids, exact.finish_reason) == (output.token_ids, "length")
        with pytest.raises(ContextLengthError, match="the prompt has 21 tokens, the context 20"):
            engine.stream(list(range(21)))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "no tokens"),
        ([5, 384], "token id 384 is outside"),
        ([-1], "token id -1"),
        ([1.5], "must be integers"),
    ],
)
def test_bad_prompts_are_refused_at_the_call(llama: Engine, prompt: str | list[int], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llama.stream(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "turbo"}, "mode: unknown mode 'turbo'"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"dtype": "int3"}, "unknown dtype 'int3'"),
        ({"ctx_size": -1}, "ctx_size: is -1"),
        ({"max_sequences": 0}, "max_sequences: is 0"),
        ({"threads": 0}, "threads: is 0"),
        ({"threads": "2"}, "threads: is '2'"),
        ({"threads": 20_000}, "threads: is 20000"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Engine.load(ROOT / "llama", **options)  # type: ignore[arg-type]


def test_context_size_zero_is_the_models_own_and_more_is_capped() -> None:
    for asked, want in ((0, 2048), (4096, 2048), (64, 64)):
        with Engine.load(ROOT / "llama", device="cpu", ctx_size=asked, max_sequences=1) as engine:
            assert engine.ctx_size == want


def test_an_abandoned_stream_frees_its_slot(llama: Engine) -> None:
    for _ in range(5):
        stream = llama.stream(PROMPT, LONG)
        next(stream)
        del stream
    gc.collect()
    assert llama.slots.busy == 0
    never_started = llama.stream(PROMPT, LONG)
    del never_started
    for step in llama.stream(PROMPT, LONG):
        if step.token_id:
            break
    assert llama.slots.busy == 0


def test_interleaved_streams_equal_separate_ones(llama: Engine) -> None:
    want = [llama.generate(p, LONG).token_ids for p in ("abc", "The licence")]
    a, b = llama.stream("abc", LONG), llama.stream("The licence", LONG)
    got: list[list[int]] = [[], []]
    for left, right in zip(a, b, strict=True):
        got[0].append(left.token_id)
        got[1].append(right.token_id)
    assert got == want


def test_too_many_streams_in_one_thread_are_an_error_not_a_deadlock(llama: Engine) -> None:
    streams = [llama.stream(PROMPT, LONG) for _ in range(3)]
    next(streams[0])
    next(streams[1])
    with pytest.raises(NoFreeSlotError, match="all 2 sequences are still generating"):
        next(streams[2])
    del streams[0]
    next(llama.stream(PROMPT, LONG))


def test_calls_from_several_threads_queue_and_agree(llama: Engine) -> None:
    prompts = [f"Section {i}" for i in range(6)]
    want = [llama.generate(prompt, LONG).token_ids for prompt in prompts]
    got: dict[int, list[int]] = {}

    def work(index: int) -> None:
        got[index] = llama.generate(prompts[index], LONG).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[i] for i in range(6)] == want
    assert llama.slots.busy == 0


def test_two_threads_that_want_two_streams_each_do_not_wait_for_each_other(llama: Engine) -> None:
    barrier, results = threading.Barrier(2), []

    def work() -> None:
        first = llama.stream(PROMPT, LONG)
        next(first)
        barrier.wait(30)
        try:
            next(llama.stream(PROMPT, LONG))
            results.append("ok")
        except NoFreeSlotError:
            results.append("refused")
        barrier.wait(30)
        first.close()  # type: ignore[attr-defined]

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == ["refused", "refused"]
    assert llama.slots.busy == 0


def test_closing_wakes_those_that_wait_for_a_slot() -> None:
    engine = Engine.load(ROOT / "llama", device="cpu", ctx_size=64, max_sequences=1)
    held = engine.stream(PROMPT, LONG)
    next(held)
    never_started = engine.stream(PROMPT, LONG)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            engine.generate(PROMPT, LONG)
        except EngineClosedError as exc:
            caught.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    engine.close()
    thread.join(10)
    assert len(caught) == 1
    for stream in (held, never_started):
        with pytest.raises(EngineClosedError):
            next(stream)


def test_the_callers_pauses_are_not_decode_time(llama: Engine) -> None:
    output = Output()
    for _ in llama.stream(PROMPT, replace(LONG, max_tokens=6), output=output):
        time.sleep(0.05)
    assert output.stats.decode_s < 0.15


def test_a_context_cut_to_the_models_limit_is_said() -> None:
    with pytest.warns(RiverinferWarning, match="the context is 2048 tokens, the model's limit, not 5000"):
        Engine.load(ROOT / "llama", device="cpu", ctx_size=5000, max_sequences=1).close()


def test_a_closed_engine_says_so() -> None:
    engine = Engine.load(ROOT / "llama", device="cpu", ctx_size=64)
    stream = engine.stream(PROMPT, LONG)
    next(stream)
    engine.close()
    engine.close()
    assert engine.closed
    for call in (
        lambda: engine.generate(PROMPT),
        lambda: engine.logits([1]),
        lambda: engine.session(),
        lambda: next(stream),
    ):
        with pytest.raises(EngineClosedError, match="engine was closed"):
            call()


def test_recommended_sampling_is_the_default(goldens: dict[str, Golden]) -> None:
    for name in goldens:
        with Engine.load(ROOT / name, device="cpu", ctx_size=64, max_sequences=1) as engine:
            raw = engine.generation_config.sampling
            assert all(getattr(engine.default_params(), field) == value for field, value in raw.items())
            assert engine.default_params(temperature=0.3).temperature == 0.3


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        with Engine.load(ROOT / "llama", device="cpu", ctx_size=64, threads=1):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
