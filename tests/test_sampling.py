"""Sampling parameters and the distribution they leave, against slow direct definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from riverinfer import SamplingParams
from riverinfer.errors import InvalidRequestError
from riverinfer.sampling import Sampler
from riverinfer.stop_strings import StopStrings


def reference(logits: list[float], params: SamplingParams, context: list[int]) -> dict[int, float]:
    """The definition, step by step, on Python floats."""
    scores = dict(enumerate(logits))
    for token in set(context):
        value = scores[token]
        scores[token] = value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
    scores = {t: v / params.temperature for t, v in scores.items()}

    def softmax(kept: dict[int, float]) -> dict[int, float]:
        top = max(kept.values())
        weights = {t: math.exp(v - top) for t, v in kept.items()}
        total = sum(weights.values())
        return {t: w / total for t, w in weights.items()}

    ranked = sorted(scores, key=lambda t: -scores[t])
    if params.top_k:
        ranked = ranked[: params.top_k]
    probabilities = softmax({t: scores[t] for t in ranked})
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= params.top_p:
            break
        kept.append(token)
        mass += probabilities[token]
    probabilities = softmax({t: scores[t] for t in kept})
    limit = params.min_p * max(probabilities.values())
    return softmax({t: scores[t] for t in kept if probabilities[t] >= limit})


@given(
    logits=st.lists(st.floats(-8, 8, allow_nan=False), min_size=4, max_size=40, unique_by=lambda x: round(x, 2)),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
    penalty=st.floats(0.5, 2.0),
)
@settings(max_examples=200, deadline=None)
def test_distribution_is_the_defined_one(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=0
    )
    row = torch.tensor(logits)
    ids, probabilities = Sampler(params, len(logits)).distribution(row, [1, 2])
    got = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    want = reference(row.tolist(), params, [1, 2])
    # A candidate exactly at a cut may fall either way by rounding; it then carries the borderline's own mass.
    assert sum(got.values()) == pytest.approx(1)
    if set(got) == set(want):
        assert got == {t: pytest.approx(p, abs=1e-5) for t, p in want.items()}
    else:
        assert len(set(got) ^ set(want)) == 1


def test_nucleus_wider_than_the_candidates_falls_back_to_a_full_sort() -> None:
    row = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.1
    params = SamplingParams(temperature=1.0, top_p=0.97, seed=0)
    ids, _ = Sampler(params, 5000).distribution(row, [])
    order = row.argsort(descending=True)
    count = int((row[order].double().softmax(0).cumsum(0) < 0.97).sum()) + 1
    assert count > 1024
    assert set(ids.tolist()) == set(order[:count].tolist())


def test_draws_follow_the_distribution() -> None:
    """Chi-square at the 0.1 % level; a sampler that ignores the temperature fails it."""
    row = torch.randn(8, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(temperature=0.7, seed=11)
    sampler = Sampler(params, 8)
    draws, counts = 20_000, torch.zeros(8)
    for position in range(draws):
        counts[sampler(row, range(position)).token_id] += 1

    def statistic(probabilities: torch.Tensor) -> float:
        return float(((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum())

    assert statistic((row / 0.7).softmax(0)) < 24.3  # 7 degrees of freedom
    assert statistic(row.softmax(0)) > 24.3


def test_greedy_takes_the_lowest_id_among_equals_and_reports_the_models_probability() -> None:
    row = torch.tensor([0.0, 3.0, 3.0, 1.0])
    sampled = Sampler(SamplingParams(logprobs=2), 4)(row, [])
    assert sampled.token_id == 1
    want = row.log_softmax(0)
    assert sampled.logprob == pytest.approx(float(want[1]), abs=1e-6)
    assert {token for token, _ in sampled.top_logprobs} == {1, 2}
    assert [value for _, value in sampled.top_logprobs] == pytest.approx([float(want[1])] * 2, abs=1e-6)


def test_logprobs_do_not_depend_on_temperature_or_filters() -> None:
    row = torch.randn(50, generator=torch.Generator().manual_seed(1))
    sampled = Sampler(SamplingParams(temperature=2.0, top_k=3, repetition_penalty=1.5, seed=1), 50)(row, [4])
    assert sampled.logprob == pytest.approx(float(row.log_softmax(0)[sampled.token_id]), abs=1e-5)


def test_padding_rows_of_the_head_are_never_chosen() -> None:
    row = torch.tensor([0.0, 1.0, 9.0])
    assert Sampler(SamplingParams(), 2)(row, []).token_id == 1
    hot = Sampler(SamplingParams(temperature=5.0, seed=0), 2)
    assert {hot(row, range(i)).token_id for i in range(100)} == {0, 1}


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    row = torch.randn(1000, generator=torch.Generator().manual_seed(9)) * 20
    for options in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 100.0}):
        params = SamplingParams(temperature=temperature, seed=1, **options)
        assert Sampler(params, 1000)(row, []).token_id == int(row.argmax()), options


def test_every_bit_of_a_seed_counts() -> None:
    row = torch.zeros(1000)
    drawn = {
        tuple(sampler(row, range(i)).token_id for i in range(8))
        for sampler in (Sampler(SamplingParams(temperature=1.0, seed=seed), 1000) for seed in (0, 2**40, 2**63, 2**100))
    }
    assert len(drawn) == 4


def test_the_same_seed_draws_the_same_tokens() -> None:
    row = torch.randn(100, generator=torch.Generator().manual_seed(2))
    runs = []
    for seed in (7, 7, 8):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), 100)
        runs.append([sampler(row, range(i)).token_id for i in range(20)])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 1.0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e9),
        ("stop", None),
        ("stop", 5),
        ("stop_token_ids", 5),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("logprobs", -1),
        ("stop", ("",)),
        ("stop_token_ids", (-1,)),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        SamplingParams(**{field: value})


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_where_a_search_over_the_whole_text_would(text: str, stops: list[str], data: Any) -> None:
    matcher, out, rest = StopStrings(stops), "", text
    while rest and matcher.matched is None:
        size = data.draw(st.integers(1, len(rest)))
        out, rest = out + matcher.push(rest[:size]), rest[size:]
        assert not any(stop in out for stop in stops)
    hits = [text.find(stop) for stop in stops if stop in text]
    if matcher.matched is None:
        assert not hits
        assert out + matcher.finish() == text
    else:
        # Streaming sees the stop string that is complete first; it may begin after another's beginning.
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert text.startswith(out + matcher.matched)
        assert len(out) + len(matcher.matched) >= min(ends)
        assert len(out) >= min(hits)
