"""Bounds-checked reading of GGUF headers and raw tensor rows.

``gguf.GGUFReader`` trusts the lengths in the file (a damaged array length keeps it busy for years), so the
header is read here, and only the block formats of the ``gguf`` package are used.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from riverinfer.errors import ConversionError

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file. ``shape`` is row-major as in torch (GGUF stores it reversed); ``offset``
    counts from the start of the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Number of rows: the first dimension, or 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row."""
        return self.nbytes // max(self.rows, 1)


class GgufFile:
    """An open GGUF file: ``fields`` (metadata) and ``tensors`` by name. Close it, or use ``with``.

    Raises ``ConversionError`` if the file is not a complete little-endian GGUF v2 or v3 file: every length
    and every tensor's extent is checked against the file size before anything is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            with path.open("rb") as stream:
                self.size = os.fstat(stream.fileno()).st_size
                if self.size < 24:
                    raise self._damaged(f"{self.size} bytes are too few for a GGUF header")
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ConversionError(f"cannot be read: {error.strerror or error}", file=path) from error
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file. Idempotent."""
        self._map.close()

    def read_rows(self, tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
        """The stored bytes of rows ``start`` to ``stop``: writable uint8 ``[stop - start, row_bytes]``."""
        width = tensor.row_bytes
        begin = tensor.offset + start * width
        raw = bytearray(self._map[begin : begin + (stop - start) * width])
        return np.frombuffer(raw, dtype=np.uint8).reshape(stop - start, width)

    def value(self, key: str, *kinds: type) -> Any:
        """Metadata value of ``key``, or None if it is absent. Raises ``ConversionError`` if it is none of
        ``kinds``."""
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ConversionError(f"has type {type(value).__name__}, expected {names}", file=self.path, field=key)
        return value

    @overload
    def float_value(self, key: str, default: float) -> float: ...

    @overload
    def float_value(self, key: str, default: None) -> float | None: ...

    def float_value(self, key: str, default: float | None) -> float | None:
        """Number under ``key``: the shortest decimal that rounds to the stored float32 (1e-05 rather than
        9.999999747378752e-06), or ``default``. Raises ``ConversionError`` if it is not a finite number."""
        value = self.value(key, float, int)
        if value is None:
            return default
        if not math.isfinite(value):
            raise ConversionError(f"is {value}", file=self.path, field=key)
        return float(str(np.float32(value)))

    def _damaged(self, problem: str, field: str | None = None) -> ConversionError:
        return ConversionError(
            problem,
            file=self.path,
            field=field,
            remedy="the file is damaged or incomplete: download it again",
        )

    def _read_header(self) -> None:
        if self._map[:4] != _MAGIC:
            raise ConversionError(
                f"not a GGUF file (it starts with {self._map[:4]!r}, not {_MAGIC!r})",
                file=self.path,
                remedy="give a .gguf file or a model folder",
            )
        version = int.from_bytes(self._map[4:8], "little")
        if version & 0xFFFF == 0 and version != 0:
            raise ConversionError(
                "a big-endian GGUF file",
                file=self.path,
                remedy="use the little-endian file of the same model",
            )
        if version not in (2, 3):
            raise ConversionError(
                f"GGUF version {version} is not supported (2 and 3 are)",
                file=self.path,
                field="version",
                remedy="download a current GGUF file of the model",
            )
        self._at = 8
        tensor_count = self._number("Q", "tensor_count")
        field_count = self._number("Q", "kv_count")
        # A tensor's entry takes at least 24 bytes, a field's at least 13.
        if tensor_count * 24 + field_count * 13 > self.size:
            raise self._damaged(f"{tensor_count} tensors and {field_count} fields do not fit into {self.size} bytes")
        for _ in range(field_count):
            key = self._string("a metadata key")
            if key in self.fields:
                raise self._damaged("is there twice", key)
            self.fields[key] = self._field_value(self._number("I", key), key)
        if self.value("split.count", int) not in (None, 0, 1):
            raise ConversionError(
                f"one of {self.fields['split.count']} parts of a split GGUF file",
                file=self.path,
                remedy="join the parts with `llama-gguf-split --merge FIRST_PART OUT.gguf` first",
            )
        self._read_tensor_table(tensor_count)

    def _read_tensor_table(self, count: int) -> None:
        entries = [self._tensor_entry() for _ in range(count)]
        alignment = self.value("general.alignment", int) or _DEFAULT_ALIGNMENT
        if alignment <= 0 or alignment & (alignment - 1):
            raise self._damaged(f"{alignment} is not a power of two", "general.alignment")
        data_start = -(-self._at // alignment) * alignment
        for name, kind, shape, offset in entries:
            if name in self.tensors:
                raise self._damaged("tensor is there twice", name)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise self._damaged(f"rows of {shape[-1]} values are no multiple of {block}", name)
            if offset % alignment:
                raise self._damaged(f"offset {offset} is not aligned to {alignment}", name)
            nbytes = _count(shape) // block * block_bytes
            if data_start + offset + nbytes > self.size:
                raise self._damaged(
                    f"data end at byte {data_start + offset + nbytes}, but the file has {self.size}", name
                )
            self.tensors[name] = GgufTensor(name, kind, shape, data_start + offset, nbytes)

    def _tensor_entry(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string("a tensor name")
        dims = self._number("I", name)
        if not 1 <= dims <= _MAX_DIMS:
            raise self._damaged(f"{dims} dimensions", name)
        shape = tuple(reversed([self._number("Q", name) for _ in range(dims)]))
        if 0 in shape:
            raise self._damaged(f"empty tensor of shape {list(shape)}", name)
        kind = self._number("I", name)
        offset = self._number("Q", name)
        try:
            return name, GGMLQuantizationType(kind), shape, offset
        except ValueError:
            raise ConversionError(
                f"unknown tensor type {kind}",
                file=self.path,
                field=name,
                remedy="use a file quantized as Q8_0, Q4_K_M or F16",
            ) from None

    def _field_value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], key)
        if kind != _ARRAY:
            raise self._damaged(f"unknown value type {kind}", key)
        item, length = self._number("I", key), self._number("Q", key)
        if item == _STRING:
            if length * 8 > self.size - self._at:
                raise self._damaged(f"{length} strings do not fit into the file", key)
            return [self._string(key) for _ in range(length)]
        if item not in _SCALARS:
            raise self._damaged(f"arrays of value type {item} are not supported", key)
        dtype = np.dtype(_SCALARS[item]).newbyteorder("<")
        return np.frombuffer(self._take(length * dtype.itemsize, key), dtype=dtype).tolist()

    def _take(self, count: int, what: str) -> bytes:
        if count > self.size - self._at:
            raise self._damaged(f"ends in the middle of the header (byte {self.size})", what)
        raw = self._map[self._at : self._at + count]
        self._at += count
        return raw

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}"), what))[0]

    def _string(self, what: str) -> str:
        raw = self._take(self._number("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged(f"text is not UTF-8: {raw[:40]!r}", what) from None


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
