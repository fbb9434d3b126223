"""``riverinfer river build|info|rm|trace``: the quantized copies of models' linears in the cache, and what they do."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING

from riverinfer.errors import InvalidRequestError
from riverinfer.progress import ConsoleProgress

if TYPE_CHECKING:
    import torch

    from riverinfer.checkpoint import Checkpoint
    from riverinfer.weights_convert.channel_scales import Calibration
    from riverinfer.weights_convert.river_artifact import RiverSettings


def run(args: argparse.Namespace) -> int:
    """Run ``args.action``. ``build`` without a folder takes the demo model; ``info`` and ``rm`` then take all."""
    actions = {"build": _build, "info": _info, "rm": _remove, "trace": _trace}
    if args.action not in actions:
        raise InvalidRequestError(f"unknown action {args.action!r}", remedy=f"use {', '.join(actions)}")
    if args.action in ("info", "rm") and any(getattr(args, name) is not None for name in ("bits", "group", "method")):
        raise InvalidRequestError(
            f"{args.action} takes no --bits, --group or --method", remedy="leave them out: it covers every river"
        )
    return actions[args.action](args)


def _build(args: argparse.Namespace) -> int:
    from riverinfer.checkpoint import Checkpoint
    from riverinfer.cli.setup import model_dir
    from riverinfer.loader import resolve_device
    from riverinfer.weights_convert.river_artifact import build_river, open_river

    settings = _settings(args)
    checkpoint = Checkpoint.open(model_dir(args))
    device = resolve_device(getattr(args, "device", None) or "auto")
    began = time.monotonic()
    calibrate = partial(_calibrate, checkpoint, device)
    path = build_river(checkpoint, settings, device=device, progress=ConsoleProgress(), calibrate=calibrate)
    seconds = time.monotonic() - began
    river = open_river(checkpoint, settings)
    weights = river.weights
    print(f"path             {path}")
    print(f"size             {_size(path.stat().st_size)}")
    print(f"seconds          {seconds:.1f}")
    print(
        f"bits per weight  {8 * river.nbytes / weights:.2f} (scales and offsets included, {weights / 1e6:.1f}M weights)"
    )
    return 0


def _calibrate(checkpoint: Checkpoint, device: torch.device) -> Calibration:
    """The model's backbone, loaded for this alone, on the calibration texts."""
    from riverinfer.calibration import MAX_TOKENS, calibrate
    from riverinfer.loader import load_model, resolve_dtype
    from riverinfer.memory import require_memory
    from riverinfer.tokenizer import Tokenizer

    config = checkpoint.config
    dtype = resolve_dtype("auto", checkpoint.stored_dtype, device)
    per_token = config.kv_bytes_per_token(dtype.itemsize)
    weights = checkpoint.parameters * dtype.itemsize
    require_memory(device, weights=weights, slots=1, ctx_size=MAX_TOKENS, bytes_per_token=per_token)
    tokenizer = Tokenizer.load(checkpoint.model_dir, vocab_size=config.vocab_size)
    return calibrate(load_model(checkpoint, device=device, dtype=dtype, progress=ConsoleProgress()), tokenizer)


def _info(args: argparse.Namespace) -> int:
    from riverinfer.errors import WeightsError
    from riverinfer.weights_convert.river_artifact import list_rivers, open_river

    checkpoint = _checkpoint(args)
    rivers = list_rivers(checkpoint)
    if not rivers:
        print("no rivers" if checkpoint is None else f"no river of {args.model_dir}")
    for info in rivers:
        state = info.problem and f"unreadable: {info.problem}"
        if checkpoint is not None and info.settings is not None:
            try:
                open_river(checkpoint, info.settings)
                state = "valid"
            except WeightsError as exc:
                state = exc.problem
        settings = "?" if info.settings is None else str(info.settings)
        print(f"{info.path}\n  {settings}, {_size(info.nbytes)}, of {info.source_folder or '?'}")
        if state:
            print(f"  {state}")
    if checkpoint is not None:
        _print_choice(checkpoint)
    return 0


def _print_choice(checkpoint: Checkpoint) -> None:
    """What lossless mode measured and chose on this machine, if it did."""
    from riverinfer.river_choice import read_choice

    choice, figures = read_choice(checkpoint)
    if choice:
        print(f"lossless mode drafts in {choice}; expected speed over exact mode, measured on this machine:")
    for name, values in figures.items():
        print(
            f"  {name}: {values['speedup']:.2f}x (a draft step costs {values['draft_cost']:.2f} of an exact one,"
            f" {values['acceptance'] * 100:.0f} % are accepted)"
        )


def _remove(args: argparse.Namespace) -> int:
    from riverinfer.weights_convert.river_artifact import remove_rivers

    count = remove_rivers(_checkpoint(args))
    print(f"removed {count} river{'' if count == 1 else 's'}")
    return 0


def _trace(args: argparse.Namespace) -> int:
    from riverinfer.cli.river_trace import run as trace

    return trace(args)


def _checkpoint(args: argparse.Namespace) -> Checkpoint | None:
    if args.model_dir is None:
        return None
    from riverinfer.checkpoint import Checkpoint

    return Checkpoint.open(args.model_dir)


def _settings(args: argparse.Namespace) -> RiverSettings:
    """The flags over the defaults; a flag that is None was not given."""
    from riverinfer.weights_convert.river_artifact import RiverSettings

    given = {name: getattr(args, name, None) for name in ("bits", "group", "method")}
    return RiverSettings(**{name: value for name, value in given.items() if value is not None})


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
