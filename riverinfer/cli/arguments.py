"""Commands and flags, under the names that users of neighbouring tools have in their fingers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from riverinfer.cli.measuring_flags import audit_flags, calibrate_flags, paper_flags, profile_flags
from riverinfer.cli.shared_flags import (
    model_flags,
    place_flags,
    prompt_flags,
    river_flags,
    runtime_flags,
    sampling_flags,
    template_flags,
)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; ``--ctx_size`` is ``--ctx-size``. Exits 2 on usage errors, 0 after --help."""
    parser = build_parser()
    known = _long_options(parser)

    def dashes(word: str) -> str:
        name, equals, value = word.partition("=")
        option = name.replace("_", "-")
        return option + equals + value if option in known else word

    return parser.parse_args([dashes(word) for word in argv])


def _long_options(parser: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        found.update(option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= _long_options(command)
    return found


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="riverinfer",
        description="Inference for decoder-only language models: the next token sooner, and right.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_VersionAction)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    chat = _command(commands, "chat", "chat with a model in the terminal, or one message a line through a pipe")
    model_flags(chat)
    runtime_flags(chat)
    river_flags(chat)
    sampling_flags(chat)
    template_flags(chat)
    prompt_flags(chat)
    chat.add_argument("-st", "--single-turn", action="store_true", help="answer once and exit")
    chat.add_argument("--no-history", action="store_true", help="do not keep an input history file")
    chat.add_argument("--no-stats", action="store_true", help="no line of timings after each answer")
    chat.add_argument(
        "--show-depth", action="store_true", help="river mode: colour tokens by exit depth, as /depth does"
    )
    chat.add_argument("--color", choices=("auto", "on", "off"), default="auto", help="default: auto")

    generate = _command(commands, "generate", "answer or continue one prompt and exit")
    model_flags(generate)
    runtime_flags(generate)
    river_flags(generate)
    sampling_flags(generate)
    template_flags(generate)
    prompt_flags(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    generate.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: log-probabilities, and the N most probable tokens"
    )
    generate.add_argument("--stats", action="store_true", help="print timings to stderr at the end")

    convert = _command(commands, "convert", "turn a GGUF file or a PyTorch checkpoint into a model folder")
    convert.add_argument("src", type=Path, metavar="SRC", help="a .gguf file, or a folder with .bin/.pth weights")
    convert.add_argument("dst", type=Path, metavar="DST", help="the folder to make; must not exist or be empty")
    convert.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="dtype of the result (default: by source)"
    )

    calibrate_flags(
        _command(commands, "calibrate", "find the loosest --tau whose disagreement with exact mode is surely small")
    )

    audit_flags(
        _command(commands, "audit", "measure what river mode loses and why, against exact mode and fair controls")
    )

    paper_flags(
        _command(commands, "paper", "measure accuracy and speed on benchmarks, beside the River-LLM paper's table")
    )

    text = "the quantized copies that river mode uses, and a picture of where tokens exit"
    river = commands.add_parser("river", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    actions = river.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = _command(actions, "build", "make the quantized copy of a model, by default what lossless mode uses")
    _river_copy(build)
    place_flags(build)
    _river_copy(_command(actions, "info", "list the copies in the cache, or those of one model"))
    _river_copy(_command(actions, "rm", "remove the copies in the cache, or those of one model"))
    _river_trace(_command(actions, "trace", "generate, up to 48 tokens without -n, and draw where they exit"))

    profile_flags(
        _command(commands, "profile", "measure latency, where a token's time goes, and how far from the limit it is")
    )

    info = _command(commands, "info", "say what would be loaded, without loading it")
    model_flags(info)
    info.add_argument("--dtype", default="auto", help="as for chat")
    info.add_argument("--device", default="auto", help="as for chat")
    info.add_argument("-c", "--ctx-size", type=int, default=4096, metavar="N", help="context to size the cache for")
    info.add_argument("--check", action="store_true", help="read all weights and refuse NaN or infinite ones")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


class _VersionAction(argparse.Action):
    """Looks the version up only when asked: reading package metadata costs start-up time."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import riverinfer

        print(f"riverinfer {riverinfer.__version__}")
        parser.exit()


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _river_copy(parser: argparse.ArgumentParser) -> None:
    """Flags of build, info and rm; that only build takes --bits and its like is for the command to say."""
    model_flags(parser)
    parser.add_argument(
        "--bits",
        "--river-bits",
        type=int,
        choices=(4, 8),
        help="bits a weight (default: 4; build without --group: what lossless mode drafts fastest in, measured)",
    )
    parser.add_argument(
        "--group", "--river-group", type=int, metavar="G", help="weights a scale (default: 64; as for --bits)"
    )
    parser.add_argument("--method", choices=("hqq", "awq", "rtn"), help="quantizer (default: hqq)")


def _river_trace(parser: argparse.ArgumentParser) -> None:
    model_flags(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".svg or .png (these need riverinfer[plots]) or .json, the figures alone; an existing file is replaced",
    )
    runtime_flags(parser, mode=False)
    river_flags(parser)
    sampling_flags(parser)
    template_flags(parser)
    prompt_flags(parser)
    parser.set_defaults(mode="river", max_tokens=48)
