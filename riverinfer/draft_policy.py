"""How long to draft, and with what: decided from the acceptance seen so far and the measured cost of each step.

A round drafts g tokens at a cost of c each and verifies them in one batched pass of cost v(g); it yields the accepted
ones and one more. Drafting one token further pays as long as the chance that it is accepted, with all before it,
exceeds what its cost would yield at the rate reached otherwise: the stopping rule of a renewal process (the marginal
value theorem, Charnov 1976). Nothing here changes what is generated, only when.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_DRAFT = 15  # with the token before it a batch of 16, the most that a CPU verifies at nearly the cost of one
_BINS = 10  # of the draft's own confidence
_PRIOR = 4.0  # observations that the prior belief counts for
_MEMORY = 64.0  # observations after which older ones fade
_SAMPLES = 15  # durations of which the median is the cost
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 256  # tokens without drafts once they did not pay
_TRIAL = 4  # rounds judged together


class _Cost:
    """Median of the last durations, in seconds."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_SAMPLES)
        self.value: float | None = None

    def note(self, seconds: float) -> None:
        self._seen.append(seconds)
        self.value = statistics.median(self._seen)


class _Chance:
    """Share of accepted tokens, recent ones counting most, drawn towards ``prior`` while few were seen."""

    def __init__(self, prior: float) -> None:
        self._prior, self.yes, self.all = prior, 0.0, 0.0

    def note(self, accepted: bool) -> None:
        fade = 1 - 1 / _MEMORY
        self.yes, self.all = self.yes * fade + accepted, self.all * fade + 1

    @property
    def value(self) -> float:
        return (self.yes + _PRIOR * self._prior) / (self.all + _PRIOR)


@dataclass
class Costs:
    """Seconds of a draft step, an exact step, and a verification of n drafted tokens, as measured on this engine."""

    draft: _Cost = field(default_factory=_Cost)
    exact: _Cost = field(default_factory=_Cost)
    verify: dict[int, _Cost] = field(default_factory=dict)

    def note_verify(self, drafted: int, seconds: float) -> None:
        if drafted == 0:
            self.exact.note(seconds)
        else:
            self.verify.setdefault(drafted, _Cost()).note(seconds)

    def verifying(self, drafted: int) -> float:
        """Expected seconds of verifying ``drafted`` tokens; between measured lengths, a straight line."""
        exact = self.exact.value or 0.0
        known = {0: exact} | {n: cost.value for n, cost in self.verify.items() if cost.value is not None}
        below = max(n for n in known if n <= drafted)
        above = min((n for n in known if n >= drafted), default=None)
        if above is None:
            # Beyond what was measured: the slope so far, or a guess that the first rounds will correct.
            slope = (known[below] - exact) / below if below else exact * 0.03
            return known[below] + max(0.0, slope) * (drafted - below)
        if above == below:
            return known[below]
        share = (drafted - below) / (above - below)
        return known[below] + share * (known[above] - known[below])


class DraftPolicy:
    """Plans the rounds of one request. ``costs`` belong to the engine and outlive it.

    Ask ``pause`` first; if drafting is on, ``go_on`` before each draft step of the river, and ``lookup_length`` for how
    much of a found continuation to take; tell ``note`` what became of them.
    """

    def __init__(self, costs: Costs, *, river: bool) -> None:
        self.costs, self._river = costs, river
        self._by_confidence = [_Chance(0.5 + 0.45 * (bin + 0.5) / _BINS) for bin in range(_BINS)]
        self._any = _Chance(0.85)
        self._by_match = [_Chance(prior) for prior in (0.3, 0.5, 0.7)]  # lookup: by length of the match
        self._pause, self._next_pause = 0, _FIRST_PAUSE
        self._trial: list[tuple[int, float]] = []

    @property
    def paused(self) -> bool:
        """No river drafts in this round: they did not pay lately, or an exact step has yet to be timed."""
        return self._pause > 0 or self.costs.exact.value is None or not self._river

    def go_on(self, confidences: Sequence[float]) -> bool:
        """Whether to draft another token after those with these confidences (0 to 1, the draft's top probability)."""
        if len(confidences) >= MAX_DRAFT:
            return False
        costs, drafted = self.costs, len(confidences)
        step = costs.draft.value
        if step is None:
            return drafted < 4  # nothing measured yet
        kept = 1.0
        for confidence in confidences:
            kept *= self._chance(confidence)
        more = costs.verifying(drafted + 1) - costs.verifying(drafted)
        return kept * self._any.value > self._rate() * (step + max(0.0, more))

    def lookup_length(self, match: int, found: int) -> int:
        """How many of ``found`` tokens, that follow an earlier occurrence of the last ``match``, to verify."""
        chance, kept, length = self._by_match[self._match_bin(match)].value, 1.0, 0
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
        chance = self._by_match[self._match_bin(match)].value
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
            chance = self._by_match[self._match_bin(match)]
            for i in range(judged):
                chance.note(i < accepted)
            return
        if source is None:
            self._pause = max(0, self._pause - tokens)
            return
        for i in range(judged):
            self._by_confidence[self._bin(confidences[i])].note(i < accepted)
            self._any.note(i < accepted)
        exact = self.costs.exact.value
        self._trial.append((tokens, seconds))
        if exact is None or len(self._trial) < _TRIAL:
            return
        got, spent = (sum(column) for column in zip(*self._trial, strict=True))
        self._trial.clear()
        if got / spent < 1 / exact:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)
        else:
            self._next_pause = _FIRST_PAUSE

    def _rate(self) -> float:
        """Tokens a second that rounds of the best planned length would reach; at least that of exact steps."""
        exact = self.costs.exact.value
        if exact is None:
            return 0.0
        best = 1 / exact
        step = self.costs.draft.value
        if step is None or not self._river or self._pause:
            return best
        chance, kept, expected = self._any.value, 1.0, 1.0
        for drafted in range(1, MAX_DRAFT + 1):
            kept *= chance
            expected += kept
            best = max(best, expected / (drafted * step + self.costs.verifying(drafted)))
        return best

    def _chance(self, confidence: float) -> float:
        return self._by_confidence[self._bin(confidence)].value

    @staticmethod
    def _bin(confidence: float) -> int:
        return min(_BINS - 1, max(0, int(confidence * _BINS)))

    @staticmethod
    def _match_bin(match: int) -> int:
        return 0 if match <= 2 else 1 if match <= 4 else 2
