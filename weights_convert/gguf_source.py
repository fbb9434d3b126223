"""Conversion of one GGUF file into the files of a model folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from riverinfer.progress import Progress
from riverinfer.weights_convert.dtype_casts import dtype_name
from riverinfer.weights_convert.gguf_config import read_model
from riverinfer.weights_convert.gguf_file import GgufFile
from riverinfer.weights_convert.gguf_tensors import tensor_entries
from riverinfer.weights_convert.gguf_tokenizer import end_of_text_ids, write_tokenizer
from riverinfer.weights_convert.safetensors_writer import write_safetensors
from riverinfer.weights_convert.source_result import SourceResult


def convert_gguf(path: Path, folder: Path, dtype: torch.dtype | None, progress: Progress | None) -> SourceResult:
    """Write config, tokenizer and weights of the GGUF file ``path`` into the existing, empty ``folder``."""
    with GgufFile(path) as gguf:
        model = read_model(gguf)
        entries = tensor_entries(gguf, model, dtype)
        written = entries[0].dtype
        config = {**model.config, "torch_dtype": dtype_name(written)}
        _write_json(folder / "config.json", config)
        generation: dict[str, Any] = {}
        if config["bos_token_id"] is not None:
            generation["bos_token_id"] = config["bos_token_id"]
        stops = end_of_text_ids(gguf, model.vocab)
        if stops:
            generation["eos_token_id"] = stops
        if config["pad_token_id"] is not None:
            generation["pad_token_id"] = config["pad_token_id"]
        _write_json(folder / "generation_config.json", generation)
        notes = write_tokenizer(gguf, folder, vocab_rows=model.vocab, context=int(config["max_position_embeddings"]))
        write_safetensors(folder, entries, progress=progress)
        types = Counter(tensor.type.name for tensor in gguf.tensors.values())
    return SourceResult(model_type=str(config["model_type"]), entries=entries, source_types=dict(types), notes=notes)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
