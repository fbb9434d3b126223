"""What leaving the backbone early costs and brings: gates against their controls, on one model, prompt by prompt.

    python bench/river.py [MODEL_DIR] [--group 64] [--method hqq] [--tokens 96] [--save]

For each prompt the exact engine writes a greedy continuation. Each gate then walks the same tokens one by one, prompt
exact, as river mode does (teacher forcing, so that positions compare), and its logits are held against the exact ones.
Controls: a fixed depth, and depths drawn at random from the histogram that the similarity gate showed on that prompt.
Intervals are 95 % bootstrap over prompts. tokens/s is timed in the same walks, in turn for all gates.
``--save`` writes bench/results/river-cpu.json, for a method other than hqq river-METHOD-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

import torch
from decode import machine
from torch import Tensor

from riverinfer import Engine, SamplingParams
from riverinfer.demo import demo_model
from riverinfer.gates import FixedDepth, Gate, ShuffledDepths, SimilarityGate, never
from riverinfer.sequence import TokenSequence
from riverinfer.trace import Trace

PROMPTS = [
    "Explain how a river shapes the land it flows through.",
    "Write a Python function that counts the words in a text.",
    "What should I pack for three days in the mountains?",
    "Tell me a short story about a lighthouse keeper.",
    "Summarise the plot of Romeo and Juliet in three sentences.",
    "How does a bicycle stay upright?",
    "Write an email that asks for a day off.",
    "List the planets of the solar system with one fact each.",
    "Why do leaves change colour in autumn?",
    "Describe how to make a simple vegetable soup.",
    "What is the difference between a comet and an asteroid?",
    "Give me five ideas for a birthday party.",
]
Row = dict[str, float]


@dataclass
class Walked:
    """One teacher-forced walk: logits [T, V], the last layer's K and V [Hkv, T, D], exit depths, seconds."""

    logits: Tensor
    k: Tensor
    v: Tensor
    depths: list[int]
    seconds: float


def walk_through(engine: Engine, prompt: list[int], ids: list[int], gate: Gate) -> Walked:
    """``ids`` one by one through ``gate``, after an exact ``prompt``."""
    sequence = TokenSequence(engine.model, engine.ctx_size)
    engine.slots.acquire(sequence)
    try:
        engine.extend(sequence, prompt)
        rows, depths, began = [], [], time.perf_counter()
        for token in ids:
            trace = Trace()
            rows.append(engine.extend(sequence, [token], gate=gate, trace=trace))
            depths.append(trace.depth)
        seconds = time.perf_counter() - began
        k, v = sequence._kv[-1]
        span = slice(len(prompt), len(sequence.tokens))
        return Walked(torch.cat(rows), k[:, span].float().clone(), v[:, span].float().clone(), depths, seconds)
    finally:
        engine.slots.release(sequence, keep=False)


def compare(exact: Walked, got: Walked) -> Row:
    """How far a walk is from the exact one."""
    p, q = exact.logits.log_softmax(-1), got.logits.log_softmax(-1)
    return {
        "mean depth": statistics.mean(got.depths),
        "KL": float((p.exp() * (p - q)).sum(-1).mean()),
        "top-1 %": float((p.argmax(-1) == q.argmax(-1)).float().mean()) * 100,
        "K cosine": float(torch.cosine_similarity(exact.k, got.k, dim=-1).mean()),
        "V cosine": float(torch.cosine_similarity(exact.v, got.v, dim=-1).mean()),
        "tokens/s": len(got.depths) / got.seconds,
    }


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over prompts."""
    rng = random.Random(0)
    means = sorted(statistics.mean(rng.choices(values, k=len(values))) for _ in range(2000))
    return statistics.mean(values), means[50], means[1949]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--method", choices=("hqq", "awq", "rtn"), default="hqq")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.model_dir or demo_model()
    engine = Engine.load(
        folder, ctx_size=1024, max_sequences=1, mode="river", river_group=args.group, river_method=args.method
    )

    rows: dict[str, list[Row]] = {}
    for number, text in enumerate(PROMPTS):
        session = engine.session()
        list(session.send(text, SamplingParams(max_tokens=args.tokens, ignore_eos=True), mode="exact"))
        output = session.last_output
        assert output is not None
        session.close()
        prompt, ids = output.prompt_token_ids, output.token_ids[:-1]
        exact = walk_through(engine, prompt, ids, never())

        def measure(
            name: str,
            gate: Gate,
            prompt: list[int] = prompt,
            ids: list[int] = ids,
            exact: Walked = exact,
        ) -> list[int]:
            got = walk_through(engine, prompt, ids, gate)
            rows.setdefault(name, []).append(compare(exact, got))
            return got.depths

        measure("exact", never())
        for tau in (0.5, 0.9, 0.95, 0.97, 0.98):
            depths = measure(f"similarity, tau {tau}", SimilarityGate(tau))
            measure(f"  shuffled {tau}", ShuffledDepths(dict(Counter(depths)), seed=number))
        for depth in (0, 2, 4, 8, 12, 16, 24):
            measure(f"fixed, first {depth} layers", FixedDepth(depth))
        print(f"{number + 1}/{len(PROMPTS)}", end="\r", flush=True)

    names = list(rows["exact"][0])
    quantized = f"4 bits group {args.group}" + ("" if args.method == "hqq" else f" {args.method}")
    title = f"{folder.name}, river {quantized}, {len(PROMPTS)} prompts x {args.tokens} tokens"
    print(f"| {title} | {' | '.join(names)} |\n{'|---' * (len(names) + 1)}|")
    summary = {}
    for gate, measured in rows.items():
        summary[gate] = {name: interval([row[name] for row in measured]) for name in names}
        cells = []
        for name, (mean, low, high) in summary[gate].items():
            digits = 1 if name in ("mean depth", "top-1 %", "tokens/s") else 3
            spread = "" if name in ("mean depth", "tokens/s") else f" ({low:.{digits}f}..{high:.{digits}f})"
            cells.append(f"{mean:.{digits}f}{spread}")
        print(f"| {gate} | {' | '.join(cells)} |")
    if args.save:
        infix = "" if args.method == "hqq" else f"{args.method}-"
        path = Path(__file__).parent / "results" / f"river-{infix}cpu.json"
        path.write_text(json.dumps({"machine": machine(), "summary": summary}, indent=1) + "\n")
        print(f"saved {path}")


if __name__ == "__main__":
    main()
