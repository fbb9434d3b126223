"""What the sections of ``gpu.py`` share: a record that outlives its process, captures and timings, names of the card.

A section runs in processes forked from one that never touches the GPU. A launch that writes where it must not takes
the CUDA context with it, and a kernel that hangs its process: either ends one measurement, and a fork goes on with the
next. Triton keeps what it compiled on disk, so that processes share it.

Triton's interpreter (``gpu.py --dry``) runs the same on a CPU: launches are not captured, and times mean nothing.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
Results = dict[str, Any]
T = TypeVar("T")

_BROKEN = 86  # exit status of a process whose CUDA context is lost
_GRACE = 20.0  # seconds beyond a section's time, for a measurement that is under way
_MOST_DEATHS = 5


class Part:
    """The results of one process of a section, on disk after each of them."""

    def __init__(self, path: Path, deadline: float, claimed: Any) -> None:
        """``path``: may hold what a process before this one, which died, left. ``deadline``: ``time.monotonic``."""
        self._path, self._deadline, self._claimed = path, deadline, claimed
        self.results: Results = read_json(path)

    @property
    def left(self) -> float:
        """Seconds until the section's time is over."""
        return self._deadline - time.monotonic()

    def claim(self) -> int:
        """The number of the next job, which no other process of the section has."""
        with self._claimed.get_lock():
            self._claimed.value += 1
            return self._claimed.value - 1

    def attempt(self, name: str, measure: Callable[[], Any], *, needs: float = 1.0) -> Any:
        """What ``measure`` returns, kept as ``name``; None where it fails, has failed, or lacks ``needs`` seconds.

        Random numbers depend on ``name`` alone.
        """
        if name in self.results:
            kept = self.results[name]
            return None if failure(kept) else kept
        if self.left < needs:
            self.results[name] = {"skipped": "no time left"}
            return None
        self.results["running"] = name
        self.save()
        torch.manual_seed(zlib.crc32(name.encode()))
        made = None
        try:
            made = self.results[name] = measure()
        except Exception as error:  # the others are still wanted
            self.fail(name, error)
        self._settle()
        return made

    def make(self, name: str, build: Callable[[], T]) -> T | None:
        """What ``build`` returns, which is not kept; None where it fails or has failed, and that is."""
        if failure(self.results.get(name)):
            return None
        self.results["running"] = name
        self.save()
        made = None
        try:
            made = build()
        except Exception as error:
            self.fail(name, error)
        self._settle()
        return made

    def _settle(self) -> None:
        self.results.pop("running", None)
        self.save()
        if broken():
            print("the CUDA context is lost: another process goes on", flush=True)
            os._exit(_BROKEN)

    def fail(self, name: str, error: BaseException) -> None:
        """Keep and print what went wrong; its frames, and what they hold on the GPU, go."""
        said = str(error).strip()
        text = f"{type(error).__name__}: {said.splitlines()[0][:200] if said else ''}"
        where = traceback.extract_tb(error.__traceback__)[-3:]
        at = [f"{Path(each.filename).name}:{each.lineno}" for each in where]
        self.results[name] = {"error": text, "at": at, "whole": said[-1500:]}
        print(f"FAIL {name}: {text}", flush=True)
        traceback.clear_frames(error.__traceback__)
        release()

    def save(self) -> None:
        write_json(self._path, self.results)


def failure(kept: Any) -> str | None:
    """Why a kept result is none, or None if it is one."""
    if isinstance(kept, dict):
        return kept.get("error") or kept.get("skipped")
    return None


def read_json(path: Path) -> Results:
    try:
        found: Results = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


def in_processes(
    name: str,
    section: Callable[[Part], None],
    folder: Path,
    seconds: float,
    keep: Callable[[Results], None],
    *,
    processes: int = 1,
    known: Results | None = None,
) -> Results:
    """Run ``section`` in forked processes and give its results to ``keep``, again and again as they come.

    A process that dies is followed by another, which finds what was measured, as it finds ``known``; at the end of
    ``seconds`` all are ended.
    """
    context = multiprocessing.get_context("fork")
    claimed, deadline = context.Value("i", 0), time.monotonic() + seconds
    paths = [folder / f"{name}-{number}.json" for number in range(processes)]
    for path in paths:
        write_json(path, known or {})

    def start(number: int) -> Any:
        sys.stdout.flush()
        process = context.Process(target=_run, args=(section, Part(paths[number], deadline, claimed)))
        process.start()
        return process

    running, deaths = {number: start(number) for number in range(processes)}, 0
    while running:
        for number, process in list(running.items()):
            process.join(0.5 / len(running))
            late = time.monotonic() > deadline + _GRACE
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                _end(process)
            del running[number]
            if process.exitcode:
                deaths += 1
                _note_death(paths[number], "ended: out of time" if late else f"died, exit status {process.exitcode}")
                if not late and deaths <= _MOST_DEATHS:
                    running[number] = start(number)
        found: Results = {}
        for path in paths:
            found.update(read_json(path))
        found.pop("running", None)
        keep(found)
    return found


def _run(section: Callable[[Part], None], part: Part) -> None:
    gc.freeze()  # captures collect garbage: not what was imported
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        section(part)
    except Exception as error:
        traceback.print_exc()
        part.fail("section", error)
        part.save()
    sys.stdout.flush()
    # Not by way of sys.exit: a context that is lost, or threads of compilers, could keep the process.
    os._exit(0)


def _end(process: Any) -> None:
    os.kill(process.pid, signal.SIGUSR1)  # it says where it hung
    process.join(1)
    process.kill()
    process.join(10)


def _note_death(path: Path, how: str) -> None:
    found = read_json(path)
    name = found.pop("running", None)
    if name is not None and name not in found:
        found[name] = {"error": how}
        print(f"FAIL {name}: its process {how}", flush=True)
    write_json(path, found)


# --- the device ---


def broken() -> bool:
    """Whether nothing more can be had from this process's CUDA context."""
    if DRY:
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Setting:
    """bandwidth: bytes a second of a large copy on this card, read and written. model: a folder, for the sections that
    need text."""

    bandwidth: float = 1.0
    model: Path | None = None
    tune: bool = False


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def capture(launches: Callable[[], Any]) -> Callable[[], Any]:
    """``launches`` as the replay of a graph, after a call outside of it that compiles."""
    if DRY:
        return launches
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launches()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    return graph.replay


class Stopwatch:
    """A point in the device's work; ``since`` waits for both."""

    def __init__(self) -> None:
        self._event = None if DRY else torch.cuda.Event(enable_timing=True)
        self._now = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def since(self, earlier: Stopwatch) -> float:
        """Seconds."""
        if self._event is None or earlier._event is None:
            return self._now - earlier._now
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


def heat(seconds: float = 0.02) -> None:
    """An idle card is slow until it has worked for a while."""
    if DRY:
        return
    x = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        x @ x
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], repeats: int = 15, warm: int = 2) -> float:
    """Median seconds of ``call``, whose work follows itself on the device without a gap of the host's making."""
    heat()
    for _ in range(0 if DRY else warm):
        call()
    moments = [Stopwatch()]
    for _ in range(1 if DRY else repeats):
        call()
        moments.append(Stopwatch())
    synchronize()
    return statistics.median(after.since(before) for before, after in pairwise(moments))


def seconds_each(launch: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """Median seconds of a launch of ``launch``, captured for all of ``items`` in turn; gaps included."""
    return seconds_of(capture(lambda: [launch(item) for item in items])) / len(items)


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Gives a function: bytes that tensors have taken at most since the beginning. 0 on a CPU."""
    if DRY:
        yield lambda: 0
        return
    torch.cuda.reset_peak_memory_stats()
    yield lambda: int(torch.cuda.max_memory_allocated())


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """float32."""
    return torch.randn(*shape, device=DEVICE) * scale


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)
