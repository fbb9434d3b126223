"""``riverinfer profile``: how long tokens take, where the time goes, and how far that is from what the machine can."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from riverinfer.cli.output_file import output_path, write_whole
from riverinfer.cli.setup import model_dir, use_huge_pages
from riverinfer.errors import InvalidRequestError
from riverinfer.progress import ConsoleProgress

if TYPE_CHECKING:
    from riverinfer.engine import Engine
    from riverinfer.profiling.ranges import Ranges
    from riverinfer.profiling.result import Profile
    from riverinfer.profiling.runner import Workload
    from riverinfer.profiling.spans import Recording
    from riverinfer.river import RiverOptions

MODES = ("exact", "river", "lossless")


def run(args: argparse.Namespace) -> int:
    """Measure and print, or compare two profiles that were saved."""
    if args.compare is not None:
        return _compare(args)
    use_huge_pages()
    # Before a model is loaded, refuse what could not be done or written at the end.
    modes = _modes(args.mode)
    named = {flag: given for flag, given in (("--tau", args.tau), ("--depth", args.depth)) if given is not None}
    if named and "river" not in modes:
        raise InvalidRequestError(f"{next(iter(named))} has no effect without river mode", remedy="add it to --mode")
    places = {
        name: output_path(getattr(args, name), suffixes)
        for name, suffixes in (("save", (".json",)), ("trace", (".json",)), ("report", (".html",)))
        if getattr(args, name) is not None
    }
    if len({path.resolve() for path in places.values()}) < len(places):
        raise InvalidRequestError("is named for two outputs", file=places["save"], remedy="give each a file of its own")
    if "report" in places:
        from riverinfer.heat_map import require_matplotlib

        require_matplotlib()
    from riverinfer.profiling.ranges import Ranges
    from riverinfer.profiling.runner import Workload

    workload = Workload(
        args.prompt_len, args.new_tokens, args.context, args.batch, args.runs, args.warmup, args.temperature, args.seed
    )
    options = _river_options(args)
    profile, recordings = _measure(args, modes, workload, options, Ranges(args.nvtx))
    print(_shown(args, profile), flush=True)  # whatever becomes of the files
    for name, path in places.items():
        write_whole(path, _content(name, profile, recordings).encode("utf-8", errors="replace"))
        print(f"riverinfer: wrote {path}", file=sys.stderr)
    return 0


def _modes(text: str | None) -> list[str]:
    if text is None:
        return list(MODES)
    modes = list(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = next((mode for mode in modes if mode not in MODES), None)
    if unknown is not None:
        raise InvalidRequestError(f"unknown mode {unknown!r}", field="--mode", remedy=f"use {', '.join(MODES)}")
    return modes


def _river_options(args: argparse.Namespace) -> RiverOptions:
    from riverinfer.river import RiverOptions

    if args.depth is None:
        return RiverOptions(tau=0.5 if args.tau is None else args.tau)
    if args.depth == 0:
        return RiverOptions(gate="always")
    return RiverOptions(gate="fixed", min_depth=args.depth)


def _measure(
    args: argparse.Namespace, modes: list[str], workload: Workload, options: RiverOptions, ranges: Ranges
) -> tuple[Profile, list[Recording]]:
    from riverinfer.profiling.environment import environment
    from riverinfer.profiling.prompt import profile_ids
    from riverinfer.profiling.result import Profile
    from riverinfer.profiling.runner import profile_modes

    progress = ConsoleProgress(quiet_s=1.0)
    began = time.perf_counter()
    with _load(args, modes, workload, progress) as engine:
        load_s = time.perf_counter() - began
        if not _river_named(args) and not engine.model.river:
            modes.remove("river")
            print("riverinfer: note: no river is faster than the backbone here; --mode river has one", file=sys.stderr)
        if "river" in modes:
            options = options.limited(engine.config.num_layers, engine.model.held_layers)
        ids = profile_ids(engine.tokenizer, workload.context + workload.prompt_len)
        measured = profile_modes(engine, modes, workload, ids, river=options, ranges=ranges, progress=progress)
        config = engine.config
        profile = Profile(
            environment=environment(engine.model.device),
            model={
                "name": engine.model_dir.resolve().name,
                "family": config.family,
                "layers": config.num_layers,
                "hidden_size": config.hidden_size,
                "vocab_size": config.vocab_size,
                "parameters": _parameters(engine),
                "dtype": str(engine.model.dtype).removeprefix("torch."),
            },
            settings={
                **asdict(workload),
                "tau": options.tau if "river" in modes and options.gate == "similarity" else None,
                "depth": args.depth,
                "river": None if engine.river_settings is None else str(engine.river_settings),
                "river_head": args.river_head,
                "graph": not args.no_graph,
            },
            load_s=load_s,
            peak_bytes=measured.peak_bytes,
            machine=measured.machine,
            modes=measured.modes,
        )
    return profile, measured.recordings


def _load(args: argparse.Namespace, modes: list[str], workload: Workload, progress: ConsoleProgress) -> Engine:
    folder = model_dir(args)
    from riverinfer.engine import Engine

    mode = next(mode for mode in ("lossless", "river", "exact") if mode in modes)
    return Engine.load(
        folder,
        device=args.device,
        dtype=args.dtype,
        ctx_size=workload.positions,
        max_sequences=workload.batch,
        mode=mode,
        threads=args.threads,
        progress=progress,
        # A river that was asked for is there, whether or not it is fast.
        draft="river" if _river_named(args) and "river" in modes else "auto",
        graph=not args.no_graph,
        river_bits=args.river_bits,
        river_group=args.river_group,
        river_method=args.river_method,
        river_head=args.river_head,
    )


def _river_named(args: argparse.Namespace) -> bool:
    return args.mode is not None or args.tau is not None or args.depth is not None


def _parameters(engine: Engine) -> int:
    from riverinfer.checkpoint import Checkpoint

    return Checkpoint.open(engine.model_dir).parameters


def _content(name: str, profile: Profile, recordings: list[Recording]) -> str:
    if name == "save":
        return profile.as_json()
    if name == "trace":
        from riverinfer.profiling.trace_events import trace_json

        return trace_json(recordings, model=profile.model["name"], environment=profile.environment)
    from riverinfer.profiling.report import report_html

    return report_html(profile, recordings)


def _shown(args: argparse.Namespace, profile: Profile) -> str:
    if args.json:
        return profile.as_json().rstrip("\n")
    from riverinfer.profiling import tables

    if args.csv:
        return tables.csv_text(profile).rstrip("\n")
    if args.md:
        return tables.markdown(profile).rstrip("\n")
    return tables.terminal(profile, width=_width(), color=sys.stdout.isatty()).rstrip("\n")


def _width() -> int:
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 140))


def _compare(args: argparse.Namespace) -> int:
    from riverinfer.profiling.compare import compare, terminal_comparison
    from riverinfer.profiling.result import load_profile

    for flag in ("model_dir", "mode", "csv", "md", "save", "report", "trace", "nvtx"):
        if getattr(args, flag):
            name = "MODEL_DIR" if flag == "model_dir" else f"--{flag}"
            raise InvalidRequestError(f"{name} does not go with --compare", remedy="leave it out; --json does")
    a, b = (load_profile(Path(path)) for path in args.compare)
    found = compare(a, b)
    if args.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        names = args.compare[0].name, args.compare[1].name
        print(terminal_comparison(found, names=names, width=_width(), color=sys.stdout.isatty()).rstrip("\n"))
    return 0
