"""``generation_config.json``: stop tokens and the sampling values a model's authors recommend."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from riverinfer.config import ModelConfig
from riverinfer.errors import ConfigError
from riverinfer.json_fields import JsonFields, read_json
from riverinfer.sampling import SamplingParams

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationConfig:
    """``eos_token_ids`` end a generation; ``sampling`` has the recommended values found, by SamplingParams name."""

    eos_token_ids: tuple[int, ...]
    sampling: dict[str, Any] = field(default_factory=dict)
    origin: str | None = None  # file name, None when there is none

    def params(self) -> SamplingParams:
        """The recommended parameters; greedy where nothing is recommended."""
        return replace(SamplingParams(), **self.sampling)


def load_generation_config(model_dir: Path, config: ModelConfig) -> GenerationConfig:
    """Read the folder's ``generation_config.json``; without one, the same fields of ``config.json``.

    ``do_sample: false`` means greedy whatever else is there; where it is absent, ``generation_config.json``
    recommends sampling if it has a temperature or top_p.
    Raises ConfigError naming file and field.
    """
    path = model_dir / "generation_config.json"
    if not path.is_file():
        path = model_dir / "config.json"  # where checkpoints kept these fields before
    raw = read_json(path)
    fields = JsonFields(raw, path)
    eos = fields.token_ids("eos_token_id") or config.eos_token_ids
    sampling: dict[str, Any] = {}
    for name in _SAMPLING:
        value = raw.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise fields.error(name, f"must be a number, not {value!r}")
        sampling[name] = int(value) if name == "top_k" else float(value)
    recommends = path.name == "generation_config.json" and bool({"temperature", "top_p"} & sampling.keys())
    do_sample = fields.flag("do_sample", recommends)
    if not do_sample:
        sampling = {k: v for k, v in sampling.items() if k == "repetition_penalty"}
    elif "temperature" not in sampling:
        sampling["temperature"] = 1.0
    result = GenerationConfig(eos, sampling, path.name)
    try:
        result.params()
    except ValueError as exc:
        raise ConfigError(str(exc), file=path, remedy="correct the field") from exc
    return result
