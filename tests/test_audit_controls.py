"""Controls spend what the gate spends, and tell a gate that knows from one that does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from audit_models import blind, load, planted, texts

from riverinfer import Engine
from riverinfer.evidence.controls import GivenDepths, Trial, compare, run_trial, shuffled_depths, static_mix
from riverinfer.evidence.quality import Judge, Scored, exact_again, floor_of
from riverinfer.gates import SimilarityGate, always, never


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def judges(engine: Engine) -> list[Judge]:
    return [Judge(engine, text) for text in texts(engine, 10, 24)]


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
    assert compare("it", [trial], 5).shuffled.mean_depth == pytest.approx(sum(depths) / len(depths))


def test_a_gate_that_knows_the_error_beats_its_controls(judges: list[Judge]) -> None:
    found = compare("planted", [run_trial(j, planted(j), shuffles=2, seed=i) for i, j in enumerate(judges)], 5)
    assert found.beats_shuffled
    assert found.over_shuffled.mean == pytest.approx(found.shuffled.kl.mean - found.gate.kl.mean)
    assert "beats shuffled depths: KL" in found.verdict
    assert f"({found.over_shuffled.low:.4f}..{found.over_shuffled.high:.4f})" in found.verdict


def test_a_coin_does_not(judges: list[Judge]) -> None:
    found = compare("coin", [run_trial(j, blind(j), shuffles=2, seed=i) for i, j in enumerate(judges)], 5)
    assert found.chooses
    assert not found.beats_shuffled
    assert "does not beat shuffled depths" in found.verdict


def test_the_opposite_of_knowing_is_worse(judges: list[Judge]) -> None:
    def upside_down(judge: Judge) -> GivenDepths:
        depths = judge.walk(planted(judge)).depths
        return GivenDepths([5 - depth for depth in depths])

    found = compare("wrong", [run_trial(j, upside_down(j), shuffles=1, seed=i) for i, j in enumerate(judges)], 5)
    assert "is worse than shuffled depths" in found.verdict
    assert not found.beats_shuffled


def test_what_spreading_depths_gains_is_not_called_choice() -> None:
    def walk(kl: float) -> Scored:
        return Scored((kl, kl), (True, True), (0.0, 0.0), (1, 5), 1.0)

    spread = [Trial(walk(0.1), walk(0.2), (walk(0.1 + (i - 2.5) / 100),)) for i in range(6)]
    found = compare("it", spread, 5)
    assert (found.beats_static, found.beats_shuffled) == (True, False)
    assert found.verdict.endswith("but no more surely than its own depths do at random")
    chosen = [Trial(walk(0.1), walk(0.2), (walk(0.15),)) for _ in range(6)]
    assert "at random" not in compare("it", chosen, 5).verdict


def test_few_prompts_prove_nothing(judges: list[Judge]) -> None:
    found = compare("planted", [run_trial(j, planted(j), shuffles=1) for j in judges[:3]], 5)
    assert found.over_shuffled.above_zero
    assert not found.beats_shuffled
    assert "too few prompts" in found.verdict


def test_a_gate_that_gives_all_the_same_depth_chooses_nothing(judges: list[Judge]) -> None:
    found = compare("always", [run_trial(j, always(), shuffles=2) for j in judges], 5)
    assert not found.chooses
    assert found.over_shuffled.mean == found.over_static.mean == 0
    assert not found.beats_static
    assert "chooses nothing" in found.verdict


def test_exact_is_its_own_floor(judges: list[Judge]) -> None:
    floor = floor_of([exact_again(judge) for judge in judges[:2]], 5)
    assert floor.again.kl.mean == 0
    assert floor.batched.kl.mean < 1e-6
    assert floor.batched.agreement.mean == 1
    assert floor.row_invariant == (floor.largest == 0)
    assert floor.largest < 1e-4
    assert judges[0].walk(never()).kl == judges[0].walk(None).kl
