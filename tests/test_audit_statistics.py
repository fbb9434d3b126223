"""Intervals and correlations against values worked out by hand."""

from __future__ import annotations

import math
import random
from statistics import NormalDist, fmean, stdev

import pytest
import torch

from riverinfer.evidence.quality import Scored, score, summarize
from riverinfer.evidence.statistics import Interval, bootstrap, paired, pearson, spearman


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


def test_pairing_takes_the_prompts_own_level_out() -> None:
    rng = random.Random(2)
    levels = [rng.uniform(0, 10) for _ in range(16)]
    better = [level + rng.uniform(0.0, 0.2) for level in levels]
    assert paired(better, levels).above_zero
    assert paired(levels, better).below_zero
    apart = bootstrap(better), bootstrap(levels)
    assert apart[0].low < apart[1].high
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_one_value_is_its_own_interval() -> None:
    assert bootstrap([2.0]) == Interval(2.0, 2.0, 2.0)
    assert not Interval(0.0, 0.0, 0.0).above_zero
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
