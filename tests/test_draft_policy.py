"""The draft policy against a simulated machine: steps of known cost, drafts of known acceptance, no clock."""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from riverinfer.draft_policy import MAX_DRAFT, Beliefs, Costs, DraftPolicy

EXACT = 0.02  # seconds
ACCEPTANCE = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
COSTS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of a draft step, in exact steps


def verifying(drafts: int) -> float:
    """Exact steps that a verification costs: what a CPU takes for a few rows more."""
    return 1 + 0.024 * drafts + 0.05 * (drafts > 0)


@dataclass
class Machine:
    """An engine's costs and beliefs, and what is true of it.

    acceptance: chance of a draft at a token of the text. spread: whether the draft's confidence tells which ones.
    noise: of a duration, relative; one in a hundred takes three times as long. hidden: exact steps that a round with
    drafts takes beside its parts, which no cost shows.
    """

    acceptance: Callable[[int], float]
    draft_cost: float
    seed: int = 0
    spread: bool = True
    noise: float = 0.05
    hidden: float = 0.0
    slow: dict[str, list[float]] = field(default_factory=dict)  # factors of the first durations, by kind
    costs: Costs = field(default_factory=Costs)
    beliefs: Beliefs = field(default_factory=Beliefs)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def duration(self, kind: str, steps: float) -> float:
        seconds = steps * EXACT * self.rng.lognormvariate(0, self.noise)
        if self.noise and self.rng.random() < 0.01:
            seconds *= 3
        factors = self.slow.get(kind)
        return seconds * (factors.pop(0) if factors else 1)

    def draft(self, position: int) -> tuple[float, bool]:
        """(confidence, whether it is what the backbone says)."""
        chance = self.acceptance(position)
        if not self.spread:
            return 0.85, self.rng.random() < chance
        confidence = self.rng.betavariate(8 * chance, 8 * (1 - chance))
        return confidence, self.rng.random() < confidence

    def generate(self, tokens: int) -> Run:
        """One request, round by round as ``LosslessRounds`` does them."""
        policy, run = DraftPolicy(self.costs, self.beliefs, river=True), Run()
        while run.tokens < tokens:
            room = min(MAX_DRAFT, tokens - run.tokens - 1)
            confidences, right, drafting = list[float](), list[bool](), 0.0
            if room and not policy.paused:
                while len(confidences) < room and policy.go_on(confidences):
                    seconds = self.duration("draft", self.draft_cost)
                    self.costs.draft.note(seconds)
                    drafting += seconds
                    confidence, agrees = self.draft(run.tokens + len(confidences))
                    confidences.append(confidence)
                    right.append(agrees)
            drafted = len(confidences)
            drafting += self.hidden * EXACT * (drafted > 0)
            seconds = self.duration("verify" if drafted else "exact", verifying(drafted))
            self.costs.note_verify(drafted, seconds)
            accepted = next((i for i, agrees in enumerate(right) if not agrees), drafted)
            run.tokens += accepted + 1
            run.seconds += drafting + seconds
            run.rounds.append(drafted)
            run.ends.append(run.tokens)
            policy.note("river" if drafted else None, confidences, accepted, accepted + 1, drafting + seconds)
        return run


@dataclass
class Run:
    """rounds: tokens drafted in each. ends: tokens of the text after each."""

    tokens: int = 0
    seconds: float = 0.0
    rounds: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        """Over exact steps under the same disturbances."""
        return self.tokens * EXACT * (1 + 0.02 + 0.05**2 / 2) / self.seconds

    def drafts(self, first: int, end: int) -> list[int]:
        """Draft lengths of the rounds that ended between these tokens."""
        return [n for n, at in zip(self.rounds, self.ends, strict=True) if first <= at < end]


def always(chance: float) -> Callable[[int], float]:
    return lambda _: chance


def best_fixed(acceptance: float, cost: float) -> float:
    """Speed-up of the best draft length of those that are the same in every round; 1 for none."""

    def speedup(g: int) -> float:
        return sum(acceptance**i for i in range(g + 1)) / (g * cost + verifying(g))

    return max(speedup(g) for g in range(MAX_DRAFT + 1))


def settled(acceptance: float, cost: float) -> Machine:
    """Without noise, and with what it should believe learnt."""
    machine = Machine(always(acceptance), cost, noise=0.0, spread=False)
    machine.generate(100)
    for _ in range(300):
        machine.beliefs.note_drafted(0.85, machine.rng.random() < acceptance)
    return machine


# --- speed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True], ids=["first request", "later request"])
@pytest.mark.parametrize("spread", [False, True], ids=["blind", "telling"])
def test_never_much_slower_than_exact_and_near_the_best_fixed_length(spread: bool, warm: bool) -> None:
    """Means over seeds of 256 tokens: at least 0.96 of exact mode, and within a tenth of the best fixed length."""
    for cost in COSTS:
        for acceptance in ACCEPTANCE:
            speedups = []
            for seed in range(8):
                machine = Machine(always(acceptance), cost, seed, spread)
                if warm:
                    machine.generate(256)
                speedups.append(machine.generate(256).speedup)
            mean = statistics.mean(speedups)
            assert mean > 0.96, (cost, acceptance)
            assert mean > 0.9 * best_fixed(acceptance, cost), (cost, acceptance)


def test_drafts_that_do_not_pay_as_they_promise_are_left() -> None:
    """By what rounds took in truth: the costs of their parts say that they pay."""
    for acceptance, cost, hidden in ((0.8, 0.4, 0.9), (0.9, 0.5, 1.5)):
        speedups, drafted = [], []
        for seed in range(5):
            machine = Machine(always(acceptance), cost, seed, hidden=hidden)
            machine.generate(512)
            run = machine.generate(2048)
            speedups.append(run.speedup)
            drafted.append(sum(n > 0 for n in run.rounds) / len(run.rounds))
        assert best_fixed(acceptance, cost) > 1.2
        assert statistics.mean(speedups) > 0.93, (acceptance, cost)
        assert statistics.mean(drafted) < 0.25, (acceptance, cost)


@pytest.mark.parametrize("kind", ["draft", "exact", "verify"])
@pytest.mark.parametrize("factor", [0.2, 6.0])
def test_a_bad_first_measurement_heals(kind: str, factor: float) -> None:
    for acceptance, cost in ((0.9, 0.4), (0.95, 0.6), (0.3, 0.6), (0.7, 1.0)):
        speedups = []
        for seed in range(8):
            machine = Machine(always(acceptance), cost, seed, slow={kind: [factor]})
            machine.generate(64)
            speedups.append(machine.generate(256).speedup)
        assert statistics.mean(speedups) > 0.93 * best_fixed(acceptance, cost), (acceptance, cost)


def test_a_change_of_the_text_is_noticed_either_way() -> None:
    def shift(before: float, after: float) -> Callable[[int], float]:
        return lambda position: before if position < 256 else after

    for seed in range(4):
        better = Machine(shift(0.2, 0.95), 0.4, seed).generate(1024)
        assert statistics.mean(better.drafts(0, 256)) < 1
        assert statistics.mean(better.drafts(768, 1024)) > 2.5
        worse = Machine(shift(0.95, 0.2), 0.4, seed).generate(1024)
        assert statistics.mean(worse.drafts(64, 256)) > 2.5
        assert statistics.mean(worse.drafts(512, 1024)) < 0.5


def test_a_drafter_that_becomes_cheap_is_tried_again() -> None:
    machine = Machine(always(0.9), 1.2, spread=False)
    assert statistics.mean(machine.generate(512).rounds) < 0.3
    machine.draft_cost = 0.3
    assert statistics.mean(machine.generate(512).drafts(256, 512)) > 2


# --- single decisions -------------------------------------------------------------------------------------------


def planned(machine: Machine, confidences: list[float] | None = None) -> int:
    """Tokens that a round would draft now, with these confidences, or 0.85 each."""
    machine.beliefs.finding_out, machine.beliefs.pause = False, 0
    policy = DraftPolicy(machine.costs, machine.beliefs, river=True)
    given = confidences or [0.85] * MAX_DRAFT
    count = 0
    while count < len(given) and policy.go_on(given[:count]):
        count += 1
    return count


def test_drafts_are_longer_for_higher_acceptance_and_cheaper_steps() -> None:
    by_acceptance = [planned(settled(acceptance, 0.3)) for acceptance in (0.5, 0.7, 0.8, 0.9, 0.99)]
    assert by_acceptance == sorted(by_acceptance)
    assert by_acceptance[0] <= 1 < by_acceptance[2] < by_acceptance[-1] == MAX_DRAFT
    by_cost = [planned(settled(0.9, cost)) for cost in (1.0, 0.7, 0.5, 0.3, 0.1)]
    assert by_cost == sorted(by_cost)
    assert by_cost[0] == 0 < by_cost[2] < by_cost[-1]
    assert planned(settled(0.3, 0.8)) == 0


def test_an_unsure_draft_ends_the_round_where_confidence_has_told() -> None:
    machine = settled(0.8, 0.3)
    for _ in range(400):
        confidence = machine.rng.betavariate(2.4, 0.6)  # 0.8 in the mean
        machine.beliefs.note_drafted(confidence, machine.rng.random() < confidence)
    sure, unsure = [0.97] * MAX_DRAFT, [0.97, 0.15] + [0.97] * 13
    assert planned(machine, sure) > planned(machine, unsure) == 2


def test_the_first_step_is_timed_and_nothing_drafted_without_a_river() -> None:
    costs, beliefs = Costs(), Beliefs()
    policy = DraftPolicy(costs, beliefs, river=True)
    assert policy.paused
    costs.note_verify(0, EXACT)
    policy.note(None, [], 0, 1, EXACT)
    assert not policy.paused
    assert policy.go_on([])
    assert DraftPolicy(costs, beliefs, river=False).paused


def test_never_more_than_a_verification_holds() -> None:
    machine = settled(0.99, 0.05)
    policy = DraftPolicy(machine.costs, machine.beliefs, river=True)
    assert policy.go_on([1.0] * (MAX_DRAFT - 1))
    assert not policy.go_on([1.0] * MAX_DRAFT)
    assert policy.lookup_length(6, 1000) <= MAX_DRAFT


def test_where_drafts_do_not_pay_they_pause_and_are_tried_again_later_and_later() -> None:
    run = Machine(always(0.1), 0.9, noise=0.0, spread=False).generate(1200)
    tries = [at for drafted, at in zip(run.rounds, run.ends, strict=True) if drafted]
    gaps = [b - a for a, b in itertools.pairwise(tries) if b - a > 4]
    assert gaps[0] < 20 < 100 < gaps[-1] < 140
    assert sorted(gaps[:4]) == gaps[:4]
    assert len(tries) > 10
    assert sum(run.rounds) < 30


def test_exact_steps_are_timed_again_from_time_to_time() -> None:
    run = Machine(always(0.99), 0.2).generate(2000)
    assert 3 <= run.rounds.count(0) <= 20


# --- lookup -----------------------------------------------------------------------------------------------------


def test_lookup_is_used_where_it_promises_more_than_the_river() -> None:
    machine = settled(0.8, 0.5)
    policy = DraftPolicy(machine.costs, machine.beliefs, river=True)
    assert policy.lookup_beats_river(6, policy.lookup_length(6, MAX_DRAFT))
    for _ in range(40):
        policy.note("lookup", [1.0] * 8, 0, 1, EXACT, 6)
    assert not policy.lookup_beats_river(6, policy.lookup_length(6, MAX_DRAFT))
    assert policy.lookup_beats_river(4, policy.lookup_length(4, MAX_DRAFT)) in (True, False)
    for _ in range(40):
        policy.note("lookup", [1.0] * 8, 8, 9, 1.3 * EXACT, 6)
    assert policy.lookup_beats_river(6, policy.lookup_length(6, MAX_DRAFT))
    assert policy.lookup_length(6, MAX_DRAFT) > policy.lookup_length(2, MAX_DRAFT)
    assert not policy.lookup_beats_river(6, 0)


def test_lookup_must_beat_a_good_river_by_more_than_a_bad_one() -> None:
    good, bad = settled(0.98, 0.2), settled(0.2, 0.8)
    for machine in (good, bad):
        for _ in range(100):
            machine.beliefs.note_found(3, machine.rng.random() < 0.5)
    asked = [DraftPolicy(machine.costs, machine.beliefs, river=True) for machine in (good, bad)]
    assert [policy.lookup_beats_river(3, policy.lookup_length(3, MAX_DRAFT)) for policy in asked] == [False, True]


def test_nothing_is_looked_up_before_an_exact_step_was_timed() -> None:
    policy = DraftPolicy(Costs(), Beliefs(), river=False)
    assert not policy.lookup_beats_river(6, policy.lookup_length(6, 10))


def test_what_followed_the_first_refusal_is_not_judged() -> None:
    beliefs = Beliefs()
    policy = DraftPolicy(Costs(), beliefs, river=True)
    before = beliefs.drafted(0.95)
    policy.note("river", [0.55, 0.25] + [0.95] * 5, 1, 2, EXACT)
    assert beliefs.drafted(0.55) > beliefs.drafted(0.25)
    assert beliefs._by_confidence[9]._all == 0
    assert beliefs.drafted(0.95) == pytest.approx(before, abs=0.1)


# --- costs ------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_verification_follows_what_is_measured() -> None:
    costs = Costs()
    costs.note_verify(0, EXACT)
    assert EXACT < costs.verifying(1) < costs.verifying(15) < 1.5 * EXACT  # a guess
    for _ in range(4):
        for drafted in (1, 4, 8, 15):
            costs.note_verify(drafted, EXACT * (1.5 + 0.1 * drafted))
    costs.note_verify(4, 50 * EXACT)  # an interruption
    for drafted in (1, 4, 8, 15):
        assert costs.verifying(drafted) == pytest.approx(EXACT * (1.5 + 0.1 * drafted), rel=0.1)
    assert costs.verifying(0) == EXACT


def test_a_cost_is_the_median_of_the_last_durations() -> None:
    costs = Costs()
    for seconds in (9.0, 8.0, 7.0):
        costs.draft.note(seconds)
    assert costs.draft.value == 7.0  # the first ones include what is done only once
    for seconds in (1.0, 1.0, 1.1, 30.0, 0.9, 1.0, 1.0, 1.0):
        costs.draft.note(seconds)
    assert costs.draft.value == 1.0


def test_threads_share_costs_without_breaking_them() -> None:
    machine = settled(0.9, 0.3)
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            Machine(always(0.9), 0.3, seed, costs=machine.costs, beliefs=machine.beliefs).generate(1500)
        except BaseException as exc:
            problems.append(exc)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert problems == []
