"""What a loaded engine holds in memory, part by part, next to what the process is measured to take."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from riverinfer.kv_arena import KVArena
from riverinfer.loader import Embedding
from riverinfer.memory import gib
from riverinfer.model import DecoderLayer, Model


@dataclass(frozen=True)
class MemoryReport:
    """Bytes.

    backbone, river: the matrices of their layers. head: the exact one and the river's. other: norms, biases and rotary
    tables. workspace: what fused steps on a GPU compute in. kv: the cache of all sequences, allocated whole; on a CPU
    it becomes resident as it fills.
    embedding: the table. Where ``embedding_mapped`` it stays in its file, whose pages the system keeps and drops as it
    likes, and ``total`` leaves it out.
    measured, peak: what is taken now, and the most so far: on a CPU by the process, its libraries and mapped pages
    included; on a GPU by torch. None where that cannot be told.
    """

    device: str
    backbone: int
    river: int
    head: int
    other: int
    workspace: int
    embedding: int
    embedding_mapped: bool
    kv: int
    measured: int | None
    peak: int | None

    @property
    def total(self) -> int:
        """The sum of all parts that are held."""
        held = self.backbone + self.river + self.head + self.other + self.workspace + self.kv
        return held if self.embedding_mapped else held + self.embedding

    def as_dict(self) -> dict[str, Any]:
        """Every figure by name, the total included."""
        return {**asdict(self), "total": self.total}

    def __str__(self) -> str:
        """One line for people."""
        parts = [f"backbone {gib(self.backbone)}"]
        parts += [f"river {gib(self.river)}"] if self.river else []
        parts += [f"head {gib(self.head)}"]
        parts += [] if self.embedding_mapped else [f"embedding {gib(self.embedding)}"]
        parts += [f"norms, biases and rotary tables {gib(self.other)}"]
        parts += [f"workspace {gib(self.workspace)}"] if self.workspace else []
        parts += [f"KV {gib(self.kv)}"]
        line = f"memory {gib(self.total)}: {' + '.join(parts)}"
        if self.embedding_mapped:
            line += f" · embedding {gib(self.embedding)} in its mapped file"
        if self.peak is not None:
            now = "" if self.measured is None else f"{gib(self.measured)} now, "
            line += f" · {'process' if self.device == 'cpu' else 'torch'} {now}{gib(self.peak)} at most"
        return line


def memory_report(model: Model, arena: KVArena, workspace: int = 0) -> MemoryReport:
    """The report of a model and its cache. ``workspace``: bytes."""
    embed = model.embed
    table, mapped = (embed.nbytes, embed.mapped) if isinstance(embed, Embedding) else (0, False)
    measured, peak = measure(model.device)
    return MemoryReport(
        device=str(model.device),
        backbone=_matrices(model.layers),
        river=_matrices(model.river),
        head=model.head.weight_bytes + getattr(model.river_head, "weight_bytes", 0),
        other=_others(model) + model.rope.nbytes,
        workspace=workspace,
        embedding=table,
        embedding_mapped=mapped,
        kv=arena.nbytes,
        measured=measured,
        peak=peak,
    )


def _matrices(layers: list[DecoderLayer]) -> int:
    return sum(linear.weight_bytes for layer in layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down))


def _others(model: Model) -> int:
    """Norms and biases. What backbone and river share counts once."""
    found: list[Tensor | None] = [model.final_norm, model.head.bias]
    for layer in (*model.layers, *model.river):
        found += [layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm]
        found += [linear.bias for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in found if tensor is not None}.values())


def measure(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes taken now and at most, as in ``MemoryReport``."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    now, peak = _status("VmRSS"), _status("VmHWM")
    if peak is None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return now, peak


def _status(field: str) -> int | None:
    """A figure of this process as Linux keeps it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
