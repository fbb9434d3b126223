"""One request on its way: the tokens so far, how they read, and whether they are enough."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection

from torch import Tensor

from riverinfer.detokenizer import StreamingDetokenizer
from riverinfer.errors import ContextLengthError, RiverinferWarning
from riverinfer.outputs import Output, Step
from riverinfer.sampling import Sampled, Sampler, SamplingParams
from riverinfer.stop_strings import StopStrings
from riverinfer.tokenizer import Tokenizer
from riverinfer.trace import Trace


def warn_of_undefined(steps: int) -> None:
    """Tell the user of hidden states that were no numbers, if there were any."""
    if steps:
        warnings.warn(
            f"in {steps} steps hidden states were no numbers; their tokens stayed in the backbone",
            RiverinferWarning,
            stacklevel=3,
        )


class Generation:
    """Chooses tokens for one request, turns them into steps and keeps the time.

    ``context`` is prompt and answer so far; ``output`` is filled before a step is handed out. Time between a step and
    ``resume`` is the caller's, not the engine's.
    """

    def __init__(
        self,
        ids: list[int],
        params: SamplingParams,
        output: Output,
        *,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
        ctx_size: int,
        began: float,
    ) -> None:
        """``stop_ids``: tokens that end the text. ``began``: when the request came, ``time.perf_counter`` seconds."""
        self.params, self.output = params, output
        self.context = list(ids)
        self.sampler = Sampler(params, tokenizer.vocab_size)
        self._detokenizer = StreamingDetokenizer(tokenizer, prompt_ids=ids)
        self._stops = StopStrings(params.stop)
        self.stop_ids, self._ctx_size = stop_ids, ctx_size
        self._began = self._resumed = began
        output.prompt_token_ids, output.seed = ids, params.seed
        output.stats.prompt_tokens = len(ids)

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    @property
    def full(self) -> bool:
        """The last token has no position in the context any more."""
        return len(self.context) > self._ctx_size

    @property
    def remaining(self) -> int:
        """Tokens that may still come, by ``max_tokens`` and the context."""
        room = self._ctx_size + 1 - len(self.context)
        wanted = self.params.max_tokens
        return room if wanted is None else min(room, wanted - self.output.stats.new_tokens)

    def ends(self, token: int) -> bool:
        """Whether this token would end the text."""
        return token in self.stop_ids

    def choose(self, logits: Tensor) -> Sampled:
        """The next token after ``context`` from logits float32 [vocab]."""
        return self.sampler(logits, self.context)

    def step(self, sampled: Sampled, trace: Trace | None = None, source: str | None = None) -> Step:
        """Append a token.

        trace: the walk that predicted it, in river mode; its depth and similarities are kept. source: in lossless
        mode, who proposed it.
        """
        params, stats, token = self.params, self.output.stats, sampled.token_id
        stats.new_tokens += 1
        now = time.perf_counter()
        if stats.new_tokens == 1:
            stats.ttft_s = now - self._began
        else:
            stats.decode_s += now - self._resumed
        self._resumed = now
        self.context.append(token)

        text, reason = "", None
        if token in self.stop_ids:
            reason = "stop"
        else:
            text = self._stops.push(self._detokenizer.push(token))
            if self._stops.matched is not None:
                reason = "stop"
            elif stats.new_tokens == params.max_tokens:
                reason = "length"
        if (reason or self.full) and self._stops.matched is None:
            text += self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        depth: int | None = None
        similarities: tuple[float, ...] = ()
        if trace is not None:
            depth, similarities = trace.depth, trace.last_similarities()
            stats.exit_depths[depth] = stats.exit_depths.get(depth, 0) + 1
        step = Step(text, token, sampled.logprob, sampled.top_logprobs, reason, depth, similarities, source)
        self.output.add(step)
        return step

    def resume(self) -> None:
        """The caller asks for more."""
        self._resumed = time.perf_counter()

    def require_room(self) -> None:
        """Raise ContextLengthError, the output attached, if the context is full and the text has not ended."""
        if self.full and not self.finished:
            raise ContextLengthError(
                f"the context of {self._ctx_size} tokens is full",
                remedy="start afresh, or load with a larger --ctx-size (ctx_size)",
                output=self.output,
            )
