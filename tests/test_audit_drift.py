"""Errors of one step and of a chain of them, repairs, and the place where texts part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from statistics import fmean

import pytest
import torch
from audit_models import load, prompts
from forced_drafts import distance_from_exact

from riverinfer import Engine
from riverinfer.errors import NoFreeSlotError
from riverinfer.evidence.drift import PATHS, DriftWalk, summarize_drift, walk_drift
from riverinfer.evidence.forced import Text, walk_forced
from riverinfer.evidence.quality import Judge
from riverinfer.evidence.statistics import TAIL
from riverinfer.evidence.survival import parting, survival
from riverinfer.gates import FixedDepth, always, never
from riverinfer.river import RiverOptions
from riverinfer.sampling import SamplingParams
from riverinfer.sequence import TokenSequence

EVERY = 8
TOKENS = 66


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def walks(engine: Engine) -> list[DriftWalk]:
    return [walk_drift(engine, ids, TOKENS, seed, always, EVERY) for seed, (_, ids) in enumerate(prompts(6))]


def test_the_sawtooth(walks: list[DriftWalk]) -> None:
    drift = summarize_drift(walks, EVERY)
    teeth = drift.sawtooth
    assert [tooth.since_repair for tooth in teeth] == list(range(EVERY))
    assert sum(tooth.tokens for tooth in teeth) == len(walks) * (TOKENS - 1)
    # Right after a repair nothing in the cache errs; right before the next, seven positions do.
    assert abs(teeth[0].from_cache.mean) < 1e-5
    assert fmean(tooth.from_cache.mean for tooth in teeth[-3:]) > 10 * abs(teeth[0].from_cache.mean)
    assert teeth[-1].from_cache.mean > 1e-3
    for tooth in teeth:
        assert tooth.from_cache.mean == pytest.approx(tooth.repaired - tooth.one_step)


def test_a_step_on_an_exact_cache_errs_less_than_a_chain_of_them(walks: list[DriftWalk]) -> None:
    drift = summarize_drift(walks, EVERY, bins=4)
    assert [(part.first, part.end) for part in drift.bins] == [(0, 16), (16, 32), (32, 48), (48, 65)]
    later = drift.bins[-1]
    assert later.kl["one_step"].mean < later.kl["repaired"].mean < later.kl["chained"].mean
    assert later.from_cache.above_zero
    assert drift.growth.above_zero
    assert drift.growth.mean == pytest.approx(later.from_cache.mean - drift.bins[0].from_cache.mean)
    assert (drift.tokens, drift.texts, drift.repair, drift.mean_depth) == (65, 6, EVERY, 0)
    # Before the first token of a text nothing was approximate yet.
    for walk in walks:
        assert walk.kl["chained"][0] == pytest.approx(walk.kl["one_step"][0], abs=1e-5)


def test_paths_are_the_walks_that_river_mode_makes(engine: Engine) -> None:
    name, ids = prompts(1)[0]
    walk = walk_drift(engine, ids, 30, 1, lambda: FixedDepth(2), EVERY)
    judge = Judge(engine, Text(name, tuple(ids), walk.answer))
    assert walk.kl["chained"] == pytest.approx(judge.walk(FixedDepth(2)).kl, abs=1e-6)
    assert walk.kl["repaired"] == pytest.approx(judge.walk(FixedDepth(2), repair=EVERY).kl, abs=1e-6)
    assert walk.kl["one_step"] == pytest.approx(judge.walk(FixedDepth(2), repair=1).kl, abs=1e-5)
    assert walk.depths == (2,) * 29
    exact = walk_drift(engine, ids, 30, 1, never, EVERY)
    assert max(max(exact.kl[path]) for path in PATHS) < 1e-6
    assert set(exact.since_repair) == {0}


def test_after_each_repair_the_cache_is_a_fresh_prefills(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float, float]] = []
    original = TokenSequence.repair

    def watched(sequence: TokenSequence, following: int) -> tuple[int, int]:
        count, before = len(sequence.tokens) - sequence.exact, distance_from_exact(sequence)
        result = original(sequence, following)
        seen.append((count, before, distance_from_exact(sequence)))
        return result

    monkeypatch.setattr(TokenSequence, "repair", watched)
    _, ids = prompts(1)[0]
    walk_drift(engine, ids, 34, 1, always, EVERY)
    assert [count for count, *_ in seen] == [EVERY] * 4
    assert max(after for *_, after in seen) < 1e-5
    assert min(before for _, before, _ in seen) > 1e-3


def test_the_text_is_drawn_from_exact_mode(engine: Engine) -> None:
    name, ids = prompts(1)[0]
    answer, other = (walk_drift(engine, ids, 20, seed, always, EVERY).answer for seed in (1, 2))
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True)
    assert answer == tuple(engine.generate(ids, params, mode="exact").token_ids) != other
    logits = walk_forced(engine, Text(name, tuple(ids), answer), None).logits
    assert (logits.argmax(-1) != torch.tensor(answer[1:])).any()


def test_it_needs_its_slots() -> None:
    with load(max_sequences=2) as small:
        _, ids = prompts(1)[0]
        with pytest.raises(NoFreeSlotError):
            walk_drift(small, ids, 6, 1, always, EVERY)
        assert small.slots.busy == 0


def test_survival_by_hand() -> None:
    found = survival([None, 1, 3, 1], 4)
    assert found.parted == (None, 1, 3, 1)
    assert found.share == (1.0, 0.5, 0.5, 0.25)
    assert found.median == 2
    assert survival([None], 4).median is None


@pytest.mark.parametrize("depth", [0, 2, 4])
def test_texts_part_where_the_modes_own_texts_do(engine: Engine, depth: int) -> None:
    params, options = SamplingParams(max_tokens=40), {0: RiverOptions(gate="always")}
    for _, ids in prompts(4):
        how = options.get(depth, RiverOptions(gate="fixed", min_depth=depth))
        exact = engine.generate(ids, params, mode="exact").token_ids
        wanted = []
        for repair in (0, EVERY):
            river = engine.generate(ids, params, mode="river", river=replace(how, repair=repair)).token_ids
            pairs = enumerate(zip_longest(exact, river))
            wanted.append(next((at for at, (ours, other) in pairs if ours != other), None))
        *parted, count = parting(engine, ids, how.make_gate, EVERY, 40)
        assert parted == wanted
        assert count == len(exact) if None in wanted else count == max(wanted) + 1
    assert engine.slots.busy == 0


def test_growth_needs_six_texts(walks: list[DriftWalk]) -> None:
    six, five = summarize_drift(walks, EVERY), summarize_drift(walks[:5], EVERY)
    assert (six.p_grows, six.p_shrinks) == (1 / 64, 1)
    assert five.p_grows == 1 / 32 > TAIL
