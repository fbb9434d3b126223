"""``riverinfer info``: what would be loaded, read from headers and small files only."""

from __future__ import annotations

import argparse
import json
from typing import Any

from riverinfer.cli.setup import model_dir


def run(args: argparse.Namespace) -> int:
    """Print the description as a table or as JSON."""
    facts = describe(args)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False, indent=2))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = value["text"] if isinstance(value, dict) else value
        print(f"{name.replace('_', ' '):<{width}}  {shown}")
    return 0


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Family, sizes, memory for weights and KV cache, template and tokenizer of a model folder.

    Raises what loading would raise; with ``--check`` also WeightsError for weights that are not finite.
    """
    folder = model_dir(args)
    from riverinfer.chat_template import load_templates
    from riverinfer.checkpoint import Checkpoint
    from riverinfer.engine_loading import effective_ctx_size
    from riverinfer.generation_config import load_generation_config
    from riverinfer.loader import check_finite, resolve_device, resolve_dtype
    from riverinfer.memory import gib
    from riverinfer.sampling import check_integer
    from riverinfer.tokenizer import Tokenizer

    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    tokenizer = Tokenizer.load(folder, vocab_size=config.vocab_size)
    generation = load_generation_config(folder, config)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, checkpoint.stored_dtype, device)
    if args.check:
        check_finite(checkpoint)
    check_integer("ctx_size", args.ctx_size, 0)
    context = effective_ctx_size(args.ctx_size, config.context_limit)
    weights = checkpoint.parameters * dtype.itemsize
    kv = context * config.kv_bytes_per_token(dtype.itemsize)
    templates = load_templates(folder)
    windows = sorted({window for window in config.windows if window is not None})
    facts: dict[str, Any] = {
        "folder": str(folder),
        "family": config.family + (" (text part of a multimodal checkpoint)" if config.nested else ""),
        "parameters": _count(checkpoint.parameters),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": f"{config.num_heads} query, {config.num_kv_heads} key/value, dimension {config.head_dim}",
        "vocabulary": config.vocab_size,
        "head": "tied to the embedding" if checkpoint.head_name != "lm_head.weight" else "own weights",
        "rope": f"{config.rope.rope_type}, theta {config.rope.theta:g}",
    }
    if not all(config.rope_layers):
        facts["rope"] += f", none on {config.rope_layers.count(False)} layers"
    if config.rope.rotary_dim != config.head_dim:
        facts["rope"] += f", {config.rope.rotary_dim} of {config.head_dim} dimensions"
    if windows:
        layers = sum(window is not None for window in config.windows)
        facts["sliding_window"] = f"{', '.join(map(str, windows))} positions on {layers} layers"
    facts |= {
        "context": f"{context} of {config.context_limit} positions",
        "dtype": f"{_name(dtype)} on {device} (stored as {_name(checkpoint.stored_dtype)})",
        "weights": _size(weights, gib),
        "kv_cache": _size(kv, gib, f"one sequence, {gib(kv // context)} a token"),
        "total": _size(weights + kv, gib),
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size} ids",
        "chat_template": ", ".join(templates) if templates else "none",
        "stop_tokens": ", ".join(f"{tokenizer.token_text(i)} ({i})" for i in generation.eos_token_ids) or "none",
        "sampling": ", ".join(f"{k} {v:g}" for k, v in generation.sampling.items()) or "greedy (nothing recommended)",
    }
    if args.check:
        facts["check"] = "all weights are finite"
    return facts


def _size(nbytes: int, show: Any, extra: str = "") -> dict[str, Any]:
    return {"bytes": nbytes, "text": show(nbytes) + (f" ({extra})" if extra else "")}


def _count(number: int) -> dict[str, Any]:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return {"count": number, "text": f"{number / scale:.1f}{unit}"}
    return {"count": number, "text": str(number)}


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
