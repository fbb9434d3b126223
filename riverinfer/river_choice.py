"""Which of several rivers drafts fastest on this machine: measured once, the answer kept beside the rivers.

More bits agree with the backbone more often and cost more to read. The measure is the speed that lossless mode can
reach with a river: with acceptance a, draft length g, costs c of a draft step and v of a verification in exact steps,
(1 - a**(g + 1)) / (1 - a) / (g c + v), at the best g (Leviathan et al., arXiv 2211.17192).
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from riverinfer.calibration_prompts import TEXTS
from riverinfer.checkpoint import Checkpoint
from riverinfer.decode import decode_one, prefill
from riverinfer.draft_policy import MAX_DRAFT
from riverinfer.errors import ConversionError, RiverinferError, RiverinferWarning, WeightsError
from riverinfer.gates import always
from riverinfer.kv_arena import KVArena
from riverinfer.model import Model
from riverinfer.progress import Progress
from riverinfer.tokenizer import Tokenizer
from riverinfer.weights_convert.river_artifact import RiverSettings, list_rivers, open_river, river_path
from riverinfer.whole_file import whole_file

MEASURED_POSITIONS = 256  # what a measurement needs of the rotary tables
_SAMPLES, _TOKENS, _DRAFT = 3, 24, 8
_ENTRIES = 8  # kept for a model: other numbers of threads, devices, candidates
_VERSION = 2


@dataclass(frozen=True)
class Choice:
    """What was measured on this machine, and which settings won.

    settings: as ``str(RiverSettings)``. figures, by settings: ``speedup`` over exact mode, ``acceptance`` of drafts (0
    to 1), ``draft_cost`` and ``verify_cost`` in exact steps, ``exact_ms`` of such a step. conditions: when it holds.
    """

    settings: str
    figures: dict[str, dict[str, float]]
    conditions: dict[str, Any]


def choose_settings(
    model: Model,
    tokenizer: Tokenizer,
    checkpoint: Checkpoint,
    candidates: list[RiverSettings],
    attach: Callable[[RiverSettings], None],
    *,
    progress: Progress | None = None,
    fused: bool = False,
) -> RiverSettings:
    """The fastest of ``candidates``, attached. Measured unless a choice made on this machine still holds.

    fused: steps will be those of a GPU's kernels.
    One that cannot be made is passed over with a warning. If none can, raises what ``attach`` raised for the first of
    them: ConversionError or WeightsError.
    """
    path = choice_path(checkpoint, candidates[0])
    conditions = _conditions(model, candidates, fused)
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    stored = _read(path).get(digest, {})
    known = {str(settings): settings for settings in candidates}
    chosen = known.get(stored.get("choice", ""))
    if chosen is not None and stored.get("conditions") == conditions:
        with suppress(ConversionError, WeightsError):
            attach(chosen)  # before the weights are compared: a lost river, or one of other weights, is made again
            if stored.get("weights") == open_river(checkpoint, chosen).source_hash:
                return chosen
    figures: dict[str, dict[str, float]] = {}
    failed: dict[RiverSettings, RiverinferError] = {}
    measure = _Measure(model, tokenizer, fused)
    for number, settings in enumerate(candidates):
        try:
            attach(settings)
        except (ConversionError, WeightsError) as exc:
            failed[settings] = exc
            continue
        if progress is not None:
            progress("Choosing the river", number, len(candidates), "rivers")
        figures[str(settings)] = measure()
    if not figures:
        raise failed[candidates[0]]
    if progress is not None:
        progress("Choosing the river", len(candidates), len(candidates), "rivers")
    made = [settings for settings in candidates if settings not in failed]
    chosen = max(made, key=lambda settings: figures[str(settings)]["speedup"])
    if chosen is not candidates[-1]:
        attach(chosen)
    for settings, problem in failed.items():
        message = f"{checkpoint.model_dir}: the choice of the river was made without {settings} ({problem})"
        warnings.warn(message, RiverinferWarning, stacklevel=4)
    weights = open_river(checkpoint, chosen).source_hash
    entry = {"conditions": conditions, "weights": weights, "choice": str(chosen), "figures": figures}
    _write(path, digest, entry)
    return chosen


def choice_path(checkpoint: Checkpoint, settings: RiverSettings) -> Path:
    """Where the choices for a model are kept: beside its rivers."""
    path = river_path(checkpoint, settings)
    return path.with_name(path.name.removesuffix(f"{settings}.safetensors") + "choice.json")


def read_choice(checkpoint: Checkpoint) -> Choice | None:
    """The latest choice that was made for the weights that the model folder now holds."""
    rivers = {str(info.settings): info.settings for info in list_rivers(checkpoint) if info.settings is not None}
    for entry in reversed(_read(choice_path(checkpoint, RiverSettings())).values()):
        settings = rivers.get(entry["choice"])
        if settings is None:
            continue
        with suppress(WeightsError):
            if open_river(checkpoint, settings).source_hash == entry["weights"]:
                figures = {name: each for name, each in entry["figures"].items() if _is_measured(each)}
                return Choice(entry["choice"], figures, entry["conditions"])
    return None


def _is_measured(figures: Any) -> bool:
    needed = ("speedup", "acceptance", "draft_cost")
    return isinstance(figures, dict) and all(isinstance(figures.get(name), int | float) for name in needed)


class _Measure:
    """Acceptance and costs of the river that is attached, on a few tokens of exact text."""

    def __init__(self, model: Model, tokenizer: Tokenizer, fused: bool) -> None:
        self._model, self._fused = model, fused
        self._arena = KVArena(
            model.config, slots=1, ctx_size=MEASURED_POSITIONS, dtype=model.dtype, device=model.device
        )
        self._kv = self._arena.slot(0)
        self._texts: list[tuple[list[int], int]] = []  # ids, where the model's own begin
        with self._as_it_will_run():
            self._exact = _typical(self._read_and_go_on(tokenizer))

    @contextmanager
    def _as_it_will_run(self) -> Iterator[None]:
        """On a GPU by its kernels' steps: torch's launches would take longer than what they launch."""
        model = self._model
        if self._fused:
            from riverinfer.device_walk import DeviceWalk, kernels_take

            model.device_walk = DeviceWalk(model, self._arena) if kernels_take(model) else None
        try:
            yield
        finally:
            model.device_walk = None

    def _read_and_go_on(self, tokenizer: Tokenizer) -> list[float]:
        """Fill ``_texts``: seconds of each exact step."""
        model, exact = self._model, list[float]()
        for text in TEXTS[:_SAMPLES]:
            ids = tokenizer.encode(text)[:100]
            begin = len(ids)
            logits = prefill(model, ids, 0, self._kv)
            ids.append(int(logits[0].argmax()))
            for _ in range(_TOKENS - 1):
                began = time.perf_counter()
                token = int(decode_one(model, ids[-1], len(ids) - 1, self._kv)[0].argmax())
                exact.append(time.perf_counter() - began)
                ids.append(token)
            self._texts.append((ids, begin))
        return exact

    def __call__(self) -> dict[str, float]:
        with self._as_it_will_run():
            return self._measure()

    def _measure(self) -> dict[str, float]:
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
                prefill(model, ids[start : start + _DRAFT + 1], start, kv, all_logits=True).argmax(-1).tolist()
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


def _conditions(model: Model, candidates: list[RiverSettings], fused: bool) -> dict[str, Any]:
    """What a choice depends on, beside the weights."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    device = str(model.device)
    if model.device.type == "cuda":
        device = f"{torch.cuda.get_device_name(model.device)}, {'fused' if fused else 'torch'}"
    return {
        "candidates": [str(settings) for settings in candidates],
        "cpu": cpu,
        "device": device,
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a file by the hash of their conditions, newest last; none of a damaged file or another version."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(data, dict) or data.get("version") != _VERSION or not isinstance(data.get("entries"), dict):
        return {}
    fields = {"conditions": dict, "weights": str, "choice": str, "figures": dict}
    return {
        digest: entry
        for digest, entry in data["entries"].items()
        if isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in fields.items())
    }


def _write(path: Path, digest: str, entry: dict[str, Any]) -> None:
    """Add an entry to a file, as its newest. What was measured for other weights, whose rivers are gone, is dropped."""
    entries = {k: old for k, old in _read(path).items() if k != digest and old["weights"] == entry["weights"]}
    entries = dict([*entries.items(), (digest, entry)][-_ENTRIES:])
    with suppress(OSError), whole_file(path) as aside:  # else it is measured again at the next start
        aside.write_text(json.dumps({"version": _VERSION, "entries": entries}, indent=1) + "\n")
