"""What a generation yields: one ``Step`` a token, and an ``Output`` at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Drafted:
    """One drafted token, the probability of the draft's likeliest one, and, from the river, the walk that gave it."""

    token: int
    confidence: float
    depth: int | None = None
    similarities: tuple[float, ...] = ()


@dataclass(frozen=True)
class Step:
    """One generated token.

    text: what became readable with it; empty while a character or a possible stop string is incomplete.
    logprob: natural log of the model's own probability of the token, before temperature and filters.
    top_logprobs: (token id, logprob) of the most probable tokens, if asked for.
    finish_reason: None until the last step; then "stop" (stop token or string) or "length" (max_tokens).
    exit_depth: in river mode, how many backbone layers the position that predicted this token passed; else None.
    similarities: if asked for, of that position the cosine of the states entering and leaving each layer; NaN where a
        state was no number.
    source: in lossless mode, who proposed the token that the backbone then chose: "river", "lookup" (it followed an
        earlier occurrence of the same words) or "backbone" (nobody: it is the correction or the one more).
    """

    text: str
    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    exit_depth: int | None = None
    similarities: tuple[float, ...] = ()
    source: str | None = None


@dataclass
class DraftStats:
    """What lossless mode's drafts were and how the backbone judged them; one judged draft is one comparison of both.

    rounds: verified batches; exact_steps of them had no draft. drafted and accepted: tokens by source ("river",
    "lookup"). The pairs [accepted, judged] count river drafts by position in the draft (from 0), by tenths of the
    draft's own confidence, by its exit depth, and, if similarities were asked for, by tenths of the similarity at the
    layer where it left the backbone (of the first layer, if it never was in it). What follows the first refusal in a
    draft is not judged. draft_s and verify_s are seconds.
    """

    rounds: int = 0
    exact_steps: int = 0
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    by_position: dict[int, list[int]] = field(default_factory=dict)
    by_confidence: dict[int, list[int]] = field(default_factory=dict)
    by_depth: dict[int, list[int]] = field(default_factory=dict)
    by_similarity: dict[int, list[int]] = field(default_factory=dict)
    draft_s: float = 0.0
    verify_s: float = 0.0

    def note(
        self,
        source: str | None,
        judged: Sequence[Drafted],
        accepted: int,
        drafted: int,
        draft_s: float,
        verify_s: float,
    ) -> None:
        """A round ended: of ``drafted`` tokens the first ``accepted`` were; ``judged`` may hold the next one too."""
        self.rounds += 1
        self.draft_s += draft_s
        self.verify_s += verify_s
        if source is None:
            self.exact_steps += 1
            return
        self.drafted[source] = self.drafted.get(source, 0) + drafted
        self.accepted[source] = self.accepted.get(source, 0) + accepted
        if source != "river":
            return
        for position, draft in enumerate(judged[: accepted + 1]):
            keys = [(self.by_position, position), (self.by_confidence, min(9, int(draft.confidence * 10)))]
            if draft.depth is not None:
                keys.append((self.by_depth, draft.depth))
            if draft.similarities:
                similarity = draft.similarities[max(0, (draft.depth or 0) - 1)]
                if similarity == similarity:
                    keys.append((self.by_similarity, min(9, max(-10, math.floor(similarity * 10)))))
            for table, key in keys:
                pair = table.setdefault(key, [0, 0])
                pair[0] += position < accepted
                pair[1] += 1

    @property
    def agreement(self) -> float | None:
        """Share of judged river drafts that the backbone would have said too; None before any was judged."""
        judged = sum(pair[1] for pair in self.by_position.values())
        return sum(pair[0] for pair in self.by_position.values()) / judged if judged else None

    def as_dict(self) -> dict[str, Any]:
        """Every figure by name; tables as lists of {from (or position, depth), accepted, judged}."""

        def rows(table: dict[int, list[int]], name: str, scale: float = 1) -> list[dict[str, float]]:
            return [
                {name: round(key * scale, 1), "accepted": yes, "judged": n} for key, (yes, n) in sorted(table.items())
            ]

        return {
            "rounds": self.rounds,
            "exact_steps": self.exact_steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "agreement": self.agreement,
            "draft_s": self.draft_s,
            "verify_s": self.verify_s,
            "by_position": rows(self.by_position, "position"),
            "by_confidence": rows(self.by_confidence, "from", 0.1),
            "by_depth": rows(self.by_depth, "depth"),
            "by_similarity": rows(self.by_similarity, "from", 0.1),
        }


@dataclass
class Stats:
    """Counts and seconds of one generation. Rates are tokens per second, 0.0 where nothing was timed.

    prompt_tokens includes cached_tokens, the ones whose K and V an earlier turn had left. ttft_s runs from the call
    to the first token, text processing included. decode_s covers the tokens after the first.
    exit_depths: in river mode, how many tokens were predicted at each depth; empty in exact mode.
    undefined_similarities: steps in which a gate met hidden states that are no numbers and kept the token in the
    backbone.
    drafts: in lossless mode, what was drafted and accepted.
    repaired: in river mode with repair, positions whose K and V the backbone rewrote; repair_disagreements: after how
        many of them its likeliest token is another than was said; repair_s: seconds, part of decode_s.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    exit_depths: dict[int, int] = field(default_factory=dict)
    undefined_similarities: int = 0
    drafts: DraftStats | None = None
    repaired: int = 0
    repair_disagreements: int = 0
    repair_s: float = 0.0

    @property
    def mean_exit_depth(self) -> float | None:
        """Mean number of backbone layers a token passed; None in exact mode."""
        total = sum(self.exit_depths.values())
        return sum(depth * count for depth, count in self.exit_depths.items()) / total if total else None

    @property
    def prefill_tokens_per_s(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return (self.new_tokens - 1) / self.decode_s if self.decode_s and self.new_tokens > 1 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Every figure by name, rates included; those of the river only where it ran."""
        river: dict[str, Any] = {}
        if self.exit_depths:
            river["exit_depths"] = {str(depth): self.exit_depths[depth] for depth in sorted(self.exit_depths)}
            river["mean_exit_depth"] = self.mean_exit_depth
        if self.undefined_similarities:
            river["undefined_similarities"] = self.undefined_similarities
        if self.repaired:
            river["repaired"], river["repair_s"] = self.repaired, self.repair_s
            river["repair_disagreements"] = self.repair_disagreements
        if self.drafts is not None:
            river["drafts"] = self.drafts.as_dict()
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "new_tokens": self.new_tokens,
            "ttft_s": self.ttft_s,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            **river,
        }


@dataclass
class Output:
    """A finished (or cut short) generation. ``finish_reason`` is None if it was abandoned or ran out of context."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    seed: int | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    exit_depths: list[int] = field(default_factory=list)  # a token each, in river mode
    similarities: list[tuple[float, ...]] = field(default_factory=list)  # a token each, if asked for
    sources: list[str] = field(default_factory=list)  # a token each, in lossless mode

    def add(self, step: Step) -> None:
        """Append one step."""
        self.text += step.text
        self.token_ids.append(step.token_id)
        self.logprobs.append(step.logprob)
        if step.top_logprobs:
            self.top_logprobs.append(step.top_logprobs)
        if step.exit_depth is not None:
            self.exit_depths.append(step.exit_depth)
        if step.similarities:
            self.similarities.append(step.similarities)
        if step.source is not None:
            self.sources.append(step.source)
        self.finish_reason = step.finish_reason
