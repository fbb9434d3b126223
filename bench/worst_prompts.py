"""Is lossless mode ever slower than exact mode? Prompts of all kinds, and the least predictable ones, in pairs.

    python bench/worst_prompts.py [MODEL_DIR] [--tokens 128] [--runs 3] [--bits 4 --group 64] [--save]

exact, lossless, exact, lossless, ... on each prompt; what the draft policy knows is forgotten before each answer, as
if it were the process's first, so that its trials count fully. Hot texts are sampled at temperature 1.5: nearly nothing
in them can be foreseen. "worst" is the least speedup of any prompt, by the median over its pairs. ``--save`` writes
bench/results/worst-prompts-RIVER-cpu.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

import torch
from harness import print_table, save
from prompts import KINDS, TEXT
from prompts import PROMPTS as CHAT

from riverinfer import Engine, Output, SamplingParams
from riverinfer.demo import demo_model
from riverinfer.draft_policy import Beliefs, Costs

FOREIGN = [
    "Erkläre in zwei Sätzen, warum der Himmel blau ist.",
    "¿Cuál es la capital de Perú y qué se come allí?",
    "Сколько будет дважды два?",
    "東京について教えてください。",
]
HOT = ["Tell me about a strange dream.", "Write a poem of random words.", "Invent twenty names.", TEXT]
TEXTS = [("chat", text, 0.0) for text in CHAT]
TEXTS += [(prompt.kind, prompt.text, float(prompt.sampled)) for prompt in KINDS]
TEXTS += [("foreign", text, 0.0) for text in FOREIGN] + [("hot", text, 1.5) for text in HOT]


def answer(engine: Engine, text: str, params: SamplingParams, mode: str) -> Output:
    engine.costs, engine.beliefs = Costs(), Beliefs()
    session = engine.session()
    list(session.send(text, params, mode=mode))
    output = session.last_output
    assert output is not None
    session.close()
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bits", type=int)
    parser.add_argument("--group", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.model_dir or demo_model()
    engine = Engine.load(folder, ctx_size=2048, max_sequences=1, river_bits=args.bits, river_group=args.group)
    answer(engine, CHAT[0], SamplingParams(max_tokens=32, ignore_eos=True), "lossless")
    rows = []
    for kind, text, temperature in TEXTS:
        params = SamplingParams(max_tokens=args.tokens, ignore_eos=True, temperature=temperature, seed=1)
        ratios = []
        for _ in range(args.runs):
            exact = answer(engine, text, params, "exact")
            lossless = answer(engine, text, params, "lossless")
            assert lossless.token_ids == exact.token_ids, f"{text!r}: the texts differ"
            ratios.append(lossless.stats.decode_tokens_per_s / exact.stats.decode_tokens_per_s)
        speedup = statistics.median(ratios)
        rows.append({"kind": kind, "prompt": text[:40], "speedup": speedup, "ratios": ratios})
        print(f"{kind:8} {speedup:.2f} ({min(ratios):.2f}..{max(ratios):.2f})  {text[:40]!r}", flush=True)
    table = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        found = [float(row["speedup"]) for row in rows if row["kind"] == kind]  # type: ignore[arg-type]
        pairs = [ratio for row in rows if row["kind"] == kind for ratio in row["ratios"]]  # type: ignore[attr-defined]
        figures = (statistics.median(found), min(found), min(pairs))
        table.append([str(kind), str(len(found)), *(f"{figure:.2f}" for figure in figures)])
    print(f"\n{engine.river_settings}, {args.tokens} tokens, {args.runs} pairs a prompt, every token id equal\n")
    print_table(["kind", "prompts", "x exact, median", "worst prompt", "worst pair"], table)
    if args.save:
        save(
            f"worst-prompts-{engine.river_settings}-cpu.json",
            {"river": str(engine.river_settings), "tokens": args.tokens, "prompts": rows},
        )


if __name__ == "__main__":
    main()
