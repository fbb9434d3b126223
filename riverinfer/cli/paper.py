"""``riverinfer paper``: the paper's main table beside what this machine measures."""

from __future__ import annotations

import argparse
import json
import warnings
from typing import TYPE_CHECKING

from riverinfer.cli.setup import load_engine, model_dir, refuse_other_templates, use_huge_pages
from riverinfer.errors import InvalidRequestError, RiverinferWarning
from riverinfer.progress import ConsoleProgress

if TYPE_CHECKING:
    from riverinfer.engine import Engine
    from riverinfer.evidence.benchmark import Benchmark


def run(args: argparse.Namespace) -> int:
    """Measure and print the table, or one JSON object."""
    use_huge_pages()
    from riverinfer.sampling import check_integer

    # Before a model is loaded, refuse what could not be asked.
    check_integer("--max-tokens", args.max_tokens, 1)
    if args.limit is not None:
        check_integer("--limit", args.limit, 1)
    if args.shots is not None:
        check_integer("--shots", args.shots, 0)
    refuse_other_templates(args)
    folder = model_dir(args)
    from riverinfer.chat_template import load_templates
    from riverinfer.evidence.paper import Settings, as_dict, measure
    from riverinfer.evidence.paper_table import table

    chat = not args.no_chat_template and bool(load_templates(folder))
    benchmarks = _benchmarks(args, chat)
    progress = ConsoleProgress(quiet_s=1.0)
    with _load(args) as engine:
        measured = [
            measure(engine, each, chat=chat, max_tokens=args.max_tokens, progress=progress) for each in benchmarks
        ]
        name = engine.model_dir.resolve().name
        settings = Settings.of(engine, certified=args.tau == "auto", chat=chat, max_tokens=args.max_tokens)
    if args.json:
        print(json.dumps(as_dict(name, measured, settings), indent=1))
    else:
        print(table(name, measured, settings))
    return 0


def _benchmarks(args: argparse.Namespace, chat: bool) -> list[Benchmark]:
    from riverinfer.evidence.gsm import word_problems
    from riverinfer.evidence.human_eval import human_eval

    found = [
        word_problems(name, path, shots=args.shots, limit=args.limit)
        for name, path in (("GSM8K", args.gsm8k), ("MATH", args.math))
        if path is not None
    ]
    if args.humaneval:
        found.append(human_eval(chat=chat, limit=args.limit, samples=args.samples))
    elif args.samples is not None:
        raise InvalidRequestError("--samples has no effect without --humaneval", remedy="add it")
    if not found:
        raise InvalidRequestError("there is nothing to ask", remedy="give --gsm8k FILE, --math FILE or --humaneval")
    return found


def _load(args: argparse.Namespace) -> Engine:
    with warnings.catch_warnings():
        # The engine would note that it runs exact mode, which here is refused.
        warnings.filterwarnings("ignore", ".*could certify no tau", RiverinferWarning)
        engine = load_engine(args)
    if engine.mode != "river":
        engine.close()
        raise InvalidRequestError(
            "a calibration could certify no tau for this river, no token would exit",
            field="--tau",
            remedy="calibrate with more prompts (riverinfer calibrate MODEL_DIR --prompts FILE), or give a number",
        )
    return engine
