"""From parsed flags to an engine, sampling parameters, a session and a prompt: shared by chat and generate."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from riverinfer.cli.shared_flags import RIVER_DEFAULTS
from riverinfer.errors import InvalidRequestError
from riverinfer.progress import ConsoleProgress

if TYPE_CHECKING:
    from riverinfer.engine import Engine
    from riverinfer.sampling import SamplingParams
    from riverinfer.session import ChatSession

SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def model_dir(args: argparse.Namespace) -> Path:
    """The folder named on the command line, else the demo model's, made on first use."""
    if args.model_dir is not None:
        return args.model_dir
    from riverinfer.demo import demo_model

    return demo_model(progress=ConsoleProgress())


def use_huge_pages() -> None:
    """Before torch is imported, which reads this: on huge pages decoding is a few percent faster, prefill more so."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def load_engine(args: argparse.Namespace, *, max_sequences: int = 1) -> Engine:
    """Load the model the flags ask for, showing progress on stderr."""
    use_huge_pages()
    folder = model_dir(args)
    from riverinfer.engine import Engine

    return Engine.load(
        folder,
        device=args.device,
        dtype=args.dtype,
        ctx_size=args.ctx_size,
        max_sequences=max_sequences,
        mode=args.mode,
        threads=args.threads,
        check=args.check,
        progress=ConsoleProgress(quiet_s=1.0),
        tau=args.tau,
        min_depth=args.min_depth,
        max_depth=args.max_depth,
        gate=args.gate,
        prefill=args.prefill,
        prefill_depth=args.prefill_depth,
        backbone_layers=args.backbone_layers,
        repair=args.repair,
        draft=args.draft,
        graph=not args.no_graph,
        river_bits=args.river_bits,
        river_group=args.river_group,
        river_method=args.river_method,
        river_head=args.river_head,
    )


def check_flags(args: argparse.Namespace) -> None:
    """Refuse bad sampling values and unreadable files before a model is loaded."""
    from riverinfer.river import RiverOptions
    from riverinfer.river_loading import RiverRequest

    sampling_params(args, {})
    _refuse_idle_flags(args)
    refuse_idle_gate_flags(args)
    tau = RiverOptions.tau if args.tau == "auto" else args.tau
    RiverOptions(tau, args.min_depth, args.max_depth, args.gate, args.prefill, args.prefill_depth, repair=args.repair)
    RiverRequest(args.river_bits, args.river_group, args.river_method, args.river_head, args.draft)
    if args.chat_template is not None:
        read_text(args.chat_template)
    _system_prompt(args)
    refuse_other_templates(args)


def _refuse_idle_flags(args: argparse.Namespace) -> None:
    """Flags of river mode do nothing in the others: better said than ignored."""
    if args.mode == "river":
        return
    for name, default in RIVER_DEFAULTS.items():
        if getattr(args, name) != default:
            flag = "--" + name.replace("_", "-")
            raise InvalidRequestError(f"{flag} has no effect in {args.mode} mode", remedy="add --mode river")
    if getattr(args, "show_depth", False):
        raise InvalidRequestError("only river mode has exit depths", remedy="add --mode river")


def refuse_other_templates(args: argparse.Namespace) -> None:
    """With --tau auto: a certificate is about prompts under the model's own template, as ``calibrate`` puts them."""
    if args.tau != "auto":
        return
    for name in ("chat_template", "chat_template_name", "no_chat_template", "chat_template_kwargs"):
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            raise InvalidRequestError(
                f"{flag} does not go with --tau auto: what is certified is about the model's own chat template",
                remedy="leave one of them out",
            )


def refuse_idle_gate_flags(args: argparse.Namespace) -> None:
    """Flags that the chosen gate does not read."""
    from riverinfer.river import UNREAD

    for name in UNREAD.get(args.gate, ()):
        read_by_prompts = args.prefill == "fixed" and name != "tau"
        if getattr(args, name) != RIVER_DEFAULTS[name] and not read_by_prompts:
            flag = "--" + name.replace("_", "-")
            raise InvalidRequestError(f"{flag} has no effect with --gate {args.gate}", remedy="leave one of them out")


def recommended(args: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """The model's recommended sampling values that no flag replaces; none if the flags say so."""
    if args.generation_config == "none":
        return {}
    return {k: v for k, v in engine.generation_config.sampling.items() if getattr(args, k) is None}


def sampling_params(args: argparse.Namespace, recommended: dict[str, Any]) -> SamplingParams:
    """Flags over the recommended values. The seed is drawn here, so that it can be shown."""
    from riverinfer.sampling import SamplingParams

    chosen: dict[str, Any] = dict(recommended)
    for name in SAMPLING_FLAGS:
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    return SamplingParams(
        **chosen,
        seed=None if args.seed in (None, -1) else args.seed,
        max_tokens=None if args.max_tokens in (None, -1) else args.max_tokens,
        stop=tuple(args.stop or ()),
        ignore_eos=args.ignore_eos,
        logprobs=getattr(args, "logprobs", None),
    ).with_seed()


def make_session(args: argparse.Namespace, engine: Engine, *, template_optional: bool = False) -> ChatSession:
    """A session with the system prompt and template of the flags.

    ``template_optional``: a model without a chat template gets bare text instead of an error.
    """
    use_template = not args.no_chat_template
    if use_template and template_optional and args.chat_template is None:
        from riverinfer.chat_template import load_templates

        use_template = bool(load_templates(engine.model_dir))
    return engine.session(
        system=_system_prompt(args),
        chat_template=None if args.chat_template is None else read_text(args.chat_template),
        template_name=args.chat_template_name,
        use_template=use_template,
        template_kwargs=args.chat_template_kwargs,
    )


def _system_prompt(args: argparse.Namespace) -> str | None:
    if args.system_prompt_file is None:
        return args.system_prompt
    if args.system_prompt is not None:
        raise InvalidRequestError(
            "--system-prompt and --system-prompt-file exclude each other", remedy="give one of them"
        )
    return read_text(args.system_prompt_file)


def given_prompt(args: argparse.Namespace) -> str | None:
    """The text of --prompt or --file; ``-p -`` reads standard input to its end."""
    if args.prompt == "-":
        return sys.stdin.read()
    if args.file is not None:
        return read_text(args.file)
    return args.prompt


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises InvalidRequestError naming it."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidRequestError("is not UTF-8 text", file=path, remedy="give a text file") from exc
    except (OSError, RuntimeError, ValueError) as exc:  # no such file, no such ~user, a null byte
        reason = getattr(exc, "strerror", None) or exc
        raise InvalidRequestError(f"cannot be read ({reason})", file=path, remedy="check the path") from exc


def describe_params(params: SamplingParams, taken: dict[str, Any] | None = None, origin: str | None = None) -> str:
    """One line for people: the sampling in force, and which values were ``taken`` from the model's files."""
    parts = []
    if params.temperature == 0:
        parts.append("greedy")
    else:
        parts.append(f"temp {params.temperature:g}")
        parts += [f"top-k {params.top_k}"] if params.top_k else []
        parts += [f"top-p {params.top_p:g}"] if params.top_p < 1 else []
        parts += [f"min-p {params.min_p:g}"] if params.min_p else []
    parts += [f"repeat-penalty {params.repetition_penalty:g}"] if params.repetition_penalty != 1 else []
    parts += [f"max-tokens {params.max_tokens}"] if params.max_tokens else []
    parts += [f"stop {stop!r}" for stop in params.stop]
    parts += ["ignore-eos"] if params.ignore_eos else []
    line = " · ".join([*parts, f"seed {params.seed}"])
    if taken:
        line += f" ({', '.join(taken)} from {origin}; --generation-config none ignores it)"
    return line
