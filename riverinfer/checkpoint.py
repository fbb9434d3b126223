"""The weight files of a model folder: found, checked from their headers alone, and read one tensor at a time.

Files are memory-mapped. A mapping lives only as long as a tensor taken from it, so what has been copied to its
place stops counting as resident memory: loading peaks at the model's size plus one layer.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from riverinfer.config import ModelConfig, load_config
from riverinfer.errors import ModelNotFoundError, RiverinferWarning, UnsupportedModelError, WeightsError
from riverinfer.json_fields import read_json

DTYPE_NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
# Buffers that old exports stored although they follow from the configuration.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$")
_AGAIN = "download the file again"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is, by the name the file uses."""

    stored_name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * _ITEM_SIZES[self.dtype]


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this configuration holds, by its plain name, with its shape."""
    c = config
    hidden, heads, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if c.tie_word_embeddings is False:
        shapes["lm_head.weight"] = (c.vocab_size, hidden)
    for i in range(c.num_layers):
        layer = f"model.layers.{i}."
        attn, mlp = f"{layer}self_attn.", f"{layer}mlp."
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
        projections = (
            [("qkv_proj", c.qkv_size)] if c.fused_checkpoint else [("q_proj", heads), ("k_proj", kv), ("v_proj", kv)]
        )
        for name, rows in projections:
            shapes[f"{attn}{name}.weight"] = (rows, hidden)
            if c.qkv_bias:
                shapes[f"{attn}{name}.bias"] = (rows,)
        shapes[f"{attn}o_proj.weight"] = (hidden, heads)
        if c.o_bias:
            shapes[f"{attn}o_proj.bias"] = (hidden,)
        if c.qk_norm:
            shapes[f"{attn}q_norm.weight"] = (c.head_dim,)
            shapes[f"{attn}k_norm.weight"] = (c.head_dim,)
        ups = (
            [("gate_up_proj", 2 * c.intermediate_size)]
            if c.fused_checkpoint
            else [("gate_proj", c.intermediate_size), ("up_proj", c.intermediate_size)]
        )
        for name, rows in ups:
            shapes[f"{mlp}{name}.weight"] = (rows, hidden)
            if c.mlp_bias:
                shapes[f"{mlp}{name}.bias"] = (rows,)
        shapes[f"{mlp}down_proj.weight"] = (hidden, c.intermediate_size)
        if c.mlp_bias:
            shapes[f"{mlp}down_proj.bias"] = (hidden,)
    return shapes


class Checkpoint:
    """An opened model folder: configuration and an index of tensors, all shapes checked, no weights read.

    ``Checkpoint.open`` raises ModelNotFoundError, ConfigError, UnsupportedModelError or WeightsError.
    """

    def __init__(self, model_dir: Path, config: ModelConfig, entries: dict[str, TensorEntry]) -> None:
        self.model_dir = model_dir
        self.config = config
        self.entries = entries  # by plain name: model.layers.0..., lm_head.weight

    @classmethod
    def open(cls, model_dir: str | Path) -> Checkpoint:
        folder = Path(model_dir)
        config = load_config(folder)
        stored = _read_headers(_weight_files(folder))
        entries = _plain_names(stored, config, folder)
        _check_shapes(entries, config, folder)
        return cls(folder, config, entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that belong to the model, as stored."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        return sum(entry.nbytes // _ITEM_SIZES[entry.dtype] for entry in self.entries.values())

    @property
    def stored_dtype(self) -> torch.dtype:
        """The configured dtype, else that of the embedding."""
        name = self.config.stored_dtype
        if name is not None:
            return getattr(torch, name)
        return DTYPE_NAMES[self.entries["model.embed_tokens.weight"].dtype]

    @property
    def head_name(self) -> str:
        """The tensor the language-model head multiplies with."""
        return "lm_head.weight" if "lm_head.weight" in self.entries else "model.embed_tokens.weight"

    @contextmanager
    def reader(self) -> Iterator[TensorReader]:
        """Maps the files while tensors are read; leave it after each layer so that mappings can go."""
        reader = TensorReader(self.entries)
        try:
            yield reader
        finally:
            reader.close()


class TensorReader:
    """Reads tensors by plain name. The tensors are views of the mapped file: copy what must stay."""

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self._entries = entries
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __call__(self, name: str) -> Tensor:
        entry = self._entries[name]
        if entry.file not in self._open:
            self._open[entry.file] = _open_safetensors(entry.file)
        try:
            return self._open[entry.file].get_tensor(entry.stored_name)
        except (SafetensorError, OSError) as exc:
            raise WeightsError(
                f"cannot be read ({exc})", file=entry.file, field=entry.stored_name, remedy=_AGAIN
            ) from exc

    def close(self) -> None:
        self._open.clear()


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors to read, each with the tensor names the index expects in it (None: no index)."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        others = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".gguf", ".safetensors")
        )
        convertible = [name for name in others if not name.endswith(".safetensors")]
        remedy = (
            f"convert {convertible[0]} with: riverinfer convert {folder} NEW_DIR"
            if convertible
            else "download model.safetensors, or its shards and model.safetensors.index.json"
        )
        raise ModelNotFoundError("no model.safetensors in this folder", file=folder, remedy=remedy)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise WeightsError("is missing or no map of names to files", file=index, field="weight_map", remedy=_AGAIN)
    files: dict[Path, set[str] | None] = {}
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if Path(shard).name != shard:
            raise WeightsError(f"names a file outside the folder ({shard})", file=index, remedy=_AGAIN)
        if not path.is_file():
            raise WeightsError("this shard is missing from disk", file=path, remedy="download the missing shard")
        files[path] = {name for name, where in weight_map.items() if where == shard}
    return files


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as exc:
        raise WeightsError(f"is no valid safetensors file ({exc})", file=path, remedy=_AGAIN) from exc
    except OSError as exc:
        raise WeightsError(f"cannot be read ({exc})", file=path, remedy="check the file") from exc


def _read_headers(files: dict[Path, set[str] | None]) -> dict[str, TensorEntry]:
    stored: dict[str, TensorEntry] = {}
    for path, expected in files.items():
        handle = _open_safetensors(path)
        names = set(handle.keys())
        if expected is not None and expected - names:
            raise WeightsError(
                f"lacks tensors the index places in it: {_some(expected - names)}", file=path, remedy=_AGAIN
            )
        for name in sorted(names if expected is None else expected):
            view = handle.get_slice(name)
            stored[name] = TensorEntry(name, path, tuple(view.get_shape()), view.get_dtype())
    return stored


def _plain_names(stored: dict[str, TensorEntry], config: ModelConfig, folder: Path) -> dict[str, TensorEntry]:
    """Strip the text part's prefix in a multimodal checkpoint and drop what is no weight of the decoder."""
    entries: dict[str, TensorEntry] = {}
    skipped: list[str] = []
    for name, entry in stored.items():
        plain = name
        if config.nested:
            if name.startswith("model.language_model."):
                plain = "model." + name.removeprefix("model.language_model.")
            elif name.startswith("language_model."):
                plain = name.removeprefix("language_model.")
            elif name != "lm_head.weight":
                skipped.append(name)
                continue
        if not _DERIVED.search(plain):
            entries[plain] = entry
    if skipped:
        parts = sorted({".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) for name in skipped})
        warnings.warn(
            f"{folder}: only the text part is loaded; {len(skipped)} tensors skipped ({', '.join(parts)})",
            RiverinferWarning,
            stacklevel=4,
        )
    return entries


def _check_shapes(entries: dict[str, TensorEntry], config: ModelConfig, folder: Path) -> None:
    wanted = expected_tensors(config)
    missing = wanted.keys() - entries.keys()
    if missing:
        raise WeightsError(
            f"tensors are missing: {_some(missing)}",
            file=folder,
            remedy="the download is incomplete, or config.json is of another model",
        )
    head = {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    unexpected = entries.keys() - wanted.keys() - head.keys()
    if unexpected:
        raise WeightsError(
            f"unexpected tensors: {_some(unexpected)}",
            file=folder,
            remedy="config.json is of another model, or the model has parts riverinfer does not implement",
        )
    for name, entry in entries.items():
        shape = (wanted | head)[name]
        if entry.shape != shape:
            raise WeightsError(
                f"has shape {list(entry.shape)} where config.json implies {list(shape)}",
                file=entry.file,
                field=name,
                remedy="config.json is of another model",
            )
        if entry.dtype not in DTYPE_NAMES:
            raise UnsupportedModelError(
                f"is stored as {entry.dtype}",
                file=entry.file,
                field=name,
                remedy=f"supported: {', '.join(DTYPE_NAMES)}",
            )


def _some(names: set[str] | Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
