"""What a GPU needs before the first token: blocks that fit its kernels, and graphs of the steps to come."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from riverinfer.cache_dir import cache_dir
from riverinfer.config import ModelConfig
from riverinfer.device_decode import DeviceDecoder
from riverinfer.device_rounds import RoundLaunches
from riverinfer.device_walk import ROWS, DeviceWalk, kernels_take
from riverinfer.kernels.linear import current
from riverinfer.kernels.triton_tuning import DeviceTimer, prepare
from riverinfer.kv_arena import KVArena
from riverinfer.progress import Progress
from riverinfer.weights_convert.river_artifact import linear_shapes

if TYPE_CHECKING:
    from riverinfer.engine import Engine


def tune_kernels(config: ModelConfig, device: torch.device, progress: Progress | None = None) -> None:
    """Blocks for all matrices of a model: known for this GPU, or measured once and kept in the cache folder.

    Before anything is computed with them: they order the sums.
    """
    if device.type != "cuda":
        return
    shapes = [*linear_shapes(config).values(), (config.vocab_size, config.hidden_size)]
    usual = [shape for shape in shapes if shape[1] % 64 == 0]
    name = torch.cuda.get_device_name(device)
    with current(device):
        prepare(usual, name, cache_dir() / "kernels", DeviceTimer(device, 64), progress=progress)


def decode_on_device(engine: Engine, arena: KVArena, progress: Progress | None = None) -> None:
    """Let ``engine`` decode with fused kernels; on a GPU the graphs that its mode needs are captured here.

    A model whose shapes they do not take stays with torch.
    """
    model = engine.model
    if not kernels_take(model):
        return
    model.device_walk = walk = DeviceWalk(model, arena)
    rope = model.config.rope
    if rope.rope_type == "dynamic" and arena.ctx_size > rope.max_position_embeddings:
        return  # frequencies that change with every token: steps follow each other on the host
    engine.decoder = DeviceDecoder(walk, engine.tokenizer.vocab_size)
    engine.rounds = RoundLaunches(engine.decoder)
    if model.device.type != "cuda":
        return
    decoder, rounds = engine.decoder, engine.rounds
    decoder.greedy = not engine.default_params().temperature
    wanted: list[Callable[[], None]] = [partial(decoder.prepare, "gated" if engine.mode == "river" else "backbone")]
    if engine.mode == "lossless":
        wanted += [rounds.prepare_drafts] if model.river else []
        wanted += [partial(rounds.prepare_verify, rows) for rows in ROWS]
    for number, capture in enumerate(wanted):
        if progress is not None:
            progress("Capturing steps", number, len(wanted), "graphs")
        capture()
    if progress is not None:
        progress("Capturing steps", len(wanted), len(wanted), "graphs")
