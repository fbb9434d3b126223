"""Errors of one step and of a chain of them, repairs, and the place where texts part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest
from statistics import fmean

import pytest
import torch
from audit_models import load, prompts
from forced_drafts import distance_from_exact
from test_audit_report import make_audit

from riverinfer import Engine
from riverinfer.errors import NoFreeSlotError
from riverinfer.evidence import report_curves as curves
from riverinfer.evidence.controls import GivenDepths
from riverinfer.evidence.drift import PATHS, DriftWalk, summarize_drift, walk_drift
from riverinfer.evidence.findings import _drift as drift_findings
from riverinfer.evidence.findings import findings
from riverinfer.evidence.forced import Text, walk_forced
from riverinfer.evidence.quality import Judge
from riverinfer.evidence.report import report_html
from riverinfer.evidence.statistics import TAIL
from riverinfer.evidence.summary import drift_rows
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
    # Up to the first repair, the cache is exact by the prompt's prefill.
    assert sum(tooth.tokens for tooth in teeth) == len(walks) * (TOKENS - 1 - EVERY)
    # Right after a repair nothing in the cache errs; right before the next, seven positions do.
    assert abs(teeth[0].from_cache.mean) < 1e-5
    assert fmean(tooth.from_cache.mean for tooth in teeth[-3:]) > 10 * abs(teeth[0].from_cache.mean)
    assert teeth[-1].from_cache.mean > 1e-3
    for tooth in teeth:
        assert tooth.from_cache.mean == pytest.approx(tooth.repaired - tooth.one_step)


def test_a_step_on_an_exact_cache_errs_less_than_a_chain_of_them(walks: list[DriftWalk]) -> None:
    drift = summarize_drift(walks, EVERY)
    assert [part.first for part in drift.bins] == [0, 1, 2, 4, 8, 16, 32]
    assert [part.end for part in drift.bins] == [1, 2, 4, 8, 16, 32, 65]
    later = drift.bins[-1]
    assert later.kl["one_step"].mean < later.kl["repaired"].mean < later.kl["chained"].mean
    assert later.from_cache.low > 0
    assert abs(drift.bins[0].from_cache.mean) < 1e-5
    assert drift.rise.low > 0
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
        found = parting(engine, ids, how.make_gate, EVERY, 40)
        assert [found.river, found.repaired] == wanted
        assert found.tokens == len(exact) if None in wanted else found.tokens == max(wanted) + 1
        # The prompt is exact, and so the first ``EVERY`` tokens are said before one is due.
        late = (len(exact) if found.repaired is None else found.repaired + 1) > EVERY + 1
        assert found.first_repair == (EVERY + 1 if late else None)
    assert engine.slots.busy == 0


def test_tokens_that_passed_the_backbone_need_no_repair(engine: Engine) -> None:
    """They leave exact K and V behind, so that the first repair comes as much later."""
    _, ids = prompts(1)[0]
    found = parting(engine, ids, lambda: GivenDepths([5] * 3 + [4] * 40), 2, 40)
    assert found.first_repair == 3 + 2 + 1


def test_growth_needs_six_texts() -> None:
    six, five = (summarize_drift([errs(float)] * texts, EVERY) for texts in (6, 5))
    assert (six.p_rises, six.p_grows, six.p_shrinks) == (1 / 64, 1 / 64, 1)
    assert min(five.p_rises, five.p_grows) == 1 / 32 > TAIL > six.p_grows


def errs(cost: Callable[[int], float], tokens: int = 32, repair: int = EVERY) -> DriftWalk:
    """A text at whose token i the cache's errors cost so much; repaired ones, a tenth a token since."""
    since = tuple(i % repair for i in range(tokens))
    kl = {"one_step": (0.5,) * tokens, "chained": tuple(0.5 + cost(i) for i in range(tokens))}
    kl["repaired"] = tuple(0.5 + 0.1 * each for each in since)
    same = dict.fromkeys(PATHS, (True,) * tokens)
    return DriftWalk((1,) * (tokens + 1), kl, same, since, (2,) * tokens)


def said(cost: Callable[[int], float], texts: int = 6, tokens: int = 32, repair: int = EVERY) -> list[str]:
    """The findings of ``texts`` equal texts."""
    return drift_findings(summarize_drift([errs(cost, tokens, repair)] * texts, repair))


def test_rise_and_late_growth_by_hand() -> None:
    # Second quarter 8..15, last 24..31.
    found = summarize_drift([errs(lambda i: min(i, 4) / 10 + (0.2 if i >= 24 else 0))] * 6, EVERY)
    assert [part.from_cache.mean for part in found.bins] == pytest.approx([0, 0.1, 0.25, 0.4, 0.4, 0.5])
    assert (found.second.mean, found.last.mean) == pytest.approx((0.4, 0.6))
    assert (found.rise.mean, found.growth.mean) == pytest.approx((0.4, 0.2))
    assert (found.p_rises, found.p_grows, found.p_shrinks) == (1 / 64, 1 / 64, 1)


@pytest.mark.parametrize(
    ("length", "edges"),
    [
        (1, [0, 1]),
        (2, [0, 1, 2]),
        (3, [0, 1, 2, 3]),
        (4, [0, 1, 2, 4]),
        (9, [0, 1, 2, 4, 9]),
        (10, [0, 1, 2, 4, 8, 10]),
        (17, [0, 1, 2, 4, 8, 17]),
        (1999, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1999]),
    ],
)
def test_parts_double(length: int, edges: list[int]) -> None:
    found = summarize_drift([errs(float, length)] * 6, EVERY)
    assert [part.first for part in found.bins] + [found.bins[-1].end] == edges
    assert [part.end for part in found.bins] == edges[1:]
    assert (found.rise.mean > 0, found.growth.mean > 0) == (length > 1, length > 2)


def test_the_finding_in_words() -> None:
    def rises(after: float) -> Callable[[int], float]:
        return lambda i: min(i, 4) / 10 + after * (i >= 24)

    start = (
        "cost rises from KL 0.0000 at the first token to 0.4000 (0.4000..0.4000) in the second quarter of the text and "
    )
    texts = "over 32 tokens drawn from exact mode at temperature 1, past any end of text, what the cache's errors "
    line = said(rises(0))[0]
    assert line.startswith(texts + start + "does not clearly grow further: 0.4000 ")
    assert line.endswith("in the last quarter, a difference of 0.0000 (0.0000..0.0000)")
    assert start + "grows further: 0.6000 " in said(rises(0.2))[0]
    assert start + "shrinks later: 0.2000 " in said(rises(-0.2))[0]
    unrisen = "cost does not clearly rise from KL 0.0000 at the first token to 0.0000 (0.0000..0.0000) in the second"
    assert unrisen + " quarter of the text and grows later: 1.0000 " in said(lambda i: i // 24)[0]
    flat = said(lambda _: -1e-6)[0]
    assert unrisen + " quarter of the text and does not clearly grow later: 0.0000 " in flat
    assert "-" not in flat
    few = said(rises(0.2), texts=5)[0]
    assert "cost goes from KL 0.0000 at the first token to 0.4000 in the second quarter of the text and 0.6000 " in few
    assert few.endswith("in the last, of 5 texts: too few to call it growth")


def test_repairs_are_told_of_where_there_were_some() -> None:
    repaired = "repaired every 8 tokens, that is 0.0000 right after a repair and 0.7000 right before the next"
    assert said(float)[1:] == said(float, tokens=16)[1:] == [repaired]
    # None, then one that the text ends before the next of: neither has both ends of a tooth.
    assert said(float, tokens=8)[1:] == said(float, tokens=15)[1:] == said(float, repair=1)[1:] == []
    assert summarize_drift([errs(float, 8)], EVERY).sawtooth == ()
    assert summarize_drift([errs(float), errs(float, repair=33)], EVERY).sawtooth == ()


def test_drift_in_a_terminal() -> None:
    head, *rows = drift_rows(summarize_drift([errs(lambda i: -1e-6 * (i == 0) + i)] * 6, EVERY))
    assert [row[0] for row in rows] == ["1", "2", "3..4", "5..8", "9..16", "17..32"]
    place = head.index("chained less one step")
    assert rows[0][place] == "0.0000 (0.0000..0.0000)"
    assert [row[place][:7] for row in rows[1:4]] == ["1.0000 ", "2.5000 ", "5.5000 "]


def test_drift_on_the_page() -> None:
    drawn = curves.drift(summarize_drift([errs(float)] * 6, EVERY))
    for label in ("1", "2", "3..4", "5..8", "9..16", "17..32", "chained less one step"):
        assert f">{label}</text>" in drawn
    assert curves.sawtooth(summarize_drift([errs(float, 8)], EVERY)) == ""
    page = " ".join(report_html(make_audit()).split())
    assert "exact mode, temperature 1), and which go on past any end of text" in page


@pytest.mark.parametrize(
    ("parted", "unrepaired", "words"),
    [
        ([3, 8], 2, "no repair came before they parted, one is made every 8 tokens"),
        ([8, 9], 1, "no repair came before half of them parted, one is made every 8 tokens"),
        ([9, 9], 0, "half have parted after 10 tokens"),
        ([8, 9, None], 1, "half have parted after 10 tokens"),
        ([9, None, None], 0, "more than half never part"),
    ],
)
def test_what_no_repair_could_change_is_not_counted_for_it(
    parted: list[int | None], unrepaired: int, words: str
) -> None:
    audit = make_audit()
    free = replace(
        audit.free_running,
        river=survival([3, 3], 12),
        repaired=survival(parted, 12),
        parted_unrepaired=unrepaired,
    )
    found = findings(replace(audit, free_running=free, settings={**audit.settings, "repair": 8})).findings
    (line,) = (line for line in found if line.startswith("Left to itself"))
    assert f"(half have parted after 4 tokens; repaired: {words}), and" in line
