"""What the machine can do: a short probe of its memory and its matrix products."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from riverinfer.kernels.linear import current, make_linear
from riverinfer.memory import available_memory
from riverinfer.profiling.result import Machine

_BUDGET_S = 0.4  # of each of the two measurements, once what it works on is made
_LONGEST_S = 0.1  # of one product
_LEAST, _MOST = 2**28, 2**30  # bytes of a buffer
_TILE = 512  # rows and columns of the smallest product
_QUEUED = 8


@torch.inference_mode()
def probe(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the bandwidth of ``device``, and the peak of matrix products in ``dtype`` in the engine's form.

    Takes about a second and a buffer of at most 1 GiB and an eighth of the memory that is available. A limit is the
    best that was seen, not a mean: what else runs on the machine only ever makes a pass slower, and so does the first
    one, which starts threads, compiles, and finds an idle GPU at a low clock.
    """
    with current(device):
        operations = _best_rate(device, _products(device, dtype))  # first: it wakes the device up
        moves = _copies(device) if device.type == "cuda" else _reads()
        return Machine(bytes_per_s=_best_rate(device, moves), operations_per_s=operations)


_Call = tuple[float, Callable[[], object]]  # bytes or operations of a call


def _best_rate(device: torch.device, works: Sequence[_Call]) -> float:
    """The highest work a second of any call.

    They take turns, so that a burst of other load spoils none for good; a turn is two calls, as the first one of a
    small product finds the caches full of the large one before it.
    """
    best, rounds, ends = 0.0, 0, time.perf_counter() + _BUDGET_S
    while rounds < 2 or time.perf_counter() < ends:
        best = max(best, *(amount / _seconds(device, call) for amount, call in works for _ in range(2)))
        rounds += 1
    return best


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Of one call; on a GPU the mean of several that queue up, behind which launches hide."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(_QUEUED):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / _QUEUED


def _products(device: torch.device, dtype: torch.dtype) -> list[_Call]:
    """Square products, each twice as wide as the one before, up to what time and memory allow.

    Several, as the best size depends on caches. Random numbers: a GPU multiplies constants at less power, thus sooner.
    """
    tile = torch.randn(_TILE, _TILE, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    works: list[_Call] = []
    times, seconds, room = 1, 0.0, _buffer_bytes(device)
    while not works or (8 * seconds < _LONGEST_S and 3 * times**2 * tile.nbytes <= room):
        call = partial(make_linear(tile.repeat(times, times)), tile.repeat(times, times))
        works.append((2 * (times * _TILE) ** 3, call))
        seconds, times = _seconds(device, call), 2 * times
    return works


def _reads() -> list[_Call]:
    """Passes over one buffer in a CPU's memory. Several, as none is the fastest everywhere: each depends on how torch
    and its BLAS were built to vectorise it and to share it among threads."""
    size = _buffer_bytes(torch.device("cpu")) // mmap.PAGESIZE * mmap.PAGESIZE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # with small pages, translation of addresses is what would be measured
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    values = torch.frombuffer(memory, dtype=torch.float32)
    values.fill_(1.0)  # pages come with the first write, near the threads that made it
    columns = mmap.PAGESIZE // values.itemsize
    halves, matrix, vector = values.view(2, -1), values.view(-1, columns), values.new_ones(columns)
    return [
        (size, values.max),
        (size, partial(torch.dot, halves[0], halves[1])),
        (size, partial(torch.mv, matrix, vector)),
        (size, values.view(torch.int64).sum),
    ]


def _copies(device: torch.device) -> list[_Call]:
    """A copy within a GPU's memory, read and written."""
    source = torch.ones(_buffer_bytes(device) // 2, dtype=torch.uint8, device=device)
    return [(2 * source.nbytes, partial(torch.empty_like(source).copy_, source))]


def _buffer_bytes(device: torch.device) -> int:
    """Several times what caches hold, where memory has room for it."""
    available = available_memory(device)
    wanted = max(_LEAST, 4 * _cache_bytes()) if device.type == "cpu" else _MOST
    return min(wanted, _MOST, _MOST if available is None else max(mmap.PAGESIZE, available // 8))


def _cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the last-level caches of all CPUs together; 0 where the system does not tell."""
    found: dict[tuple[int, str], int] = {}
    try:
        for folder in root.glob("cpu[0-9]*/cache/index[0-9]*"):
            level, cpus, size = ((folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            found[int(level), cpus] = int(size.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 0
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)
