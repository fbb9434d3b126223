"""The GPU's decode steps without a GPU: the same launches under Triton's interpreter, through the whole engine.

Graphs are what is missing here; ``bench/gpu.py`` has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forced_drafts import force
from golden_models import CPU, NAMES, ROOT, copy_model, edit_json
from safetensors.torch import load_file, save_file
from torch import Tensor
from triton_process import collect, needs_triton

from riverinfer import Engine, Output, SamplingParams
from riverinfer.checkpoint import Checkpoint
from riverinfer.decode import walk
from riverinfer.draft_policy import BINS, Plan
from riverinfer.errors import ContextLengthError
from riverinfer.gates import FixedDepth, Gate, SimilarityGate
from riverinfer.kernels.linear import PlainLinear
from riverinfer.kv_arena import KVArena
from riverinfer.loader import load_model
from riverinfer.model import Model
from riverinfer.profiling.instrument import Instruments
from riverinfer.river import RiverOptions
from riverinfer.sequence import TokenSequence
from riverinfer.trace import Trace

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
PROMPT = [5 + i * 7 % 200 for i in range(20)]
RIVERS = [name for name in NAMES if name not in ("phi3", "qwen2")]  # those have no whole groups of 32


@needs_triton
def test_steps_on_the_device_are_those_of_the_walk(tmp_path: Path) -> None:
    collect(__file__, "interpreted_", tmp_path, TRITON_INTERPRET="1")


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def load(model: str | Path, **options: Any) -> Engine:
    common: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "ctx_size": 128, "max_sequences": 2}
    packed = isinstance(model, Path) or model in RIVERS
    common |= {"river_bits": 4, "river_group": 32, "river_method": "rtn"} if packed else {"mode": "exact"}
    return Engine.load(ROOT / model, **(common | options))


def two_layers(name: str, folder: Path) -> Path:
    """A golden model cut short: the interpreter is slow."""
    copy_model(name, folder)
    edit_json(folder / "config.json", num_hidden_layers=2)
    deep = re.compile(r"model\.layers\.([2-9])\.")
    tensors = load_file(folder / "model.safetensors")
    save_file({key: x for key, x in tensors.items() if not deep.match(key)}, folder / "model.safetensors")
    return folder


@contextmanager
def in_torch(engine: Engine) -> Iterator[None]:
    """The same engine without its kernels' steps."""
    held = engine.model.device_walk, engine.decoder, engine.rounds
    engine.model.device_walk = engine.decoder = engine.rounds = None
    yield
    engine.model.device_walk, engine.decoder, engine.rounds = held


@pytest.fixture(scope="module")
def llama() -> Iterator[Engine]:
    with load("llama") as engine:
        yield engine


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = two_layers("llama", tmp_path_factory.mktemp("model") / "llama")
    with load(folder, river_bits=8) as engine:  # 4 bits take the interpreter four times as long
        yield engine


@torch.inference_mode()
def steps(engine: Engine, ids: list[int], sizes: list[int], gate: Gate | None = None) -> tuple[Tensor, list[int]]:
    """States of ``ids`` after a prompt, in steps of these sizes, and their depths."""
    model = engine.model
    kv = engine._arena.slot(0)  # type: ignore[union-attr]
    walk(model, torch.tensor(PROMPT), 0, kv)
    start, states, depths = len(PROMPT), [], []
    for size in sizes:
        trace = Trace()
        taken = walk if model.device_walk is None else model.device_walk
        part = torch.tensor(ids[:size])
        if model.device_walk is not None:
            assert model.device_walk.can_take(size, start + size, kv, gate, trace)
        states.append(
            taken(model, part, start, kv, gate=gate, trace=trace)
            if taken is walk
            else taken(part, start, kv, gate=gate, trace=trace)
        )
        depths.append(trace.depth)
        ids, start = ids[size:], start + size
    return torch.cat(states), depths


def reference(name: str) -> tuple[Model, KVArena]:
    """The model that an engine in bfloat16 has, computing in float32."""
    model = load_model(Checkpoint.open(ROOT / name), device=CPU, dtype=torch.float32)
    for layer in model.layers:
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
            assert isinstance(linear, PlainLinear)
            linear.weight = linear.weight.bfloat16().float()
    return model, KVArena(model.config, slots=1, ctx_size=128, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("name", NAMES)
def interpreted_states_and_cache(name: str) -> None:
    """All kinds of layers: states and cache as far from those of float32 as the walk's own in bfloat16 are."""
    ids = [9, 30, 31, 200, 7]
    model, arena = reference(name)
    with torch.inference_mode():
        exact = walk(model, torch.tensor([*PROMPT, *ids]), 0, arena.slot(0))[20:]
    with load(name) as engine:
        slot = engine._arena.slot(0)  # type: ignore[union-attr]

        def found() -> list[Tensor]:
            h, _ = steps(engine, ids, [1, 3, 1])
            cache = torch.cat([x[:, 20:25] for layer in slot for x in layer])
            return [h, cache.clone(), engine.model.logits(h)]

        got = found()
        with in_torch(engine):
            plain = found()
        head = model.head
        assert isinstance(head, PlainLinear)
        logits = model.normed(exact) @ head.weight.bfloat16().float().T
    cache = torch.cat([x[:, 20:25] for layer in arena.slot(0) for x in layer])
    for a, b, want in zip(got, plain, (exact, cache, logits), strict=True):
        assert relative(a, want) < 1.25 * relative(b, want)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def interpreted_a_batch_has_the_bits_of_single_steps(name: str, tmp_path: Path) -> None:
    ids = [5 + i * 11 % 250 for i in range(10)]
    options: dict[str, Any] = {} if name in RIVERS else {"mode": "exact", "river_bits": None, "river_group": None}
    with load(two_layers(name, tmp_path / name), **options) as engine:
        kv = engine._arena.slot(0)  # type: ignore[union-attr]
        alone, _ = steps(engine, ids, [1] * 10)
        cache = [(k[:, :30].clone(), v[:, :30].clone()) for k, v in kv]
        for sizes in ([10], [3, 7]):
            for k, v in kv:
                k.fill_(float("nan"))
                v.fill_(float("nan"))
            together, _ = steps(engine, ids, sizes)
            assert torch.equal(alone, together)
            for (k, v), (k2, v2) in zip(cache, kv, strict=True):
                assert torch.equal(k, k2[:, :30])
                assert torch.equal(v, v2[:, :30])
            assert torch.equal(engine.model.logits(alone[3:4]), engine.model.logits(together)[3:4])


@pytest.mark.parametrize(
    "gate",
    [
        SimilarityGate([0.2, 0.9, 0.5], min_depth=2),
        SimilarityGate(1.0, max_depth=3),
        SimilarityGate(-1.0),
        FixedDepth(0),
        FixedDepth(99),
    ],
    ids=lambda gate: f"{type(gate).__name__} {vars(gate)}"[:60],
)
def interpreted_gates(gate: Gate, llama: Engine) -> None:
    """Depths are the walk's, and so are the states but for what bfloat16 rounds."""
    ids = [9, 200]
    got, depths = steps(llama, ids, [1, 1], gate)
    with in_torch(llama):
        want, wanted = steps(llama, ids, [1, 1], gate)
    assert depths == wanted
    assert relative(got, want) < 0.04


def interpreted_not_a_number(llama: Engine) -> None:
    kv = llama._arena.slot(1)  # type: ignore[union-attr]
    gate, trace = SimilarityGate(0.5), Trace()
    assert llama.model.device_walk is not None
    with torch.inference_mode():
        kv[0][1][:, 0] = float("nan")
        h = llama.model.device_walk(torch.tensor([8]), 1, kv, gate=gate, trace=trace)
    assert h.isnan().all()
    assert trace.depth == len(llama.model.layers)
    assert gate.not_a_number == 1


def same(got: Output, want: Output) -> None:
    assert got.token_ids == want.token_ids
    assert got.logprobs == want.logprobs
    assert (got.text, got.finish_reason) == (want.text, want.finish_reason)


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.7, "repetition_penalty": 1.2},
    {"logprobs": 2},
]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def interpreted_lossless_is_exact(sampling: dict[str, Any], short: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and probabilities are equal, not close; the penalty and lists of tokens take the host's choice."""
    params = replace(PARAMS, **sampling)
    want = short.generate(PROMPT, params, mode="exact")
    force(monkeypatch, [("river", 4), ("none", 1), ("river", 9)])
    got = short.generate(PROMPT, params)
    same(got, want)
    assert got.top_logprobs == want.top_logprobs
    drafts = got.stats.drafts
    assert drafts is not None
    assert drafts.drafted["river"] >= 4
    assert drafts.rounds < 7


def interpreted_lossless_with_query_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(two_layers("ministral3", tmp_path / "model"), river_bits=8) as engine:
        want = engine.generate(PROMPT, PARAMS, mode="exact")
        force(monkeypatch, [("river", 9)])
        got = engine.generate(PROMPT, PARAMS)
        same(got, want)
        assert got.stats.drafts is not None
        assert got.stats.drafts.rounds < 7


@contextmanager
def placed(engine: Engine, prompt: list[int]) -> Iterator[tuple[Any, int]]:
    """A request on the device, whose prompt and first token are there: the launches of its rounds, and that token."""
    rounds = engine.rounds
    assert rounds is not None
    generation = engine.generation(prompt, PARAMS, Output(), began=0.0)
    sequence = TokenSequence(engine.model, engine.ctx_size)
    engine.slots.acquire(sequence)
    with torch.inference_mode():
        generation.step(generation.choose(engine.read_prompt(sequence, generation, None)[0]))
        rounds.decoder.place(generation, [(sequence, generation)])
        yield rounds, generation.context[-1]
    engine.slots.release(sequence, keep=False)


def interpreted_given_tokens_take_the_place_of_drafts(short: Engine) -> None:
    want = short.generate(PROMPT, PARAMS, mode="exact").token_ids
    with placed(short, PROMPT) as (rounds, last):
        given = want[1:6]
        given[3] ^= 1
        rounds.queue(last, 20, 21, given, Plan(0, [], 1.0), [], 0)
        choices, drafts = rounds.read()
        assert [token for token, _ in drafts] == given
        assert [choice.token_id for choice in choices][:4] == want[1:5]
        assert len(choices) == 6
        rounds.queue(last, 20, 21, [], Plan(0, [], 1.0), [], 0)
        choices, drafts = rounds.read()
        assert [choice.token_id for choice in choices] == want[1:2]
        assert drafts == []


def interpreted_drafting_stops_where_it_does_not_pay(short: Engine) -> None:
    """By the plan's length, the product of the drafts' chances, and a token that ends the text."""
    chances = [0.5 + i / 20 for i in range(BINS)]
    with placed(short, PROMPT) as (rounds, last):

        def drafted(plan: Plan, stops: list[int]) -> list[tuple[int, float]]:
            rounds.queue(last, 20, 21, [], plan, stops, 0)
            choices, drafts = rounds.read()
            assert len(choices) == len(drafts) + 1
            return drafts

        whole = drafted(Plan(4, chances, 0.0), [])
        assert len(whole) == 4
        assert all(0 < confidence <= 1 for _, confidence in whole)
        kept = 1.0
        for _, confidence in whole[:2]:
            kept *= chances[min(BINS - 1, int(confidence * BINS))]
        assert drafted(Plan(2, chances, 0.0), []) == whole[:2]
        assert drafted(Plan(4, chances, kept * 1.001), []) == whole[:2]
        tokens = [token for token, _ in whole]
        assert drafted(Plan(4, chances, 0.0), [tokens[1], 7777]) == whole[: tokens.index(tokens[1]) + 1]


def interpreted_river_mode(llama: Engine) -> None:
    """Depths and probabilities are those of the layer-by-layer walk, but for what bfloat16 rounds."""
    options, params = RiverOptions(tau=0.6), replace(PARAMS, max_tokens=6)
    got = llama.generate(PROMPT, params, mode="river", river=options)
    with in_torch(llama):
        want = llama.generate(PROMPT, replace(params, max_tokens=3), mode="river", river=options)
    assert len(got.exit_depths) == len(got.token_ids) == 6
    assert len(set(got.exit_depths)) > 1
    assert got.exit_depths[:3] == want.exit_depths
    assert got.token_ids[:3] == want.token_ids
    assert got.logprobs[:3] == pytest.approx(want.logprobs, abs=0.05)


def interpreted_clocks_between_launches(llama: Engine) -> None:
    """A profile's clocks change nothing, and find each launch of each layer, on the path that its row took."""
    params, options = replace(PARAMS, max_tokens=3), RiverOptions(tau=0.6)
    instruments, layers = Instruments(llama), len(llama.model.layers)
    walk = llama.model.device_walk
    assert walk is not None
    for mode, river in (("exact", None), ("river", options)):
        plain = llama.generate(PROMPT, params, mode=mode, river=river)
        with instruments.attached() as watch:
            watch.start()
            timed = llama.generate(PROMPT, params, mode=mode, river=river)
        assert timed.token_ids == plain.token_ids
        assert timed.logprobs == pytest.approx(plain.logprobs, abs=1e-3)  # the host has the river's head otherwise
        steps = [span for span in watch.recorder.spans() if span.phase == "step" and span.layer is not None]
        assert [(s.layer, s.op) for s in steps] == [
            (layer, op) for _ in range(2) for layer in range(layers)
            for op in ("qkv", "rope", "attention", "o", "gate_up", "down")
        ]  # fmt: skip
        depths = plain.exit_depths[1:] or [layers] * 2
        want = [path for d in depths for path in ["backbone"] * d + ["river"] * (layers - d)]
        assert [span.path for span in steps if span.op == "qkv"] == want
        assert walk.marked is None
    instruments.close()


def interpreted_what_is_queued_ahead_leaves_no_trace(short: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop tokens, max_tokens, a full context, and a chat that goes on after them."""
    whole = short.generate(PROMPT, PARAMS, mode="exact")
    force(monkeypatch, [("river", 5)])
    for mode in ("exact", "lossless"):
        for count in (1, 2, 4):
            got = short.generate(PROMPT, replace(PARAMS, max_tokens=count), mode=mode)
            assert got.token_ids == whole.token_ids[:count]
            assert got.finish_reason == "length"
        token = whole.token_ids[3]
        got = short.generate(PROMPT, replace(PARAMS, stop_token_ids=(token,)), mode=mode)
        assert got.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
        assert got.finish_reason == "stop"
        long = (PROMPT * 7)[:125]
        with pytest.raises(ContextLengthError) as full:
            short.generate(long, PARAMS, mode=mode)
        assert len(full.value.output.token_ids) == 4


def interpreted_a_chat_goes_on(short: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, [("river", 5)])
    params = replace(PARAMS, max_tokens=5)
    outputs = []
    for mode in ("exact", "lossless"):
        session = short.session()
        for text in ("Hi", "Go on"):
            list(session.send(text, params, mode=mode))
        assert session.last_output is not None
        assert session.last_output.stats.cached_tokens > 0
        outputs.append(session.last_output)
        session.close()
    same(*outputs)


def interpreted_two_requests_take_turns(short: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of two open requests interleave: each finds its own state again."""
    force(monkeypatch, [("river", 3)])
    other, params = [9, 8, 7, 6, 5, 4], replace(PARAMS, max_tokens=5)
    wanted = [short.generate(ids, params, mode="exact").token_ids for ids in (PROMPT, other)]
    for modes in (("exact", "exact"), ("lossless", "exact")):
        streams = [short.stream(ids, params, mode=mode) for ids, mode in zip((PROMPT, other), modes, strict=True)]
        told = [[step.token_id for step in steps] for steps in zip(*streams, strict=True)]
        assert [list(each) for each in zip(*told, strict=True)] == wanted


def interpreted_side_by_side_each_says_what_it_says_alone(tmp_path: Path) -> None:
    """To the bit, while members leave one after the other."""
    prompts = [PROMPT, [9, 8, 7, 6, 5, 4], PROMPT[3:9]]
    params = [replace(PARAMS, max_tokens=n, temperature=t) for n, t in ((6, 0.0), (3, 1.0), (5, 0.0))]
    with load(two_layers("llama", tmp_path / "model"), max_sequences=3) as engine:
        wanted = [engine.generate(p, each, mode="exact") for p, each in zip(prompts, params, strict=True)]
        for got, want in zip(engine.generate_batch(prompts, params, mode="exact"), wanted, strict=True):
            same(got, want)


def interpreted_a_stream_that_rests_finds_its_step_again(short: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though others have overwritten the device's record of it meanwhile."""
    monkeypatch.setattr("riverinfer.device_decode._RING", 3)
    monkeypatch.setattr(short.decoder, "_rings", {})
    monkeypatch.setattr(short.model.device_walk, "_ready", {})
    want = short.generate(PROMPT, PARAMS, mode="exact").token_ids
    stream = short.stream(PROMPT, PARAMS, mode="exact")
    told = [next(stream).token_id for _ in range(3)]
    short.generate([9, 8, 7], PARAMS, mode="exact")
    assert told + [step.token_id for step in stream] == want


def interpreted_steps_made_ready_at_the_start(short: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change nothing, and leave tensors that later steps, of other kinds, may write to."""
    decoder, rounds = short.decoder, short.rounds
    assert decoder is not None
    assert rounds is not None
    monkeypatch.setattr(decoder, "_rings", {})
    monkeypatch.setattr(decoder.walk, "_ready", {})
    decoder.prepare("backbone")
    rounds.prepare_drafts()
    rounds.prepare_verify(4)
    force(monkeypatch, [("river", 3)])
    params = replace(PARAMS, temperature=1.0, max_tokens=4)
    same(short.generate(PROMPT, params), short.generate(PROMPT, params, mode="exact"))


def interpreted_more_sequences_than_a_step_has_rows(tmp_path: Path) -> None:
    params = replace(PARAMS, max_tokens=2)
    with load(two_layers("llama", tmp_path / "model"), mode="exact", river_bits=None, max_sequences=17) as engine:
        want = engine.generate(PROMPT[:3], params)
        for got in engine.generate_batch([PROMPT[:3]] * 17, params):
            assert got.token_ids == want.token_ids


def interpreted_across_the_border_of_long_frequencies(tmp_path: Path) -> None:
    """All that is cached is computed again there, by torch, and the device goes on behind it."""
    prompt = [5 + i * 7 % 200 for i in range(62)]
    with load(two_layers("phi3", tmp_path / "model"), mode="exact", river_bits=None, river_group=None) as engine:
        assert engine.model.rope.regime(64) != engine.model.rope.regime(65)
        got = engine.generate(prompt, PARAMS)
        with in_torch(engine):
            want = engine.generate(prompt, PARAMS)
        assert got.token_ids == want.token_ids
        assert got.logprobs == pytest.approx(want.logprobs, abs=0.1)
        batched = engine.generate_batch([prompt, prompt], PARAMS)
        assert [each.token_ids for each in batched] == [want.token_ids] * 2


def interpreted_frequencies_that_change_with_every_token(tmp_path: Path) -> None:
    """Dynamic NTK beyond its length: torch's steps, and K rotated as they do it."""
    folder = two_layers("llama", tmp_path / "model")
    edit_json(
        folder / "config.json", max_position_embeddings=24, rope_theta=10000.0, rope_parameters=...,
        rope_scaling={"rope_type": "dynamic", "factor": 4.0},
    )  # fmt: skip
    with load(folder, mode="exact", river_bits=None, ctx_size=64) as engine:
        assert engine.ctx_size > 24
        got = engine.generate(PROMPT, PARAMS)
        with in_torch(engine):
            want = engine.generate(PROMPT, PARAMS)
        assert got.token_ids == want.token_ids


def interpreted_a_river_that_is_not_packed(tmp_path: Path) -> None:
    """Torch takes models whose matrices the kernels do not."""
    with load("qwen2", mode="river", river_bits=8, river_group=0, river_method="rtn") as engine:
        assert engine.model.device_walk is None
        assert engine.generate(PROMPT, replace(PARAMS, max_tokens=2)).exit_depths


def interpreted_offloaded() -> None:
    """A backbone of which only two layers are loaded."""
    with load("llama", mode="river", backbone_layers=2) as engine:
        got = engine.generate(PROMPT, replace(PARAMS, max_tokens=3))
        with in_torch(engine):
            want = engine.generate(PROMPT, replace(PARAMS, max_tokens=2))
        assert set(got.exit_depths) <= {1, 2}
        assert got.exit_depths[:2] == want.exit_depths
        assert got.logprobs[:2] == pytest.approx(want.logprobs, abs=0.05)
