"""Tensors of a folder that already has safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from riverinfer.errors import ConversionError
from riverinfer.weights_convert.checkpoint_source import StoredTensor, read_json
from riverinfer.weights_convert.safetensors_writer import TORCH_DTYPES
from riverinfer.weights_convert.shard_lists import refuse_absent, shard_files

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def open_safetensors(source: Path) -> list[StoredTensor]:
    """All tensors of the folder's safetensors files, read lazily.

    Raises ``ConversionError`` if files are missing or damaged, or hold dtypes that cannot be copied.
    """
    tensors: list[StoredTensor] = []
    for path, wanted in _weight_files(source).items():
        try:
            handle = safe_open(str(path), framework="pt")
            names = list(handle.keys())
        except Exception as error:
            raise ConversionError(
                f"cannot be read as safetensors: {error}", file=path, remedy="download the file again"
            ) from error
        if wanted is not None:
            refuse_absent(path, wanted, set(names))
        tensors += [_stored(path, handle, name) for name in (names if wanted is None else wanted)]
    return tensors


def _weight_files(source: Path) -> dict[Path, list[str] | None]:
    if (source / _SINGLE).is_file():
        return {source / _SINGLE: None}
    if (source / _INDEX).is_file():
        weight_map = read_json(source / _INDEX, "download the file again").get("weight_map")
        return dict(shard_files(source, _INDEX, weight_map))
    candidates = sorted(source.glob("*.safetensors"))
    if len(candidates) != 1:
        names = ", ".join(path.name for path in candidates[:6])
        raise ConversionError(
            f"holds {len(candidates)} safetensors files without {_INDEX}: {names}",
            file=source,
            remedy="download the index file",
        )
    if candidates[0].name.startswith("adapter"):
        raise ConversionError("holds an adapter, not a model", file=source, remedy="merge it into its base model")
    return {candidates[0]: None}


def _stored(path: Path, handle: Any, name: str) -> StoredTensor:
    view = handle.get_slice(name)
    kind = view.get_dtype()
    if kind not in TORCH_DTYPES:
        raise ConversionError(f"dtype {kind} is not supported", file=path, field=name)
    shape = tuple(view.get_shape())

    def read(start: int, stop: int) -> torch.Tensor:
        result: torch.Tensor = view[start:stop] if shape else handle.get_tensor(name)
        return result

    return StoredTensor(name, TORCH_DTYPES[kind], shape, read)
