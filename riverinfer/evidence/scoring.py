"""How probable a model finds given text: prompts in batches, or token by token through the gate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from riverinfer.errors import ContextLengthError, InvalidRequestError
from riverinfer.gates import Gate
from riverinfer.sequence import TokenSequence
from riverinfer.trace import Trace

if TYPE_CHECKING:
    from riverinfer.engine import Engine

_ROWS = 256  # of float32 logits [rows, vocab] in memory at once


class Score(NamedTuple):
    """Sum of the natural log probabilities of a continuation, and whether greedy decoding would say it."""

    logprob: float
    greedy: bool


class Scorer:
    """Scores (context ids, continuation ids) one after the other; neighbours share the K and V of a common beginning.

    decode: every prediction that counts comes from a decode step, that after the context's last token included;
    ``make_gate`` gives the gate of a continuation's steps, None keeps them in the backbone. Else from a batched
    backbone pass. The rest of the context is exact either way. ``depths``: decode steps by backbone layers.
    """

    def __init__(self, engine: Engine, *, decode: bool, make_gate: Callable[[], Gate | None]) -> None:
        self.engine, self.decode, self.make_gate = engine, decode, make_gate
        self.depths: Counter[int] = Counter()

    def scores(self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Score]:
        """A score a pair, in their order; holds one slot until the iterator ends.

        What does not fit into the context is cut from the left, all but the last ``ctx_size`` + 1 tokens.
        Raises InvalidRequestError for ids outside the vocabulary or an empty context, ContextLengthError for a
        continuation longer than the context, NoFreeSlotError, EngineClosedError.
        """
        sequence = TokenSequence(self.engine.model, self.engine.ctx_size)
        self.engine.slots.acquire(sequence)
        try:
            for context, continuation in pairs:
                yield self._score(sequence, context, continuation)
        finally:
            self.engine.slots.release(sequence, keep=False)

    def _score(self, sequence: TokenSequence, context: Sequence[int], continuation: Sequence[int]) -> Score:
        size = self.engine.ctx_size
        if not context:
            raise InvalidRequestError("the context has no tokens", remedy="begin it with the BOS or EOS token")
        if len(continuation) > size:
            raise ContextLengthError(
                f"the continuation has {len(continuation)} tokens, the context {size}",
                remedy="score it in parts, or load with a larger ctx_size",
            )
        if not continuation:
            return Score(0.0, True)
        self.engine.check_ids(continuation)
        # Position i predicts token i + 1: the last token is never read, and the one before the continuation counts.
        ids = self.engine.check_ids([*context, *continuation][-size - 1 :][:-1])
        first = len(ids) - len(continuation)
        sequence.keep_common(ids, exact=True)
        sequence.truncate(first)
        if len(sequence.tokens) < first:
            self.engine.extend(sequence, ids[len(sequence.tokens) : first])
        logprob, greedy = 0.0, True
        for rows, targets in self._rows(sequence, ids[first:], continuation):
            wanted = torch.tensor(targets, device=rows.device)
            picked = rows.log_softmax(-1).gather(1, wanted[:, None])
            logprob += float(picked.double().sum())
            greedy = greedy and bool((rows.argmax(-1) == wanted).all())
        return Score(logprob, greedy)

    def _rows(
        self, sequence: TokenSequence, ids: Sequence[int], targets: Sequence[int]
    ) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """Logits float32 [n, vocab] after the next n of ``ids``, and the n tokens that follow them."""
        if not self.decode:
            for at in range(0, len(ids), _ROWS):
                yield (
                    self.engine.extend(sequence, ids[at : at + _ROWS], all_logits=True),
                    targets[at : at + _ROWS],
                )
            return
        gate, trace = self.make_gate(), Trace()
        for token, target in zip(ids, targets, strict=True):
            yield self.engine.extend(sequence, [token], gate=gate, trace=trace), [target]
            self.depths[trace.depth] += 1
