"""How long to draft, and with what: decided from the acceptance seen so far and the measured cost of each step.

A round drafts g tokens at a cost of c each and verifies them in one batched pass of cost v(g); it yields the accepted
ones and one more. Drafting one token further pays as long as the chance that it is accepted, with all before it,
exceeds what its cost would yield at the rate reached otherwise: the stopping rule of a renewal process (the marginal
value theorem, Charnov 1976). Nothing here changes what is generated, only when.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

MAX_DRAFT = 15  # with the token before it a batch of 16, the most that a CPU verifies at nearly the cost of one
BINS = 10  # of the draft's own confidence
_PRIOR = 4.0  # observations that the prior belief counts for
_MEMORY = 64.0  # observations after which older ones fade
_SAMPLES = 9  # durations of which the median is the cost
_WARM_UP = 2
_VERIFICATIONS = 48
_EXACT_EVERY = 64  # rounds after which an exact step is timed again
_EXACT_FIRST = 4  # the same while only the first ones were timed, which may have been slow
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 128  # tokens without drafts once they did not pay
_MARGIN = 1.03  # by which drafting must promise to be faster
_TRIAL = 12  # rounds judged together: fewer would stop drafts that pay, for want of luck


class _Cost:
    """Median of the last durations, in seconds, without the first ones: they include what is done only once."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_SAMPLES)
        self._skip = _WARM_UP
        self._lock = threading.Lock()
        self.value: float | None = None

    @property
    def settled(self) -> bool:
        """Whether the first ones are over."""
        return not self._skip

    def note(self, seconds: float) -> None:
        with self._lock:
            if self._skip and self.value is not None:
                self._skip -= 1
                self._seen.clear()
            self._seen.append(seconds)
            self.value = statistics.median(self._seen)


class _Chance:
    """Share of accepted tokens, recent ones counting most."""

    def __init__(self, yes: float = 0.0, seen: float = 0.0) -> None:
        self._yes, self._all = yes, seen

    def note(self, accepted: bool) -> None:
        fade = 1 - 1 / _MEMORY
        self._yes, self._all = self._yes * fade + accepted, self._all * fade + 1

    def value(self, prior: float) -> float:
        """The share, drawn towards ``prior`` while few were seen."""
        return (self._yes + _PRIOR * prior) / (self._all + _PRIOR)


class Beliefs:
    """How often drafts are accepted, by the river's confidence and a lookup's match length, and whether they pay."""

    def __init__(self) -> None:
        self._any = _Chance(yes=3.6, seen=4.0)
        self._by_confidence = [_Chance() for _ in range(BINS)]
        self.pause, self.next_pause = 0, _FIRST_PAUSE  # tokens without river drafts
        self.finding_out = True  # the next draft is made whatever it is thought to cost
        self._by_match = [_Chance(yes=4 * share, seen=4.0) for share in (0.3, 0.5, 0.7)]

    @property
    def next_one(self) -> float:
        """Chance of a draft whose confidence is not known yet."""
        return self._any.value(0.9)

    def drafted(self, confidence: float) -> float:
        """Chance of a draft with this confidence, 0 to 1."""
        return self._by_confidence[_bin(confidence)].value(self.next_one)

    def found(self, match: int) -> float:
        """Chance of a token that followed an earlier occurrence of the last ``match``."""
        return self._by_match[_match_bin(match)].value(0.5)

    def note_drafted(self, confidence: float, accepted: bool) -> None:
        self._any.note(accepted)
        self._by_confidence[_bin(confidence)].note(accepted)

    def note_found(self, match: int, accepted: bool) -> None:
        self._by_match[_match_bin(match)].note(accepted)


def _bin(confidence: float) -> int:
    return min(BINS - 1, max(0, int(confidence * BINS)))


def _match_bin(match: int) -> int:
    return 0 if match <= 2 else 1 if match <= 4 else 2


class Costs:
    """Seconds of a draft step, an exact step, and a verification of n drafted tokens, as measured on this engine.

    Shared by all requests, also of several threads.
    """

    def __init__(self) -> None:
        self.draft, self.exact = _Cost(), _Cost()
        self._verified: deque[tuple[int, float]] = deque(maxlen=_VERIFICATIONS)
        self._warm_up = _WARM_UP  # verifications that are not counted
        self._line: tuple[float, float] | None = None  # seconds of no draft, and of each one more

    def note_verify(self, drafted: int, seconds: float) -> None:
        if drafted == 0:
            self.exact.note(seconds)
        elif self._warm_up:
            self._warm_up -= 1
        else:
            self._verified.append((drafted, seconds))
        self._line = None

    def verifying(self, drafted: int) -> float:
        """Expected seconds of verifying ``drafted`` tokens: a straight line through what was measured."""
        exact = self.exact.value or 0.0
        if drafted == 0:
            return exact
        line = self._line
        if line is None:
            line = self._line = self._fit(exact)
        return max(exact, line[0] + line[1] * drafted)

    def _fit(self, exact: float) -> tuple[float, float]:
        # Two points for a start: one draft costs 7 % of an exact step, fifteen cost 40 %. Outliers are cut.
        verified = list(self._verified)  # at once: another thread may add to it
        limit = 2 * statistics.median(seconds for _, seconds in verified) if verified else 0.0
        points = [(1, 1.07 * exact), (MAX_DRAFT, 1.4 * exact)]
        points += [(n, seconds) for n, seconds in verified if seconds <= limit]
        mean_n = statistics.mean(n for n, _ in points)
        mean_s = statistics.mean(seconds for _, seconds in points)
        variance = sum((n - mean_n) ** 2 for n, _ in points)
        slope = max(0.0, sum((n - mean_n) * (seconds - mean_s) for n, seconds in points) / variance)
        return mean_s - slope * mean_n, slope


@dataclass(frozen=True)
class Plan:
    """Draft at most ``length`` tokens, and go on only while the product of their ``chances`` exceeds ``bound``.

    chances: that a draft is accepted, by tenths of its confidence.
    """

    length: int
    chances: list[float]
    bound: float


class DraftPolicy:
    """Plans the rounds of one request. ``costs`` and ``beliefs`` belong to the engine and outlive it.

    Ask ``paused`` first; if drafting is on, ``go_on`` before each draft step of the river, and ``lookup_length`` for
    how much of a found continuation to take; tell ``note`` what became of them.
    """

    def __init__(self, costs: Costs, beliefs: Beliefs, *, river: bool) -> None:
        self.costs, self.beliefs, self._river = costs, beliefs, river
        self._trial: list[tuple[int, float]] = []
        self._since_exact = 0

    @property
    def paused(self) -> bool:
        """No river drafts in this round: they did not pay lately, or an exact step is to be timed."""
        exact = self.costs.exact
        untimed = exact.value is None or self._since_exact >= (_EXACT_EVERY if exact.settled else _EXACT_FIRST)
        return self.beliefs.pause > 0 or untimed or not self._river

    def go_on(self, confidences: Sequence[float]) -> bool:
        """Whether to draft another token after those with these confidences (0 to 1, the draft's top probability)."""
        if len(confidences) >= MAX_DRAFT:
            return False
        costs, drafted = self.costs, len(confidences)
        step = costs.draft.value
        if step is None or (not drafted and (self.beliefs.finding_out or not costs.draft.settled)):
            return not drafted
        if not drafted:
            # Verifying a first draft costs more than each further one: it is the whole round that has to pay.
            worth = self._rate() > _MARGIN / (costs.exact.value or 1.0)
            if not worth:
                self._rest()
            return worth
        kept = 1.0
        for confidence in confidences:
            kept *= self.beliefs.drafted(confidence)
        more = costs.verifying(drafted + 1) - costs.verifying(drafted)
        return kept * self.beliefs.next_one > self._rate() * (step + max(0.0, more))

    def plan(self, room: int) -> Plan:
        """What ``go_on`` would say of drafts to come, for those who cannot ask after each."""
        most = min(room, MAX_DRAFT)
        step = self.costs.draft.value
        if most <= 0 or not self.go_on(()):
            return Plan(0, [], 1.0)
        if step is None:
            return Plan(1, [1.0] * BINS, 1.0)
        more = max(0.0, self.costs.verifying(2) - self.costs.verifying(1))
        bound = self._rate() * (step + more) / self.beliefs.next_one
        likely, kept = 1, self.beliefs.next_one
        while likely < most and kept > bound:
            likely, kept = likely + 1, kept * self.beliefs.next_one
        return Plan(likely, [self.beliefs.drafted((i + 0.5) / BINS) for i in range(BINS)], bound)

    def lookup_length(self, match: int, found: int) -> int:
        """How many of ``found`` tokens, that follow an earlier occurrence of the last ``match``, to verify."""
        chance, kept, length = self.beliefs.found(match), 1.0, 0
        rate = self._rate()
        while length < min(found, MAX_DRAFT):
            kept *= chance
            if kept <= rate * max(0.0, self.costs.verifying(length + 1) - self.costs.verifying(length)):
                break
            length += 1
        return length

    def lookup_beats_river(self, match: int, length: int) -> bool:
        """Whether verifying ``length`` looked-up tokens promises a higher rate than drafting in the river."""
        if length == 0 or self.costs.exact.value is None:
            return False
        chance = self.beliefs.found(match)
        expected = sum(chance**i for i in range(1, length + 1))
        return (1 + expected) / self.costs.verifying(length) > self._rate()

    def note(
        self,
        source: str | None,
        confidences: Sequence[float],
        accepted: int,
        tokens: int,
        seconds: float,
        match: int = 0,
    ) -> None:
        """A round ended: ``accepted`` of the drafted tokens, ``tokens`` emitted, in ``seconds``."""
        judged = min(accepted + 1, len(confidences))  # what follows the first refusal was never judged
        if source == "lookup":
            for i in range(judged):
                self.beliefs.note_found(match, i < accepted)
            self.beliefs.pause = max(0, self.beliefs.pause - tokens)
            return
        if source is None:
            self.beliefs.pause, self._since_exact = max(0, self.beliefs.pause - tokens), 0
            return
        self._since_exact += 1
        for i in range(judged):
            self.beliefs.note_drafted(confidences[i], i < accepted)
        exact, step = self.costs.exact.value, self.costs.draft.value
        if step is not None:
            # An interruption of the whole process is not the draft's fault.
            seconds = min(seconds, 1.5 * (len(confidences) * step + self.costs.verifying(len(confidences))))
        if exact is None:
            return
        # Finding out goes on as long as it pays: so do old beliefs give way to what is true now.
        self.beliefs.finding_out = self.beliefs.finding_out and tokens * exact > _MARGIN * seconds
        self._trial.append((tokens, seconds))
        if len(self._trial) < _TRIAL:
            return
        got, spent = (sum(column) for column in zip(*self._trial, strict=True))
        self._trial.clear()
        if got / spent < 1 / exact:
            self._rest()
        else:
            self.beliefs.next_pause = _FIRST_PAUSE

    def _rest(self) -> None:
        """Drafts do not pay now: none for a while, each time a longer one, then another try."""
        self.beliefs.pause, self.beliefs.next_pause = (
            self.beliefs.next_pause,
            min(2 * self.beliefs.next_pause, _LONGEST_PAUSE),
        )
        self.beliefs.finding_out = True

    def _rate(self) -> float:
        """Tokens a second that rounds of the best planned length would reach; at least that of exact steps."""
        exact = self.costs.exact.value
        if exact is None:
            return 0.0
        best = 1 / exact
        step = self.costs.draft.value
        if step is None or not self._river or self.beliefs.pause:
            return best
        chance, kept, expected = self.beliefs.next_one, 1.0, 1.0
        for drafted in range(1, MAX_DRAFT + 1):
            kept *= chance
            expected += kept
            best = max(best, expected / (drafted * step + self.costs.verifying(drafted)))
        return best
