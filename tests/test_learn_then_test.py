"""Learn then Test: p-values that are valid and find what is there, and a stopping rule that keeps its promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from riverinfer.errors import InvalidRequestError
from riverinfer.evidence.learn_then_test import (
    betting_p_value,
    drawn_order,
    fewest_prompts,
    fixed_sequence,
    least_bound,
)

Draw = Callable[[np.random.Generator, float, Any], NDArray[np.float64]]
EPSILON, DELTA = 0.1, 0.05
LOSSES: dict[str, Draw] = {
    "all or nothing": lambda rng, mean, size: (rng.random(size) < mean).astype(float),
    "beta": lambda rng, mean, size: rng.beta(5 * mean, 5 * (1 - mean), size),
    "shares of 64 tokens": lambda rng, mean, size: rng.binomial(64, rng.beta(20 * mean, 20 * (1 - mean), size)) / 64,
}
SPLITS = 600


def most(share: float, trials: int) -> float:
    """What a share of ``trials`` may come to by chance: three standard errors above."""
    return share + 3 * math.sqrt(share * (1 - share) / trials)


@pytest.mark.parametrize("draw", LOSSES.values(), ids=LOSSES)
def test_p_values_are_valid_where_the_risk_is_the_bound(draw: Draw) -> None:
    rng, trials = np.random.default_rng(1), 4000
    for epsilon, prompts in ((0.02, 200), (0.1, 60), (0.5, 25)):
        p = betting_p_value(draw(rng, epsilon, (trials, prompts)), epsilon, DELTA)
        assert p.shape == (trials,)
        for alpha in (0.01, 0.05, 0.1, 0.3):
            assert (p <= alpha).mean() <= most(alpha, trials), (epsilon, alpha)


def test_p_values_are_hardly_larger_than_they_must_be() -> None:
    losses = LOSSES["all or nothing"](np.random.default_rng(2), EPSILON, (4000, 200))
    assert (betting_p_value(losses, EPSILON, DELTA) <= DELTA).mean() > DELTA / 2


@pytest.mark.parametrize(("mean", "prompts"), [(0.0, fewest_prompts(0.02, DELTA)), (0.005, 400), (0.01, 500)])
def test_clearly_lower_risks_are_found(mean: float, prompts: int) -> None:
    losses = LOSSES["shares of 64 tokens"](np.random.default_rng(3), max(mean, 1e-12), (200, prompts))
    assert (betting_p_value(losses, 0.02, DELTA) <= DELTA).mean() > 0.9
    assert betting_p_value(np.full(prompts, 0.03), 0.02, DELTA) == 1


@pytest.mark.parametrize("delta", [1e-12, 0.01, DELTA, 0.5, 0.999])
@pytest.mark.parametrize("epsilon", [1e-4, 0.02, 0.25, 0.5, 0.9, 1 - 1e-12])
def test_the_fewest_prompts_are_enough_and_no_fewer_are(epsilon: float, delta: float) -> None:
    fewest = fewest_prompts(epsilon, delta)
    assert betting_p_value(np.zeros(fewest), epsilon, delta) <= delta
    for fewer in range(max(1, fewest - 50), fewest):
        assert betting_p_value(np.zeros(fewer), epsilon, delta) > delta
    assert fewest >= math.log(delta) / math.log1p(-epsilon), "no valid test could do with fewer"


def test_the_fewest_prompts_that_are_known() -> None:
    assert fewest_prompts(0.02, DELTA) == 150
    assert fewest_prompts(1e-12, DELTA) == pytest.approx(math.log(20) * 1e12 / 0.99)  # found without so many zeros


@pytest.mark.parametrize("prompts", [3, 16, 150, 1000])
def test_the_least_bound_passes_and_no_lower_one_does(prompts: int) -> None:
    zeros, least = np.zeros(prompts), least_bound(prompts, DELTA)
    assert 0 < least < 1
    assert betting_p_value(zeros, least, DELTA) <= DELTA < betting_p_value(zeros, least * (1 - 1e-6), DELTA)
    assert fewest_prompts(least, DELTA) == prompts


def test_one_prompt_bounds_nothing() -> None:
    assert least_bound(1, DELTA) == 1


@pytest.mark.parametrize("losses", [[], [0.5, 1.1], [-0.1], [math.nan], 0.5])
def test_what_is_no_loss_is_refused(losses: Any) -> None:
    with pytest.raises(InvalidRequestError, match="losses: must be numbers from 0 to 1"):
        betting_p_value(losses, EPSILON, DELTA)


def test_the_sequence_ends_at_the_first_that_is_not_rejected() -> None:
    assert fixed_sequence([0.01, 0.05, 0.06, 0.0], 0.05) == 1
    assert fixed_sequence([0.01, 0.02], 0.05) == 1
    assert fixed_sequence([0.06, 0.0], 0.05) is None
    assert fixed_sequence([math.nan, 0.0], 0.05) is None
    assert fixed_sequence([], 0.05) is None
    values = iter([0.0, 0.1, 0.0])
    assert fixed_sequence(values, 0.05) == 0
    assert list(values) == [0.0]  # not asked for


# --- the promise, over many splits of a population whose risks are known --------------------------------------------

RISKS = (0.002, 0.01, 0.02, 0.1, 0.102, 0.104, 0.11, 0.3)
FIRST_OVER = 3
OVER = slice(FIRST_OVER, None)


def first_not_rejected(p_values: Iterable[float], delta: float) -> int | None:
    """Off by one."""
    p_values = list(p_values)
    last = fixed_sequence(p_values, delta)
    return min(0 if last is None else last + 1, len(p_values) - 1)


def loosest_rejected(p_values: Iterable[float], delta: float) -> int | None:
    """Never stops: many tests, each with its chance to be wrong."""
    return max((index for index, p_value in enumerate(p_values) if p_value <= delta), default=None)


@pytest.fixture(scope="module", params=LOSSES)
def splits(request: pytest.FixtureRequest) -> NDArray[np.float64]:
    """p-values [splits, settings] of random splits of a population whose risks from FIRST_OVER on exceed the bound."""
    rng, prompts = np.random.default_rng(4), 200
    population = np.stack([LOSSES[request.param](rng, risk, 50_000) for risk in RISKS])
    risks = population.mean(-1)
    epsilon = float(risks[OVER].min()) - 1e-4
    assert risks[:FIRST_OVER].max() < epsilon
    chosen = np.stack([rng.choice(population.shape[1], prompts, replace=False) for _ in range(SPLITS)])
    return np.stack([betting_p_value(losses[chosen], epsilon, DELTA) for losses in population], axis=-1)


def violations(splits: NDArray[np.float64], rule: Callable[[Iterable[float], float], int | None]) -> float:
    """Share of the splits that certify a setting whose true risk exceeds the bound."""
    certified = [rule(p, DELTA) for p in splits.tolist()]
    return float(np.mean([index is not None and index >= FIRST_OVER for index in certified]))


def test_certified_settings_keep_the_bound(splits: NDArray[np.float64]) -> None:
    assert violations(splits, fixed_sequence) <= most(DELTA, SPLITS)
    certified = [fixed_sequence(p, DELTA) for p in splits.tolist()]
    assert np.mean([index is not None for index in certified]) > 0.9


def test_an_off_by_one_in_the_stopping_rule_breaks_it(splits: NDArray[np.float64]) -> None:
    assert violations(splits, first_not_rejected) > most(DELTA, SPLITS)


@pytest.mark.parametrize("splits", ["all or nothing"], indirect=True)
def test_going_on_after_a_setting_that_failed_breaks_it(splits: NDArray[np.float64]) -> None:
    assert violations(splits, loosest_rejected) > most(DELTA, SPLITS)


def named(trial: int, losses: NDArray[np.float64]) -> dict[str, float]:
    """A file: the loss of each prompt. Names sort as losses do."""
    return {f"{trial}, prompt {number:04}": float(loss) for number, loss in enumerate(losses)}


def as_tested(file: dict[str, float]) -> list[float]:
    """Losses in the order of the test."""
    order, _ = drawn_order(file)
    assert sorted(order) == sorted(file)
    return [file[text] for text in order]


def test_a_set_of_prompts_is_tested_in_one_order() -> None:
    texts = [f"{number}" for number in range(50)]
    assert drawn_order(texts) == drawn_order(texts[::-1]) == drawn_order([*texts[7:], *texts])
    assert drawn_order(texts)[0] not in (texts, sorted(texts))
    assert drawn_order(texts[1:])[1] != drawn_order(texts)[1]


def test_the_best_of_many_shuffled_files_is_no_better_than_one() -> None:
    """True risk at epsilon, losses of 0 and 1: to list the prompts in 20 ways and keep the best gains nothing."""
    rng, trials = np.random.default_rng(5), 400
    by_set, by_file = 0, 0
    for trial in range(trials):
        losses = named(trial, (rng.random(200) < EPSILON).astype(np.float64))
        files = [{text: losses[text] for text in rng.permutation(list(losses)).tolist()} for _ in range(20)]
        by_set += min(float(betting_p_value(as_tested(file), EPSILON, DELTA)) for file in files) <= DELTA
        by_file += min(float(betting_p_value([*file.values()], EPSILON, DELTA)) for file in files) <= DELTA
    assert by_set / trials <= most(DELTA, trials)
    assert by_file / trials > 0.3, "what files in their own order would allow"


def test_a_sorted_file_certifies_nothing_false() -> None:
    """The easy prompts first: along the file the capital grows before the others come."""
    losses = np.r_[np.zeros(200), np.ones(800)]
    assert betting_p_value(losses, 0.02, 0.05) < 0.05
    for trial in range(50):
        assert betting_p_value(as_tested(named(trial, losses)), 0.02, 0.05) > 0.05


def test_sorted_draws_keep_the_level() -> None:
    """True risk at epsilon: sorted files are rejected as seldom as promised once their order is drawn."""
    rng, rejected, plain = np.random.default_rng(3), 0, 0
    for trial in range(400):
        losses = np.sort(rng.binomial(64, 0.1, 200) / 64)
        rejected += bool(betting_p_value(as_tested(named(trial, losses)), 0.1, 0.1) <= 0.1)
        plain += bool(betting_p_value(losses, 0.1, 0.1) <= 0.1)
    assert rejected / 400 <= 0.1 + 2 * (0.1 * 0.9 / 400) ** 0.5
    assert plain / 400 > 0.5
