"""The error that one forced exit causes, and candidate gates fitted to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from audit_models import load, texts
from golden_models import make_cache

from riverinfer import Engine
from riverinfer.decode import decode_one, prefill
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
from riverinfer.evidence.forced import Text, walk_forced
from riverinfer.evidence.gate_error import (
    Exit,
    KVError,
    Sampled,
    exit_depths,
    sample_errors,
)
from riverinfer.evidence.gate_error_summary import PAPER_R, summarize_errors
from riverinfer.evidence.quality import Scored
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
    found = exit_depths(30)
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
    assert set(walked.depths) == {1, 5} or walked.depths[0] == 5


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
    assert "no candidate gate beats shuffled depths" in none.verdict
