"""How the next token is chosen: parameters, and the sampler that applies them to one row of logits."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from riverinfer.errors import InvalidRequestError

# Rows are cut to this many candidates before sorting; a wider nucleus falls back to a full sort.
_NUCLEUS_CANDIDATES = 1024


@dataclass(frozen=True)
class SamplingParams:
    """What to generate and when to stop. The defaults are greedy decoding without a limit but the context.

    Filters apply in the order repetition penalty, temperature, top-k, top-p, min-p.

    temperature: 0 is greedy (highest logit, lowest id among equals).
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: keep the smallest set of most probable tokens whose probability reaches top_p (arXiv 1904.09751).
    min_p: drop tokens less probable than min_p times the most probable one.
    repetition_penalty: > 1 makes tokens of prompt and answer less likely (arXiv 1909.05858).
    seed: same seed, same text; None draws one, reported in the output.
    max_tokens: None generates until a stop token or string, or until the context is full.
    stop: strings that end the text, themselves not part of it.
    stop_token_ids: ids that end the text besides the model's own.
    ignore_eos: go on after end-of-sequence tokens.
    logprobs: None, or how many of the most probable tokens to report with each token.

    Raises InvalidRequestError on values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise InvalidRequestError(f"is {value!r}", field=name, remedy="give a list")
            object.__setattr__(self, name, tuple(value))
        _number("temperature", self.temperature, 0.0, math.inf)
        check_integer("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            check_integer("seed", self.seed, 0)
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1)
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, 0)
        if not all(isinstance(s, str) and s for s in self.stop):
            raise InvalidRequestError("must be non-empty strings", field="stop", remedy="leave empty ones out")
        for token in self.stop_token_ids:
            check_integer("stop_token_ids", token, 0)

    @property
    def alike_every_step(self) -> bool:
        """Whether a choice needs nothing but the logits and its number, and gives nothing but a token."""
        return self.repetition_penalty == 1.0 and not self.logprobs

    def with_seed(self) -> SamplingParams:
        """These parameters with a seed drawn if there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < low or value > high or (open_low and value == low):
        bounds = f"{'above' if open_low else 'at least'} {low:g}"
        bounds += f" and at most {high:g}" if math.isfinite(high) else ""
        raise InvalidRequestError(f"is {value!r}", field=name, remedy=f"give a number {bounds}")


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise InvalidRequestError naming ``name`` unless ``value`` is an integer from ``low`` to ``high``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" + ("" if high is None else f" and at most {high}")
        raise InvalidRequestError(f"is {value!r}", field=name, remedy=f"give an integer {bounds}")


@dataclass(frozen=True)
class Sampled:
    """One chosen token. Log-probabilities are the model's own: before penalty, temperature and filters."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses tokens for one request.

    A draw is the minimum of E / p over the tokens, E exponential: token i then wins with probability p_i (the race form
    of the Gumbel-max trick). E comes from a counter, not from a state: seed, position and token id give it. So the
    choice at a position does not depend on what was drawn before it or by whom, and two distributions that are alike
    choose alike.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        """``vocab_size``: ids from here on (padding rows of the head) are never chosen."""
        self.params = params
        self._vocab_size = vocab_size
        self._seed = _mix(params.seed if params.seed is not None else secrets.randbits(32))

    def __call__(self, logits: Tensor, context: Sequence[int]) -> Sampled:
        """logits float32 [vocab]; ``context``: prompt and answer so far, which the repetition penalty looks at."""
        row = logits[: self._vocab_size]
        token, _ = self._choose(row, context)
        normalizer = row.logsumexp(0)
        top: tuple[tuple[int, float], ...] = ()
        if self.params.logprobs:
            values, indices = row.topk(min(self.params.logprobs, len(row)))
            top = tuple(zip(indices.tolist(), (values - normalizer).tolist(), strict=True))
        return Sampled(token, float(row[token] - normalizer), top)

    def guess(self, logits: Tensor, context: Sequence[int]) -> tuple[int, float]:
        """What would be chosen if ``logits`` were the model's own, and how probable the likeliest token is."""
        row = logits[: self._vocab_size]
        if not bool(row.max().isfinite()):
            return int(row.argmax()), 0.0  # a draft of no numbers is only wrong
        token, probability = self._choose(row, context)
        if probability is None:
            probability = float((row[token] - row.logsumexp(0)).exp())
        return token, probability

    def _choose(self, row: Tensor, context: Sequence[int]) -> tuple[int, float | None]:
        """The token, and where it is known already the largest probability of the filtered distribution."""
        if not self.params.temperature and self.params.repetition_penalty == 1.0:
            return int(row.argmax()), None
        ids, probabilities = self.distribution(row, context)
        if len(ids) == 1:
            return int(ids[0]), None
        race = _exponential(self._seed, len(context), ids) / probabilities
        return int(ids[race.argmin()]), float(probabilities.max())

    def distribution(self, row: Tensor, context: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The tokens that can be chosen and their probabilities: (int64 [n], float64 [n] summing to 1)."""
        params = self.params
        row = row.double()
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({t for t in context if t < len(row)}), dtype=torch.int64, device=row.device)
            row = row.clone()
            values = row[seen]
            row[seen] = torch.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
        if not params.temperature:
            return row.argmax().view(1), torch.ones(1, dtype=torch.float64)
        # The largest score is 0 before it is divided: no temperature, however small, makes it overflow.
        row = (row - row.max()) / params.temperature
        ids: Tensor | None = None
        if params.top_k and params.top_k < len(row):
            row, ids = row.topk(params.top_k)
        if params.top_p < 1.0:
            row, order = _nucleus(row, params.top_p, ordered=ids is not None)
            ids = order if ids is None else ids[order]
        if params.min_p:
            kept = (row >= row.max() + math.log(params.min_p)).nonzero().squeeze(1)
            if not len(kept):
                kept = row.argmax().view(1)  # logits that are no numbers
            row, ids = row[kept], kept if ids is None else ids[kept]
        if ids is None:
            ids = torch.arange(len(row), device=row.device)
        return ids, row.softmax(0)


_MASK = (1 << 64) - 1
_GAMMA, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(value: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on a number of any size."""
    mixed = 0
    while True:
        z = (mixed ^ value) & _MASK
        z = (z + _GAMMA) & _MASK
        z = ((z ^ (z >> 30)) * _M1) & _MASK
        z = ((z ^ (z >> 27)) * _M2) & _MASK
        mixed, value = z ^ (z >> 31), value >> 64
        if not value:
            return mixed


def _exponential(seed: int, position: int, ids: Tensor) -> Tensor:
    """Exponential variates float64 [n] for token ids int64 [n]: SplitMix64 started at (seed, position), step id + 1."""
    return _variates(_start(seed, position), ids)


def _start(seed: int, position: int) -> int:
    """Where the stream of a position starts, as an int64."""
    return _signed(_mix(seed ^ _mix(position)))


def _variates(start: int | Tensor, ids: Tensor) -> Tensor:
    """Exponential variates float64 of the streams from ``start``, at ``ids``: int64, broadcast together."""

    def shifted(z: Tensor, bits: int) -> Tensor:
        return (z >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift

    z = (ids + 1) * _signed(_GAMMA) + start
    z = (z ^ shifted(z, 30)) * _signed(_M1)
    z = (z ^ shifted(z, 27)) * _signed(_M2)
    z = shifted(z ^ shifted(z, 31), 11)  # 53 bits
    return -torch.log((z.double() + 0.5) * 2.0**-53)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _nucleus(row: Tensor, top_p: float, *, ordered: bool) -> tuple[Tensor, Tensor]:
    """The smallest most-probable set whose probability reaches top_p: (values, positions in row)."""
    normalizer = row.logsumexp(0)
    for candidates in (_NUCLEUS_CANDIDATES, len(row)):
        if ordered:
            values, order = row, torch.arange(len(row), device=row.device)
        else:
            values, order = row.topk(min(candidates, len(row)))
        cumulative = (values - normalizer).exp().cumsum(0)
        reached = int((cumulative < top_p).sum())
        if reached < len(values) or len(values) == len(row):
            break
    kept = min(reached + 1, len(values))
    return values[:kept], order[:kept]
