"""Conversion of GGUF files and PyTorch checkpoints into Hugging Face style model folders.

Importing this package is cheap: torch, gguf and tokenizers are loaded on the first call of ``convert``.
"""

from riverinfer.weights_convert.convert import convert
from riverinfer.weights_convert.report import ConversionReport

__all__ = ["ConversionReport", "convert"]
