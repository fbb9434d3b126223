"""Text that comes in bursts, shown smoothly: lossless mode says the tokens of a round all at once.

The first piece of a burst is shown when it comes; the others are spread over what the last rounds took, by a thread of
their own, so that the engine never waits for the screen. Once the next burst comes, all of the one before is shown.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

_APART = 0.05  # seconds between pieces from which on they are of two bursts
_SHORTEST = 0.1  # seconds of a round that is worth spreading
_ROUNDS = 3  # the middle one of so many is what the next is expected to take

_Piece = tuple[str, bool, float]  # text, whether a burst begins with it, and when the next burst is due


class Pacer:
    """Hands the pieces of one answer to ``write``, in their order and unchanged. For a single thread's use.

    ``push`` never blocks once a piece had to wait; as long as none had to, it writes itself and there is no thread.
    What ``write`` raises, the next ``push`` or ``finish`` raises. ``clock`` gives seconds; ``queue`` waits in them.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        queue: SimpleQueue[_Piece | None] | None = None,
    ) -> None:
        self._write, self._clock = write, clock
        # No lock is shared with the thread: an interrupt could leave it held.
        self._queue: SimpleQueue[_Piece | None] = SimpleQueue() if queue is None else queue
        self._thread: threading.Thread | None = None
        self._over, self._woken = False, SimpleQueue[None]()  # whether the thread has ended, and a bell for it
        self._error: BaseException | None = None
        self._rounds: deque[float] = deque(maxlen=_ROUNDS)  # seconds from one burst to the next
        self._began = self._came = self._due = float("-inf")  # this burst, the last piece, the next burst

    def push(self, text: str) -> None:
        """Show ``text`` after all before it, at once or when it is due."""
        self._raise()
        if not text:
            return
        now = self._clock()
        begins = now - self._came >= _APART
        if begins:
            if self._began > float("-inf"):
                self._rounds.append(now - self._began)
            expected = statistics.median(self._rounds or [0.0])
            self._began, self._due = now, now + (expected if expected >= _SHORTEST else 0.0)
        self._came = now
        if self._thread is None:
            if begins or now >= self._due:
                self._write(text)
                return
            self._over = False
            self._thread = threading.Thread(target=self._run, args=(self._began,), name="pacer", daemon=True)
            self._thread.start()
        self._queue.put((text, begins, self._due))

    def finish(self) -> None:
        """Show at once all that is left, and end the thread. Call it again if it was interrupted."""
        if self._thread is not None:
            self._queue.put(None)
            # Not ``join``: one that is interrupted takes a thread for ended that still writes (Python before 3.13).
            while not self._over:
                with suppress(Empty):
                    self._woken.get(timeout=0.05)
        self._thread = None
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, shown: float) -> None:
        """``shown``: when the last piece was."""
        waiting: deque[_Piece] = deque()  # of one burst
        try:
            while True:
                pause = None
                if waiting:
                    # The pieces divide what is left of the round, and its end belongs to the next burst.
                    pause = shown + (waiting[0][2] - shown) / (len(waiting) + 1) - self._clock()
                    if pause <= 0:
                        shown = self._clock()
                        self._write(waiting.popleft()[0])
                        continue
                try:
                    piece = self._queue.get(timeout=pause)
                except Empty:
                    continue
                if piece is not None and not piece[1]:
                    waiting.append(piece)
                    continue
                shown = self._clock()
                late = "".join(text for text, *_ in waiting) + (piece[0] if piece else "")
                waiting.clear()
                if late:
                    self._write(late)
                if piece is None:
                    return
        except BaseException as exc:
            self._error = exc
        finally:
            self._over = True
            self._woken.put(None)
