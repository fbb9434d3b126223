"""The error that one forced exit causes, and candidate gates fitted to it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from audit_models import load, texts
from golden_models import make_cache

from riverinfer import Engine
from riverinfer.decode import decode_one, prefill
from riverinfer.evidence import gate_error_summary
from riverinfer.evidence.better_gates import (
    CANDIDATES,
    RECENT,
    Example,
    FittedGate,
    GateFit,
    confidence,
    examples,
    fit_gate,
    judged,
)
from riverinfer.evidence.controls import Trial
from riverinfer.evidence.findings import _correlations, _runs
from riverinfer.evidence.forced import Text, walk_forced
from riverinfer.evidence.gate_error import (
    Exit,
    KVError,
    Sampled,
    exit_depths,
    sample_errors,
)
from riverinfer.evidence.gate_error_summary import (
    ERRORS,
    PAPER_R,
    Correlation,
    GateError,
    _ranks,
    _weighted_pearson,
    error_of,
    summarize_errors,
)
from riverinfer.evidence.quality import Scored
from riverinfer.evidence.statistics import pearson, spearman
from riverinfer.gates import FixedDepth, always

LAYERS = 5


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def text(engine: Engine) -> Text:
    return texts(engine, 1, 16)[0]


def test_exit_depths() -> None:
    assert exit_depths(2) == [1]
    assert exit_depths(5) == [1, 2, 3, 4]
    assert exit_depths(30) == list(range(1, 30))
    found = exit_depths(30, 8)
    assert len(found) == 8
    assert found[:2] == [1, 2]
    assert found[-1] == 29
    assert exit_depths(30, 1) == [1]


def test_nothing_differs_from_exact_but_the_one_exit(engine: Engine, text: Text) -> None:
    sampled = sample_errors(engine, text, 0, [1, 3], 6)
    assert len({token.position for token in sampled}) == 6
    model = engine.model
    for token in sampled[::3]:
        ids = [*text.prompt, *text.answer[: token.position]]
        said = text.answer[token.position]
        caches = [make_cache(model) for _ in range(3)]
        rows = []
        for cache, gate in zip(caches, (None, FixedDepth(1), FixedDepth(3)), strict=True):
            prefill(model, ids, 0, cache)
            rows.append(decode_one(model, said, len(ids), cache, gate=gate))
        for exit, cache, row in zip(token.exits, caches[1:], rows[1:], strict=True):
            p, q = rows[0].log_softmax(-1), row.log_softmax(-1)
            assert exit.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4, abs=1e-6)
            assert exit.similarity == pytest.approx(token.similarities[exit.depth - 1])
            got, want = (c[-1][1][:, len(ids)] for c in (cache, caches[0]))  # V of the last layer
            assert exit.last_v_cosine == pytest.approx(float(torch.cosine_similarity(got, want, dim=-1).mean()))
            last = token.by_layer[token.exits.index(exit)][-1]
            assert last.v_l2 == pytest.approx(float(((got - want).norm(dim=-1) / want.norm(dim=-1)).mean()), rel=1e-4)
            assert last.v_norm == pytest.approx(float((got.norm(dim=-1) / want.norm(dim=-1)).mean()), rel=1e-4)
            assert len(token.by_layer[token.exits.index(exit)]) == LAYERS - exit.depth


def test_a_river_of_the_backbones_own_layers_causes_no_error(
    engine: Engine, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.model, "river", list(engine.model.layers))
    monkeypatch.setattr(engine.model, "river_script", None)
    monkeypatch.setattr(engine.model, "river_head", None)
    for token in sample_errors(engine, text, 0, [1, 4], 3):
        for exit in token.exits:
            assert exit.kl < 1e-6
            assert exit.same
            assert exit.error.v_l2 < 1e-5
            assert exit.error.k_cosine == pytest.approx(1)


def test_the_summary(engine: Engine) -> None:
    sampled = [
        token for i, each in enumerate(texts(engine, 3, 12)) for token in sample_errors(engine, each, i, [1, 4], 5)
    ]
    found = summarize_errors(sampled)
    assert len(found.exits) == 30
    assert found.paper_r == PAPER_R == 0.5536
    assert {(c.depth, c.tokens) for c in found.correlations} == {(1, 15), (4, 15), (None, 30)}
    assert [each.layer for each in found.layers] == list(range(LAYERS))
    assert [(each.depth, each.layer) for each in found.by_layer] == [(1, 1), (1, 2), (1, 3), (1, 4), (4, 4)]
    mean = sum(exit.error.k_l2 for exit in found.exits if exit.depth == 4) / 15
    assert found.by_layer[-1].error.k_l2 == pytest.approx(mean)
    assert found.layers[2].low <= found.layers[2].median <= found.layers[2].high


def forced(prompts: int, tokens: int = 6, depth: int = 2, **errors: Any) -> list[Sampled]:
    """Tokens whose similarity rises from 0 to 1 unevenly, with errors given as functions of it."""
    found = []
    for i in range(prompts * tokens):
        similarity = (i * 7 % (prompts * tokens)) / (prompts * tokens)
        noise = math.sin(37.0 * i)  # has nothing to do with it

        def value(name: str, s: float = similarity, noise: float = noise) -> float:
            return float(errors[name](s)) if name in errors else 1 + 0.1 * noise

        error = KVError(*(value(field.name) for field in fields(KVError)))
        exit = Exit(i // tokens, i, depth, similarity, value("kl"), True, error, value("last_v_cosine"))
        found.append(Sampled(i // tokens, i, (0.0,) * 4, (exit,), ((error, error),)))
    return found


def of(sampled: list[Sampled]) -> dict[str, Correlation]:
    return {c.error: c for c in summarize_errors(sampled).correlations if c.depth is not None}


def test_pearson_and_spearman_of_a_curve_that_rises() -> None:
    found = of(forced(8, v_cosine=lambda s: math.exp(9 * s)))["v_cosine"]
    assert found.spearman == pytest.approx(1)
    assert found.spearman_interval == pytest.approx((1, 1))
    assert found.pearson is not None
    assert found.pearson < 0.8
    assert found.pearson_interval is not None
    low, high = found.pearson_interval
    assert low < found.pearson < high < 0.9


def test_each_error_has_its_own_direction() -> None:
    """What falls with similarity is right for L2, norms off 1 and KL, and wrong for cosines."""
    assert set(ERRORS) == {"kl", "last_v_cosine", *(field.name for field in fields(KVError))}
    for name in ERRORS:
        falls = of(forced(8, **{name: lambda s: 3 - s}))
        grows = of(forced(8, **{name: lambda s: 1 + s}))
        right = 1 if name.endswith("cosine") else -1
        assert (falls[name].direction, grows[name].direction) == (-right, right), name
        others = [c for other, c in falls.items() if other != name]
        assert all(c.direction == 0 for c in others), name


def test_a_norm_too_small_is_as_wrong_as_one_too_large() -> None:
    exit = forced(1, v_norm=lambda _: 0.5, k_norm=lambda _: 2.0)[0].exits[0]
    assert error_of(exit, "v_norm") == error_of(exit, "k_norm") == pytest.approx(math.log(2))
    assert error_of(forced(1, v_norm=lambda _: 0.0)[0].exits[0], "v_norm") > 700  # not an error
    found = of(forced(8, v_norm=lambda s: math.exp(s - 1)))["v_norm"]  # nears 1 from below
    assert found.pearson == pytest.approx(-1)
    assert found.direction == 1


def test_intervals_are_over_prompts() -> None:
    """As those of resamples made by hand, and wider where the tokens of a prompt are the same one many times over."""
    tokens = forced(10, 3, v_l2=lambda s: s + 0.5 * math.sin(40 * s))
    found = of(tokens)["v_l2"]
    rng, drawn = random.Random(1), []
    for _ in range(1500):
        exits = [e for p in rng.choices(range(10), k=10) for t in tokens if t.prompt == p for e in t.exits]
        x, y = [e.similarity for e in exits], [e.error.v_l2 for e in exits]
        drawn.append((pearson(x, y), spearman(x, y)))
    tail = 0.012  # 0.025 expanded for ten prompts
    for at, interval in enumerate((found.pearson_interval, found.spearman_interval)):
        assert interval == pytest.approx(np.quantile([pair[at] or 0 for pair in drawn], [tail, 1 - tail]), abs=0.06)
    again = of([each for token in tokens for each in [token] * 5])["v_l2"]
    assert again.tokens == 5 * found.tokens
    assert again.pearson_interval == pytest.approx(found.pearson_interval)
    assert again.spearman_interval == pytest.approx(found.spearman_interval, abs=0.01)


def test_resamples_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many exits there are, an array holds about ``CELLS`` values: the same intervals come out."""
    tokens = forced(10, 3, v_l2=lambda s: s + 0.5 * math.sin(40 * s))
    whole, sizes = of(tokens), []

    def watched(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        sizes.append(weights.size)
        return _ranks(weights, values)

    monkeypatch.setattr(gate_error_summary, "CELLS", 5000)
    monkeypatch.setattr(gate_error_summary, "_ranks", watched)
    assert of(tokens) == whole
    assert 2500 < max(sizes) <= 5000


def test_a_weighted_resample_is_the_one_written_out() -> None:
    x, y = np.array([1.0, 2, 2, 5, 3]), np.array([3.0, 1, 4, 4, 0])
    weights = np.array([[2.0, 0, 1, 1, 3], [1, 1, 1, 1, 1]])
    pairs = (x, y), (_ranks(weights, x), _ranks(weights, y))
    for correlate, pair in zip((pearson, spearman), pairs, strict=True):
        found = _weighted_pearson(weights, *pair)
        for row, value in zip(weights.astype(int), found, strict=True):
            assert value == pytest.approx(correlate(x.repeat(row).tolist(), y.repeat(row).tolist()))


def test_what_has_no_correlation_has_no_interval() -> None:
    flat = of(forced(8, k_l2=lambda _: 0.3))["k_l2"]
    assert (flat.pearson, flat.spearman, flat.pearson_interval, flat.spearman_interval) == (None,) * 4
    few = of(forced(4, k_l2=lambda s: s))["k_l2"]
    assert few.pearson == pytest.approx(1)
    assert few.pearson_interval is few.spearman_interval is None
    assert few.direction == 0


def test_pearson_alone_is_not_sure() -> None:
    """One far-off token a prompt turns r against the order of all others."""
    found = Correlation(6, "v_cosine", -0.4, -0.2, 128, (-0.6, -0.1), (-0.4, 0.1))
    assert found.direction == 0
    assert replace(found, spearman_interval=(-0.4, -0.1)).direction == -1
    assert replace(found, spearman_interval=(0.1, 0.4)).direction == 0


def test_the_finding_names_depths_and_directions() -> None:
    def finding(*correlations: Correlation) -> list[str]:
        return _correlations(GateError((), correlations, (), ()))

    def c(depth: int | None, error: str, r: float, rho: float, half: float = 0.1) -> Correlation:
        return Correlation(depth, error, r, rho, 128, (r - half, r + half), (rho - half, rho + half))

    v = [
        c(1, "v_cosine", 0.7, 0.8),
        c(9, "v_cosine", 0.5, 0.4),
        c(14, "v_cosine", 0.05, 0),
        c(20, "v_cosine", -0.5, -0.6),
    ]
    kl = [c(1, "kl", -0.3, -0.35), c(9, "kl", 0.3, 0.35)]
    lines = finding(*v, *kl, c(None, "v_cosine", 0.99, 0.99), c(1, "last_v_cosine", 0.2, 0.1, 0.5))
    said = "similarity at an exit and its error in"
    assert lines == [
        f"{said} V over the layers after it: similar tokens surely err less after 1, 9 layers (r 0.50 to 0.70, rho 0.40"
        " to 0.80) and more after 20 layers (r -0.50, rho -0.60), unsure at 1 of 4 depths",
        f"{said} the last layer's V (the paper: r = {PAPER_R} for early layers): sure at none of 1 depths (r 0.20)",
        f"{said} KL: similar tokens surely err less after 1 layer (r -0.30, rho -0.35) and more after 9 layers (r 0.30,"
        " rho 0.35). Sure, here, is what the intervals of Pearson's r and Spearman's rho both tell from 0, each depth"
        " by itself, so that one in twenty may be luck",
    ]
    (few,) = finding(replace(v[0], pearson_interval=None, spearman_interval=None))
    assert "too few prompts to tell (r 0.70)" in few
    assert finding() == []


def test_depths_in_a_row_are_said_as_one() -> None:
    assert _runs([1, 2, 5, 6, 7, 8, 20]) == "1, 2, 5 to 8, 20"
    assert _runs([3]) == "3"


def made(count: int, layers: int = 6) -> list[Example]:
    """Tokens whose log error falls by 0.5 a depth, by 2 with a unit of confidence, and rises with similarity's z."""
    found = []
    for i in range(count):
        z, last = math.sin(7.0 * i), 0.5 + 0.4 * math.cos(3.0 * i)
        values = tuple(0.1 * layer + 0.01 * z for layer in range(layers))
        nothing = KVError(1, 1, 0, 0, 1, 1)
        exits = tuple(
            Exit(0, i, depth, values[depth - 1], math.exp(0.7 * z - 2 * last - 0.5 * depth), True, nothing, 1.0)
            for depth in (1, 3, 5)
        )
        found.append(Example(Sampled(0, i, values, exits, ()), last, last))
    return found


def test_the_fit_finds_what_the_error_was_made_of() -> None:
    tokens = [replace(example, recent=0.5) for example in made(200)]
    fit = fit_gate("combination", tokens, 3)
    sd = 0.01 * math.sqrt(0.5)
    assert fit.sd == pytest.approx([sd] * 6, rel=0.1)
    assert fit.weights[0] == pytest.approx(0.7 * math.sqrt(0.5), rel=0.1)
    assert fit.weights[1] == pytest.approx(-2, rel=0.3)  # the ridge pulls a little
    steps = [b - a for a, b in zip(fit.base, fit.base[1:], strict=False)]
    assert steps[:4] == pytest.approx([-0.5] * 4, abs=0.01)
    alone = fit_gate("confidence", tokens, 3)
    assert alone.weights[0] == 0
    assert fit_gate("standardised similarity", tokens, 3).weights == (-1, 0, 0)
    assert fit_gate("similarity", tokens, 3).mean == (0,) * 6
    with pytest.raises(ValueError, match="too few"):
        fit_gate("combination", tokens[:7], 3)


@pytest.mark.parametrize("wanted", [1.5, 2.5, 4.0])
@pytest.mark.parametrize("name", CANDIDATES)
def test_the_limit_gives_the_wanted_mean_depth(name: str, wanted: float) -> None:
    tokens = made(200)
    if name == "standardised similarity":
        wanted = 2.5  # z is the same on all of these layers: a token leaves at the first or never
    fit = fit_gate(name, tokens, wanted)
    depths = []
    for token in tokens:
        gate, own = FittedGate(fit), (token.last, token.recent)
        gate._confidences.extend([own[0]] * RECENT)
        gate.start()
        depth, similarities = 6, token.sampled.similarities
        for layer in range(5):
            deviation = (similarities[layer] - fit.mean[layer]) / fit.sd[layer]
            if fit.base[layer] + fit.weights[0] * deviation + gate._of_token < fit.limit:
                depth = layer + 1
                break
        depths.append(depth)
    assert sum(depths) / len(depths) == pytest.approx(wanted, abs=0.6)


def test_the_gate_hears_the_predictions_of_its_own_walk(engine: Engine, text: Text) -> None:
    fit = GateFit("it", (0.0,) * 5, (1.0,) * 5, (0.0,) * 5, (0.0, 1.0, 0.0), 0.5, 0.5, 0.0)

    class Watched(FittedGate):
        seen: list[float]

        def start(self) -> bool:
            super().start()
            self.seen.append(self._of_token + 0.5)
            return False

    gate = Watched(fit)
    gate.seen = []
    walked = walk_forced(engine, text, gate)
    heard = [confidence(row) for row in walked.logits]
    assert gate.seen == pytest.approx([0.5, *heard[:-1]])
    # Sure of the token before: out after the first layer. Unsure: never.
    assert walked.depths == [1 if value < 0.5 else 5 for value in gate.seen]
    assert set(walked.depths) == {1, 5}


def test_examples_take_the_confidences_before_the_token(engine: Engine, text: Text) -> None:
    confidences = [confidence(row) for row in walk_forced(engine, text, always()).logits]
    sampled = sample_errors(engine, text, 0, [1], 15)
    found = examples(sampled, confidences)
    assert [example.sampled.position for example in found] == list(range(1, 15))
    assert found[0].last == found[0].recent == confidences[0]
    assert found[9].last == confidences[9]
    assert found[9].recent == pytest.approx(sum(confidences[6:10]) / 4)


def test_only_who_beats_shuffled_depths_is_kept() -> None:
    def walk(kl: float) -> Scored:
        return Scored((kl, kl), (True, True), (0.0, 0.0), (1, 3), 1.0)

    fit = GateFit("similarity", (), (), (), (0, 0, 0), 0, 0, 0)
    good = [Trial(walk(0.1), walk(0.2), (walk(0.2 + i / 100),)) for i in range(8)]
    bad = [Trial(walk(0.2), walk(0.1), (walk(0.2 + (i - 3.5) / 100),)) for i in range(8)]
    named = {"similarity": good, "confidence": bad, "combination": good}
    fits = {name: replace(fit, name=name) for name in named}
    found = judged(fits, named, 2, 4, 5)
    assert found.kept == ("combination",)
    assert "combination" in found.verdict
    assert [each.fit.name for each in found.candidates] == list(named)
    none = judged(fits, {"confidence": bad}, 2, 4, 5)
    assert none.kept == ()
    assert "no candidate gate surely beats shuffled depths" in none.verdict
    # The plain gate is no candidate: neither does it weigh on them, nor speak for them.
    assert judged(fits, {"similarity": good, "confidence": good[:6]}, 2, 4, 5).kept == ("confidence",)
    same = [Trial(walk(0.1), walk(0.1), (walk(0.1),))] * 8
    few = judged(fits, {"similarity": good, "confidence": same}, 2, 4, 5)
    assert few.verdict == "the prompts are too few to judge candidate gates by shuffled depths"
    flat = Scored((0.1,), (True,), (0.0,), (3,), 1.0)
    idle = judged(fits, {"similarity": good, "confidence": [Trial(flat, flat, (flat,))] * 8}, 2, 4, 5)
    assert idle.verdict == "no candidate gate chooses: each lets all tokens of a prompt leave alike"
