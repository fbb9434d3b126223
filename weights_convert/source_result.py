"""What a source module hands back to ``convert``."""

from __future__ import annotations

from dataclasses import dataclass, field

from riverinfer.weights_convert.safetensors_writer import TensorEntry


@dataclass(frozen=True)
class SourceResult:
    """The written tensors, the tensor types of the source with their counts, and notes for the user."""

    model_type: str
    entries: list[TensorEntry]
    source_types: dict[str, int]
    notes: list[str] = field(default_factory=list)
