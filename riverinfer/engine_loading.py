"""From what ``Engine.load`` is asked for to a plan that fits into memory, and from the plan to an engine's parts."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from riverinfer.checkpoint import Checkpoint
from riverinfer.config import ModelConfig
from riverinfer.errors import EngineMemoryError, InvalidRequestError, RiverinferWarning
from riverinfer.evidence.certificate import certified_tau, text_conditions
from riverinfer.generation_config import GenerationConfig, load_generation_config
from riverinfer.kernels.linear import triton_runs
from riverinfer.kv_arena import KVArena
from riverinfer.loader import load_model, resolve_device, resolve_dtype
from riverinfer.memory import explain_out_of_memory, gib, require_memory
from riverinfer.model import Model
from riverinfer.progress import Progress
from riverinfer.river import RiverOptions
from riverinfer.river_choice import MEASURED_POSITIONS
from riverinfer.river_loading import RiverRequest, load_river, river_bytes
from riverinfer.sampling import check_integer
from riverinfer.tokenizer import Tokenizer
from riverinfer.weights_convert.river_artifact import RiverSettings, linear_shapes

DEFAULT_CTX_SIZE = 4096
MAX_THREADS = 1024


@dataclass(frozen=True)
class LoadRequest:
    """What is asked for, in the words of ``Engine.load``. auto: the certified tau is to replace that of ``options``.

    Raises InvalidRequestError for numbers out of range.
    """

    device: str
    dtype: str
    ctx_size: int
    max_sequences: int
    mode: str
    threads: int | None
    auto: bool
    options: RiverOptions
    backbone_layers: int | None
    river: RiverRequest
    graph: bool

    def __post_init__(self) -> None:
        check_integer("ctx_size", self.ctx_size, 0)
        check_integer("max_sequences", self.max_sequences, 1)
        if self.threads is not None:
            check_integer("threads", self.threads, 1, MAX_THREADS)


@dataclass(frozen=True)
class LoadPlan:
    """All that is settled before weights are read.

    mode: exact where "auto" finds no certified tau, and where memory does not hold lossless mode's river too.
    conditions: of texts in river mode, see ``text_conditions``. held: backbone layers. river, candidates: what was
    asked for, and the settings to choose from: none where no river is needed. ctx_size: positions of one sequence.
    fused: whether a GPU's fused kernels are to decode. weights: bytes of backbone and river.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    generation_config: GenerationConfig
    device: torch.device
    dtype: torch.dtype
    mode: str
    options: RiverOptions
    conditions: dict[str, Any]
    held: int
    river: RiverRequest
    candidates: list[RiverSettings]
    ctx_size: int
    max_sequences: int
    fused: bool
    weights: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one position's K and V."""
        return self.checkpoint.config.kv_bytes_per_token(self.dtype.itemsize)

    def explain_out_of_memory(self) -> AbstractContextManager[None]:
        """Raises EngineMemoryError, with the plan's sums, where the allocator gives up."""
        cache = self.max_sequences * self.ctx_size * self.token_bytes
        return explain_out_of_memory(self.device, weights=self.weights, cache=cache)


@dataclass(frozen=True)
class EngineParts:
    """What takes the memory. river_settings: of the river that the model got, if any."""

    model: Model
    arena: KVArena
    river_settings: RiverSettings | None


# Warnings point at the call of Engine.load: their stack levels count on it calling plan_load and load_parts itself.


def plan_load(model_dir: str | Path, asked: LoadRequest) -> LoadPlan:
    """Read all of a model folder but its weights, settle what is to be loaded and whether it fits.

    Sets torch's number of threads. Raises what ``Engine.load`` raises.
    """
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    checkpoint = Checkpoint.open(model_dir)
    config = checkpoint.config
    tokenizer = Tokenizer.load(checkpoint.model_dir, vocab_size=config.vocab_size)
    generation_config = load_generation_config(checkpoint.model_dir, config)
    device = resolve_device(asked.device)
    dtype = resolve_dtype(asked.dtype, checkpoint.stored_dtype, device)
    mode, options, held = asked.mode, asked.options, _held_layers(asked, config)
    limited = options.limited(config.num_layers, held) if mode == "river" else options
    candidates = asked.river.candidates(config, mode, dtype, device)
    fused = asked.graph and dtype == torch.bfloat16 and triton_runs(device.type)
    head, conditions = asked.river.head, {}
    if mode == "river":
        conditions = text_conditions(limited, candidates[0], head=head, dtype=dtype, device=device, fused=fused)
    if asked.auto:
        certified = certified_tau(checkpoint, candidates[0], conditions)
        if certified is None:
            mode, candidates = "exact", []
        else:
            options = replace(options, tau=certified)
    positions = effective_ctx_size(asked.ctx_size, config.context_limit)
    if asked.ctx_size > positions and asked.ctx_size != DEFAULT_CTX_SIZE:
        warnings.warn(
            f"{model_dir}: the context is {positions} tokens, the model's limit, not {asked.ctx_size}",
            RiverinferWarning,
            stacklevel=3,
        )
    absent = (config.num_layers - held) * sum(rows * columns for rows, columns in linear_shapes(config).values())
    backbone = (checkpoint.parameters - absent) * dtype.itemsize
    river = max((river_bytes(config, each, head, dtype, device) for each in candidates), default=0)
    plan = LoadPlan(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        generation_config=generation_config,
        device=device,
        dtype=dtype,
        mode=mode,
        options=options,
        conditions=conditions,
        held=held,
        river=asked.river,
        candidates=candidates,
        ctx_size=positions,
        max_sequences=asked.max_sequences,
        fused=fused,
        weights=backbone + river,
    )
    return _fitted(plan, backbone, model_dir)


def _held_layers(asked: LoadRequest, config: ModelConfig) -> int:
    if asked.backbone_layers is None:
        return config.num_layers
    if asked.mode != "river":
        raise InvalidRequestError("needs river mode", field="backbone_layers", remedy='give mode="river" too')
    check_integer("backbone_layers", asked.backbone_layers, 0, config.num_layers)
    return asked.backbone_layers


def _fitted(plan: LoadPlan, backbone: int, model_dir: str | Path) -> LoadPlan:
    """``plan``, in exact mode if only a lossless mode's river is too much. Raises EngineMemoryError.

    backbone: bytes; the plan's other weights are the river.
    """
    fits = partial(
        require_memory,
        plan.device,
        slots=plan.max_sequences,
        ctx_size=plan.ctx_size,
        bytes_per_token=plan.token_bytes,
    )
    river = plan.weights - backbone
    try:
        fits(weights=plan.weights)
    except EngineMemoryError:
        if plan.mode != "lossless" or not river:
            raise
        fits(weights=backbone)
        warnings.warn(
            f"{model_dir}: backbone and river ({gib(backbone)} + {gib(river)}) do not both fit into memory;"
            " running exact mode (river mode with --backbone-layers needs less)",
            RiverinferWarning,
            stacklevel=4,
        )
        return replace(plan, mode="exact", candidates=[], weights=backbone)
    return plan


def load_parts(plan: LoadPlan, *, check: bool = False, progress: Progress | None = None) -> EngineParts:
    """Allocate the cache, read the weights, and make or read the river. Raises what ``Engine.load`` raises."""
    config = plan.checkpoint.config
    arena = KVArena(config, slots=plan.max_sequences, ctx_size=plan.ctx_size, dtype=plan.dtype, device=plan.device)
    model = load_model(
        plan.checkpoint,
        device=plan.device,
        dtype=plan.dtype,
        backbone_layers=plan.held,
        check=check,
        progress=progress,
    )
    # Kernels read whole tables, also those of a measurement.
    model.rope.reserve(max(plan.ctx_size, MEASURED_POSITIONS) if plan.fused else plan.ctx_size)
    if plan.fused:
        from riverinfer.device_setup import tune_kernels

        tune_kernels(config, plan.device, progress)
    settings = None
    if plan.candidates:
        settings = load_river(
            model,
            plan.tokenizer,
            plan.checkpoint,
            plan.candidates,
            head=plan.river.head,
            progress=progress,
            optional=plan.mode != "river" and not plan.river.named,
            fused=plan.fused,
        )
    model.script()
    return EngineParts(model, arena, settings)


def effective_ctx_size(requested: int, limit: int) -> int:
    """0 means the model's own limit; more than the limit is capped to it."""
    return limit if requested == 0 else min(requested, limit)
