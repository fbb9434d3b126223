"""Tensors of PyTorch checkpoints (``.bin``, ``.pth``, ``.pt``), read without executing what a pickle says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from riverinfer.errors import ConversionError
from riverinfer.weights_convert.checkpoint_source import StoredTensor, read_json
from riverinfer.weights_convert.safetensors_writer import TORCH_DTYPES
from riverinfer.weights_convert.shard_lists import PYTORCH_SUFFIXES, TRAINING_STATE, refuse_absent, shard_files

_INDEX = "pytorch_model.bin.index.json"
_SINGLE = "pytorch_model.bin"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("_orig_mod.", "module.")


def open_pytorch(source: Path) -> tuple[list[StoredTensor], list[str]]:
    """All tensors of the folder's checkpoint, mapped from disk where the format allows it, and notes.

    Raises ``ConversionError`` if files are missing, damaged, need code to be executed, or hold other things
    than dense tensors.
    """
    state: dict[str, torch.Tensor] = {}
    notes: list[str] = []
    for path, wanted in _weight_files(source).items():
        loaded = _state_dict(path, notes)
        if wanted is not None:
            refuse_absent(path, wanted, set(loaded))
        state.update(loaded)
    return [_stored(source, name, tensor) for name, tensor in _without_prefix(state).items()], notes


def _weight_files(source: Path) -> dict[Path, list[str] | None]:
    if (source / _SINGLE).is_file():
        return {source / _SINGLE: None}
    if (source / _INDEX).is_file():
        weight_map = read_json(source / _INDEX, "download the file again").get("weight_map")
        return dict(shard_files(source, _INDEX, weight_map))
    candidates = sorted(
        path
        for path in source.iterdir()
        if path.suffix in PYTORCH_SUFFIXES and not path.name.startswith(TRAINING_STATE)
    )
    if any(path.name.startswith("consolidated.") for path in candidates):
        raise ConversionError(
            f"{candidates[0].name} is a checkpoint in Meta's original format",
            file=source,
            remedy="download the Hugging Face version of the model",
        )
    if len(candidates) != 1:
        names = ", ".join(path.name for path in candidates[:6])
        raise ConversionError(
            f"holds {len(candidates)} weight files without {_INDEX}: {names}" if candidates else "holds no weights",
            file=source,
            remedy=f"a folder needs {_SINGLE}, {_INDEX} with its shards, or one .pth or .pt file",
        )
    return {candidates[0]: None}


def _state_dict(path: Path, notes: list[str]) -> dict[str, torch.Tensor]:
    content = _load(path)
    for _ in range(len(_WRAPPERS)):
        inner = [key for key in _WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
        if not inner:
            break
        others = [str(key) for key in content if key != inner[0]]
        if others:
            notes.append(f"{path.name}: took {inner[0]!r} and left out {', '.join(others[:6])}")
        content = content[inner[0]]
    if not isinstance(content, Mapping):
        raise ConversionError(f"holds a {type(content).__name__}, not a dictionary of tensors", file=path)
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(f"is a {type(value).__name__}, not a tensor", file=path, field=str(name))
    return dict(content)


def _load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                # The format from before torch 1.6 cannot be mapped.
                if "mmap" not in str(error):
                    raise
                return torch.load(str(path), map_location="cpu", weights_only=True)
        except MemoryError as error:
            raise ConversionError("does not fit into memory", file=path) from error
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            unsafe = "weights_only" in str(error).lower() or "Unsupported global" in str(error)
            raise ConversionError(
                "holds objects other than tensors, which would have to be executed"
                if unsafe
                else f"cannot be read as a PyTorch checkpoint: {first_line[:200]}",
                file=path,
                remedy="use a safetensors version of the model" if unsafe else "download the file again",
            ) from error


def _without_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _stored(source: Path, name: str, tensor: torch.Tensor) -> StoredTensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ConversionError("is not a plain dense tensor", file=source, field=name)
    if tensor.dtype not in TORCH_DTYPES.values():
        raise ConversionError(f"dtype {tensor.dtype} is not supported", file=source, field=name)
    plain = tensor.detach()
    identity = (plain.untyped_storage().data_ptr(), plain.storage_offset(), *plain.shape, *plain.stride())

    def read(start: int, stop: int) -> torch.Tensor:
        return plain[start:stop] if plain.dim() else plain

    return StoredTensor(name, plain.dtype, tuple(plain.shape), read, identity)
