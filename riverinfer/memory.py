"""How much memory there is, and whether weights and KV cache fit into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from riverinfer.errors import EngineMemoryError


def require_memory(device: torch.device, *, weights: int, slots: int, ctx_size: int, bytes_per_token: int) -> None:
    """Raise EngineMemoryError unless ``weights`` bytes and the KV cache fit into what is available.

    Checked as one sum before anything is allocated: memory that is allocated but not touched still counts as free.
    """
    available = available_memory(device)
    cache = slots * ctx_size * bytes_per_token
    if available is None or weights + cache <= available:
        return
    fits = (available - weights) // (slots * bytes_per_token)
    hint = f"lower --ctx-size (ctx_size; about {fits} would fit)" if fits > 0 else "use a smaller model or dtype"
    if slots > 1 and fits > 0:
        hint += " or max_sequences"
    raise EngineMemoryError(
        f"the weights ({gib(weights)}) and the KV cache of {slots} sequence{'s' if slots > 1 else ''} x {ctx_size}"
        f" positions ({gib(cache)}) need {gib(weights + cache)} on {device}, {gib(available)} are available",
        remedy=hint,
    )


@contextmanager
def explain_out_of_memory(device: torch.device, *, weights: int, cache: int) -> Iterator[None]:
    """Raise EngineMemoryError, with the sum that was counted on, where the allocator gives up all the same."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise EngineMemoryError(
            f"{device} ran out of memory: weights and river ({gib(weights)}), the KV cache ({gib(cache)}) and what"
            " steps compute in need more than is free",
            remedy="lower --ctx-size (ctx_size) or max_sequences, or load less of the backbone (--backbone-layers)",
        ) from exc


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on ``device``, or None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_linux_available(), _cgroup_available()]
    known = [limit for limit in limits if limit is not None]
    if known:
        return min(known)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _linux_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup_available() -> int | None:
    """What is left of a container's limit (cgroup v2); page cache counts as available."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def gib(nbytes: int) -> str:
    """Bytes for people: KiB, MiB or GiB."""
    if nbytes < 2**20:
        return f"{nbytes / 2**10:.1f} KiB"
    return f"{nbytes / 2**20:.1f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:.2f} GiB"
