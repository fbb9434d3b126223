"""``riverinfer river trace``: where the tokens of one generation left the backbone, as a heat map or as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from riverinfer.cli.output_file import output_path, write_whole
from riverinfer.cli.setup import check_flags, given_prompt, load_engine, make_session, recommended, sampling_params
from riverinfer.errors import ContextLengthError, InvalidRequestError

if TYPE_CHECKING:
    from riverinfer.engine import Engine
    from riverinfer.outputs import Output

SUFFIXES = (".svg", ".png", ".json")


def run(args: argparse.Namespace) -> int:
    """Generate in river mode, write the picture to ``args.output``, say in one line what it shows.

    What was generated before the context ran full is written too. An existing file is replaced, at once and whole.
    """
    path = _output_path(args.output)
    prompt = given_prompt(args)
    if prompt is None:
        if sys.stdin.isatty():
            raise InvalidRequestError("there is no prompt", remedy="give -p TEXT, -f FILE, or pipe it in")
        prompt = sys.stdin.read()
    if not prompt:
        raise InvalidRequestError("the prompt is empty", remedy="give at least one character")
    check_flags(args)
    with load_engine(args) as engine:
        if engine.mode != "river":
            raise InvalidRequestError("no tau is certified, no token would exit", field="--tau", remedy="give a number")
        output, error = _generate(args, engine, prompt)
        facts = _facts(args, engine, output, prompt)
    write_whole(path, _content(facts, path.suffix.lower()))
    depth, layers = facts["mean_exit_depth"], facts["layers"]
    print(f"{path}: {len(output.token_ids)} tokens, mean exit depth {depth:.1f} of {layers} layers, seed {output.seed}")
    if error is not None:
        raise error
    return 0


def _generate(args: argparse.Namespace, engine: Engine, prompt: str) -> tuple[Output, ContextLengthError | None]:
    """As ``riverinfer generate`` does: one user message under the chat template, or bare text without one."""
    from riverinfer.outputs import Output

    params = sampling_params(args, recommended(args, engine))
    session = make_session(args, engine, template_optional=True)
    output = Output()
    if session.template is None:
        text = f"{session.system}\n\n{prompt}" if session.system else prompt
        steps = engine.stream(text, params, output=output, similarities=True)
    else:
        steps = session.send(prompt, params, output=output, similarities=True)
    try:
        for _ in steps:
            pass
    except ContextLengthError as exc:
        if not output.token_ids:
            raise
        return output, exc
    return output, None


def _facts(args: argparse.Namespace, engine: Engine, output: Output, prompt: str) -> dict[str, Any]:
    """What the JSON file holds, and the picture is drawn from."""
    return {
        "model": engine.model_dir.resolve().name,
        "layers": engine.config.num_layers,
        "gate": args.gate,
        "tau": engine.river_options.tau,
        "min_depth": args.min_depth,
        "river": str(engine.river_settings),
        "prompt": prompt,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "seed": output.seed,
        "mean_exit_depth": output.stats.mean_exit_depth,
        "tokens": [
            {
                "token_id": token,
                "token": engine.tokenizer.token_text(token),
                "exit_depth": depth,
                # JSON has no NaN.
                "similarities": [value if math.isfinite(value) else None for value in values],
            }
            for token, depth, values in zip(output.token_ids, output.exit_depths, output.similarities, strict=True)
        ],
    }


def _content(facts: dict[str, Any], suffix: str) -> bytes:
    if suffix == ".json":
        return (json.dumps(facts, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
    from riverinfer.heat_map import render

    tokens = facts["tokens"]
    return render(
        [token["token"] for token in tokens],
        [[math.nan if value is None else value for value in token["similarities"]] for token in tokens],
        [token["exit_depth"] for token in tokens],
        title=f"State transition similarity and exits of {facts['model']}\n{_gate(facts)}"
        f" · mean exit depth {facts['mean_exit_depth']:.1f} of {facts['layers']} layers",
        tau=facts["tau"] if facts["gate"] == "similarity" else None,
        kind=suffix[1:],
    )


def _gate(facts: dict[str, Any]) -> str:
    if facts["gate"] == "similarity":
        least = f", min depth {facts['min_depth']}" if facts["min_depth"] != 1 else ""
        return f"tau {facts['tau']:g}{least}"
    return f"gate fixed at {facts['min_depth']}" if facts["gate"] == "fixed" else f"gate {facts['gate']} open"


def _output_path(path: Path) -> Path:
    """Where to write; refuses, before a model is loaded, what could not be drawn or written at the end."""
    path = output_path(path, SUFFIXES)
    if path.suffix.lower() != ".json":
        from riverinfer.heat_map import require_matplotlib

        require_matplotlib()
    return path
