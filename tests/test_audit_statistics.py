"""Intervals and correlations against values worked out by hand."""

from __future__ import annotations

import math
import random
from statistics import NormalDist, fmean, stdev

import pytest
import torch

from riverinfer.errors import InvalidRequestError
from riverinfer.evidence.quality import Scored, score, summarize
from riverinfer.evidence.statistics import (
    Interval,
    bootstrap,
    can_pass,
    holm,
    least_p,
    paired,
    pearson,
    sign_flip,
    spearman,
    student,
)
from riverinfer.evidence.sweep import Point, mark_front


def test_correlations_by_hand() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 10.0]
    # Deviations (-1.5, -.5, .5, 1.5) and (-3, -1, -2, 6): products sum to 13, squares to 5 and 50.
    assert pearson(x, y) == pytest.approx(13 / math.sqrt(5 * 50))
    assert spearman(x, y) == pytest.approx(0.8)  # 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    assert spearman(x, [math.exp(v) for v in x]) == pytest.approx(1)
    assert pearson(x, [-v for v in x]) == pytest.approx(-1)


def test_equal_values_share_their_rank() -> None:
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert spearman([5.0, 7.0, 7.0, 9.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_undefined_correlations() -> None:
    assert pearson([1.0, 2.0], [1.0, 2.0]) is None
    assert pearson([0.1] * 7, [float(i) for i in range(7)]) is None
    assert spearman([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]) is None


def test_the_bootstrap_of_many_values_is_the_normal_interval() -> None:
    rng = random.Random(1)
    values = [rng.gauss(3, 2) for _ in range(200)]
    found = bootstrap(values)
    half = NormalDist().inv_cdf(0.975) * stdev(values) / math.sqrt(len(values))
    assert found.mean == pytest.approx(fmean(values))
    assert found.low == pytest.approx(fmean(values) - half, abs=0.1 * half)
    assert found.high == pytest.approx(fmean(values) + half, abs=0.1 * half)


def test_intervals_of_few_values_are_wide_enough() -> None:
    rng, draws = random.Random(3), 1000
    for count in (5, 12):
        found = [bootstrap([rng.gauss(1, 1) for _ in range(count)]) for _ in range(draws)]
        covered = sum(each.low <= 1 <= each.high for each in found) / draws
        assert covered == pytest.approx(0.95, abs=0.03), count  # the plain percentiles': 0.85 of 5, 0.90 of 12


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.182), (4, 2.776), (7, 2.365), (15, 2.131), (100, 1.984)])
def test_student(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, abs=1e-2)


def test_sign_flips_by_hand() -> None:
    # Of the eight sums of +-1 +-2 +-4, two reach 5: that of all three, and that without the 1.
    assert sign_flip([-1.0, 2.0, 4.0]) == 2 / 8
    assert sign_flip([1.0, 2.0, 4.0]) == 1 / 8 == least_p(3)
    assert sign_flip([-1.0, -2.0, -4.0]) == 1
    assert sign_flip([0.0, 0.0]) == 1
    assert sign_flip([0.1, 0.2, -0.3]) == sum(s >= 0 for s in (6, 4, 2, 0, 0, -2, -4, -6)) / 8
    with pytest.raises(ValueError, match="no values"):
        sign_flip([])


def test_drawn_sign_flips_are_near_the_normal_tail() -> None:
    rng = random.Random(4)
    values = [rng.gauss(0.25, 1) for _ in range(60)]
    z = sum(values) / math.sqrt(sum(v * v for v in values))
    assert sign_flip(values) == pytest.approx(1 - NormalDist().cdf(z), abs=0.01)
    assert sign_flip([1.0] * 60) == 1 / 10_000 == least_p(60)


def test_what_is_no_number_shows_nothing() -> None:
    assert sign_flip([math.nan, *[-1.0] * 7]) == sign_flip([math.inf, *[1.0] * 7]) == 1
    exact = torch.zeros(2, 4)
    broken = exact.clone()
    broken[1, 2] = math.nan
    with pytest.raises(InvalidRequestError, match=r"the measured walk's logits are no numbers; load with dtype"):
        score(exact, broken, [0, 1], [1, 1], 1.0)
    with pytest.raises(InvalidRequestError, match="exact mode's logits are no numbers"):
        score(broken, exact, [0, 1], [1, 1], 1.0)


def test_a_ratio_beyond_all_numbers_is_infinite() -> None:
    assert Interval(800.0, 0.0, 900.0).exp() == Interval(math.inf, 1.0, math.inf)


def test_holm_by_hand() -> None:
    # Times 3, 2 and 1 from the smallest on, none below the one before it.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_cannot_pass_beside_the_others_is_left_out() -> None:
    assert can_pass([]) == []
    assert can_pass([0.02]) == [True]
    assert can_pass([0.03]) == [False]
    assert can_pass([0.02, 0.02]) == [False, False]  # each would have to reach 0.0125
    assert can_pass([0.01, 0.02]) == [True, False]  # the second could not, and so the first is alone
    assert can_pass([1 / 128] * 3) == [True] * 3
    assert can_pass([1 / 128] * 4) == [False] * 4
    assert can_pass([1e-4, 1e-4, 0.01, 0.02]) == [True, True, False, False]


def test_points_of_fewer_prompts_are_not_on_the_front() -> None:
    def point(family: str, rate: float, kl: float, prompts: int) -> Point:
        walk = Scored((kl,), (True,), (0.0,), (1,), 1 / rate)
        return Point(family, "", summarize([[walk]] * prompts, 2), prompts)

    points = [point("exact", 10, 0, 4), point("river", 20, 0.2, 4), point("static", 15, 0.3, 4)]
    partial = point("masking", 30, 0.1, 2)
    assert [each.front for each in mark_front(points)] == [True, True, False]
    assert [each.front for each in mark_front([*points, partial])] == [True, True, False, False]
    assert mark_front([]) == ()


def test_pairing_takes_the_prompts_own_level_out() -> None:
    rng = random.Random(2)
    levels = [rng.uniform(0, 10) for _ in range(16)]
    better = [level + rng.uniform(0.0, 0.2) for level in levels]
    assert paired(better, levels).low > 0
    assert paired(levels, better).high < 0
    apart = bootstrap(better), bootstrap(levels)
    assert apart[0].low < apart[1].high
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_one_value_is_its_own_interval() -> None:
    assert bootstrap([2.0]) == Interval(2.0, 2.0, 2.0)
    assert not Interval(0.0, 0.0, 0.0).low > 0
    assert Interval(0.0, -1.0, 1.0).exp() == Interval(1.0, math.exp(-1), math.e)


def test_scores_by_hand() -> None:
    exact = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).log()
    found = score(exact, other, [0, 1], [2, 3], 0.5)
    assert found.kl == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2), 0.0), abs=1e-6)
    assert found.same == (False, True)
    assert found.excess == pytest.approx((math.log(2), 0.0), abs=1e-6)


def test_a_prompt_counts_once_however_many_walks_it_has() -> None:
    def walk(kl: float, depth: int) -> Scored:
        return Scored((kl, kl), (True, False), (math.log(2), math.log(2)), (depth, depth), 0.5)

    found = summarize([[walk(1.0, 0)], [walk(2.0, 2), walk(4.0, 2)]], 3)
    assert found.kl.mean == 2.0
    assert found.kl_by_prompt == (1.0, 3.0)
    assert found.agreement.mean == 0.5
    assert found.perplexity_ratio.mean == pytest.approx(2.0)
    assert found.depths == (2, 0, 4, 0)
    assert found.mean_depth == pytest.approx(4 / 3)
    assert found.tokens_per_s == pytest.approx(6 / 1.5)
