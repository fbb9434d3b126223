"""What the tests of evaluations share: a tiny model with its river, and a file of word problems."""

from __future__ import annotations

from pathlib import Path

import torch
from golden_models import ROOT

from riverinfer import Engine

MODEL = str(ROOT / "llama")
GSM = Path(__file__).parent / "data" / "gsm_small.jsonl"
PLACE = ["--device", "cpu", "--dtype", "float32", "--river-group", "32"]


def load() -> Engine:
    """In river mode, one sequence at a time."""
    return Engine.load(
        MODEL, device="cpu", dtype="float32", ctx_size=512, max_sequences=1, mode="river", river_group=32
    )


def score_of(engine: Engine, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """A continuation's log-probability by ``Engine.logits``, and whether each of its tokens is the likeliest."""
    rows = engine.logits([*context, *continuation][:-1])[-len(continuation) :]
    wanted = torch.tensor(continuation)
    greedy = bool((rows.argmax(-1) == wanted).all())
    return float(rows.log_softmax(-1).gather(1, wanted[:, None]).sum()), greedy
