"""Streaming writer of sharded safetensors files: at no time is more than one chunk of a tensor in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from riverinfer.errors import ConversionError
from riverinfer.progress import Progress

MAX_SHARD_BYTES = 4 * 2**30
_METADATA = {"format": "pt"}
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to write. ``chunks()`` yields its values in row-major order as CPU tensors of ``dtype`` of any
    shape, which together have as many elements as ``shape``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[torch.Tensor]]

    @property
    def elements(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return self.elements * self.dtype.itemsize


def write_safetensors(
    folder: Path,
    entries: list[TensorEntry],
    *,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``model.safetensors`` into ``folder``, or shards with ``model.safetensors.index.json``.

    A shard has at most ``max_shard_bytes``, or is a single tensor.

    Raises ``OSError`` if the disk does not take it and ``ConversionError`` if an entry yields too few or too
    many values.
    """
    shards = _split(entries, max_shard_bytes)
    total = sum(entry.nbytes for entry in entries)
    meter = _Meter(progress, total)
    if len(shards) == 1:
        _write_shard(folder / "model.safetensors", shards[0], meter)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, meter)
        weight_map.update((entry.name, name) for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Meter:
    """Adds up written bytes and reports them; the last report, and only that one, has done == total."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None and count:
            self._progress("Writing weights", self._done, self._total, "B")


def _split(entries: list[TensorEntry], limit: int) -> list[list[TensorEntry]]:
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_shard(path: Path, entries: list[TensorEntry], meter: _Meter) -> None:
    # Wide types first keeps every tensor aligned to its own item size.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": _METADATA}
    offset = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for entry in ordered:
            _write_tensor(stream, entry, meter)


def _write_tensor(stream: BinaryIO, entry: TensorEntry, meter: _Meter) -> None:
    left = entry.nbytes
    for chunk in entry.chunks():
        if chunk.dtype != entry.dtype or chunk.nbytes > left:
            raise ConversionError(f"has more data than its shape {list(entry.shape)}", field=entry.name)
        if chunk.numel():
            stream.write(chunk.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        left -= chunk.nbytes
        meter.add(chunk.nbytes)
    if left:
        raise ConversionError(f"has less data than its shape {list(entry.shape)}", field=entry.name)
