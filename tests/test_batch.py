"""Batches: every output is that of a lone run, whoever its neighbours are, unless all exit together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import NAMES, ROOT, make_cache, open_model
from test_river_walk import GivenDepths, crude_river
from torch import Tensor

from riverinfer import Engine, Output, SamplingParams
from riverinfer.decode import decode_batch, decode_one, prefill, walk
from riverinfer.errors import ContextLengthError, InvalidRequestError, NoFreeSlotError
from riverinfer.gates import FixedDepth, Gate
from riverinfer.model import Model
from riverinfer.river import RiverOptions
from riverinfer.trace import Trace

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = [[9, 10, 11, 12, 13], [20 + i % 60 for i in range(30)], [7], [44, 45, 46, 47]]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def some_ids(count: int, seed: int) -> list[int]:
    return torch.randint(5, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIVERINFER_CACHE", str(folder))
        yield folder


def load(name: str, **options: Any) -> Engine:
    """A river engine of four slots in float32. Eight bits and one scale a row suit every golden model."""
    defaults: dict[str, Any] = {"river_bits": 8, "river_group": 0, "ctx_size": 128, "mode": "river"}
    return Engine.load(ROOT / name, device="cpu", dtype="float32", **{**defaults, **options})


@pytest.fixture(scope="module")
def engine(cache: Path) -> Iterator[Engine]:
    with load("llama", river_bits=4, river_group=32) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def slots_are_free_afterwards(engine: Engine) -> Iterator[None]:
    yield
    assert_free(engine)


def assert_free(engine: Engine) -> None:
    assert engine.slots.busy == 0
    assert sorted(engine.slots._free) == list(range(engine.max_sequences))


def assert_same(got: Output, want: Output) -> None:
    assert (got.token_ids, got.text) == (want.token_ids, want.text)
    assert (got.finish_reason, got.prompt_token_ids) == (want.finish_reason, want.prompt_token_ids)
    assert (got.exit_depths, got.stats.exit_depths) == (want.exit_depths, want.stats.exit_depths)
    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-3)


# --- one step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gated", ["no gate", "a gate each", "one gate"])
def test_a_step_of_a_batch_is_the_steps_of_its_sequences(name: str, gated: str) -> None:
    """Lengths below and beyond a window of 8, on both sides of longrope's border, and more rows than ``FEW``."""
    model = open_model(ROOT / name)
    model.river = crude_river(model)
    layers = model.config.num_layers
    lengths = [1, 3, 9, 70, 30] + [5] * 14
    depths = [row % (layers + 1) for row in range(len(lengths))]
    if gated == "no gate":
        depths = [layers] * len(lengths)
    elif gated == "one gate":
        depths = [2] * len(lengths)
    prompts = [some_ids(length, seed) for seed, length in enumerate(lengths)]
    ids = some_ids(len(lengths), 99)
    caches, alone = [make_cache(model, 72) for _ in lengths], [make_cache(model, 72) for _ in lengths]
    for row, prompt in enumerate(prompts):
        prefill(model, prompt, 0, caches[row])
        prefill(model, prompt, 0, alone[row])
    gates: list[Gate] = []
    if gated == "a gate each":
        gates = [GivenDepths([depth]) for depth in depths]
    elif gated == "one gate":
        gates = [GivenDepths([2])]
    traces = [Trace() for _ in lengths]
    logits = decode_batch(model, ids, lengths, caches, gates=gates, traces=traces)
    assert [trace.depth for trace in traces] == depths
    for row, length in enumerate(lengths):
        want = decode_one(model, ids[row], length, alone[row], gate=FixedDepth(depths[row]))
        assert close(logits[row], want[0])
        for (k, v), (want_k, want_v) in zip(caches[row], alone[row], strict=True):
            assert close(k[:, : length + 1], want_k[:, : length + 1])
            assert close(v[:, : length + 1], want_v[:, : length + 1])
            assert k[:, length + 1 :].isnan().all()


# --- whole texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "ministral3", "smollm3"])
@pytest.mark.parametrize("mode", ["exact", "river"])
def test_every_output_is_that_of_a_lone_run(name: str, mode: str) -> None:
    """Of different lengths; mistral slides its window, phi3 turns all K the other way at 64, at different steps."""
    prompts = [some_ids(length, length) for length in (57, 3, 60, 62)]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (14, 20, 1, 9)]
    with load(name, tau=0.6) as engine:
        alone = [engine.generate(prompt, each, mode=mode) for prompt, each in zip(prompts, params, strict=True)]
        together = engine.generate_batch(prompts, params, mode=mode)
        assert_free(engine)
    for got, want in zip(together, alone, strict=True):
        assert_same(got, want)
        assert got.finish_reason == "length"
    if mode == "river":
        assert len({depth for output in together for depth in output.exit_depths}) > 1


def test_a_text_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    first, *_ = engine.generate_batch(PROMPTS, PARAMS)
    assert len(set(first.exit_depths)) > 1
    for neighbours in ([], [[50, 51]], [[50, 51], [60] * 40]):
        again, *_ = engine.generate_batch([PROMPTS[0], *neighbours], PARAMS)
        assert_same(again, first)


def test_text_prompts_and_the_models_own_params(engine: Engine) -> None:
    params = engine.default_params(max_tokens=6, seed=4)
    prompts = ["Once upon a time", "The sea"]
    for got, prompt in zip(engine.generate_batch(prompts, params), prompts, strict=True):
        assert_same(got, engine.generate(prompt, params))


def test_a_greedy_and_a_sampled_prompt_side_by_side(engine: Engine) -> None:
    greedy, sampled = PARAMS, SamplingParams(temperature=1.5, seed=7, max_tokens=9, ignore_eos=True)
    for prompts in ([PROMPTS[0], PROMPTS[0]], PROMPTS[:2]):
        outputs = engine.generate_batch(prompts, [greedy, sampled])
        assert_same(outputs[0], engine.generate(prompts[0], greedy))
        assert_same(outputs[1], engine.generate(prompts[1], sampled))
        assert outputs[1].seed == 7
    first, second = engine.generate_batch([[9], [9]], SamplingParams(temperature=1.0, max_tokens=2))
    assert first.seed != second.seed  # none was given: each draws its own


def test_stop_tokens_end_some_early_and_the_others_go_on(engine: Engine) -> None:
    alone = engine.generate(PROMPTS[0], PARAMS)
    stop = alone.token_ids[4]
    ended = SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
    outputs = engine.generate_batch(PROMPTS[:3], [ended, PARAMS, PARAMS])
    assert outputs[0].token_ids == alone.token_ids[: alone.token_ids.index(stop) + 1]
    assert [output.finish_reason for output in outputs] == ["stop", "length", "length"]
    for output, prompt in zip(outputs[1:], PROMPTS[1:], strict=False):
        assert_same(output, engine.generate(prompt, PARAMS))


def test_a_stop_string_ends_one(engine: Engine) -> None:
    text = engine.generate(PROMPTS[0], PARAMS).text
    wanted = SamplingParams(max_tokens=12, ignore_eos=True, stop=(text[4:7],))
    outputs = engine.generate_batch(PROMPTS[:2], [wanted, PARAMS])
    assert_same(outputs[0], engine.generate(PROMPTS[0], wanted))
    assert outputs[0].finish_reason == "stop"


def test_a_full_context_is_an_error_that_has_all_outputs() -> None:
    endless, brief = SamplingParams(ignore_eos=True), SamplingParams(max_tokens=3, ignore_eos=True)
    prompts = [some_ids(20, 1), some_ids(32, 2), some_ids(5, 3)]
    with load("llama-untied", ctx_size=32) as engine:
        for order in ([0, 1, 2], [2, 1, 0]):
            params = [brief if which == 2 else endless for which in order]
            with pytest.raises(ContextLengthError, match="the context of 32 tokens is full; set max_tokens") as caught:
                engine.generate_batch([prompts[which] for which in order], params)
            outputs = caught.value.outputs
            assert [len(outputs[order.index(which)].token_ids) for which in range(3)] == [13, 1, 3]
            assert caught.value.output is next(output for output in outputs if output.finish_reason is None)
            for output, which, wanted in zip(outputs, order, params, strict=True):
                alone = Output()
                try:
                    list(engine.stream(prompts[which], wanted, output=alone))
                except ContextLengthError:
                    assert which != 2
                assert_same(output, alone)
            assert_free(engine)


def test_the_prompts_of_others_are_not_the_decoding_time_of_the_first(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Engine.read_prompt

    def slowly(*args: Any, **options: Any) -> Tensor:
        time.sleep(0.25)
        return read(*args, **options)

    monkeypatch.setattr(Engine, "read_prompt", slowly)
    first, second = engine.generate_batch(PROMPTS[:2], SamplingParams(max_tokens=2, ignore_eos=True))
    assert first.stats.decode_s < 0.25
    assert second.stats.ttft_s > 0.5


# --- all exit together ------------------------------------------------------------------------------------------


def replay(model: Model, outputs: list[Output], tau: float) -> list[int]:
    """Depths of the steps after the first, by the definition: the least similar sequence decides for all.

    Each step is walked in the backbone to see all similarities, then again to the depth they imply, which replaces K
    and V. Where longrope turns, all stay in the backbone, since those that turn are computed anew there.
    """
    layers, regime = model.config.num_layers, model.rope.regime
    caches = [make_cache(model, 128) for _ in outputs]
    for output, cache in zip(outputs, caches, strict=True):
        prefill(model, output.prompt_token_ids, 0, cache)
    depths = []
    for step in range(1, max(len(output.token_ids) for output in outputs)):
        active = [(o, cache) for o, cache in zip(outputs, caches, strict=True) if len(o.token_ids) > step]
        similarities, turned = [], False
        for output, cache in active:
            trace, position = Trace.full(), len(output.prompt_token_ids) + step - 1
            if regime(position + 1) != regime(position):
                turned = True
                prefill(model, [*output.prompt_token_ids, *output.token_ids[:step]], 0, cache)
                continue
            with torch.inference_mode():
                walk(model, torch.tensor(output.token_ids[step - 1 : step]), position, cache, trace=trace)
            similarities.append([float(value) for value in trace.similarities or ()])
        above = [layer for layer in range(layers) if all(values[layer] > tau for values in similarities)]
        depth = layers if turned or not above else above[0] + 1
        for output, cache in active:
            position = len(output.prompt_token_ids) + step - 1
            if regime(position + 1) == regime(position):
                decode_one(model, output.token_ids[step - 1], position, cache, gate=FixedDepth(depth))
        depths.append(depth)
    return depths


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_with_scope_batch_the_least_similar_decides_for_all(name: str) -> None:
    prompts = [some_ids(length, length) for length in (60, 4, 10)]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (16, 12, 7)]
    seen = set()
    with load(name) as engine:
        for tau in (0.3, 0.5, 0.6, 0.7):
            options = RiverOptions(tau=tau, scope="batch")
            outputs = engine.generate_batch(prompts, params, river=options)
            depths = replay(engine.model, outputs, tau)
            for output in outputs:
                assert output.exit_depths[0] == engine.config.num_layers  # the prompt is exact
                assert output.exit_depths[1:] == depths[: len(output.exit_depths) - 1]
            seen.update(depths)
    assert len(seen) > 2


def test_one_alone_exits_the_same_in_either_scope(engine: Engine) -> None:
    (alone,) = engine.generate_batch([PROMPTS[0]], PARAMS, river=RiverOptions(tau=0.6, scope="batch"))
    assert_same(alone, engine.generate(PROMPTS[0], PARAMS, river=RiverOptions(tau=0.6)))


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_the_other_gates_and_prefills_hold_in_batches(engine: Engine, scope: str) -> None:
    for options, wanted in (
        (RiverOptions(gate="fixed", min_depth=3, scope=scope), {3}),
        (RiverOptions(gate="always", scope=scope), {0}),
        (RiverOptions(gate="never", max_depth=4, scope=scope), {4}),
        (RiverOptions(tau=-1, min_depth=2, scope=scope), {2}),
    ):
        for output in engine.generate_batch(PROMPTS, PARAMS, river=options):
            assert set(output.exit_depths[1:]) == wanted
    options = RiverOptions(gate="fixed", min_depth=2, prefill="fixed", prefill_depth=1, scope=scope)
    for output, prompt in zip(engine.generate_batch(PROMPTS, PARAMS, river=options), PROMPTS, strict=True):
        assert output.exit_depths == [1] + [2] * 11
        assert_same(output, engine.generate(prompt, PARAMS, river=options))


# --- what is refused, and what goes wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([], PARAMS, "prompts: is not a list of prompts; give at least one"),
        ("Once upon", PARAMS, "prompts: is not a list of prompts"),
        ([[9]] * 5, PARAMS, "prompts: are 5, the engine holds 4 sequences; give fewer .* max_sequences"),
        ([[9], [9]], [PARAMS], "params: are 1 for 2 prompts; give one for all, or one each"),
        ([[9], [9]], [PARAMS] * 3, "params: are 3 for 2 prompts"),
        ([[9], ""], PARAMS, "the prompt is empty"),
        ([[9], []], PARAMS, "the prompt has no tokens"),
        ([[9], [384]], PARAMS, "token id 384 is outside the vocabulary"),
        ([9, 10], PARAMS, "token ids must be integers; give text, or a list of ids"),
        ([[9], [9] * 129], PARAMS, "the prompt has 129 tokens, the context 128"),
    ],
    ids=str,
)
def test_bad_batches_are_refused(engine: Engine, prompts: Any, params: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        engine.generate_batch(prompts, params)


def test_exact_mode_takes_no_river_options_and_an_exact_engine_no_river_mode(engine: Engine, llama: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="river: has no effect in exact mode"):
        engine.generate_batch([[9]], PARAMS, mode="exact", river=RiverOptions())
    with pytest.raises(InvalidRequestError, match="no river is loaded"):
        llama.generate_batch([[9]], PARAMS, mode="river")


@pytest.mark.parametrize("broken", ["generation", "read_prompt", "extend_batch"])
def test_an_interrupt_anywhere_frees_all_slots(engine: Engine, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, calls = getattr(Engine, broken), []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return method(*args, **options)

    monkeypatch.setattr(Engine, broken, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate_batch(PROMPTS, PARAMS)
    assert_free(engine)
    monkeypatch.undo()
    assert_same(engine.generate_batch(PROMPTS, PARAMS)[0], engine.generate(PROMPTS[0], PARAMS))


def test_a_batch_that_finds_too_few_slots_says_so_and_frees_those_it_took(engine: Engine) -> None:
    steps = engine.stream(PROMPTS[0], PARAMS)
    next(steps)
    with pytest.raises(NoFreeSlotError, match="all 4 sequences are still generating"):
        engine.generate_batch(PROMPTS, PARAMS)
    assert engine.slots.busy == 1
    assert len(engine.generate_batch(PROMPTS[:3], PARAMS)) == 3
    steps.close()  # type: ignore[attr-defined]


def test_idle_chats_make_room_for_a_batch(engine: Engine) -> None:
    sessions = [engine.session() for _ in range(2)]
    for session in sessions:
        list(session.send("Hello", PARAMS))
    assert len(engine.generate_batch(PROMPTS, PARAMS)) == 4
    assert [session.cached_tokens() for session in sessions] == [0, 0]
