"""The entry point: find out what the source is, convert it into a temporary folder, rename that."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from riverinfer.errors import ConversionError
from riverinfer.progress import Progress
from riverinfer.weights_convert.output_folder import check_destination, output_folder
from riverinfer.weights_convert.report import ConversionReport, SourceKind
from riverinfer.weights_convert.shard_lists import PYTORCH_SUFFIXES, TRAINING_STATE

if TYPE_CHECKING:
    import torch

    from riverinfer.weights_convert.source_result import SourceResult

_SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def convert(src: Path, dst: Path, *, dtype: str | None = None, progress: Progress | None = None) -> ConversionReport:
    """Convert the checkpoint ``src`` into the Hugging Face style model folder ``dst``.

    ``src`` is a GGUF file, a folder with exactly one of those, or a folder with config.json and PyTorch or
    safetensors weights. ``dtype`` is ``bfloat16``, ``float16`` or ``float32``; None keeps the dtypes of the
    source, and is bfloat16 for quantized GGUF files. ``progress`` is called with the bytes written; an
    exception from it (such as KeyboardInterrupt) ends the conversion.

    ``dst`` appears only when it is complete: it is written under ``.NAME.partial-PID`` beside it, which is
    removed on every error.

    Raises ``ConversionError`` if ``dst`` exists and is not empty or is the current folder, if ``src`` is damaged,
    incomplete or of an unknown kind, or if the disk refuses; ``UnsupportedModelError`` and ``TokenizerError``
    for models and tokenizers that riverinfer does not run.
    """
    started = time.monotonic()
    src, dst = Path(src), Path(dst)
    check_destination(dst)
    kind, path = find_source(src)
    from riverinfer.weights_convert.dtype_casts import parse_dtype

    target = parse_dtype(dtype)
    with output_folder(dst) as folder:
        try:
            result = _run(kind, path, folder, target, progress)
        except ConversionError as error:
            if error.file is not None:
                raise
            raise ConversionError(error.problem, file=path, field=error.field, remedy=error.remedy) from error
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        weight_bytes = sum((folder / file).stat().st_size for file in files if file.endswith(".safetensors"))
    dtypes = {str(entry.dtype).removeprefix("torch.") for entry in result.entries}
    return ConversionReport(
        source=path,
        destination=dst,
        source_kind=kind,
        model_type=result.model_type,
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        tensors=len(result.entries),
        parameters=sum(entry.elements for entry in result.entries),
        weight_bytes=weight_bytes,
        source_types=result.source_types,
        files=tuple(files),
        notes=tuple(result.notes),
        seconds=time.monotonic() - started,
    )


def find_source(src: Path) -> tuple[SourceKind, Path]:
    """The kind of checkpoint at ``src`` and its GGUF file or folder.

    Raises ``ConversionError`` if there is none or more than one.
    """
    try:
        if src.is_file():
            return _single_file(src)
        if not src.is_dir():
            raise ConversionError("no such file or folder", file=src)
        names = sorted(entry.name for entry in src.iterdir() if entry.is_file())
    except OSError as error:
        raise ConversionError(f"cannot be read: {error.strerror or error}", file=src) from error
    if "model.safetensors" in names or "model.safetensors.index.json" in names:
        return "safetensors", src
    pickles = [name for name in names if name.endswith((*PYTORCH_SUFFIXES, ".bin.index.json"))]
    if any(not name.startswith(TRAINING_STATE) for name in pickles):
        return "pytorch", src
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return "safetensors", src
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if len(ggufs) == 1:
        return _single_file(src / ggufs[0])
    if ggufs:
        raise ConversionError(
            f"holds {len(ggufs)} GGUF files ({', '.join(ggufs[:6])})",
            file=src,
            remedy="give one of these files",
        )
    raise ConversionError(
        "holds no weights (looked for .safetensors, .bin, .pth, .pt and .gguf files)",
        file=src,
        remedy="give a GGUF file or the folder of a downloaded model",
    )


def _single_file(src: Path) -> tuple[SourceKind, Path]:
    if src.suffix.lower() in (".bin", ".pth", ".pt", ".safetensors"):
        raise ConversionError(
            "weights alone do not make a model",
            file=src,
            remedy="give the folder that also has config.json and the tokenizer",
        )
    if _SPLIT_GGUF.search(src.name):
        raise ConversionError(
            "one part of a split GGUF file",
            file=src,
            remedy="join the parts with `llama-gguf-split --merge FIRST_PART OUT.gguf` first",
        )
    return "gguf", src


def _run(
    kind: SourceKind, path: Path, folder: Path, dtype: torch.dtype | None, progress: Progress | None
) -> SourceResult:
    if kind == "gguf":
        from riverinfer.weights_convert.gguf_source import convert_gguf

        return convert_gguf(path, folder, dtype, progress)
    from riverinfer.weights_convert.checkpoint_source import convert_checkpoint

    return convert_checkpoint(path, folder, kind, dtype, progress)
