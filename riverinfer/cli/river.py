"""``riverinfer river build|info|rm|trace``: the quantized copies of models' linears in the cache, and what they do."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
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
    """Make the river that --bits and --group name; without them what lossless mode drafts in, as its first start does.

    What that measures and chooses is kept for it.
    """
    from riverinfer.checkpoint import Checkpoint
    from riverinfer.cli.setup import model_dir, use_huge_pages
    from riverinfer.loader import resolve_device, resolve_dtype
    from riverinfer.weights_convert.river_artifact import open_river

    use_huge_pages()
    _set_threads(args.threads)
    device = resolve_device(args.device)
    checkpoint = Checkpoint.open(model_dir(args))
    dtype = resolve_dtype(args.dtype, checkpoint.stored_dtype, device)
    began = time.monotonic()
    named = args.bits is not None or args.group is not None
    settings = (_build_named if named else _build_fastest)(args, checkpoint, device, dtype)
    seconds = time.monotonic() - began
    if settings is None:
        print("no river was made: lossless mode drafts in none here; --bits and --group make one for river mode")
        return 0
    river = open_river(checkpoint, settings)
    weights = river.weights
    print(f"path             {river.path}")
    print(f"size             {_size(river.path.stat().st_size)}")
    print(f"seconds          {seconds:.1f}")
    print(
        f"bits per weight  {8 * river.nbytes / weights:.2f} (scales and offsets included, {weights / 1e6:.1f}M weights)"
    )
    if not named:
        print(f"lossless mode drafts in it; riverinfer river info {checkpoint.model_dir} shows what was measured")
    return 0


def _build_named(
    args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> RiverSettings:
    from riverinfer.weights_convert.river_artifact import RiverSettings, build_river

    given = {name: getattr(args, name) for name in ("bits", "group", "method")}
    settings = RiverSettings(**{name: value for name, value in given.items() if value is not None})
    calibrate = partial(_calibrate, checkpoint, device, dtype)
    build_river(checkpoint, settings, device=device, progress=ConsoleProgress(), calibrate=calibrate)
    return settings


def _build_fastest(
    args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> RiverSettings | None:
    """None where lossless mode would draft in no river, for want of a packed kernel or of memory."""
    from riverinfer.engine import Engine
    from riverinfer.river_loading import RiverRequest

    method = args.method or "hqq"
    if not RiverRequest(method=method).candidates(checkpoint.config, "lossless", dtype, device):
        return None
    # With draft="river" one that cannot be made is an error, where a chat would do without.
    with Engine.load(
        checkpoint.model_dir,
        device=args.device,
        dtype=args.dtype,
        max_sequences=1,
        progress=ConsoleProgress(quiet_s=1.0),
        river_method=method,
        draft="river",
    ) as engine:
        return engine.river_settings


def _set_threads(threads: int | None) -> None:
    import torch

    from riverinfer.engine_loading import MAX_THREADS
    from riverinfer.sampling import check_integer

    if threads is not None:
        check_integer("threads", threads, 1, MAX_THREADS)
        torch.set_num_threads(threads)


def _calibrate(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Calibration:
    """The model's backbone, loaded for this alone, on the calibration texts."""
    from riverinfer.calibration import MAX_TOKENS, calibrate
    from riverinfer.loader import load_model
    from riverinfer.memory import require_memory
    from riverinfer.tokenizer import Tokenizer

    config = checkpoint.config
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
        _print_certificate(info.path)
    if checkpoint is not None:
        _print_choice(checkpoint)
    return 0


def _print_certificate(river: Path) -> None:
    """What a calibration found, if there was one. Whether it holds for what would run is for --tau auto to say."""
    from riverinfer.evidence.certificate import certificate_path, read_certificate

    path = certificate_path(river)
    if not path.exists():
        return
    try:
        found = read_certificate(path)
    except InvalidRequestError as exc:
        print(f"  certificate: {exc.problem}")
        return
    tau = "no tau" if found.tau is None else f"tau {found.tau:g}"
    print(
        f"  certified: {tau}, disagreement of at most {found.epsilon:g} with confidence {1 - found.delta:g},"
        f" {found.prompts} prompts, {found.date}"
    )


def _print_choice(checkpoint: Checkpoint) -> None:
    """What lossless mode measured and chose on this machine, if it did."""
    from riverinfer.river_choice import read_choice

    choice = read_choice(checkpoint)
    if choice is None:
        return
    told = {name: str(choice.conditions.get(name)).removeprefix("torch.") for name in ("threads", "dtype", "device")}
    method = choice.settings.rsplit("-", 1)[-1]
    asked = "" if method == "hqq" else f" if asked for --river-method {method}"
    threads = f"{told['threads']} thread{'' if told['threads'] == '1' else 's'}"
    print(
        f"lossless mode drafts in {choice.settings}{asked}; expected speed over exact mode, measured on this machine"
        f" with {threads}, {told['dtype']} on {told['device']}:"
    )
    for name, values in choice.figures.items():
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


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
