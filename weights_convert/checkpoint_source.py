"""Conversion of a model folder with PyTorch or safetensors weights: same tensors, same companion files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from riverinfer.errors import ConversionError
from riverinfer.progress import Progress
from riverinfer.weights_convert.dtype_casts import cast, dtype_name
from riverinfer.weights_convert.report import SourceKind
from riverinfer.weights_convert.safetensors_writer import TensorEntry, write_safetensors
from riverinfer.weights_convert.source_result import SourceResult

_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the source. ``read(start, stop)`` gives rows of it (the whole tensor if it has no rows);
    ``identity`` is equal for two tensors that are one in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]
    identity: tuple[int, ...] | None = None


def convert_checkpoint(
    source: Path, folder: Path, kind: SourceKind, dtype: torch.dtype | None, progress: Progress | None
) -> SourceResult:
    """Write config, companion files and weights of the model folder ``source`` into the empty ``folder``.

    Raises ``ConversionError`` if config.json or weights are missing, damaged or in a layout that is not a
    Hugging Face model's.
    """
    config = read_json(source / "config.json", "give the folder of a complete Hugging Face model")
    tensors, notes = _open(source, kind)
    _refuse_foreign_names(source, tensors)
    tensors, untie = _drop_redundant(tensors, config)
    if untie:
        notes.append(
            f"{_HEAD} differs from {_EMBEDDING} and was kept: tie_word_embeddings is false in the new config.json"
        )
    if dtype is not None and config.get("quantization_config"):
        raise ConversionError(
            "a quantized checkpoint cannot change its dtype",
            file=source / "config.json",
            field="quantization_config",
            remedy="convert it without a dtype, or the original model",
        )
    entries = [_entry(tensor, dtype) for tensor in tensors]
    if not entries:
        raise ConversionError("the weight files hold no tensors", file=source)
    if dtype is not None:
        config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        config["torch_dtype"] = dtype_name(dtype)
    if untie:
        config["tie_word_embeddings"] = False
    if untie or dtype is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        _copy(source / "config.json", folder / "config.json")
    copied = _copy_companions(source, folder)
    if not copied & {"tokenizer.json", "tokenizer.model"}:
        notes.append("the source has neither tokenizer.json nor tokenizer.model")
    write_safetensors(folder, entries, progress=progress)
    types = Counter(dtype_name(tensor.dtype) for tensor in tensors)
    return SourceResult(str(config.get("model_type")), entries, dict(types), notes)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in the JSON file ``path``. Raises ``ConversionError`` if it is missing or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError("is missing", file=path, remedy=remedy) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"cannot be read: {error}", file=path, remedy=remedy) from error
    if not isinstance(content, dict):
        raise ConversionError("is not a JSON object", file=path, remedy=remedy)
    return content


def _open(source: Path, kind: SourceKind) -> tuple[list[StoredTensor], list[str]]:
    if kind == "pytorch":
        from riverinfer.weights_convert.pytorch_files import open_pytorch

        return open_pytorch(source)
    from riverinfer.weights_convert.safetensors_files import open_safetensors

    return open_safetensors(source), []


def _refuse_foreign_names(source: Path, tensors: list[StoredTensor]) -> None:
    names = {tensor.name for tensor in tensors}
    if "tok_embeddings.weight" in names:
        raise ConversionError(
            "tensors have the names of Meta's or Mistral's original format (tok_embeddings, wq, w1, …)",
            file=source,
            remedy="download the Hugging Face version of the model",
        )
    if names and all(".lora_" in name for name in names):
        raise ConversionError("holds a LoRA adapter, not a model", file=source, remedy="merge it into its base model")
    if _EMBEDDING not in names:
        shown = ", ".join(sorted(names)[:5])
        raise ConversionError(
            f"is missing (there are {shown}, …)" if names else "is missing",
            file=source,
            field=_EMBEDDING,
            remedy="only decoder-only models with Hugging Face tensor names can be converted",
        )


def _drop_redundant(tensors: list[StoredTensor], config: dict[str, Any]) -> tuple[list[StoredTensor], bool]:
    """The tensors to keep, and whether config.json ties a head that differs. Such a head is what runs:
    transformers and riverinfer tie only equal ones."""
    kept = [tensor for tensor in tensors if not tensor.name.endswith(".rotary_emb.inv_freq")]
    by_name = {tensor.name: tensor for tensor in kept}
    head, embedding = by_name.get(_HEAD), by_name[_EMBEDDING]
    if head is None or config.get("tie_word_embeddings") is not True:
        return kept, False
    same = head.identity is not None and head.identity == embedding.identity
    if not same and not _equal(head, embedding):
        return kept, True
    return [tensor for tensor in kept if tensor is not head], False


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return all(torch.equal(a, b) for a, b in zip(_blocks(first), _blocks(second), strict=True))


def _blocks(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    if not tensor.shape:
        yield tensor.read(0, 1)
        return
    width = 1
    for size in tensor.shape[1:]:
        width *= size
    step = max(1, _CHUNK_ELEMENTS // max(width, 1))
    for start in range(0, tensor.shape[0], step):
        yield tensor.read(start, min(start + step, tensor.shape[0]))


def _entry(tensor: StoredTensor, dtype: torch.dtype | None) -> TensorEntry:
    target = dtype if dtype is not None and tensor.dtype in _FLOATS else tensor.dtype

    def chunks() -> Iterator[torch.Tensor]:
        for block in _blocks(tensor):
            yield cast(block, target, tensor.name)

    return TensorEntry(tensor.name, target, tensor.shape, chunks)


def _copy_companions(source: Path, folder: Path) -> set[str]:
    copied = set()
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                name = str(path.relative_to(source))
                _copy(path, folder / name)
                copied.add(name)
    return copied


def _copy(source: Path, target: Path) -> None:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise ConversionError(f"cannot be read: {error.strerror or error}", file=source) from error
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(content)
