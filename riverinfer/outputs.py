"""What a generation yields: one ``Step`` a token, and an ``Output`` at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
    """

    text: str
    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    exit_depth: int | None = None
    similarities: tuple[float, ...] = ()


@dataclass
class Stats:
    """Counts and seconds of one generation. Rates are tokens per second, 0.0 where nothing was timed.

    prompt_tokens includes cached_tokens, the ones whose K and V an earlier turn had left. ttft_s runs from the call
    to the first token, text processing included. decode_s covers the tokens after the first.
    exit_depths: in river mode, how many tokens were predicted at each depth; empty in exact mode.
    undefined_similarities: how often a gate met hidden states that are no numbers and kept the token in the backbone.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    exit_depths: dict[int, int] = field(default_factory=dict)
    undefined_similarities: int = 0

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
        self.finish_reason = step.finish_reason
