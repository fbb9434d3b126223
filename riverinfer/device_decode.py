"""Tokens that are chosen on the device: steps follow each other there, and the host reads what they said.

In exact and river mode a step is embedding, layers, head, choice, and the choice as the next step's input; the host
queues steps ahead of the ones it reads. In lossless mode a round's drafts and their verification are queued together,
and only the outcome is read (``device_rounds``).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from riverinfer.device_walk import MAX_ROWS, ROWS, DeviceWalk, StepKind, held_bytes
from riverinfer.gates import Gate, SimilarityGate
from riverinfer.generation import Generation
from riverinfer.kernels.triton_sampling import SamplingState, SamplingWorkspace, sample
from riverinfer.kernels.triton_step import RECORD, advance
from riverinfer.outputs import Step
from riverinfer.sampling import Sampled
from riverinfer.sequence import TokenSequence
from riverinfer.trace import Trace

if TYPE_CHECKING:
    from riverinfer.engine import Engine

AHEAD = 2  # steps on their way while the host reads: one that runs, one that waits for it
_RING = 64  # steps whose record the device keeps


class Moment:
    """A point in the device's work, to be waited for and timed."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._now = time.perf_counter()
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return once the device has come so far."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds between two moments that have been waited for."""
        if self._event is None or earlier._event is None:
            return self._now - earlier._now
        return earlier._event.elapsed_time(self._event) / 1000


class DeviceDecoder:
    """Steps of a ``DeviceWalk`` that choose tokens. Not thread-safe: callers hold the engine's lock."""

    def __init__(self, walk: DeviceWalk, vocab_size: int) -> None:
        """``vocab_size``: ids from here on (padding rows of the head) are never chosen."""
        device, self.most = walk.model.device, MAX_ROWS
        self.walk, self.vocab_size, self.device = walk, vocab_size, device
        self.params, self._sampling = SamplingState(MAX_ROWS, device), SamplingWorkspace(device, vocab_size)
        self.greedy = True  # the rows that are placed: a step then needs fewer launches
        self.drawn = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)  # the number of each row's next choice
        self.logits = torch.empty(MAX_ROWS, walk.model.config.vocab_size, dtype=torch.float32, device=device)
        self.token = torch.zeros(MAX_ROWS, dtype=torch.int64, device=device)
        self.logprob = torch.zeros(MAX_ROWS, dtype=torch.float32, device=device)
        self.confidence = torch.zeros(MAX_ROWS, dtype=torch.float32, device=device)
        self._rings: dict[int, _Ring] = {}  # by number of sequences
        self._path = ""  # of the members that are placed

    @property
    def nbytes(self) -> int:
        """Bytes on the device, those of the walk included."""
        return self.walk.nbytes + held_bytes(self, self.params, self._sampling, *self._rings.values())

    def on_host(self, tensor: Tensor) -> Tensor:
        """Room for a copy of ``tensor`` that the device writes by itself."""
        return torch.zeros_like(tensor, device="cpu", pin_memory=self.device.type == "cuda")

    def choose(self, kind: StepKind) -> None:
        """Launches: the placed rows through all layers and the head, and what each of them chooses."""
        rows, walk = kind.rows, self.walk
        walk.launch(kind)
        walk.launch_head(kind, self.logits[:rows])
        sample(
            self.logits[:rows], self.params, self.drawn[:rows], vocab_size=self.vocab_size, path=walk.state.path[:rows],
            token=self.token[:rows], logprob=self.logprob[:rows], confidence=self.confidence[:rows],
            workspace=self._sampling, sampled=not self.greedy,
        )  # fmt: skip

    def place(self, owner: object, members: Sequence[tuple[TokenSequence, Generation]]) -> None:
        """Row i is the last token of member i's text, at the position after its cached ones; other rows are idle.

        Of a single member all rows have the slot and the parameters. ``owner`` holds the place until another takes it.
        """
        state, count = self.walk.state, len(members)
        self.walk.owner = owner
        rows = [
            (generation.context[-1], len(sequence.tokens), sequence.slot or 0, len(generation.context))
            for sequence, generation in members
        ]
        rows += [(0, 0, rows[0][2], 0)] * (MAX_ROWS - count)
        tokens, positions, slots, drawn = (torch.tensor(column) for column in zip(*rows, strict=True))
        for target, values in (
            (state.tokens, tokens),
            (state.position, positions),
            (state.slot, slots),
            (self.drawn, drawn),
            (state.live, torch.arange(MAX_ROWS) < count),
        ):
            target.copy_(values)
        for row, (_, generation) in enumerate(members):
            self.params.set(generation.params, slice(row, None))
        self.greedy = all(not generation.params.temperature for _, generation in members)

    def single_steps(
        self, engine: Engine, sequence: TokenSequence, generation: Generation, gate: Gate | None, trace: Trace | None
    ) -> Iterator[Step]:
        """All steps of a request after its first token. ``gate`` and ``trace`` as in ``decode.walk``."""
        flight: deque[_Ticket] = deque()
        path, rope = "", self.walk.model.rope
        while not generation.finished:
            generation.require_room()
            generation.resume()
            if not flight and sequence.crosses_regime(1):
                # All that is cached is computed again, and the row on the device is not the last token any more.
                logits = engine.extend(sequence, generation.context[-1:], gate=gate, trace=trace)
                yield generation.step(generation.choose(logits[0]), trace)
                continue
            with engine.stepping():
                if not flight and self.walk.owner is not generation:
                    self.place(generation, [(sequence, generation)])
                    path = self.walk.set_gate(gate)
                while self.walk.owner is generation and len(flight) < min(AHEAD, generation.remaining):
                    if sequence.crosses_regime(len(flight) + 1):
                        break
                    end = len(sequence.tokens) + len(flight) + 1
                    sequence.note_length(end)
                    flight.append(self._queue(StepKind(path, 1, 1, rope.regime(end))))
            record = flight.popleft().read()[0]
            passed = self._depth(path, record)
            sequence.note([generation.context[-1]], passed)
            if isinstance(gate, SimilarityGate):
                gate.not_a_number += record[3] > 0
            if trace is not None:
                trace.depth = passed
            yield generation.step(Sampled(int(record[0]), record[1]), trace)

    def prepare(self, path: str) -> None:
        """Make single steps of this path ready. Nothing is placed, and no cache touched."""
        self.walk.owner = None
        self.walk.state.live.zero_()
        self._replay(StepKind(path, 1, 1))  # of idle rows: it does not count

    def step_together(
        self, owner: object, members: Sequence[tuple[TokenSequence, Generation]], gate: Gate | None
    ) -> list[tuple[Sampled, int, bool]]:
        """One token of each member: what it chose, its depth, and whether a similarity was no number.

        ``owner`` differs for other members, or another order of them. Each sequence has room, all have the same regime,
        and none crosses it. The engine's lock is held.
        """
        if self.walk.owner != owner:
            self.place(owner, members)
            self._path = self.walk.set_gate(gate)
        path = self._path
        ends = []
        for sequence, _ in members:
            ends.append(len(sequence.tokens) + 1)
            sequence.note_length(ends[-1])
        rows = next(rows for rows in ROWS if rows >= len(members))
        records = self._queue(StepKind(path, rows, 1, self.walk.model.rope.regime(ends[0]))).read()
        told = []
        for (sequence, generation), record in zip(members, records, strict=False):
            depth = self._depth(path, record)
            sequence.note([generation.context[-1]], depth)
            told.append((Sampled(int(record[0]), record[1]), depth, record[3] > 0))
        return told

    def _depth(self, path: str, record: list[float]) -> int:
        return {"backbone": len(self.walk.model.layers), "river": 0}.get(path, int(record[2]))

    def _queue(self, kind: StepKind) -> _Ticket:
        return self._replay(kind).ticket()

    def _replay(self, kind: StepKind) -> _Ring:
        ring = self._rings.get(kind.sequences)
        if ring is None:
            ring = self._rings[kind.sequences] = _Ring(self, kind.sequences)
        ring.make_room()
        self.walk.replay(("step", kind, self.greedy), lambda: self._launch_step(kind, ring))
        return ring

    def _launch_step(self, kind: StepKind, ring: _Ring) -> None:
        state, rows = self.walk.state, kind.rows
        self.choose(kind)
        advance(
            self.token[:rows], self.logprob[:rows], state.depth[:rows], state.undefined[:rows], state.live[:rows],
            tokens=state.tokens[:rows], position=state.position[:rows], drawn=self.drawn[:rows],
            ring=ring.records, count=ring.count,
        )  # fmt: skip
        ring.copy.copy_(ring.records, non_blocking=True)


class _Ring:
    """The records of the last steps of so many sequences, and the host's copy of them."""

    def __init__(self, decoder: DeviceDecoder, rows: int) -> None:
        self.device = decoder.device
        self.records = torch.zeros(_RING, rows, RECORD, dtype=torch.float64, device=self.device)
        self.count = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.copy = decoder.on_host(self.records)
        self._queued = 0  # the host's ``count``
        self._tickets: dict[int, _Ticket] = {}  # by entry, the last step that has its record there

    def make_room(self) -> None:
        """Before a step is queued: what it will overwrite, and nobody has read yet, is kept in its ticket."""
        old = self._tickets.pop(self._queued % _RING, None)
        if old is not None:
            old.read()

    def ticket(self) -> _Ticket:
        """For the step that was just queued."""
        entry = self._queued % _RING
        self._queued += 1
        ticket = self._tickets[entry] = _Ticket(self, entry, Moment(self.device))
        return ticket


@dataclass
class _Ticket:
    """A step on its way."""

    ring: _Ring
    entry: int
    done: Moment
    record: list[list[float]] | None = None

    def read(self) -> list[list[float]]:
        """Its record, a list of token, logprob, depth, undefined for each row; waits until it is there."""
        if self.record is None:
            self.done.wait()
            self.record = self.ring.copy[self.entry].tolist()
        return self.record
