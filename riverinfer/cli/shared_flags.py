"""Flags that several commands take, in groups, under the names that users of neighbouring tools know."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# What river mode's flags are where they are not given, or a command has none.
RIVER_DEFAULTS: dict[str, Any] = {
    "tau": 0.5,
    "min_depth": 1,
    "max_depth": None,
    "gate": "similarity",
    "prefill": "exact",
    "prefill_depth": None,
    "backbone_layers": None,
    "repair": 0,
}


def model_flags(parser: argparse.ArgumentParser) -> None:
    """The model's folder."""
    parser.add_argument(
        "model_dir",
        type=Path,
        nargs="?",
        metavar="MODEL_DIR",
        help="a model folder as the hub has them; without it the demo model, SmolLM2-135M-Instruct",
    )


def runtime_flags(parser: argparse.ArgumentParser, *, mode: bool = True) -> None:
    """Where and how it runs. ``mode``: whether the command can be asked for one."""
    group = parser.add_argument_group("runtime")
    if mode:
        group.add_argument(
            "--mode",
            choices=("lossless", "exact", "river"),
            default="lossless",
            help="lossless: the checkpoint's own output, sooner: a quantized copy drafts, the backbone verifies; exact:"
            " a backbone pass a token; river: tokens exit early into the copy, at a loss (default: lossless)",
        )
    place_flags(group)
    group.add_argument(
        "-c", "--ctx-size", type=int, default=4096, metavar="N", help="positions of context, 0 = the model's own"
    )
    group.add_argument(
        "--no-graph", action="store_true", help="on a GPU: walk layer by layer in torch, no fused kernels"
    )
    group.add_argument("--check", action="store_true", help="refuse weights that are NaN or infinite")


def place_flags(parser: argparse._ActionsContainer) -> None:
    """Device, dtype and threads."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16, float32 (default: auto)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="CPU threads")


def river_flags(parser: argparse.ArgumentParser) -> None:
    """River and lossless mode."""
    group = parser.add_argument_group("river and lossless mode")
    gate_flags(group)
    group.add_argument(
        "--prefill",
        choices=("exact", "last", "min", "fixed"),
        help="prompts: all backbone; exit by the last token or the least similar; fixed depth (default: exact)",
    )
    group.add_argument("--prefill-depth", type=int, metavar="N", help="with --prefill fixed (default: --min-depth)")
    group.add_argument(
        "--backbone-layers", type=int, metavar="N", help="load only the first N backbone layers; all tokens exit there"
    )
    group.add_argument("--repair", type=int, metavar="R", help="rewrite K and V exactly every R tokens")
    group.add_argument(
        "--draft",
        choices=("auto", "river", "lookup"),
        default="auto",
        help="lossless mode: lookup repeats what stands in the text and needs no river; river has one even where it is"
        " no faster than the backbone (default: auto)",
    )
    copy_flags(group, "4; lossless: the faster, measured")
    parser.set_defaults(**RIVER_DEFAULTS)


def gate_flags(group: argparse._ActionsContainer) -> None:
    """When tokens exit."""
    tau_flag(group)
    depth_flags(group)
    group.add_argument(
        "--gate",
        choices=("similarity", "fixed", "never", "always"),
        help="when tokens exit; fixed: after --min-depth layers (default: similarity)",
    )


def tau_flag(group: argparse._ActionsContainer) -> None:
    """The similarity gate's threshold."""
    group.add_argument(
        "--tau",
        type=_tau,
        metavar="T",
        help="exit above this similarity; auto: what riverinfer calibrate certified (default: 0.5)",
    )


def depth_flags(group: argparse._ActionsContainer) -> None:
    """How many backbone layers tokens pass, at least and at most."""
    group.add_argument("--min-depth", type=int, metavar="N", help="backbone layers for every token")
    group.add_argument("--max-depth", type=int, metavar="N", help="every token exits here at the latest")


def copy_flags(group: argparse._ActionsContainer, bits: str) -> None:
    """Which copy an engine exits into or drafts in. ``bits``: the default, in words."""
    group.add_argument("--river-bits", type=int, choices=(4, 8), help=f"bits a weight (default: {bits})")
    group.add_argument("--river-group", type=int, metavar="G", help="weights a scale, 0 = a row (8 bits) (default: 64)")
    group.add_argument(
        "--river-method",
        choices=("hqq", "awq", "rtn"),
        default="hqq",
        help="quantizer; awq: hqq calibrated on a few texts, slow to make (default: hqq)",
    )
    group.add_argument(
        "--river-head",
        choices=("quantized", "exact"),
        default="quantized",
        help="logits of tokens that exited: a 4-bit head whose highest logits are made exact, or the model's own head"
        " (default: quantized)",
    )


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """What is drawn and when an answer ends."""
    group = parser.add_argument_group(
        "sampling", "Defaults are the model's own, from generation_config.json; greedy where it says nothing."
    )
    group.add_argument(
        "-n", "--max-tokens", "--predict", "--n-predict", type=int, metavar="N", help="stop after N tokens, -1 = never"
    )
    group.add_argument("--temp", "--temperature", dest="temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="0 keeps every token")
    group.add_argument("--top-p", type=float, metavar="P", help="1 keeps every token")
    group.add_argument("--min-p", type=float, metavar="P", help="0 keeps every token")
    group.add_argument(
        "--repeat-penalty", "--repetition-penalty", dest="repetition_penalty", type=float, metavar="R", help="1 is none"
    )
    group.add_argument("-s", "--seed", type=int, metavar="N", help="-1 draws one; the one used is printed")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before TEXT; repeatable")
    group.add_argument("--ignore-eos", action="store_true", help="go on after end-of-sequence tokens")
    group.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="none ignores the model's sampling defaults (default: auto)",
    )


def template_flags(parser: argparse.ArgumentParser) -> None:
    """How a prompt is put to a chat model."""
    group = parser.add_argument_group("chat template")
    group.add_argument("-sys", "--system-prompt", metavar="TEXT")
    group.add_argument("--system-prompt-file", type=Path, metavar="FILE")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--chat-template", type=Path, metavar="FILE", help="a Jinja file instead of the model's own")
    which.add_argument("--chat-template-name", metavar="NAME", help="one of the model's own templates")
    which.add_argument("--no-chat-template", action="store_true", help="send bare text")
    group.add_argument(
        "--chat-template-kwargs", type=_json_object, default={}, metavar="JSON", help="variables for the template"
    )


def prompt_flags(parser: argparse.ArgumentParser) -> None:
    """The prompt, one way or the other."""
    group = parser.add_argument_group("prompt").add_mutually_exclusive_group()
    group.add_argument("-p", "--prompt", metavar="TEXT", help="- reads standard input")
    group.add_argument("-f", "--file", type=Path, metavar="FILE", help="read the prompt from a file")


def _tau(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}, not a number or auto") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"is not valid JSON ({exc})") from exc
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
