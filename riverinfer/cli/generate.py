"""``riverinfer generate``: one prompt in, one answer out."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from riverinfer.cli.pacing import Pacer
from riverinfer.cli.setup import check_flags, given_prompt, load_engine, make_session, recommended, sampling_params
from riverinfer.errors import ContextLengthError, InvalidRequestError, RiverinferError

if TYPE_CHECKING:
    from riverinfer.engine import Engine
    from riverinfer.outputs import DraftStats, Output


def run(args: argparse.Namespace) -> int:
    """Stream the answer to stdout, or print one JSON object.

    With a chat template the prompt is one user message; without, it is continued as bare text.
    """
    if args.logprobs is not None and not args.json:
        raise InvalidRequestError("--logprobs needs --json", remedy="add --json")
    prompt = given_prompt(args)
    if prompt is None:
        if sys.stdin.isatty():
            raise InvalidRequestError("there is no prompt", remedy="give -p TEXT, -f FILE, or pipe it in")
        prompt = sys.stdin.read()
    if not prompt:
        raise InvalidRequestError("the prompt is empty", remedy="give at least one character")
    check_flags(args)
    with load_engine(args) as engine:
        return _generate(args, engine, prompt)


def _generate(args: argparse.Namespace, engine: Engine, prompt: str) -> int:
    from riverinfer.outputs import Output

    params = sampling_params(args, recommended(args, engine))
    session = make_session(args, engine, template_optional=True)
    output = Output()
    error: RiverinferError | None = None
    if session.template is None:
        text = f"{session.system}\n\n{prompt}" if session.system else prompt
        steps = engine.stream(text, params, output=output)
    else:
        steps = session.send(prompt, params, output=output)
    pacer = Pacer(_show) if sys.stdout.isatty() and not args.json else None
    show = pacer.push if pacer is not None else _show
    try:
        for step in steps:
            if not args.json:
                show(step.text)
    except ContextLengthError as exc:
        if not output.token_ids:
            raise
        error = exc
    finally:
        if pacer is not None:
            pacer.finish()
    if args.json:
        print(json.dumps(_as_json(engine, output, params.logprobs, error), ensure_ascii=False))
    else:
        print()
        print(f"seed {output.seed}", file=sys.stderr)
    if args.stats:
        print(format_stats(output), file=sys.stderr)
        if output.stats.drafts is not None:
            print(format_drafts(output.stats.drafts), file=sys.stderr)
        print(engine.memory(), file=sys.stderr)
    if error is not None:
        raise error
    return 0


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _as_json(engine: Engine, output: Output, logprobs: int | None, error: RiverinferError | None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "model": engine.model_dir.name,
        "mode": engine.mode,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "seed": output.seed,
        "stats": output.stats.as_dict(),
        "memory": engine.memory().as_dict(),
    }
    if output.exit_depths:
        result["exit_depths"] = output.exit_depths
    if output.sources:
        result["sources"] = output.sources
    if logprobs is not None:
        name = engine.tokenizer.token_text
        tops = output.top_logprobs or [()] * len(output.token_ids)
        result["logprobs"] = [
            {
                "token_id": token,
                "token": name(token),
                "logprob": logprob,
                "top": [{"token_id": t, "token": name(t), "logprob": value} for t, value in top],
            }
            for token, logprob, top in zip(output.token_ids, output.logprobs, tops, strict=True)
        ]
    if error is not None:
        result["error"] = str(error)
    return result


def format_stats(output: Output) -> str:
    """The line after an answer: prompt (cached), time to first token, tokens and rate, what was drafted or repaired."""
    stats = output.stats
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    parts = [f"prompt {_tokens(stats.prompt_tokens)}{cached}", f"first token {stats.ttft_s * 1000:.0f} ms"]
    rate = f" at {stats.decode_tokens_per_s:.1f} tokens/s" if stats.decode_tokens_per_s else ""
    parts.append(f"{_tokens(stats.new_tokens)}{rate}")
    if stats.mean_exit_depth is not None:
        parts.append(f"mean exit depth {stats.mean_exit_depth:.1f}")
    if stats.repaired:
        parts.append(f"repaired {stats.repaired} positions, {stats.repair_disagreements} said otherwise")
    drafts = stats.drafts
    if drafts is not None and drafts.drafted:
        shares = (f"{drafts.accepted[source]} of {drafted} {source}" for source, drafted in drafts.drafted.items())
        parts.append(f"drafts {', '.join(shares)}")
    return " · ".join(parts)


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def format_drafts(drafts: DraftStats) -> str:
    """Lossless mode's drafts: rounds, how well the river knew the backbone, and where in a draft it did."""
    line = f"{drafts.rounds} rounds, {drafts.exact_steps} without a draft"
    judged = sum(count for _, count in drafts.by_position.values())
    if drafts.agreement is not None:
        line += (
            f" · the backbone agrees with {drafts.agreement * 100:.1f} % of the {judged} river drafts that it judged"
        )
    line += f" · drafting {drafts.draft_s * 1000:.0f} ms, verifying {drafts.verify_s * 1000:.0f} ms"
    for name, table, scale in (
        ("position", drafts.by_position, 1.0),
        ("confidence", drafts.by_confidence, 0.1),
        ("exit depth", drafts.by_depth, 1.0),
        ("similarity", drafts.by_similarity, 0.1),
    ):
        shares = [f"{key * scale:g}: {yes}/{count}" for key, (yes, count) in sorted(table.items())]
        if len(shares) > 1:
            line += f"\naccepted by {name}  {'  '.join(shares)}"
    return line
