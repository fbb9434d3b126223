"""Lossless rounds on the device: drafts and their verification are queued at once, the host reads the outcome."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from riverinfer.device_decode import DeviceDecoder, Moment
from riverinfer.device_walk import ROWS, StepKind, held_bytes
from riverinfer.draft_policy import BINS, MAX_DRAFT, Plan
from riverinfer.kernels.triton_step import RoundState
from riverinfer.lossless import LosslessRounds, Round
from riverinfer.outputs import Drafted
from riverinfer.sampling import Sampled


class RoundLaunches:
    """The graphs of a round, and what they leave for the host."""

    def __init__(self, decoder: DeviceDecoder) -> None:
        self.decoder = decoder
        self.state = RoundState(MAX_DRAFT, BINS, decoder.device)
        rows = MAX_DRAFT + 1
        # A line each: choices and their log-probabilities, drafts and their confidences; how many drafts there are.
        self._outcome = torch.zeros(5, rows, dtype=torch.float64, device=decoder.device)
        self._read = decoder.on_host(self._outcome)

    @property
    def nbytes(self) -> int:
        """Bytes on the device, without the decoder's."""
        return held_bytes(self, self.state)

    def queue(
        self,
        last: int,
        position: int,
        drawn: int,
        given: Sequence[int],
        plan: Plan,
        stops: Collection[int],
        regime: int,
    ) -> tuple[Moment, Moment, Moment]:
        """Draft as planned, or verify the ``given`` tokens: the moments of beginning, drafts, and outcome."""
        state, device = self.state, self.decoder.device
        command = [last, position, drawn, len(given), *given]
        began = Moment(device)
        state.command[: len(command)].copy_(torch.tensor(command, dtype=torch.int64))
        if plan.length:
            state.chances.copy_(torch.tensor(plan.chances, dtype=torch.float32))
            state.bound.fill_(plan.bound)
            known = sorted(stops)[: state.STOPS]  # drafting on behind another one costs time, not correctness
            padded = [*known, *[-1] * (state.STOPS - len(known))]
            state.stops.copy_(torch.tensor(padded, dtype=torch.int64))
        self._open()
        for _ in range(plan.length):
            self._draft(StepKind("river", 1, 1, regime))
        drafted = Moment(device)
        rows = next(rows for rows in ROWS if rows > max(plan.length, len(given)))
        self._verify(StepKind("backbone", 1, rows, regime))
        return began, drafted, Moment(device)

    def prepare_drafts(self) -> None:
        """Make draft steps ready. Nothing is placed, and no cache touched."""
        self.decoder.walk.owner = None
        self.decoder.walk.state.live.zero_()
        self._draft(StepKind("river", 1, 1))

    def prepare_verify(self, rows: int) -> None:
        """Make verifications of so many rows ready. Before anything is cached: position 0 of slot 0 is written."""
        self.decoder.walk.owner = None
        self.state.command.zero_()
        self._open()
        self._verify(StepKind("backbone", 1, rows))

    def _open(self) -> None:
        self.decoder.walk.replay("open", lambda: self.state.open(*self._rows(1)))

    def _draft(self, kind: StepKind) -> None:
        key = ("draft", kind, self.decoder.greedy)
        self.decoder.walk.replay(key, lambda: self._launch_draft(kind))

    def _verify(self, kind: StepKind) -> None:
        key = ("verify", kind, self.decoder.greedy)
        self.decoder.walk.replay(key, lambda: self._launch_verify(kind))

    def read(self) -> tuple[list[Sampled], list[tuple[int, float]]]:
        """What the backbone chooses at each position, and the drafts with their confidences."""
        choices, logprobs, drafts, confidences, (count, *_) = self._read.tolist()
        n = int(count)
        sampled = [Sampled(int(token), logprob) for token, logprob in zip(choices, logprobs, strict=True)]
        return sampled[: n + 1], [(int(token), sure) for token, sure in zip(drafts, confidences, strict=True)][:n]

    def _rows(self, rows: int) -> tuple[Any, Any, Any, Any]:
        state = self.decoder.walk.state
        return state.tokens[:rows], state.position[:rows], self.decoder.drawn[:rows], state.live[:rows]

    def _launch_draft(self, kind: StepKind) -> None:
        decoder = self.decoder
        decoder.choose(kind)
        self.state.propose(decoder.token[:1], decoder.confidence[:1], *self._rows(1))

    def _launch_verify(self, kind: StepKind) -> None:
        decoder, state, rows = self.decoder, self.state, kind.rows
        state.assemble(*self._rows(rows))
        decoder.choose(kind)
        self._outcome[0, :rows] = decoder.token[:rows]
        self._outcome[1, :rows] = decoder.logprob[:rows]
        self._outcome[2, :MAX_DRAFT] = state.drafts
        self._outcome[3, :MAX_DRAFT] = state.confidences
        self._outcome[4, :1] = state.count
        self._read.copy_(self._outcome, non_blocking=True)


class DeviceRounds(LosslessRounds):
    """``LosslessRounds`` whose drafts go straight through the river and whose choices are the device's."""

    def _draft_and_verify(self, room: int) -> Round:
        generation, sequence, costs = self._generation, self._sequence, self._engine.costs
        if sequence.crosses_regime(1):
            return super()._draft_and_verify(room)  # all that is cached is computed again
        found, match = self._look_up(room)
        plan = Plan(0, [], 1.0)
        if not found and not self._policy.paused:
            plan = self._policy.plan(room)
        given = [draft.token for draft in found]
        with self._engine.stepping() as engine:
            launches = engine.rounds
            assert launches is not None
            if launches.decoder.walk.owner is not generation:
                launches.decoder.place(generation, [(sequence, generation)])
            end = len(sequence.tokens) + 1 + max(plan.length, len(given))
            sequence.note_length(end)
            began, drafted, done = launches.queue(
                generation.context[-1],
                len(sequence.tokens),
                len(generation.context),
                given,
                plan,
                generation.stop_ids,
                engine.model.rope.regime(end),
            )
            done.wait()
            choices, drafts = launches.read()
            sequence.note([generation.context[-1], *(token for token, _ in drafts)], len(engine.model.layers))
        draft_s, verify_s = drafted.since(began), done.since(drafted)
        if plan.length:
            # Steps after the last draft cost their launches: they are part of what drafting costs.
            costs.draft.note(draft_s / max(1, len(drafts)))
        costs.note_verify(len(drafts), verify_s)
        if found:
            return Round("lookup", found, match, iter(choices), draft_s, verify_s)
        made = [Drafted(token, confidence, 0) for token, confidence in drafts]
        return Round("river" if made else None, made, 0, iter(choices), draft_s, verify_s)
