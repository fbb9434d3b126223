"""The KV cache: one block of memory, allocated once, addressed by layer, slot and position.

Nothing is allocated while decoding. A sequence owns one slot; rolling back is moving its length.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from riverinfer.config import ModelConfig
from riverinfer.errors import EngineMemoryError


class KVArena:
    """K and V of ``slots`` sequences of up to ``ctx_size`` positions.

    ``k`` and ``v`` are [layers, slots, kv heads, ctx_size, head_dim]. Positions at or beyond a sequence's length
    hold garbage and are never read. Raises EngineMemoryError when the memory is not there.
    """

    def __init__(
        self, config: ModelConfig, *, slots: int, ctx_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots, self.ctx_size = slots, ctx_size
        self.nbytes = slots * ctx_size * config.kv_bytes_per_token(dtype.itemsize)
        _require_memory(self.nbytes, slots, ctx_size, config.kv_bytes_per_token(dtype.itemsize), device)
        shape = (config.num_layers, slots, config.num_kv_heads, ctx_size, config.head_dim)
        try:
            self.k = torch.empty(shape, dtype=dtype, device=device)  # [L, slots, Hkv, S, D]
            self.v = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as exc:
            raise _too_large(self.nbytes, None, slots, ctx_size, device) from exc
        self._views = [
            [(self.k[layer, slot], self.v[layer, slot]) for layer in range(config.num_layers)] for slot in range(slots)
        ]

    def slot(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """Per layer (k, v) of one slot, each [Hkv, S, D]: views into the arena."""
        return self._views[index]


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


def _require_memory(need: int, slots: int, ctx_size: int, per_token: int, device: torch.device) -> None:
    available = available_memory(device)
    if available is not None and need > available:
        fits = available // (slots * per_token)
        raise _too_large(need, available, slots, ctx_size, device, fits)


def _too_large(
    need: int, available: int | None, slots: int, ctx_size: int, device: torch.device, fits: int | None = None
) -> EngineMemoryError:
    have = "" if available is None else f", {gib(available)} are available"
    hint = "" if fits is None else f" (about {fits} positions would fit)"
    sequences = f"{slots} sequence{'s' if slots > 1 else ''}"
    return EngineMemoryError(
        f"the KV cache of {sequences} x {ctx_size} positions needs {gib(need)} on {device}{have}",
        remedy=f"lower --ctx-size (ctx_size){hint}" + (" or max_sequences" if slots > 1 else ""),
    )


def gib(nbytes: int) -> str:
    """Bytes for people: KiB, MiB or GiB."""
    if nbytes < 2**20:
        return f"{nbytes / 2**10:.1f} KiB"
    return f"{nbytes / 2**20:.1f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:.2f} GiB"
