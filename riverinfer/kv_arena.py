"""The KV cache: one block of memory, allocated once, addressed by layer, slot and position.

It never grows and is never copied. A sequence owns one slot; rolling back is moving its length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from riverinfer.config import ModelConfig
from riverinfer.errors import EngineMemoryError
from riverinfer.memory import gib


class KVArena:
    """K and V of ``slots`` sequences of up to ``ctx_size`` positions.

    ``k`` and ``v`` are [layers, slots, kv heads, ctx_size, head_dim], views of ``block``, which has both of them as
    [layers, slots, 2, kv heads, ctx_size, head_dim]. Positions at or beyond a
    sequence's length hold garbage and are never read. Raises EngineMemoryError when the memory is not there.
    """

    def __init__(
        self, config: ModelConfig, *, slots: int, ctx_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots, self.ctx_size = slots, ctx_size
        self.nbytes = slots * ctx_size * config.kv_bytes_per_token(dtype.itemsize)
        shape = (config.num_layers, slots, 2, config.num_kv_heads, ctx_size, config.head_dim)
        try:
            block = torch.empty(shape, dtype=dtype, device=device)  # [L, slots, 2, Hkv, S, D]
        except RuntimeError as exc:
            raise EngineMemoryError(
                f"the KV cache of {slots} x {ctx_size} positions needs {gib(self.nbytes)}, which {device} refuses",
                remedy="lower --ctx-size (ctx_size) or max_sequences",
            ) from exc
        self.block = block
        self.k, self.v = block[:, :, 0], block[:, :, 1]
        self._views = [SlotCache(self, slot) for slot in range(slots)]

    def slot(self, index: int) -> SlotCache:
        """The views into the arena that belong to one slot."""
        return self._views[index]


class SlotCache(list[tuple[Tensor, Tensor]]):
    """Per layer (k, v) of one slot, each [Hkv, S, D]; ``joint`` has both of a layer together, [2, Hkv, S, D]."""

    def __init__(self, arena: KVArena, index: int) -> None:
        self.arena_block, self.slot = arena.block, index
        self.joint = list(arena.block[:, index])
        super().__init__((layer[0], layer[1]) for layer in self.joint)
