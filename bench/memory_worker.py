"""One measurement of ``memory.py``, in a process of its own: its options as JSON in, a line of JSON out. Linux only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from riverinfer import Engine
from riverinfer.checkpoint import Checkpoint
from riverinfer.decode import PREFILL_CHUNK, decode_one, prefill
from riverinfer.tokenizer import Tokenizer

STEPS = 3


def status() -> dict[str, int]:
    """Bytes of this process by Linux's names: VmRSS, its parts RssAnon and RssFile, VmHWM (the peak of VmRSS)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0].startswith(("VmRSS", "VmHWM", "Rss"))}


def forget_peak() -> None:
    """Let VmHWM begin anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(folder: str, context: int, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    """Bytes before, of the tokenizer, after loading with a full cache, and the peaks of three parts of a run."""
    torch.set_num_threads(threads)
    checkpoint = Checkpoint.open(folder)
    before = status()
    # Let go at once: the engine's own takes its place.
    Tokenizer.load(checkpoint.model_dir, vocab_size=checkpoint.config.vocab_size)
    tokenizer = status()["RssAnon"] - before["RssAnon"]
    forget_peak()
    engine = Engine.load(folder, device="cpu", dtype="bfloat16", ctx_size=context, max_sequences=1, **options)
    if engine.ctx_size != context:
        raise SystemExit(f"the context is {engine.ctx_size} positions, not {context}")
    peaks = {"load": status()["VmHWM"]}
    arena = engine._arena
    assert arena is not None
    arena.block.zero_()  # written, so that every page of it is resident
    held = status()

    kv, (_, river) = arena.slot(0), engine.choose_mode(None, None)
    forget_peak()
    for position in range(max(0, context - STEPS), context):
        decode_one(engine.model, 1, position, kv, gate=river and river.make_gate())
    peaks["step"] = status()["VmHWM"]
    forget_peak()
    ids = [1] * min(PREFILL_CHUNK, context)
    prefill(engine.model, ids, context - len(ids), kv, gate=river and river.make_prefill_gate())
    peaks["prompt"] = status()["VmHWM"]
    report = engine.memory().as_dict()
    return {"before": before, "tokenizer": tokenizer, "held": held, "peaks": peaks, "report": report}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
