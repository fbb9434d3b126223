"""Lossless decoding: the river drafts, the backbone verifies in one batched pass and rewrites K and V exactly.

A round starts from a cache that is the backbone's own up to the last token but one. Drafted tokens write K and V behind
its end, where nothing reads them but further drafts; the verification computes the same positions again in the backbone
and so leaves them exact; what was not accepted is cut off by moving a length.

Each token is the one that exact mode would choose at that position: for sampling, both draw with the same random
numbers by position and token id, so that a draft is accepted exactly when it is that choice (a coupling that does not
depend on the drafter: Daliri, Musco and Suresh, arXiv 2408.07978). The text of a seed is thus that of exact mode,
however long the drafts were.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from riverinfer.draft_policy import MAX_DRAFT, DraftPolicy
from riverinfer.gates import Gate
from riverinfer.generation import Generation
from riverinfer.outputs import Drafted, DraftStats, Step
from riverinfer.prompt_lookup import PromptLookup
from riverinfer.sampling import Sampled
from riverinfer.sequence import TokenSequence
from riverinfer.trace import Trace

if TYPE_CHECKING:
    from riverinfer.engine import Engine


@dataclass
class Round:
    """What was drafted, by whom, after a lookup's match of which length; the backbone's choice at each position."""

    source: str | None
    drafts: list[Drafted]
    match: int
    choices: Iterator[Sampled]
    draft_s: float
    verify_s: float


class LosslessRounds:
    """The rounds of one request on one sequence."""

    def __init__(
        self,
        engine: Engine,
        sequence: TokenSequence,
        generation: Generation,
        *,
        gate: Gate | None,
        lookup: bool = True,
        similarities: bool = False,
    ) -> None:
        """``gate``: when a draft step enters the river; None drafts by lookup only. ``similarities``: record them."""
        self._engine, self._sequence, self._generation = engine, sequence, generation
        self._gate, self._similarities = gate, similarities
        self._lookup = PromptLookup() if lookup else None
        self._policy = DraftPolicy(engine.costs, engine.beliefs, river=gate is not None)
        self.stats = generation.output.stats.drafts = DraftStats()

    def run(self, logits: Tensor) -> Iterator[Step]:
        """All steps of the request. ``logits`` float32 [1, vocab]: those after the prompt."""
        generation = self._generation
        yield generation.step(generation.choose(logits[0]), source="backbone")
        while not generation.finished:
            generation.require_room()
            generation.resume()
            yield from self._round()

    def _round(self) -> Iterator[Step]:
        generation, sequence = self._generation, self._sequence
        done = self._draft_and_verify(self._room())
        source, drafts = done.source, done.drafts
        accepted = emitted = 0
        more = True
        try:
            for sampled in done.choices:
                draft = drafts[emitted] if emitted < len(drafts) else None
                agreed = draft is not None and draft.token == sampled.token_id
                step = generation.step(sampled, source=source if agreed else "backbone")
                accepted, emitted = accepted + agreed, emitted + 1
                more = agreed and not generation.finished and not generation.full
                if not more:
                    self._note(done, accepted, emitted)
                yield step
                if not more:
                    return
                generation.resume()
        finally:
            # Positions of drafts that were not accepted, or not said; the last token is computed in the next round.
            sequence.truncate(len(generation.context) - 1)
            if more:  # left half way: what was not said was not judged
                self.stats.note(source, drafts[:accepted], accepted, len(drafts), done.draft_s, done.verify_s)

    def _draft_and_verify(self, room: int) -> Round:
        """Draft up to ``room`` tokens, and let the backbone pass them: its K and V are then those of the cache."""
        generation = self._generation
        began = time.perf_counter()
        source, drafts, match = self._draft(room)
        between = time.perf_counter()
        ids = [generation.context[-1], *(draft.token for draft in drafts)]
        logits = self._engine.extend(self._sequence, ids, all_logits=True)  # [g + 1, vocab]
        seconds = time.perf_counter() - between
        self._engine.costs.note_verify(len(drafts), seconds)
        # One by one: each may depend on the one before. No generator: an interrupt while one is thrown away is lost.
        choices = map(generation.choose, logits)
        return Round(source, drafts, match, choices, between - began, seconds)

    def _room(self) -> int:
        """Tokens that can be drafted so that context and max_tokens hold one more than all of them."""
        generation, sequence = self._generation, self._sequence
        room = min(MAX_DRAFT, generation.remaining - 1, sequence.ctx_size - len(generation.context))
        # K that is rotated by the sequence's length would differ from that of single steps.
        return 0 if room > 0 and not sequence.steps_alike(room + 1) else max(0, room)

    def _draft(self, room: int) -> tuple[str | None, list[Drafted], int]:
        """(source, drafts, length of the lookup's match)."""
        found, match = self._look_up(room)
        if found:
            return "lookup", found, match
        if room and not self._policy.paused:
            drafts = self._river_drafts(room)
            if drafts:
                return "river", drafts, 0
        return None, [], 0

    def _look_up(self, room: int) -> tuple[list[Drafted], int]:
        """What followed an earlier occurrence of the text's end, if verifying it promises more than the river does."""
        policy = self._policy
        if room and self._lookup is not None:
            found, match = self._lookup.find(self._generation.context, room)
            length = policy.lookup_length(match, len(found)) if found else 0
            if length and policy.lookup_beats_river(match, length):
                return [Drafted(token, 1.0) for token in found[:length]], match
        return [], 0

    def _river_drafts(self, room: int) -> list[Drafted]:
        generation, gate, costs = self._generation, self._gate, self._engine.costs
        context, token, drafts = list(generation.context), generation.context[-1], list[Drafted]()
        trace = Trace(similarities=[] if self._similarities else None)
        while len(drafts) < room and self._policy.go_on([draft.confidence for draft in drafts]):
            began = time.perf_counter()
            logits = self._engine.draft(self._sequence, token, len(drafts), gate=gate, trace=trace)
            token, confidence = generation.sampler.guess(logits[0], context)
            costs.draft.note(time.perf_counter() - began)
            drafts.append(Drafted(token, confidence, trace.depth, trace.last_similarities()))
            context.append(token)
            if generation.ends(token):
                break
        return drafts

    def _note(self, done: Round, accepted: int, emitted: int) -> None:
        cut = self._generation.finished or self._generation.full
        confidences = [draft.confidence for draft in done.drafts]
        if cut and accepted == emitted:
            confidences = confidences[:accepted]  # the text ended: what would have come next was not judged
        seconds = done.draft_s + done.verify_s
        self._policy.note(done.source, confidences, accepted, emitted, seconds, done.match)
        judged = done.drafts[: len(confidences)]
        self.stats.note(done.source, judged, accepted, len(done.drafts), done.draft_s, done.verify_s)
