"""Which of several rivers drafts fastest on this machine: measured once, the answer kept beside the rivers.

More bits agree with the backbone more often and cost more to read. The measure is the speed that lossless mode can
reach with a river: with acceptance a, draft length g, costs c of a draft step and v of a verification in exact steps,
(1 - a**(g + 1)) / (1 - a) / (g c + v), at the best g (Leviathan et al., arXiv 2211.17192).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from riverinfer.calibration_prompts import TEXTS
from riverinfer.checkpoint import Checkpoint
from riverinfer.decode import decode_one, prefill
from riverinfer.draft_policy import MAX_DRAFT
from riverinfer.gates import always
from riverinfer.kv_arena import KVArena
from riverinfer.model import Model
from riverinfer.progress import Progress
from riverinfer.tokenizer import Tokenizer
from riverinfer.weights_convert.river_artifact import RiverSettings, open_river, river_path

_SAMPLES, _TOKENS, _DRAFT = 3, 24, 8
_VERSION = 1


def choose_settings(
    model: Model,
    tokenizer: Tokenizer,
    checkpoint: Checkpoint,
    candidates: list[RiverSettings],
    attach: Callable[[RiverSettings], None],
    *,
    progress: Progress | None = None,
) -> RiverSettings:
    """The fastest of ``candidates``, attached. Measured unless a choice made on this machine still holds."""
    path = choice_path(checkpoint, candidates[0])
    stored = _read(path)
    known = {str(settings): settings for settings in candidates}
    choice = stored.get("choice")
    chosen = known.get(choice) if isinstance(choice, str) else None
    if chosen is not None:
        attach(chosen)  # before the key is made: a river that was lost, or is of other weights, is made again
        if stored.get("key") == _key(model, checkpoint, chosen, candidates):
            return chosen
    figures: dict[str, dict[str, float]] = {}
    measure = _Measure(model, tokenizer)
    for number, settings in enumerate(candidates):
        attach(settings)
        if progress is not None:
            progress("Choosing the river", number, len(candidates), "rivers")
        figures[str(settings)] = measure()
    if progress is not None:
        progress("Choosing the river", len(candidates), len(candidates), "rivers")
    chosen = max(candidates, key=lambda settings: figures[str(settings)]["speedup"])
    if chosen is not candidates[-1]:
        attach(chosen)
    key = _key(model, checkpoint, chosen, candidates)
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        aside.write_text(json.dumps({"key": key, "choice": str(chosen), "figures": figures}, indent=1) + "\n")
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)  # measured again at the next start
    return chosen


def choice_path(checkpoint: Checkpoint, settings: RiverSettings) -> Path:
    """Where the choice for a model is kept: beside its rivers."""
    path = river_path(checkpoint, settings)
    return path.with_name(path.name.removesuffix(f"{settings}.safetensors") + "choice.json")


def read_choice(checkpoint: Checkpoint) -> tuple[str | None, dict[str, dict[str, float]]]:
    """(settings, figures by settings: speedup, acceptance, draft_cost, verify_cost, exact_ms) of a stored choice."""
    stored = _read(choice_path(checkpoint, RiverSettings()))
    choice, figures = stored.get("choice"), stored.get("figures")
    if not isinstance(choice, str) or not isinstance(figures, dict):
        return None, {}
    wanted = {"speedup", "acceptance", "draft_cost"}
    return choice, {name: each for name, each in figures.items() if isinstance(each, dict) and wanted <= each.keys()}


class _Measure:
    """Acceptance and costs of the river that is attached, on a few tokens of exact text."""

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        self._model = model
        arena = KVArena(model.config, slots=1, ctx_size=256, dtype=model.dtype, device=model.device)
        self._kv = arena.slot(0)
        self._texts: list[tuple[list[int], int]] = []  # ids, where the model's own begin
        exact: list[float] = []
        for text in TEXTS[:_SAMPLES]:
            ids = tokenizer.encode(text)[:100]
            begin = len(ids)
            logits = prefill(model, ids, 0, self._kv)
            for _ in range(_TOKENS):
                ids.append(int(logits[0].argmax()))
                began = time.perf_counter()
                logits = decode_one(model, ids[-1], len(ids) - 1, self._kv)
                exact.append(time.perf_counter() - began)
            self._texts.append((ids, begin))
        self._exact = _typical(exact)

    def __call__(self) -> dict[str, float]:
        model, kv = self._model, self._kv
        draft: list[float] = []
        verify: list[float] = []
        agreed = judged = 0
        for ids, begin in self._texts:
            prefill(model, ids, 0, kv)
            for start in range(begin, len(ids) - _DRAFT, _DRAFT):
                token = ids[start]
                for offset in range(_DRAFT):
                    began = time.perf_counter()
                    token = int(decode_one(model, token, start + offset, kv, gate=always())[0].argmax())
                    draft.append(time.perf_counter() - began)
                    judged += 1
                    if token != ids[start + offset + 1]:
                        break
                    agreed += 1
                # Exact again, as a round's verification leaves it.
                began = time.perf_counter()
                prefill(model, ids[start : start + _DRAFT + 1], start, kv, all_logits=True)
                verify.append(time.perf_counter() - began)
        a = agreed / judged
        c, v = _typical(draft) / self._exact, _typical(verify) / self._exact
        slope = max(0.0, v - 1) / _DRAFT

        def speedup(g: int) -> float:
            tokens = sum(a**i for i in range(g + 1))
            return tokens / (g * c + 1 + slope * g)

        return {
            "speedup": max(speedup(g) for g in range(MAX_DRAFT + 1)),
            "acceptance": a,
            "draft_cost": c,
            "verify_cost": v,
            "exact_ms": self._exact * 1000,
        }


def _typical(seconds: list[float]) -> float:
    """The lower quartile: what a step takes when nothing else disturbs it."""
    return statistics.quantiles(seconds, n=4)[0]


def _key(
    model: Model, checkpoint: Checkpoint, chosen: RiverSettings, candidates: list[RiverSettings]
) -> dict[str, Any]:
    """What a choice depends on."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "version": _VERSION,
        "weights": open_river(checkpoint, chosen).source_hash,
        "candidates": [str(settings) for settings in candidates],
        "cpu": cpu,
        "device": str(model.device),
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
