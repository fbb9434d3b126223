"""The modes of generation, and which of them a call to a loaded engine takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from riverinfer.errors import InvalidRequestError
from riverinfer.river import RiverOptions

if TYPE_CHECKING:
    from riverinfer.engine import Engine

MODES = ("lossless", "exact", "river")


def check_mode(mode: str) -> None:
    """Raises InvalidRequestError for what is none."""
    if mode not in MODES:
        raise InvalidRequestError(f"unknown mode {mode!r}", field="mode", remedy=f"use {', '.join(MODES)}")


def choose_mode(
    engine: Engine, mode: str | None, options: RiverOptions | None, similarities: bool
) -> tuple[str, RiverOptions | None]:
    """``Engine.choose_mode``."""
    mode = mode or engine.mode
    check_mode(mode)
    model, layers = engine.model, engine.config.num_layers
    if mode != "river" and model.offloaded:
        raise InvalidRequestError(
            f"only {model.held_layers} of {layers} backbone layers are loaded",
            field="mode",
            remedy='use mode="river", or load without backbone_layers (--backbone-layers)',
        )
    for field, wanted in (("similarities", similarities), ("river", options is not None)):
        if wanted and mode == "exact":
            raise InvalidRequestError("has no effect in exact mode", field=field, remedy='give mode="river" too')
    if not model.river:
        if mode == "river" or options is not None:
            asked, remedy = ("mode", 'mode="river"') if mode == "river" else ("river", 'draft="river"')
            raise InvalidRequestError("no river is loaded", field=asked, remedy=f"load the engine with {remedy}")
        return mode, None
    if mode == "exact":
        return mode, None
    # Drafts go straight through the river: what passes the backbone first costs more than it is accepted more.
    default = engine.river_options if mode == "river" else RiverOptions(gate="always")
    return mode, (options or default).limited(layers, model.held_layers)
