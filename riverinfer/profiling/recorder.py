"""Clocks between operators: each mark says what ended just now, so that nothing between two marks is lost.

On a CPU a mark is a reading of ``time.perf_counter``, on a GPU an event in the stream's work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from riverinfer.kernels.scripted import MARKS
from riverinfer.profiling.spans import Span

Place = tuple[str, int | None, str]  # path, layer, operator

CPU_CLOCK, CUDA_EVENTS = "cpu clock", "cuda events"


class Recorder:
    """Marks of one generation. ``phase`` is that of the marks that follow (see ``OperatorTime``)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.phase = "prefill"
        self.marks: list[tuple[Any, str, Place]] = []  # when (seconds or an event), phase, what ended
        self._began = self._base_s = 0.0
        self._base: Any = None  # an event at ``_base_s``; events tell milliseconds since it, in float32
        self._told = 0  # marks whose time is known in seconds

    @property
    def events(self) -> str:
        return CUDA_EVENTS if self.cuda else CPU_CLOCK

    def start(self) -> float:
        """The time axis begins now: seconds of ``time.perf_counter``."""
        self.marks.clear()
        self.phase, self._told = "prefill", 0
        if self.cuda:
            torch.cuda.synchronize(self.device)
            self._base = self._event()
        self._began = self._base_s = time.perf_counter()
        return self._began

    def settle(self) -> None:
        """Wait for the marks so far and read them: the next ones are told from here, with all of their digits."""
        if not self.cuda:
            return
        base = self._event()
        base.synchronize()
        for i in range(self._told, len(self.marks)):
            when, phase, place = self.marks[i]
            self.marks[i] = self._seconds(when), phase, place
        self._told = len(self.marks)
        self._base_s, self._base = self._base_s + self._base.elapsed_time(base) / 1000, base

    def mark(self, op: str, layer: int | None = None, path: str = "") -> None:
        """What ran since the last mark is ``op``."""
        self.marks.append((self._event() if self.cuda else time.perf_counter(), self.phase, (path, layer, op)))

    def last(self) -> tuple[float, Place | None]:
        """Of the last mark: when, seconds of ``time.perf_counter`` (on a GPU: now), and what ended."""
        if not self.marks:
            return self._began, None
        when, _, place = self.marks[-1]
        return when if isinstance(when, float) else time.perf_counter(), place

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def script_marks(self, path: str, layers: int) -> Callable[[int, int], None]:
        """For ``scripted.script_layers``: its marks as ours."""
        places: list[list[Place]] = [[(path, layer, op) for op in MARKS] for layer in range(layers)]
        now = time.perf_counter

        def marked(which: int, layer: int) -> None:
            self.marks.append((now(), self.phase, places[layer][which]))

        return marked

    def add_events(self, events: Sequence[tuple[Any, Place]]) -> None:
        """Marks of a graph that was replayed: its events are read before the next replay overwrites them."""
        torch.cuda.synchronize(self.device)
        self.marks += [(self._seconds(event), self.phase, place) for event, place in events]

    def _seconds(self, when: Any) -> float:
        return when if isinstance(when, float) else self._base_s + self._base.elapsed_time(when) / 1000

    def follow_depth(self, first_mark: int, depth: int) -> None:
        """A step whose exits were decided on the device has ended: name its layers' paths, from a mark on."""
        for i, (when, phase, (_, layer, op)) in enumerate(self.marks[first_mark:], first_mark):
            if layer is not None:
                self.marks[i] = when, phase, ("backbone" if layer < depth else "river", layer, op)

    def spans(self) -> tuple[Span, ...]:
        """What the marks bound, one after the other, from ``start`` on."""
        self.settle()
        spans, begin = [], self._began
        for when, phase, (path, layer, op) in self.marks:
            end = self._seconds(when)
            spans.append(Span(begin, end, phase, path, layer, op))
            begin = end
        return tuple(spans)


def cost_of_a_mark(device: torch.device, count: int = 2000) -> float:
    """Seconds that one mark takes the host by itself."""
    recorder = Recorder(device)
    recorder.start()
    began = time.perf_counter()
    for _ in range(count):
        recorder.mark("host")
    return (time.perf_counter() - began) / count
