"""Names of output dtypes and casts that refuse to turn a number into infinity."""

from __future__ import annotations

import torch

from riverinfer.errors import ConversionError

OUTPUT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype called ``name``; None stays None. Raises ``ConversionError`` for other names."""
    if name is None:
        return None
    if name not in OUTPUT_DTYPES:
        raise ConversionError(f"unknown dtype {name!r}", field="dtype", remedy=f"use one of {', '.join(OUTPUT_DTYPES)}")
    return OUTPUT_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of ``dtype`` as config.json spells it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def cast(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """``values`` (floating point) as ``dtype``, rounded to nearest even.

    Raises ``ConversionError`` naming the tensor ``name`` if a finite value would become infinite.
    """
    if values.dtype == dtype:
        return values
    result = values.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(values.dtype).max
    if narrower and bool(torch.isinf(result).any()) and bool((torch.isinf(result) & torch.isfinite(values)).any()):
        raise ConversionError(
            f"has values beyond the range of {dtype_name(dtype)}",
            field=name,
            remedy="convert with dtype bfloat16 or float32",
        )
    return result
