"""What a finished conversion tells its caller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SourceKind = Literal["gguf", "pytorch", "safetensors"]


@dataclass(frozen=True)
class ConversionReport:
    """The result of ``convert``.

    ``dtype`` is the dtype of the written weights (``"mixed"`` if they differ), ``source_types`` counts the
    tensors of the source by their type, ``files`` are relative to ``destination`` and sorted, ``notes`` are
    sentences for the user about things that were left out or chosen on their behalf.
    """

    source: Path
    destination: Path
    source_kind: SourceKind
    model_type: str
    dtype: str
    tensors: int
    parameters: int
    weight_bytes: int
    source_types: dict[str, int]
    files: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        """What was made, in a few lines for the user; without ``notes``."""
        size = f"{self.weight_bytes / 2**20:,.1f} MiB"
        lines = [
            f"Converted {self.source} ({self.source_kind}) to {self.destination}",
            f"  {self.model_type}, {self.parameters:,} parameters in {self.tensors} tensors, {size} {self.dtype}",
        ]
        if any(name.startswith("Q") for name in self.source_types):
            types = ", ".join(f"{count} {name}" for name, count in sorted(self.source_types.items()))
            lines.append(f"  tensors in the source: {types}")
        return "\n".join([*lines, f"  took {self.seconds:.1f} s"])
