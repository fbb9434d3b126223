"""Progress of long steps: a bar on a terminal, plain lines in a pipe, nothing when nobody asked.

Library code takes ``progress: Progress | None`` and never prints by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

Progress = Callable[[str, int, int, str], None]
"""``progress(label, done, total, unit)``; called with ``done == total`` exactly once, at the end of a step.

``unit`` is ``"B"`` for bytes, else a plain noun such as ``"tensors"``. ``total`` stays the same within a step.
"""


class ConsoleProgress:
    """A ``Progress`` that draws on ``stream`` (default stderr): a tqdm bar if it is a terminal, else one
    line when a step starts and one when it ends. In a pipe, steps shorter than ``quiet_s`` seconds say nothing."""

    def __init__(self, stream: TextIO | None = None, *, quiet_s: float = 0.0) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet_s = quiet_s
        self._label: str | None = None
        self._began = 0.0
        self._announced = False
        self._bar: object = None

    def __call__(self, label: str, done: int, total: int, unit: str) -> None:
        if self._stream.isatty():
            self._draw_bar(label, done, total, unit)
        else:
            self._print_lines(label, done, total, unit)

    def _draw_bar(self, label: str, done: int, total: int, unit: str) -> None:
        from tqdm import tqdm

        if label != self._label:
            self._label = label
            scaled = unit == "B"
            self._bar = tqdm(
                total=total,
                desc=label,
                unit=unit,
                unit_scale=scaled,
                unit_divisor=1024 if scaled else 1000,
                file=self._stream,
                leave=False,
            )
        bar = self._bar
        assert isinstance(bar, tqdm)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            self._label = None

    def _print_lines(self, label: str, done: int, total: int, unit: str) -> None:
        if label != self._label:
            self._label, self._began, self._announced = label, time.monotonic(), False
        if not self._announced and time.monotonic() - self._began >= self._quiet_s:
            self._announced = True
            print(f"{label} ...", file=self._stream, flush=True)
        if done >= total:
            self._label = None
            if self._announced:
                amount = f"{total / 2**20:.0f} MiB" if unit == "B" else f"{total} {unit}"
                print(f"{label}: done ({amount})", file=self._stream, flush=True)
