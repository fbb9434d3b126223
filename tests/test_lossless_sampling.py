"""Sampling in lossless mode: the text of a seed is that of exact mode, and its distribution the model's.

Statistics are held against their 0.1 % levels on fixed seeds; rules of acceptance that are known to be wrong must fail
the very same test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from forced_drafts import draft_from, force, random_ids, random_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lossless import assert_same, load, needs_packing
from torch import Tensor

from riverinfer import Engine, SamplingParams
from riverinfer.draft_policy import MAX_DRAFT
from riverinfer.sampling import Sampler, _start, _variates

FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 12},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.2, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.4},
]
NAMES = ("llama", "phi3")


# --- the text of a seed -----------------------------------------------------------------------------------------


def check_texts(engine: Engine, tokens: int, *, to_the_bit: bool) -> None:
    for number, filters in enumerate(FILTERS):
        prompt = random_ids(8 + 9 * number, number)
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=number, **filters)
        want = engine.generate(prompt, params, mode="exact")
        for plan in ([("river", MAX_DRAFT)], random_plan(number)):
            with pytest.MonkeyPatch.context() as patch:
                force(patch, plan)
                assert_same(engine.generate(prompt, params), want, to_the_bit=to_the_bit)


@pytest.mark.parametrize("name", NAMES)
def test_a_seeds_text_is_that_of_exact_mode_whatever_is_drafted(name: str) -> None:
    with load(name) as engine:
        check_texts(engine, 40, to_the_bit=False)


@needs_packing
@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_so_are_its_probabilities_to_the_bit(name: str) -> None:
    with load(name, "bfloat16") as engine:
        check_texts(engine, 40, to_the_bit=True)


@given(wrong=st.sets(st.integers(0, 39)), filters=st.sampled_from(FILTERS), seed=st.integers(0, 2**70))
@settings(max_examples=20, deadline=None)
def test_wrong_drafts_leave_no_trace(llama: Engine, wrong: set[int], filters: dict[str, Any], seed: int) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, seed=seed, **filters)
    want = llama.generate("Once upon a time", params, mode="exact")
    with pytest.MonkeyPatch.context() as patch:
        draft_from(patch, want.token_ids, wrong.__contains__)
        assert_same(llama.generate("Once upon a time", params), want)


def test_without_a_seed_a_drawn_one_gives_the_text_again(llama: Engine) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.0)
    drawn = llama.generate("Once upon a time", params)
    assert drawn.seed is not None
    assert_same(llama.generate("Once upon a time", replace(params, seed=drawn.seed), mode="exact"), drawn)


# --- distributions ----------------------------------------------------------------------------------------------

DRAWS, VOCABULARY = 100_000, 8
LEVEL = {7: 24.32, 49: 85.35}  # chi-square, 0.1 %, by degrees of freedom
PARAMS = SamplingParams(temperature=0.9, seed=17)


@cache
def noise(seed: int = 17, draws: int = DRAWS, vocabulary: int = VOCABULARY) -> Tensor:
    """The sampler's exponential variates of consecutive positions: float64 [draws, vocabulary]."""
    mixed = Sampler(replace(PARAMS, seed=seed), vocabulary)._seed
    starts = torch.tensor([_start(mixed, position) for position in range(draws)])
    return _variates(starts[:, None], torch.arange(vocabulary))


def logits(seed: int) -> Tensor:
    return 1.5 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


@cache
def model_and_drafter() -> tuple[Tensor, Tensor]:
    """Two distributions over the vocabulary that are alike, but not the same: of the model, and of its drafter."""
    row, other = logits(1), logits(1) + 0.5 * logits(2)
    return tuple(Sampler(PARAMS, VOCABULARY).distribution(each, [])[1] for each in (row, other))  # type: ignore[return-value]


def race(variates: Tensor, probabilities: Tensor) -> Tensor:
    """The winners: int64 [draws]."""
    return (variates / probabilities).argmin(1)


def fresh(seed: int) -> Tensor:
    """Noise that the sampler has nothing to do with."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(DRAWS, VOCABULARY, dtype=torch.float64).exponential_(generator=generator)


def coupled(p: Tensor, q: Tensor) -> Tensor:
    """The rule in use: a draft counts if it is what the model chooses with the same noise; else that does."""
    draft, choice = race(noise(), q), race(noise(), p)
    return torch.where(draft == choice, draft, choice)


def every_draft(p: Tensor, q: Tensor) -> Tensor:
    return race(noise(), q)


def drawn_again(p: Tensor, q: Tensor) -> Tensor:
    """Fresh noise where the two differ."""
    draft = race(noise(), q)
    return torch.where(draft == race(noise(), p), draft, race(fresh(1), p))


def without_residual(p: Tensor, q: Tensor) -> Tensor:
    """Speculative sampling that forgets to take the drafter's share off before it draws again."""
    draft = race(noise(), q)
    kept = torch.rand(DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) < (p / q)[draft]
    return torch.where(kept, draft, race(fresh(3), p))


def with_residual(p: Tensor, q: Tensor) -> Tensor:
    """The same, rightly (Leviathan et al.): the test must not fail what is right in another way."""
    draft = race(noise(), q)
    kept = torch.rand(DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) < (p / q)[draft]
    return torch.where(kept, draft, race(fresh(3), (p - q).clamp(min=0)))


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def statistic(rule: Callable[[Tensor, Tensor], Tensor]) -> float:
    p, q = model_and_drafter()
    return chi_square(torch.bincount(rule(p, q), minlength=VOCABULARY), DRAWS * p)


@pytest.mark.parametrize("rule", [coupled, with_residual], ids=lambda rule: rule.__name__)
def test_the_choice_with_drafts_follows_the_models_distribution(rule: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert statistic(rule) < LEVEL[7]


@pytest.mark.parametrize("rule", [every_draft, drawn_again, without_residual], ids=lambda rule: rule.__name__)
def test_wrong_rules_of_acceptance_do_not(rule: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert statistic(rule) > LEVEL[7]


def test_these_draws_are_the_samplers_own() -> None:
    """What is computed above for all positions at once is what the engine computes one by one."""
    row, other = logits(1), logits(1) + 0.5 * logits(2)
    p, q = model_and_drafter()
    sampler = Sampler(PARAMS, VOCABULARY)
    choices, drafts = race(noise(), p).tolist(), race(noise(), q).tolist()
    for position in range(300):
        assert sampler(row, range(position)).token_id == choices[position]
        assert sampler.guess(other, range(position)) == (drafts[position], pytest.approx(float(q.max())))


def test_alike_distributions_agree_as_often_as_the_coupling_promises() -> None:
    """At least (1 - d) / (1 + d) of the time, d the total variation (Daliri, Musco and Suresh, theorem 3)."""
    p, q = model_and_drafter()
    distance = float((p - q).abs().sum() / 2)
    agreed = float((race(noise(), p) == race(noise(), q)).double().mean())
    assert 0.1 < distance < 0.4
    assert (1 - distance) / (1 + distance) < agreed <= 1 - distance + 0.005
    assert bool((race(noise(), p) == race(noise(), p.clone())).all())


# --- the noise --------------------------------------------------------------------------------------------------


def kolmogorov(variates: Tensor) -> float:
    """sqrt(n) times the largest distance from the exponential distribution function; 1.95 at the 0.1 % level."""
    ordered = variates.flatten().sort().values
    want = 1 - torch.exp(-ordered)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum((steps[1:] - want).abs().max(), (steps[:-1] - want).abs().max())) * len(ordered) ** 0.5


def test_each_variate_is_exponential_along_positions_ids_and_seeds() -> None:
    for token in (0, 3, 7):
        assert kolmogorov(noise()[:, token]) < 1.95
    for seed in (0, 1, 2**40):
        assert kolmogorov(noise(seed, 2, 50_000)[1]) < 1.95
    seeds = torch.tensor([_start(Sampler(replace(PARAMS, seed=seed), 8)._seed, 5) for seed in range(50_000)])
    assert kolmogorov(_variates(seeds, torch.tensor(4))) < 1.95


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, times sqrt(n): a standard normal variable if the two are independent."""
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1]) * len(a) ** 0.5


def test_neighbours_are_not_correlated() -> None:
    """Between ids, positions and seeds next to each other, also diagonally; 4.2: the 0.1 % level of 40 comparisons."""
    here, found = noise(), []
    for shift in (1, 2, 3):
        for lag in (0, 1, 2):
            later = here[lag:]
            found.append(correlation(here[: len(later), 0], later[:, shift]))
            found.append(correlation(here[: len(later), shift], later[:, 0]))
    found += [correlation(here[:-lag, 4], here[lag:, 4]) for lag in (1, 2, 3, 7, 64)]
    found += [correlation(here[:, 4], noise(other)[:, 4]) for other in (16, 18, 17 + 2**32)]
    found += [correlation(here[:-lag, 4], noise(18)[lag:, 4]) for lag in (1, 2)]
    assert max(abs(each) for each in found) < 4.2


@pytest.mark.parametrize("lag", [1, 2, 7])
def test_consecutive_choices_are_independent(lag: int) -> None:
    p, _ = model_and_drafter()
    choices = race(noise(), p)
    pairs = choices[:-lag] * VOCABULARY + choices[lag:]
    counts = torch.bincount(pairs, minlength=VOCABULARY**2).double().view(VOCABULARY, VOCABULARY)
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
    assert chi_square(counts, expected) < LEVEL[49]


def test_a_noise_that_forgets_the_position_fails_these_tests() -> None:
    stuck = noise()[:1].expand(DRAWS, -1)
    p, _ = model_and_drafter()
    assert chi_square(torch.bincount(race(stuck, p), minlength=VOCABULARY), DRAWS * p) > LEVEL[7]
    slow = noise()[torch.arange(DRAWS) // 2]
    assert abs(correlation(slow[:-1, 4], slow[1:, 4])) > 4.2
