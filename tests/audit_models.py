"""The tiny llama with a river too coarse for comfort, texts of it, and gates whose worth is known beforehand."""

from __future__ import annotations

import random
from typing import Any

from forced_drafts import random_ids
from golden_models import ROOT

from riverinfer import Engine
from riverinfer.evidence.controls import GivenDepths
from riverinfer.evidence.forced import Text, exact_texts
from riverinfer.evidence.quality import Judge
from riverinfer.gates import FixedDepth, Gate


def load(**options: Any) -> Engine:
    river = {"river_bits": 4, "river_group": 32, "river_method": "rtn"}
    common = {"device": "cpu", "dtype": "float32", "ctx_size": 256, "max_sequences": 3, "mode": "river"}
    return Engine.load(ROOT / "llama", **(common | river | options))


def prompts(count: int, length: int = 9) -> list[tuple[str, list[int]]]:
    return [(f"prompt {seed}", random_ids(length, seed)) for seed in range(count)]


def texts(engine: Engine, count: int, tokens: int) -> list[Text]:
    return exact_texts(engine, prompts(count), tokens)


def planted(judge: Judge) -> Gate:
    """Knows the true error: the half of the tokens that lose most by leaving after one layer stay until the fourth."""
    early, late = judge.walk(FixedDepth(1)).kl, judge.walk(FixedDepth(4)).kl
    gain = [a - b for a, b in zip(early, late, strict=True)]
    kept = sorted(range(len(gain)), key=gain.__getitem__)[len(gain) // 2 :]
    return GivenDepths([4 if i in kept else 1 for i in range(len(gain))])


def blind(judge: Judge) -> Gate:
    """Knows nothing: a coin for each token."""
    rng = random.Random(judge.text.name)
    return GivenDepths([rng.choice((1, 4)) for _ in judge.text.answer])
