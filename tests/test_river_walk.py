"""The walk through backbone, gate and river, against exact runs and against an independent walk in float64."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from golden_models import CPU, NAMES, Golden, make_cache, open_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from riverinfer.decode import decode_one, prefill, walk
from riverinfer.errors import InvalidRequestError
from riverinfer.gates import FixedDepth, Gate, ShuffledDepths, SimilarityGate, always, never, similarity
from riverinfer.kernels.linear import PlainLinear
from riverinfer.kv_arena import KVArena
from riverinfer.kv_ledger import BACKBONE, RIVER, KVLedger
from riverinfer.model import DecoderLayer, Model
from riverinfer.river import RiverOptions
from riverinfer.sequence import SlotPool, TokenSequence
from riverinfer.trace import Trace


def crude_river(model: Model) -> list[DecoderLayer]:
    """The layers with matrices rounded to 15 levels: far enough from the backbone to tell the paths apart."""

    def rounded(linear: object) -> PlainLinear:
        assert isinstance(linear, PlainLinear)
        step = linear.weight.abs().amax(1, keepdim=True) / 7
        return PlainLinear((linear.weight / step).round() * step, linear.bias)

    return [
        replace(layer, **{name: rounded(getattr(layer, name)) for name in ("qkv", "o", "gate_up", "down")})
        for layer in model.layers
    ]


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


@pytest.fixture(scope="module")
def model(golden: Golden) -> Model:
    model = open_model(golden.folder)
    model.river = crude_river(model)
    return model


class GivenDepths:
    """Exits each step at the next of the given depths."""

    def __init__(self, depths: list[int]) -> None:
        self._depths, self._depth = iter(depths), 0

    def start(self) -> bool:
        self._depth = next(self._depths)
        return self._depth == 0

    def __call__(self, layer: int, h: Tensor, h_next: Tensor) -> bool:
        return layer + 1 >= self._depth


def run(model: Model, ids: list[int], gate: Gate | None, first: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """``first`` ids prefilled exactly, the others one by one through ``gate``; a ledger watches."""
    cache, ledger = make_cache(model, len(ids)), KVLedger(model.config.num_layers, len(ids))
    trace = Trace(ledger=ledger)
    rows = [prefill(model, ids[:first], 0, cache, trace=trace)]
    rows += [decode_one(model, token, first + i, cache, gate=gate, trace=trace) for i, token in enumerate(ids[first:])]
    return torch.cat(rows), cache


def test_a_gate_that_never_opens_is_exact_to_the_bit(golden: Golden, model: Model) -> None:
    ids = golden.tensors["prompt2.input_ids"].tolist()
    exact, exact_cache = run(model, ids, None, 5)
    for gate in (never(), SimilarityGate(tau=1.0, min_depth=99), SimilarityGate(tau=-1.0, min_depth=99)):
        logits, cache = run(model, ids, gate, 5)
        assert torch.equal(logits, exact)
        for (k, v), (ek, ev) in zip(cache, exact_cache, strict=True):
            assert torch.equal(k, ek)
            assert torch.equal(v, ev)


def test_an_unquantized_river_is_exact(golden: Golden) -> None:
    model = open_model(golden.folder)
    model.river = list(model.layers)
    ids = golden.tensors["prompt2.input_ids"].tolist()
    exact, _ = run(model, ids, None, 5)
    for gate in (always(), SimilarityGate(tau=0.5), FixedDepth(2), ShuffledDepths({0: 1, 3: 2})):
        assert torch.equal(run(model, ids, gate, 5)[0], exact)


def test_the_river_is_used_and_differs(golden: Golden, model: Model) -> None:
    ids = golden.tensors["prompt2.input_ids"].tolist()
    exact, _ = run(model, ids, None, 5)
    river, _ = run(model, ids, always(), 5)
    assert torch.equal(river[0], exact[0])
    assert (river[1:] - exact[1:]).abs().max() > 0.1


def test_similarities_are_the_golden_ones(golden: Golden, model: Model) -> None:
    trace = Trace.full()
    with torch.inference_mode():
        walk(model, golden.tensors["prompt2.input_ids"], 0, make_cache(model), trace=trace)
    assert trace.similarities is not None
    got, want = torch.stack(trace.similarities), golden.tensors["f32.prompt2.similarity"].float()
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-4


def test_the_similarity_gate_opens_after_the_first_layer_above_tau(golden: Golden, model: Model) -> None:
    ids = golden.tensors["prompt2.input_ids"].tolist()
    want = golden.tensors["f32.prompt2.similarity"]
    layers = model.config.num_layers
    for tau in (-1.0, 0.3, 0.6, 0.9, 1.0):
        for token in (6, 11, 22):
            # Everything before the token is exact, so its similarities up to its exit are the golden ones.
            cache, trace = make_cache(model), Trace()
            prefill(model, ids[:token], 0, cache)
            decode_one(model, ids[token], token, cache, gate=SimilarityGate(tau), trace=trace)
            above = [i for i in range(layers) if want[i, token] > tau]
            assert trace.depth == (above[0] + 1 if above else layers)


def independent_walk(model: Model, ids: list[int], depths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """K and V that each token leaves behind, in float64, token by token and head by head from the definitions."""
    config, rope = model.config, model.rope
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    keys: list[list[Tensor]] = [[] for _ in range(config.num_layers)]
    values: list[list[Tensor]] = [[] for _ in range(config.num_layers)]

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weight.double()

    def times(linear: object, x: Tensor) -> Tensor:
        assert isinstance(linear, PlainLinear)
        y = linear.weight.double() @ x
        return y if linear.bias is None else y + linear.bias.double()

    for position, (token, depth) in enumerate(zip(ids, depths, strict=True)):
        h = model.embed(torch.tensor([token]))[0].double()
        angles = position * rope.inverse_frequencies(len(ids)).double()
        turn = torch.polar(torch.full_like(angles, rope.attention_factor), angles)
        half, rotary = len(angles), 2 * len(angles)
        for i in range(config.num_layers):
            layer = model.layers[i] if i < depth else model.river[i]
            qkv = times(layer.qkv, norm(h, layer.input_norm)).view(-1, dim)
            q, k, v = qkv[:heads], qkv[heads : heads + kv_heads], qkv[heads + kv_heads :]
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
            if layer.use_rope:
                for x in (q, k):
                    pairs = torch.complex(x[:, :half].clone(), x[:, half:rotary].clone()) * turn
                    x[:, :half], x[:, half:rotary] = pairs.real, pairs.imag
            if config.query_scaling is not None:
                scaling = config.query_scaling
                q = q * (1 + scaling.beta * math.log(1 + position // scaling.period))
            keys[i].append(k)
            values[i].append(v)
            low = 0 if layer.window is None else max(0, position + 1 - layer.window)
            mixed = []
            for head in range(heads):
                kv_head = head * kv_heads // heads
                seen = torch.stack([row[kv_head] for row in keys[i][low:]])
                weights = (seen @ q[head] / math.sqrt(dim)).softmax(0)
                mixed.append(weights @ torch.stack([row[kv_head] for row in values[i][low:]]))
            h = h + times(layer.o, torch.cat(mixed))
            gate, up = times(layer.gate_up, norm(h, layer.post_norm)).chunk(2)
            h = h + times(layer.down, gate * gate.sigmoid() * up)
    return [(torch.stack(k, 1), torch.stack(v, 1)) for k, v in zip(keys, values, strict=True)]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=4, deadline=None)
def test_mixed_depths_leave_the_cache_of_an_independent_walk(golden: Golden, model: Model, seed: int) -> None:
    rng, layers = random.Random(seed), model.config.num_layers
    ids = [rng.randrange(5, model.config.vocab_size) for _ in range(20)]
    depths = [layers] * 3 + [rng.randrange(layers + 1) for _ in range(17)]
    _, cache = run(model, ids, GivenDepths(depths[3:]), 3)
    for (k, v), (want_k, want_v) in zip(cache, independent_walk(model, ids, depths), strict=True):
        assert (k - want_k).abs().max() <= 1e-4 * want_k.abs().max()
        assert (v - want_v).abs().max() <= 1e-4 * want_v.abs().max()


def test_the_ledger_knows_every_path(model: Model) -> None:
    layers = model.config.num_layers
    cache, ledger = make_cache(model, 8), KVLedger(layers, 8)
    trace = Trace(ledger=ledger)
    prefill(model, [9, 10, 11], 0, cache, trace=trace)
    for position, depth in ((3, 0), (4, 2), (5, layers)):
        decode_one(model, 12, position, cache, gate=FixedDepth(depth), trace=trace)
        assert trace.depth == depth
        want = [BACKBONE if layer < depth else RIVER for layer in range(layers)]
        assert ledger.paths[:, position].tolist() == want
    assert (ledger.paths[:, :3] == BACKBONE).all()
    assert (ledger.paths[:, 6:] == 0).all()


def test_the_ledger_finds_what_is_missing_or_twice(model: Model) -> None:
    cache, ledger = make_cache(model, 8), KVLedger(model.config.num_layers, 8)
    trace = Trace(ledger=ledger)
    prefill(model, [9, 10], 0, cache, trace=trace)
    with pytest.raises(AssertionError, match="has no K and V at position 2"):
        decode_one(model, 11, 3, cache, trace=trace)
    with pytest.raises(AssertionError, match="twice"):
        ledger.write(0, 1, 2, river=False)
    cache, ledger = make_cache(model, 8), KVLedger(model.config.num_layers, 8)
    silent = model.layers[1].__class__

    class Forgetful(silent):  # type: ignore[misc, valid-type]
        def __call__(self, h: Tensor, step: object, k: Tensor, v: Tensor) -> Tensor:
            return super().__call__(h, step, k.clone(), v.clone())

    kept = model.layers[1]
    model.layers[1] = Forgetful(**{f: getattr(kept, f) for f in kept.__dataclass_fields__})
    try:
        with pytest.raises(AssertionError, match="layer 1 claims K and V that it did not write"):
            prefill(model, [9, 10], 0, cache, trace=Trace(ledger=ledger))
    finally:
        model.layers[1] = kept


def test_a_state_that_is_no_number_stays_in_the_backbone() -> None:
    gate = SimilarityGate(tau=-1.0)
    h = torch.ones(1, 4)
    assert gate(0, h, h)
    assert not gate(0, h, h * float("nan"))
    assert gate.not_a_number == 1


def test_tau_may_differ_by_layer_and_depths_are_bounded() -> None:
    h, turned = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])  # similarity 0.707
    gate = SimilarityGate(tau=[0.9, 0.5])
    assert [gate(0, h, turned), gate(1, h, turned), gate(5, h, turned)] == [False, True, True]
    gate = SimilarityGate(tau=-1.0, min_depth=3)
    assert [gate(layer, h, turned) for layer in range(4)] == [False, False, True, True]
    gate = SimilarityGate(tau=1.0, max_depth=2)
    assert [gate(layer, h, turned) for layer in range(3)] == [False, True, True]
    assert SimilarityGate(max_depth=0, min_depth=0).start()
    both = torch.cat((h, h)), torch.cat((h, turned))
    assert SimilarityGate(0.8, scope="min")(0, *both) is False
    assert SimilarityGate(0.8, scope="last")(0, both[0], both[1].flip(0)) is True
    assert similarity(h, turned).dtype == torch.float32


def test_shuffled_depths_follow_their_histogram_and_seed() -> None:
    h = torch.ones(1, 2)

    def draw(seed: int) -> list[int]:
        gate = ShuffledDepths({0: 1, 2: 3}, seed)
        return [0 if gate.start() else 1 + next(i for i in range(9) if gate(i, h, h)) for _ in range(2000)]

    depths = draw(1)
    assert set(depths) == {0, 2}
    assert 0.7 < depths.count(2) / 2000 < 0.8
    assert depths == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tau": 1.1}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"tau": []}, "tau"),
        ({"tau": [0.5, 2]}, "tau"),
        ({"tau": "x"}, "tau"),
        ({"tau": None}, "tau"),
        ({"tau": True}, "tau"),
        ({"min_depth": -1}, "min_depth"),
        ({"min_depth": 4, "max_depth": 3}, "max_depth"),
        ({"gate": "garden"}, "gate"),
        ({"prefill": "some"}, "prefill"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        RiverOptions(**options)  # type: ignore[arg-type]


def test_exact_turns_do_not_read_what_the_river_wrote(model: Model) -> None:
    arena = KVArena(model.config, slots=1, ctx_size=64, dtype=model.dtype, device=CPU)
    pool, sequence = SlotPool(arena), TokenSequence(model, 64)
    pool.acquire(sequence)
    sequence.extend([9, 10, 11])
    sequence.extend([12], gate=never())
    assert sequence.exact == 4
    sequence.extend([13], gate=FixedDepth(1))
    sequence.extend([14])
    assert (sequence.exact, len(sequence.tokens)) == (4, 6)
    wanted = [9, 10, 11, 12, 13, 14, 15]
    assert sequence.keep_common(wanted) == 6
    assert sequence.keep_common(wanted, exact=True) == 4
    got = sequence.extend(wanted[4:])
    want = prefill(model, wanted, 0, make_cache(model))
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert sequence.exact == 7


def test_an_interrupted_rollback_claims_no_more_than_is_exact(model: Model) -> None:
    class Interrupted(list[int]):
        def __delitem__(self, index: object) -> None:
            raise KeyboardInterrupt

    sequence = TokenSequence(model, 64)
    pool = SlotPool(KVArena(model.config, slots=1, ctx_size=64, dtype=model.dtype, device=CPU))
    pool.acquire(sequence)
    sequence.extend([9, 10, 11, 12])
    sequence.tokens = Interrupted(sequence.tokens)
    with pytest.raises(KeyboardInterrupt):
        sequence.truncate(2)
    assert sequence.exact == 2
