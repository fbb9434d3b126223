"""Rotary embedding fields of config.json from GGUF metadata and frequency factor tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from riverinfer.errors import ConversionError, UnsupportedModelError
from riverinfer.weights_convert.gguf_file import GgufFile

_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
_LLAMA3_FACTORS = (8.0, 32.0)
_LLAMA3_CONTEXT = 8192
_MATCH = 2e-4


def rope_fields(gguf: GgufFile, arch: str, *, head_dim: int, context: int) -> dict[str, Any]:
    """``rope_theta``, ``rope_scaling`` and what else describes the rotary embedding (``rope_parameters`` for
    ministral3, which never had the older fields).

    Raises ``UnsupportedModelError`` for scaling types other than linear, yarn, llama3 and longrope and
    ``ConversionError`` for frequency factors that no Llama 3 parameters explain.
    """
    theta = gguf.float_value(f"{arch}.rope.freq_base", 10000.0)
    if theta <= 0:
        raise ConversionError(f"is {theta}", file=gguf.path, field=f"{arch}.rope.freq_base")
    rotary_dim = gguf.value(f"{arch}.rope.dimension_count", int) or head_dim
    fields: dict[str, Any] = {"rope_theta": theta}
    if rotary_dim != head_dim:
        if arch != "phi3" or rotary_dim > head_dim or rotary_dim % 2:
            raise UnsupportedModelError(
                f"{rotary_dim} of {head_dim} dimensions rotated",
                file=gguf.path,
                field=f"{arch}.rope.dimension_count",
            )
        fraction = rotary_dim / head_dim
        # Readers round the product down.
        if int(head_dim * fraction) < rotary_dim:
            fraction = math.nextafter(fraction, 1.0)
        fields["partial_rotary_factor"] = fraction
    scaling = _scaling(gguf, arch, context)
    if "rope_freqs.weight" in gguf.tensors:
        factors = _factors(gguf, "rope_freqs.weight", rotary_dim // 2)
        if not np.all(factors == 1.0):
            if scaling is not None:
                raise UnsupportedModelError("together with rope.scaling", file=gguf.path, field="rope_freqs.weight")
            scaling = _recover_llama3(gguf, factors, theta, rotary_dim)
    if arch == "phi3":
        fields.update(_longrope(gguf, rotary_dim, context))
        if "rope_scaling" in fields:
            return fields
    if arch == "mistral3":
        parameters: dict[str, Any] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
        # Present in every Ministral 3; a beta of 0 switches the query scaling off.
        parameters.setdefault("original_max_position_embeddings", context)
        parameters["llama_4_scaling_beta"] = gguf.float_value(f"{arch}.attention.temperature_scale", 0.0)
        return {"rope_parameters": parameters}
    fields["rope_scaling"] = scaling
    return fields


def _scaling(gguf: GgufFile, arch: str, context: int) -> dict[str, Any] | None:
    prefix = f"{arch}.rope.scaling"
    kind = gguf.value(f"{prefix}.type", str)
    if kind is None:
        linear = gguf.float_value(f"{arch}.rope.scale_linear", 1.0)
        return None if linear == 1.0 else {"rope_type": "linear", "factor": linear}
    if kind == "none" or (kind == "longrope" and arch == "phi3"):
        return None
    factor = gguf.float_value(f"{prefix}.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or factor < 1.0:
        raise UnsupportedModelError(
            f"rope scaling {kind!r} with factor {factor} is not supported",
            file=gguf.path,
            field=f"{prefix}.type",
            remedy="supported: linear, yarn, longrope (phi3) and the factors of Llama 3",
        )
    original = gguf.value(f"{prefix}.original_context_length", int) or int(context / factor)
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    for name in ("beta_fast", "beta_slow"):
        if f"{prefix}.yarn_{name}" in gguf.fields:
            scaling[name] = gguf.float_value(f"{prefix}.yarn_{name}", 0.0)
    log_multiplier = gguf.float_value(f"{prefix}.yarn_log_multiplier", 0.0)
    if log_multiplier:
        # The file has only mscale_all_dim; llama.cpp takes mscale to be 1.
        scaling.update(mscale=1.0, mscale_all_dim=log_multiplier)
    attention = gguf.float_value(f"{prefix}.attn_factor", gguf.float_value(f"{prefix}.yarn_attn_factor", 1.0))
    if attention != 1.0:
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return scaling


def _longrope(gguf: GgufFile, rotary_dim: int, context: int) -> dict[str, Any]:
    names = ("rope_factors_long.weight", "rope_factors_short.weight")
    present = [name for name in names if name in gguf.tensors]
    original = gguf.value("phi3.rope.scaling.original_context_length", int)
    if not present:
        return {"original_max_position_embeddings": original or context}
    if len(present) == 1 or original is None or original < 2:
        raise ConversionError(
            f"needs both {names[0]} and {names[1]} and a positive original_context_length",
            file=gguf.path,
            field="phi3.rope.scaling",
        )
    long, short = ([float(str(f)) for f in _factors(gguf, name, rotary_dim // 2)] for name in names)
    scaling: dict[str, Any] = {"type": "longrope", "long_factor": long, "short_factor": short}
    ratio = context / original
    derived = 1.0 if ratio <= 1.0 else math.sqrt(1.0 + math.log(ratio) / math.log(original))
    attention = gguf.float_value("phi3.rope.scaling.attn_factor", derived)
    if abs(attention - derived) > 1e-4:
        scaling["attention_factor"] = attention
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _factors(gguf: GgufFile, name: str, count: int) -> np.ndarray:
    tensor = gguf.tensors[name]
    if tensor.type.name != "F32" or tensor.shape != (count,):
        raise ConversionError(
            f"is {tensor.type.name} {list(tensor.shape)}, expected F32 [{count}]", file=gguf.path, field=name
        )
    factors = gguf.read_rows(tensor, 0, 1).reshape(-1).view("<f4")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ConversionError("has factors that are not positive numbers", file=gguf.path, field=name)
    return factors


def _llama3_factors(wavelengths: np.ndarray, factor: float, original: float) -> np.ndarray:
    smooth = np.clip((original / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
    result: np.ndarray = 1.0 / ((1.0 - smooth) / factor + smooth)
    return result


def _recover_llama3(gguf: GgufFile, factors: np.ndarray, theta: float, rotary_dim: int) -> dict[str, Any]:
    wavelengths = 2.0 * math.pi * theta ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    for factor, original in _llama3_candidates(factors.astype(np.float64), wavelengths):
        if np.allclose(_llama3_factors(wavelengths, factor, original), factors, rtol=_MATCH, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": original,
            }
    raise ConversionError(
        "these frequency factors match no Llama 3 scaling (low 1, high 4)",
        file=gguf.path,
        field="rope_freqs.weight",
        remedy="convert the original Hugging Face model instead",
    )


def _llama3_candidates(factors: np.ndarray, wavelengths: np.ndarray) -> list[tuple[float, int]]:
    """Published parameters first, then those that solve the equations for the largest factor."""
    candidates = [(factor, _LLAMA3_CONTEXT) for factor in _LLAMA3_FACTORS]
    largest = float(str(np.float32(factors.max())))
    if largest > 1.0:
        between = (factors > 1.0 + 1e-3) & (factors < largest * (1.0 - 1e-3))
        smooth = (1.0 / factors[between] - 1.0 / largest) / (1.0 - 1.0 / largest)
        solved = wavelengths[between] * (smooth * (_LLAMA3_HIGH - _LLAMA3_LOW) + _LLAMA3_LOW)
        contexts = [round(float(np.median(solved)))] if solved.size else [2**power for power in range(3, 24)]
        candidates += [(largest, context) for context in contexts if context > 0]
    return candidates
