"""The reference models in ``tests/golden`` and small helpers around them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from riverinfer.checkpoint import Checkpoint
from riverinfer.decode import decode_one, prefill
from riverinfer.kv_arena import KVArena
from riverinfer.loader import load_model
from riverinfer.model import Model

ROOT = Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in ROOT.iterdir() if path.is_dir())
CPU = torch.device("cpu")


@dataclass
class Golden:
    """One reference folder with its stored outputs."""

    folder: Path
    tensors: dict[str, Tensor]
    info: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> Golden:
        folder = ROOT / name
        return cls(folder, load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text()))


def open_model(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """Load the weights of a folder on the CPU; no tokenizer needed."""
    return load_model(Checkpoint.open(folder), device=CPU, dtype=dtype)


def make_cache(model: Model, positions: int = 256) -> list[tuple[Tensor, Tensor]]:
    """A slot whose unused positions are NaN: reading one would show."""
    arena = KVArena(model.config, slots=1, ctx_size=positions, dtype=model.dtype, device=CPU)
    arena.k.fill_(float("nan"))
    arena.v.fill_(float("nan"))
    return arena.slot(0)


def greedy(model: Model, ids: list[int], count: int, chunk: int = 512) -> list[int]:
    """``count`` greedy tokens after ``ids`` on a fresh cache."""
    cache = make_cache(model, len(ids) + count)
    logits = prefill(model, ids, 0, cache, chunk=chunk)
    out: list[int] = []
    for position in range(len(ids), len(ids) + count):
        out.append(int(logits[0].argmax()))
        logits = decode_one(model, out[-1], position, cache)
    return out


def copy_model(name: str, target: Path) -> Path:
    """A writable copy of a golden folder, for tests that damage it."""
    shutil.copytree(ROOT / name, target)
    for path in target.iterdir():
        path.chmod(0o644)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; a value of ``...`` deletes the field."""
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            data.pop(key, None)
        else:
            data[key] = value
    path.write_text(json.dumps(data))
