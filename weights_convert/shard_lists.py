"""Which weight files a model folder has: one file, or the shards that an index names."""

from __future__ import annotations

from pathlib import Path

from riverinfer.errors import ConversionError

PYTORCH_SUFFIXES = (".bin", ".pth", ".pt")
# Files of these suffixes that trainers leave beside the weights.
TRAINING_STATE = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


def shard_files(source: Path, index_name: str, weight_map: object) -> dict[Path, list[str]]:
    """Shard paths and the tensors that the index says are in each, in index order.

    ``weight_map`` is the value of that key in the index file ``index_name``. Raises ``ConversionError`` if it
    is not a map of tensor names to file names in ``source``, or if a shard is missing.
    """
    index = source / index_name
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError("is missing or empty", file=index, field="weight_map")
    shards: dict[Path, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ConversionError(f"{name!r} is not a plain file name", file=index, field=f"weight_map.{tensor}")
        shards.setdefault(source / name, []).append(tensor)
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise ConversionError(
            f"{len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:8])}",
            file=index,
            remedy="download the missing files",
        )
    return shards


def refuse_absent(shard: Path, wanted: list[str], present: set[str]) -> None:
    """Raise ``ConversionError`` if a tensor that the index places in ``shard`` is not among ``present``."""
    absent = [name for name in wanted if name not in present]
    if absent:
        raise ConversionError(
            f"lacks {len(absent)} tensors that the index places there: {', '.join(absent[:8])}",
            file=shard,
            remedy="the file is damaged or of another version: download it again",
        )
