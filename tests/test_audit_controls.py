"""Controls spend what the gate spends, and tell a gate that knows from one that does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from audit_models import blind, load, planted, texts

from riverinfer import Engine
from riverinfer.evidence.controls import (
    Comparison,
    GivenDepths,
    Trial,
    compare,
    run_trial,
    shuffled_depths,
    static_mix,
)
from riverinfer.evidence.quality import Judge, Scored, exact_again, floor_of
from riverinfer.evidence.statistics import TAIL, bootstrap, holm, sign_flip
from riverinfer.gates import SimilarityGate, always, never


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def judges(engine: Engine) -> list[Judge]:
    return [Judge(engine, text) for text in texts(engine, 10, 24)]


def only(name: str, trials: list[Trial]) -> Comparison:
    return compare({name: trials}, 5)[0]


def made_trial(gate: float, static: float, shuffled: float) -> Trial:
    def walk(kl: float) -> Scored:
        return Scored((kl, kl), (True, True), (0.0, 0.0), (1, 5), 1.0)

    return Trial(walk(gate), walk(static), (walk(shuffled),))


@pytest.mark.parametrize("depths", [[1, 4, 4, 2, 0], [3, 3, 3], [0], [5, 0, 0, 0], [1, 2] * 7])
def test_controls_have_the_gates_mean_depth_to_the_layer(depths: list[int]) -> None:
    static = static_mix(depths)
    assert sum(static) == sum(depths)
    assert len(static) == len(depths)
    assert max(static) - min(static) <= 1
    # The deeper ones are spread: no stretch has more than its share by a whole one.
    for end in range(1, len(static) + 1):
        assert abs(sum(static[:end]) - sum(depths) * end / len(depths)) < 1
    orders = {tuple(shuffled_depths(depths, seed)) for seed in range(20)}
    assert all(sorted(order) == sorted(depths) for order in orders)
    assert len(orders) > 1 or len(set(depths)) == 1


def test_walks_have_the_depths_that_were_dealt(judges: list[Judge]) -> None:
    trial = run_trial(judges[0], SimilarityGate(0.9), shuffles=3, seed=2)
    depths = trial.gate.depths
    assert len(set(depths)) > 1
    assert trial.static.depths == tuple(static_mix(depths))
    assert [walk.depths for walk in trial.shuffled] == [tuple(shuffled_depths(depths, 6 + i)) for i in range(3)]
    assert only("it", [trial]).shuffled.control.mean_depth == pytest.approx(sum(depths) / len(depths))


def test_a_gate_that_knows_the_error_beats_its_controls(judges: list[Judge]) -> None:
    found = only("planted", [run_trial(j, planted(j), shuffles=2, seed=i) for i, j in enumerate(judges)])
    assert found.shuffled.beats
    difference = found.shuffled.difference
    assert difference.mean == pytest.approx(found.shuffled.control.kl.mean - found.gate.kl.mean)
    assert "beats shuffled depths: KL" in found.verdict
    assert f"({difference.low:.4f}..{difference.high:.4f})" in found.verdict


def test_a_coin_does_not(judges: list[Judge]) -> None:
    found = only("coin", [run_trial(j, blind(j), shuffles=2, seed=i) for i, j in enumerate(judges)])
    assert found.chooses
    assert not found.shuffled.beats
    assert "does not surely beat shuffled depths" in found.verdict


def test_the_opposite_of_knowing_is_worse(judges: list[Judge]) -> None:
    def upside_down(judge: Judge) -> GivenDepths:
        depths = judge.walk(planted(judge)).depths
        return GivenDepths([5 - depth for depth in depths])

    found = only("wrong", [run_trial(j, upside_down(j), shuffles=1, seed=i) for i, j in enumerate(judges)])
    assert "is worse than shuffled depths" in found.verdict
    assert not found.shuffled.beats


def test_what_spreading_depths_gains_is_not_called_choice() -> None:
    spread = [made_trial(0.1, 0.2, 0.1 + (i - 2.5) / 100) for i in range(6)]
    found = only("it", spread)
    assert (found.static.beats, found.shuffled.beats) == (True, False)
    assert found.verdict.endswith("but is not told from its own depths at random")
    assert "at random" not in only("it", [made_trial(0.1, 0.2, 0.15)] * 6).verdict


def test_of_many_settings_one_must_be_surer() -> None:
    lucky = [made_trial(0.1, 0.1, 0.1 + (2 if i else -1) / 100) for i in range(8)]
    alone = only("it", lucky)
    assert alone.shuffled.difference.low > 0
    assert alone.shuffled.p_better == 2 / 256
    assert alone.shuffled.beats
    plain = {f"setting {n}": [made_trial(0.1, 0.1, 0.1 + (i - 3.5) / 100) for i in range(8)] for n in range(3)}
    same = Scored((0.1,), (True,), (0.0,), (3,), 1.0)
    idle = [Trial(same, same, (same,))] * 8
    together = compare({"it": lucky, "idle": idle, **plain}, 5)
    assert [each.shuffled.judged for each in together] == [True, False, True, True, True]
    assert together[0].shuffled.p_better == 4 * 2 / 256
    assert not together[0].shuffled.beats
    assert "does not surely beat shuffled depths: KL 0.1000 against" in together[0].verdict
    assert ", p = 0.031, and" in together[0].verdict
    assert (together[1].shuffled.p_better, together[1].chooses) == (1, False)


def test_prompts_on_which_nothing_differs_show_nothing() -> None:
    """What could never be sure neither claims anything nor makes others less sure."""
    rare = [made_trial(0.1, 0.1, 0.1 + (i < 4) / 100) for i in range(8)]
    sure = [made_trial(0.1, 0.1, 0.11) for _ in range(8)]
    found, other = compare({"rare": rare, "sure": sure}, 5)
    assert (found.shuffled.differing, found.shuffled.judged, found.shuffled.beats) == (4, False, False)
    assert "differs from shuffled depths on 4 of 8 prompts, too few to tell which is better" in found.verdict
    assert (other.shuffled.judged, other.shuffled.p_better) == (True, 1 / 256)


def test_what_no_data_could_show_is_not_judged() -> None:
    """Six prompts can show one setting to be better, and never one of two."""
    best = [made_trial(0.1, 0.2, 0.2) for _ in range(6)]
    assert only("it", best).shuffled.beats
    for found in compare({"one": best, "other": best}, 5):
        assert (found.shuffled.judged, found.shuffled.p_better, found.shuffled.beats) == (False, 1, False)
        assert "differs from shuffled depths on 6 of 6 prompts, too few to tell which is better" in found.verdict


@pytest.mark.parametrize("prompts", [8, 16])
def test_gates_that_choose_no_better_are_seldom_said_to(prompts: int) -> None:
    """Five gates on the same prompts, KL as skewed as it is: hardly one audit in forty may praise any of them."""
    rng, audits = np.random.default_rng(prompts), 1500
    hard = rng.lognormal(-2, 0.7, (audits, 1, prompts, 1))
    walks = hard * rng.lognormal(0, 0.3, (audits, 5, prompts, 3))
    differences = walks[..., 1:].mean(-1) - walks[..., 0]  # [audits, gates, prompts], as of two shuffles
    praised = sum(min(holm([sign_flip(gate) for gate in audit])) <= TAIL for audit in differences.tolist()) / audits
    assert praised <= TAIL + 3 * math.sqrt(TAIL * (1 - TAIL) / audits)
    # That is what the rule before was: the bootstrap interval of any gate above zero.
    some = differences[:300].tolist()
    naive = sum(any(bootstrap(gate).low > 0 for gate in audit) for audit in some) / len(some)
    assert naive > 2 * TAIL


def test_few_prompts_prove_nothing(judges: list[Judge]) -> None:
    found = only("planted", [run_trial(j, planted(j), shuffles=1) for j in judges[:5]])
    assert found.shuffled.difference.low > 0
    assert not found.shuffled.beats
    assert "differs from shuffled depths on 5 of 5 prompts, too few to tell which is better" in found.verdict


def test_the_p_shown_is_of_the_direction_that_the_difference_has() -> None:
    better = [made_trial(0.1, 0.2, 0.1 + (1 if i % 4 else -1) / 100) for i in range(8)]
    worse = [made_trial(0.1, 0.2, 0.1 - (1 if i % 4 else -1) / 100) for i in range(8)]
    for trials, low in ((better, "p_better"), (worse, "p_worse")):
        against = only("it", trials).shuffled
        assert against.p == getattr(against, low) < 0.5
        assert f"p = {against.p:.2g}" in only("it", trials).verdict


def test_a_static_walk_has_its_own_time(judges: list[Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the gate gives all tokens one depth: asking it costs time."""
    kinds: list[type] = []
    walk = Judge.walk

    def watched(judge: Judge, gate: Any, **options: Any) -> Scored:
        kinds.append(type(gate))
        return replace(walk(judge, gate, **options), seconds=float(len(kinds)))

    monkeypatch.setattr(Judge, "walk", watched)
    trial = run_trial(judges[0], SimilarityGate(-1), shuffles=2)
    assert kinds == [SimilarityGate, GivenDepths]
    assert (trial.gate.seconds, trial.static.seconds, trial.shuffled[0].seconds) == (1, 2, 2)
    assert trial.static.kl == trial.gate.kl


def test_a_gate_that_gives_all_the_same_depth_chooses_nothing(judges: list[Judge]) -> None:
    found = only("always", [run_trial(j, always(), shuffles=2) for j in judges])
    assert not found.chooses
    assert found.shuffled.difference.mean == found.static.difference.mean == 0
    assert not found.static.beats
    assert "chooses nothing" in found.verdict


def test_exact_is_its_own_floor(judges: list[Judge]) -> None:
    floor = floor_of([exact_again(judge) for judge in judges[:2]], 5)
    assert floor.again.kl.mean == 0
    assert floor.batched.kl.mean < 1e-6
    assert floor.batched.agreement.mean == 1
    assert floor.row_invariant == (floor.largest == 0)
    assert floor.largest < 1e-4
    assert judges[0].walk(never()).kl == judges[0].walk(None).kl
