"""One sequence of tokens and the slot that holds its K and V."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from riverinfer import decode
from riverinfer.errors import ContextLengthError, EngineClosedError, NoFreeSlotError
from riverinfer.gates import FixedDepth, Gate
from riverinfer.kv_arena import KVArena
from riverinfer.model import Model
from riverinfer.trace import Trace


def closed_error() -> EngineClosedError:
    """What every use of a closed engine raises."""
    return EngineClosedError("the engine was closed", remedy="load it again")


class TokenSequence:
    """Tokens whose K and V are in the cache.

    Invariant: ``tokens[i]`` is what position i of the slot was computed from, for every i, and the first ``exact``
    positions have the backbone's own K and V on every layer. An interrupt leaves a shorter sequence, never a wrong
    one. Needs a slot (``SlotPool.acquire``) before ``extend``.
    """

    def __init__(self, model: Model, ctx_size: int) -> None:
        self.model, self.ctx_size = model, ctx_size
        self.tokens: list[int] = []
        self.exact = 0
        self.slot: int | None = None
        self._kv: list[tuple[Tensor, Tensor]] = []
        # Longest length the cached K were computed for; matters to length-dependent rotary scalings only.
        self._rope_len = 0

    def bind(self, slot: int | None, kv: list[tuple[Tensor, Tensor]]) -> None:
        """Take or lose a slot; what was cached is gone either way."""
        self.slot, self._kv = slot, kv
        self._forget()

    def truncate(self, length: int) -> None:
        """Roll back to the first ``length`` tokens. No memory is touched."""
        if length >= len(self.tokens):
            return
        rope = self.model.rope
        if rope.scaled_by_length(self._rope_len) and not (rope.regime(self._rope_len) and rope.regime(length)):
            length = 0  # K of early positions carries the frequencies of the longer sequence
        # An interrupt between two lines may leave too low a claim of exactness, never too high a one.
        self.exact = min(self.exact, length)
        del self.tokens[length:]
        if not length:
            self._rope_len = 0

    def _forget(self) -> None:
        self.exact = 0
        self.tokens, self._rope_len = [], 0

    def keep_common(self, ids: Sequence[int], *, exact: bool = False) -> int:
        """Roll back to the longest common beginning with ``ids``, at least one of which stays to be computed.

        With ``exact`` only positions that the backbone computed count. Returns how many of ``ids`` are served from
        the cache.
        """
        if exact:
            self.truncate(self.exact)
        rope = self.model.rope
        if self.tokens and rope.regime(len(ids)) != rope.regime(self._rope_len):
            self.truncate(0)
        common = 0
        for cached, wanted in zip(self.tokens, ids[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
        self.truncate(common)
        return len(self.tokens)

    def extend(
        self,
        ids: Sequence[int],
        *,
        all_logits: bool = False,
        gate: Gate | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Append ``ids``, computing their K and V: float32 logits [1, vocab] after the last (all: [T, vocab]).

        ``gate`` (None: stay in the backbone) and ``trace`` are those of ``decode.walk``; the trace of several ids is
        that of the last chunk.

        Raises ContextLengthError, leaving the sequence as it was, when they do not fit.
        """
        start, end, count = len(self.tokens), len(self.tokens) + len(ids), len(ids)
        if end > self.ctx_size:
            raise ContextLengthError(
                f"{end} tokens do not fit into the context of {self.ctx_size}",
                remedy="shorten the input or load with a larger --ctx-size (ctx_size)",
            )
        if self.crosses_regime(len(ids)):
            # Crossing the short/long border of longrope: every cached K needs the other frequencies.
            ids, start = [*self.tokens, *ids], 0
            gate = FixedDepth(self.model.held_layers) if self.model.offloaded else None
            self._forget()
        trace = trace or Trace()
        self.note_length(end)
        if len(ids) == 1:
            logits = decode.decode_one(self.model, ids[0], start, self._kv, gate=gate, trace=trace)
            self.note(ids, trace.depth)
        else:
            base = len(self.tokens)

            def chunk_done(count: int) -> None:
                self.note(ids[len(self.tokens) - base : count], trace.depth)

            every = all_logits and count > 1
            logits = decode.prefill(
                self.model, ids, start, self._kv, all_logits=every, on_chunk=chunk_done, gate=gate, trace=trace
            )
        return logits[-count:] if all_logits else logits

    def draft(self, token: int, ahead: int, *, gate: Gate | None, trace: Trace | None = None) -> Tensor:
        """One token ``ahead`` positions beyond the end: float32 logits [1, vocab].

        Its K and V lie where only further drafts read them; the sequence does not grow.
        """
        position = len(self.tokens) + ahead
        return decode.decode_one(self.model, token, position, self._kv, gate=gate, trace=trace)

    def steps_alike(self, count: int) -> bool:
        """Whether ``count`` more tokens at once get the K that they get one by one: no length-dependent rotation."""
        rope, end = self.model.rope, len(self.tokens) + count
        by_length = rope.scaled_by_length(end) and not rope.regime(end)
        return not by_length and not self.crosses_regime(count)

    def repair(self, following: int) -> tuple[int, int]:
        """Compute all positions that are not exact again in the backbone, in one pass, and rewrite their K and V.

        ``following``: the token said after the last one. Returns how many positions there were, and after how many of
        them the backbone's likeliest token is not the one that follows. Never fewer tokens than before, whatever
        interrupts: until the pass is complete they count as the river's.
        """
        ids, start = self.tokens[self.exact :], self.exact
        if not ids:
            return 0, 0
        rope, end = self.model.rope, len(self.tokens)
        # K that is rotated by the sequence's length gets the length that its own step had.
        by_length = rope.scaled_by_length(end) and not rope.regime(end)
        size = 1 if by_length else len(ids)
        rows = [
            decode.prefill(self.model, ids[i : i + size], start + i, self._kv, all_logits=True)
            for i in range(0, len(ids), size)
        ]
        self.exact = end
        said = torch.tensor([*ids[1:], following], device=rows[0].device)
        return len(ids), int((torch.cat(rows).argmax(-1) != said).sum())

    def crosses_regime(self, count: int) -> bool:
        """Whether ``count`` more tokens change the rotary frequencies of all that is cached (longrope)."""
        rope, cached = self.model.rope, len(self.tokens)
        return cached > 0 and rope.regime(cached + count) != rope.regime(self._rope_len)

    def note_length(self, end: int) -> None:
        """Before K of a sequence of length ``end`` are computed: after an interrupt, they must not be taken for those
        of a shorter one."""
        self._rope_len = max(self._rope_len, end) if self.tokens else end

    def note(self, ids: Sequence[int], depth: int) -> None:
        """Append ids whose K and V are complete; they are exact if all before them are and no layer was the river's."""
        exact = self.exact == len(self.tokens) and depth == len(self.model.layers)
        self.tokens.extend(ids)
        if exact:
            self.exact = len(self.tokens)


def extend_batch(
    sequences: Sequence[TokenSequence], ids: Sequence[int], *, gates: Sequence[Gate] = (), traces: Sequence[Trace] = ()
) -> Tensor:
    """One token more for each of several sequences of one model: float32 logits [B, vocab].

    ``gates`` and ``traces`` are those of ``decode.decode_batch``. Each sequence must have room.
    """
    model = sequences[0].model
    if any(sequence.crosses_regime(1) for sequence in sequences):
        # Rare (longrope at its border), and a recomputation of the whole sequence: one by one.
        rows = []
        # Those that are recomputed stay in the backbone; under a gate for all, so do the others.
        shared = len(gates) == 1
        together = FixedDepth(model.held_layers) if model.offloaded else None
        for row, (sequence, token) in enumerate(zip(sequences, ids, strict=True)):
            gate = together if shared or not gates else gates[row]
            rows.append(sequence.extend([token], gate=gate, trace=traces[row] if traces else None))
        return torch.cat(rows)
    traces = traces or [Trace() for _ in sequences]
    for sequence in sequences:
        sequence.note_length(len(sequence.tokens) + 1)
    positions = [len(sequence.tokens) for sequence in sequences]
    kvs = [sequence._kv for sequence in sequences]
    logits = decode.decode_batch(model, ids, positions, kvs, gates=gates, traces=traces)
    for sequence, token, trace in zip(sequences, ids, traces, strict=True):
        sequence.note([token], trace.depth)
    return logits


class SlotPool:
    """Hands the arena's slots to sequences; thread-safe.

    A sequence that is generating is *busy* and keeps its slot. One that is between turns keeps its cache until a
    busy one needs the room: then the longest idle loses its slot and computes its tokens again at its next turn.
    """

    def __init__(self, arena: KVArena) -> None:
        self._arena: KVArena | None = arena
        self._free = list(range(arena.slots))
        self._idle: list[TokenSequence] = []  # longest idle first
        self._busy: dict[int, int] = {}  # slot -> ident of the thread that took it
        self._changed = threading.Condition()

    def acquire(self, sequence: TokenSequence) -> None:
        """Make ``sequence`` busy, with a slot. Waits while other threads hold all of them.

        A thread that holds a slot itself does not wait: two that did could wait for each other. It gets
        NoFreeSlotError. Raises EngineClosedError once the pool is closed, also to those that wait.
        """
        me = threading.get_ident()
        with self._changed:
            while True:
                if self._arena is None:
                    raise closed_error()
                if sequence.slot is not None:
                    if sequence in self._idle:
                        self._idle.remove(sequence)
                    self._busy[sequence.slot] = me
                    return
                if not self._free and self._idle:
                    evicted = self._idle.pop(0)
                    assert evicted.slot is not None
                    self._free.append(evicted.slot)
                    evicted.bind(None, [])
                if self._free:
                    slot = self._free.pop(0)
                    sequence.bind(slot, self._arena.slot(slot))
                    continue
                if me in self._busy.values():
                    raise NoFreeSlotError(
                        f"all {self._arena.slots} sequences are still generating",
                        remedy="finish or close one of them, or load with more max_sequences",
                    )
                self._changed.wait()

    def release(self, sequence: TokenSequence, *, keep: bool) -> None:
        """End of a turn: with ``keep`` the cache stays for the next one, else the slot is free at once."""
        with self._changed:
            if sequence.slot is None:
                return
            self._busy.pop(sequence.slot, None)
            if sequence in self._idle:
                self._idle.remove(sequence)
            if keep and self._arena is not None:
                self._idle.append(sequence)
            else:
                self._free.append(sequence.slot)
                sequence.bind(None, [])
            self._changed.notify_all()

    def close(self) -> None:
        """Take the slots away, those of busy sequences when they are released, and let the arena go."""
        with self._changed:
            for sequence in self._idle:
                sequence.bind(None, [])
            self._idle.clear()
            self._arena = None
            self._changed.notify_all()

    @property
    def busy(self) -> int:
        """Number of sequences that are generating now."""
        return len(self._busy)
