"""Hugging Face tensors from GGUF tensors: names, row order of rotary projections, dequantization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Ggml
from gguf.quants import dequantize

from riverinfer.errors import ConversionError
from riverinfer.weights_convert.dtype_casts import cast
from riverinfer.weights_convert.gguf_config import GgufModel
from riverinfer.weights_convert.gguf_file import GgufFile, GgufTensor
from riverinfer.weights_convert.safetensors_writer import TensorEntry

_PLAIN = {Ggml.F32: torch.float32, Ggml.F16: torch.float16, Ggml.BF16: torch.bfloat16}
_QUANTIZED = frozenset({Ggml.Q8_0, Ggml.Q4_0, Ggml.Q4_1, Ggml.Q5_0, Ggml.Q5_1, Ggml.Q4_K, Ggml.Q5_K, Ggml.Q6_K})
_NOT_WEIGHTS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
_CHUNK_ELEMENTS = 2**21


@dataclass(frozen=True)
class _Spec:
    """One expected tensor; ``rotary_head`` is the head size if its rows are to be put back into half-split
    order, else 0."""

    source: str
    target: str
    shape: tuple[int, ...]
    rotary_head: int = 0


def tensor_entries(gguf: GgufFile, model: GgufModel, dtype: torch.dtype | None) -> list[TensorEntry]:
    """Entries for every tensor of the Hugging Face model, in model order, to be read lazily from ``gguf``.

    With ``dtype`` None it is ``default_dtype``. Raises ``ConversionError`` naming tensors that are missing,
    not known, of another shape than the metadata say, or of an unsupported type.
    """
    specs = _expected(model)
    known = {spec.source for spec in specs}
    unknown = [name for name in gguf.tensors if name not in known and name not in _NOT_WEIGHTS]
    if unknown:
        raise ConversionError(
            f"{len(unknown)} tensors have no place in a {model.arch} model: {_some(unknown)}",
            file=gguf.path,
            remedy="the file may hold a variant of the architecture that riverinfer does not run",
        )
    missing = [spec.source for spec in specs if spec.source not in gguf.tensors]
    if missing:
        raise ConversionError(f"{len(missing)} tensors are missing: {_some(missing)}", file=gguf.path)
    target_dtype = dtype or default_dtype(gguf)
    entries = []
    for spec in specs:
        tensor = gguf.tensors[spec.source]
        if tensor.shape != spec.shape:
            raise ConversionError(
                f"has shape {list(tensor.shape)}, the metadata say {list(spec.shape)}",
                file=gguf.path,
                field=spec.source,
            )
        if tensor.type not in _PLAIN and tensor.type not in _QUANTIZED:
            supported = ", ".join(kind.name for kind in (*_PLAIN, *sorted(_QUANTIZED)))
            raise ConversionError(
                f"tensor type {tensor.type.name} is not supported",
                file=gguf.path,
                field=spec.source,
                remedy=f"use a file with these types: {supported}",
            )
        entries.append(_entry(gguf, tensor, spec, target_dtype))
    return entries


def default_dtype(gguf: GgufFile) -> torch.dtype:
    """float16 or float32 if all matrices of the file have that type (vectors are float32 in every file of
    llama.cpp), else bfloat16."""
    kinds = {tensor.type for tensor in gguf.tensors.values() if len(tensor.shape) > 1}
    return _PLAIN.get(kinds.pop(), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _entry(gguf: GgufFile, tensor: GgufTensor, spec: _Spec, dtype: torch.dtype) -> TensorEntry:
    return TensorEntry(spec.target, dtype, spec.shape, lambda: _chunks(gguf, tensor, spec, dtype))


def _chunks(gguf: GgufFile, tensor: GgufTensor, spec: _Spec, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    if len(tensor.shape) == 1 and spec.rotary_head:
        # A bias has one value per row of its projection.
        vector = _values(gguf.read_rows(tensor, 0, 1), tensor.type).reshape(-1)
        order = torch.from_numpy(_half_split_order(vector.numel(), spec.rotary_head))
        yield cast(vector[order], dtype, spec.source)
        return
    unit = spec.rotary_head or 1
    width = tensor.shape[-1]
    step = max(1, _CHUNK_ELEMENTS // (width * unit)) * unit
    for start in range(0, tensor.rows, step):
        stop = min(start + step, tensor.rows)
        raw = gguf.read_rows(tensor, start, stop)
        if spec.rotary_head:
            # Blocks never cross rows, so moving the quantized rows loses nothing.
            raw = raw[_half_split_order(stop - start, spec.rotary_head)]
        yield cast(_values(raw, tensor.type), dtype, spec.source)


def _values(raw: np.ndarray, kind: Ggml) -> torch.Tensor:
    """The numbers in ``raw`` (uint8 [rows, row bytes]) in the type they are stored in, or float32."""
    if kind in _PLAIN:
        return torch.from_numpy(raw).view(_PLAIN[kind])
    # Old versions of numpy warn about the infinities and NaN that damaged scales can be.
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.ascontiguousarray(dequantize(raw, kind)))


def _half_split_order(rows: int, head: int) -> np.ndarray:
    """Row indices that turn pairs (x0 y0 x1 y1 …) of every head into halves (x0 x1 … y0 y1 …)."""
    order: np.ndarray = np.arange(rows).reshape(rows // head, head // 2, 2).swapaxes(1, 2).reshape(-1)
    return order


def _expected(model: GgufModel) -> list[_Spec]:
    hidden, vocab = model.hidden, model.vocab
    specs = [_Spec("token_embd.weight", "model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(model.layers):
        specs += _layer(model, f"blk.{layer}", f"model.layers.{layer}")
    specs.append(_Spec("output_norm.weight", "model.norm.weight", (hidden,)))
    if not model.tied:
        specs.append(_Spec("output.weight", "lm_head.weight", (vocab, hidden)))
    return specs


def _layer(model: GgufModel, source: str, target: str) -> list[_Spec]:
    hidden, inner = model.hidden, model.intermediate
    q_size, kv_size = model.heads * model.head_dim, model.kv_heads * model.head_dim
    rotary = model.head_dim if model.interleaved_rope else 0
    attention, mlp = f"{target}.self_attn", f"{target}.mlp"
    specs = [_Spec(f"{source}.attn_norm.weight", f"{target}.input_layernorm.weight", (hidden,))]
    if model.arch == "phi3":
        specs.append(_Spec(f"{source}.attn_qkv.weight", f"{attention}.qkv_proj.weight", (q_size + 2 * kv_size, hidden)))
    else:
        for name, rows, head in (("q", q_size, rotary), ("k", kv_size, rotary), ("v", kv_size, 0)):
            specs.append(_Spec(f"{source}.attn_{name}.weight", f"{attention}.{name}_proj.weight", (rows, hidden), head))
            if model.attention_bias or model.arch == "qwen2":
                specs.append(_Spec(f"{source}.attn_{name}.bias", f"{attention}.{name}_proj.bias", (rows,), head))
    if model.arch == "qwen3":
        specs += [
            _Spec(f"{source}.attn_{name}_norm.weight", f"{attention}.{name}_norm.weight", (model.head_dim,))
            for name in ("q", "k")
        ]
    specs.append(_Spec(f"{source}.attn_output.weight", f"{attention}.o_proj.weight", (hidden, q_size)))
    if model.attention_bias:
        specs.append(_Spec(f"{source}.attn_output.bias", f"{attention}.o_proj.bias", (hidden,)))
    specs.append(_Spec(f"{source}.ffn_norm.weight", f"{target}.post_attention_layernorm.weight", (hidden,)))
    if model.arch == "phi3":
        specs.append(_Spec(f"{source}.ffn_up.weight", f"{mlp}.gate_up_proj.weight", (2 * inner, hidden)))
        specs.append(_Spec(f"{source}.ffn_down.weight", f"{mlp}.down_proj.weight", (hidden, inner)))
        return specs
    for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        specs.append(_Spec(f"{source}.ffn_{name}.weight", f"{mlp}.{name}_proj.weight", shape))
        if model.mlp_bias:
            specs.append(_Spec(f"{source}.ffn_{name}.bias", f"{mlp}.{name}_proj.bias", shape[:1]))
    return specs
