"""The early-exit strategies: exact when nobody exits, and each true to its rule when tokens do."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_models import CPU, NAMES, ROOT, Golden, make_cache, open_model
from torch import Tensor

from riverinfer.decode import decode_one, prefill
from riverinfer.evidence.kv_strategies import (
    STRATEGIES,
    BatchedRecompute,
    EarlyExit,
    KVShare,
    Masking,
    MonotoneDepth,
    StatePropagation,
)
from riverinfer.gates import never
from riverinfer.kernels.linear import PlainLinear
from riverinfer.kv_arena import KVArena
from riverinfer.model import DecoderLayer, Model
from riverinfer.trace import Trace

BENCH = Path(__file__).parent.parent / "bench"

FIRST = 5  # prompt tokens


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


@pytest.fixture(scope="module")
def model(golden: Golden) -> Model:
    model = open_model(golden.folder)
    model.river = list(model.layers)
    return model


@pytest.fixture(scope="module")
def ids(golden: Golden) -> list[int]:
    return golden.tensors["prompt2.input_ids"].tolist()


class GivenDepths:
    """Leaves each step at the next of the given depths; keeps the state it left with."""

    def __init__(self, depths: list[int]) -> None:
        self._depths, self._depth = iter(depths), 0
        self.state: Tensor | None = None

    def start(self) -> bool:
        self._depth, self.state = next(self._depths), None
        return self._depth == 0

    def __call__(self, layer: int, h: Tensor, h_next: Tensor) -> bool:
        assert h.shape == h_next.shape == (1, h.shape[1])
        self.state = h_next
        return layer + 1 >= self._depth


def arena_slot(model: Model, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    return KVArena(model.config, slots=1, ctx_size=len(ids), dtype=model.dtype, device=CPU).slot(0)


def random_depths(model: Model, ids: list[int], seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(model.config.num_layers + 1) for _ in ids[FIRST:]]


def run(strategy: EarlyExit, ids: list[int]) -> tuple[Tensor, list[int]]:
    """Logits [1 + T, vocab] after the prompt and each of T further ids, and their depths."""
    rows, depths = [strategy.prefill(ids[:FIRST])], []
    for token in ids[FIRST:]:
        logits, depth = strategy.step(token)
        rows.append(logits)
        depths.append(depth)
    return torch.cat(rows), depths


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


@pytest.mark.parametrize("kind", STRATEGIES.values())
def test_without_exits_every_strategy_is_exact_to_the_bit(kind: type[EarlyExit], model: Model, ids: list[int]) -> None:
    cache = make_cache(model, len(ids))
    rows = [prefill(model, ids[:FIRST], 0, cache)]
    rows += [decode_one(model, token, FIRST + i, cache) for i, token in enumerate(ids[FIRST:])]
    strategy = kind(model, arena_slot(model, ids), never())
    logits, depths = run(strategy, ids)
    assert torch.equal(logits, torch.cat(rows))
    assert set(depths) == {model.config.num_layers}
    for layer, (k, v) in enumerate(cache):
        got_k, got_v = strategy.entries(layer)
        assert torch.equal(got_k, k)
        assert torch.equal(got_v, v)


@pytest.mark.parametrize("kind", STRATEGIES.values())
def test_no_strategy_reads_an_entry_that_is_missing(kind: type[EarlyExit], model: Model, ids: list[int]) -> None:
    strategy = kind(model, arena_slot(model, ids), GivenDepths(random_depths(model, ids, 1)))
    assert run(strategy, ids)[0].isfinite().all()
    broken = EarlyExit(model, arena_slot(model, ids), GivenDepths(random_depths(model, ids, 1)))
    assert run(broken, ids)[0].isnan().any()


def test_a_river_of_backbone_layers_is_exact(model: Model, ids: list[int]) -> None:
    want, _ = run(KVShare(model, arena_slot(model, ids), never()), ids)
    wanted = random_depths(model, ids, 2)
    got, depths = run(KVShare(model, arena_slot(model, ids), GivenDepths(wanted)), ids)
    assert torch.equal(got, want)
    assert depths == wanted


# float64, straight from the definitions -----------------------------------------------------------------------------


def times(linear: object, x: Tensor) -> Tensor:
    assert isinstance(linear, PlainLinear)
    y = x @ linear.weight.double().T
    return y if linear.bias is None else y + linear.bias.double()


def norm(model: Model, x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + model.config.rms_norm_eps) * weight.double()


def turned(model: Model, layer: DecoderLayer, x: Tensor, positions: Tensor) -> Tensor:
    """x [T, heads, D] rotated to ``positions`` [T]."""
    if not layer.use_rope:
        return x
    angles = torch.outer(positions.double(), model.rope.inverse_frequencies(1).double())[:, None]  # [T, 1, R / 2]
    half = angles.shape[-1]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
    pairs = pairs * torch.polar(torch.full_like(angles, model.rope.attention_factor), angles)
    return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), -1)


def project(model: Model, layer: DecoderLayer, h: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V, each [T, heads, D], of input states h [T, H]."""
    heads, kv_heads = layer.num_heads, layer.num_kv_heads
    qkv = times(layer.qkv, norm(model, h, layer.input_norm)).view(len(h), -1, layer.head_dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    q, k = norm(model, q, layer.q_norm), norm(model, k, layer.k_norm)
    return turned(model, layer, q, positions), turned(model, layer, k, positions), v


def masked_logits(model: Model, ids: list[int], depths: list[int]) -> Tensor:
    """All tokens layer by layer, who skipped a layer hidden there by an explicit mask: float64 [T, vocab]."""
    positions, depth = torch.arange(len(ids)), torch.tensor(depths)
    distance = positions[:, None] - positions  # [T, T]
    h = model.embed(torch.tensor(ids)).double()
    for index, layer in enumerate(model.layers):
        q, k, v = project(model, layer, h, positions)
        if model.config.query_scaling is not None:
            scaling = model.config.query_scaling
            q = q * (1 + scaling.beta * torch.log(1.0 + positions.double() // scaling.period))[:, None, None]
        passed = depth > index  # [T]
        visible = (distance >= 0) & passed
        if layer.window is not None:
            visible &= distance < layer.window
        k, v = (x.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(layer.head_dim)
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        out = h + times(layer.o, torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
        gate, up = times(layer.gate_up, norm(model, out, layer.post_norm)).chunk(2, -1)
        out = out + times(layer.down, gate * gate.sigmoid() * up)
        h = torch.where(passed[:, None], out, h)
    return times(model.head, norm(model, h, model.final_norm))


@pytest.mark.parametrize("seed", range(2))
def test_masking_is_attention_under_an_explicit_mask(model: Model, ids: list[int], seed: int) -> None:
    wanted = random_depths(model, ids, seed)
    strategy = Masking(model, arena_slot(model, ids), GivenDepths(wanted))
    logits, depths = run(strategy, ids)
    assert depths == wanted
    depths = [model.config.num_layers] * FIRST + depths
    assert close(logits, masked_logits(model, ids, depths)[FIRST - 1 :])
    for layer in range(model.config.num_layers):
        k, v = strategy.entries(layer)
        absent = torch.tensor(depths) <= layer
        assert torch.equal(k.isnan().all(0).all(-1), absent)
        assert torch.equal(v.isnan().any(0).any(-1), absent)


def test_propagated_entries_are_projections_of_the_state_at_the_exit(model: Model, ids: list[int]) -> None:
    wanted = random_depths(model, ids, 3)
    gate = GivenDepths(wanted)
    strategy = StatePropagation(model, arena_slot(model, ids), gate)
    strategy.prefill(ids[:FIRST])
    for position, (token, depth) in enumerate(zip(ids[FIRST:], wanted, strict=True), FIRST):
        assert strategy.step(token)[1] == depth
        state = model.embed(torch.tensor([token])) if gate.state is None else gate.state
        for layer in range(depth, model.config.num_layers):
            _, k, v = project(model, model.layers[layer], state.double(), torch.tensor([position]))
            got_k, got_v = strategy.entries(layer)
            assert close(got_k[:, position], k[0])
            assert close(got_v[:, position], v[0])


@pytest.mark.parametrize("limit", [3, 100])
@pytest.mark.parametrize("seed", range(2))
def test_recompute_is_the_exact_backbone_at_every_depth(model: Model, ids: list[int], limit: int, seed: int) -> None:
    layers, wanted = model.config.num_layers, random_depths(model, ids, seed)
    cache, trace, gate = make_cache(model, len(ids)), Trace.full(), GivenDepths(wanted)
    exact = prefill(model, ids, 0, cache, all_logits=True, trace=trace)
    strategy = BatchedRecompute(model, arena_slot(model, ids), gate, limit)
    strategy.prefill(ids[:FIRST])
    for position, token in enumerate(ids[FIRST:], FIRST):
        gate.state = None
        logits, depth = strategy.step(token)
        if gate.state is not None:
            assert trace.states is not None
            assert close(gate.state[0], trace.states[depth][position])
        for layer in range(depth):
            assert strategy.entries(layer)[0].isfinite().all()
        if depth == layers:
            assert close(logits[0], exact[position])
            assert not strategy.waiting
        assert sum(len(states) for _, states in strategy.waiting) <= limit
    strategy.flush()
    assert not strategy.waiting
    for layer, (k, v) in enumerate(cache):
        got_k, got_v = strategy.entries(layer)
        assert close(got_k, k)
        assert close(got_v, v)


def test_recompute_fills_the_cache_before_a_full_token_reads_it(model: Model, ids: list[int]) -> None:
    layers, early = model.config.num_layers, [1, 0, 2, 1, 3, 1]
    strategy = BatchedRecompute(model, arena_slot(model, ids), GivenDepths([*early, layers]))
    strategy.prefill(ids[:FIRST])
    waiting = [strategy.step(token)[1] for token in ids[FIRST : FIRST + len(early)]]
    assert waiting == early
    assert [(depth, len(states)) for depth, states in strategy.waiting] == [(3, 5), (1, 1)]
    logits, _ = strategy.step(ids[FIRST + len(early)])
    seen = ids[: FIRST + len(early) + 1]
    cache = make_cache(model, len(seen))
    assert close(logits, prefill(model, seen, 0, cache))
    for layer, (k, v) in enumerate(cache):
        got_k, got_v = strategy.entries(layer)
        assert close(got_k, k)
        assert close(got_v, v)


def test_a_full_list_forces_a_full_token(model: Model, ids: list[int]) -> None:
    layers = model.config.num_layers
    strategy = BatchedRecompute(model, arena_slot(model, ids), GivenDepths([1] * len(ids)), limit=2)
    _, depths = run(strategy, ids)
    assert depths == [layers if i % 3 == 2 else 1 for i in range(len(depths))]


def test_depths_never_increase_under_the_monotone_rule(model: Model, ids: list[int]) -> None:
    layers, wanted = model.config.num_layers, random_depths(model, ids, 4)
    wanted[0] = layers
    wanted[1:] = [max(1, depth) for depth in wanted[1:]]
    strategy = MonotoneDepth(model, arena_slot(model, ids), GivenDepths(wanted))
    logits, depths = run(strategy, ids)
    assert depths == [min(wanted[: i + 1]) for i in range(len(wanted))]
    assert logits.isfinite().all()
    for layer in range(layers):
        absent = torch.tensor([layers] * FIRST + depths) <= layer
        assert torch.equal(strategy.entries(layer)[0].isnan().all(0).all(-1), absent)

    class Free(MonotoneDepth):
        def step(self, token: int) -> tuple[Tensor, int]:
            self.max_depth = layers
            return super().step(token)

    logits, depths = run(Free(model, arena_slot(model, ids), GivenDepths(wanted)), ids)
    assert depths == wanted
    assert logits.isnan().any()


def test_a_sequence_that_scales_its_rotary_frequencies_is_refused() -> None:
    model = open_model(ROOT / "phi3")
    with pytest.raises(ValueError, match="longer than this model's unscaled"):
        EarlyExit(model, make_cache(model, model.config.context_limit), never())


def test_the_comparison_prints_its_table(tmp_path: Path) -> None:
    arguments = [
        "--tokens",
        "6",
        "--prompts",
        "2",
        "--group",
        "32",
        "--tau",
        "0.5",
        "0.97",
        "--limit",
        "2",
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, str(BENCH / "figure8.py"), str(ROOT / "llama"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "RIVERINFER_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "| never | exact | 5.0 | 0.000" in done.stdout
    for text in (*STRATEGIES, "tau 0.5", "tau 0.97", "fixed, 2 layers", "V cosine"):
        assert text in done.stdout
