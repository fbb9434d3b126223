"""Five ways to handle the K and V that early exits leave missing, on one model: the paper's Figure 8, for any model.

    python bench/figure8.py [MODEL_DIR] [--tau 0.5 0.97 0.98] [--tokens 96] [--prompts 12] [--save]

For each prompt the exact engine writes a greedy continuation. Each strategy of ``riverinfer.evidence.kv_strategies``
then walks the same tokens one by one after an exact prompt (teacher forcing, so that positions compare), under the
similarity gate at each tau and under a fixed depth of half the layers, and is held against the exact walk. Intervals
are 95 % bootstrap over prompts. tokens/s is timed in the same walks, in turn for all; what still waits to be
recomputed at the end is not. ``--save`` writes bench/results/figure8-cpu.json.

- KL, top-1 %: of all tokens. "KL, full depth" is that of the tokens which passed every layer: what they lose, they
  lose by the cache alone, not by an early head. They may be few; with recompute most are those that a full list
  forced, under the monotone rule all precede the first exit.
- V cosine: the last layer's V against the exact ones, where it has any; "V held %" says for how many tokens it has.
- A dash: there was no such token. An interval is over the prompts that had one.

Comparable with the paper (arXiv 2604.18396): the order of the strategies under one and the same gate, and where their
time goes. Not comparable: the figures themselves. The paper's baselines are trained for early exits or bring gates
and heads of their own, and it scores answers to GSM8K. Here all share one untrained gate and the model's own head,
which was never taught to read a state from the middle: in the four strategies that stop at the exit every early token
pays for that, whatever becomes of the cache, while the river takes each token to the last layer. SkipDecode's
schedule and D-LLM's decision at every layer are reduced to their rules for the cache.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

import torch
from harness import interval, print_table, save
from prompts import PROMPTS
from river import Row, Walked

from riverinfer import Engine, SamplingParams
from riverinfer.demo import demo_model
from riverinfer.evidence.kv_strategies import STRATEGIES, BatchedRecompute, EarlyExit, KVShare
from riverinfer.gates import FixedDepth, Gate, SimilarityGate, never
from riverinfer.kv_arena import KVArena

Summary = dict[str, tuple[float, float, float] | None]  # by measure: mean and its interval
DIGITS = {"KL": 3, "KL, full depth": 3, "V cosine": 3}  # others have 1
PLAIN = ("mean depth", "V held %", "tokens/s")  # printed without their interval


def walk_through(strategy: EarlyExit, prompt: list[int], ids: list[int]) -> Walked:
    """``ids`` one by one after an exact ``prompt``."""
    strategy.prefill(prompt)
    rows, depths, began = [], [], time.perf_counter()
    for token in ids:
        logits, depth = strategy.step(token)
        rows.append(logits)
        depths.append(depth)
    seconds = time.perf_counter() - began
    k, v = (x[:, len(prompt) :].clone() for x in strategy.entries(-1))
    return Walked(torch.cat(rows), k, v, depths, seconds)


def compare(exact: Walked, got: Walked, layers: int) -> Row:
    """How far a walk is from the exact one; NaN for a measure without tokens."""
    p, q = exact.logits.log_softmax(-1), got.logits.log_softmax(-1)  # [T, vocab]
    kl = (p.exp() * (p - q)).sum(-1)  # [T]
    v_cosine = torch.cosine_similarity(exact.v, got.v, dim=-1).mean(0)  # [T], NaN where V is missing
    return {
        "mean depth": statistics.mean(got.depths),
        "KL": float(kl.mean()),
        "KL, full depth": float(kl[torch.tensor(got.depths) == layers].mean()),
        "top-1 %": float((p.argmax(-1) == q.argmax(-1)).float().mean()) * 100,
        "V cosine": float(v_cosine.nanmean()),
        "V held %": float((~v_cosine.isnan()).float().mean()) * 100,
        "tokens/s": len(got.depths) / got.seconds,
    }


def summarize(rows: list[Row]) -> Summary:
    """Each measure over the prompts for which it is defined."""
    summary: Summary = {}
    for name in rows[0]:
        values = [row[name] for row in rows if not math.isnan(row[name])]
        summary[name] = interval(values) if values else None
    return summary


def table_row(gate: str, strategy: str, summary: Summary) -> list[str]:
    cells = [gate, strategy]
    for name, value in summary.items():
        if value is None:
            cells.append("–")
            continue
        (mean, low, high), digits = value, DIGITS.get(name, 1)
        cells.append(f"{mean:.{digits}f}" + ("" if name in PLAIN else f" ({low:.{digits}f}..{high:.{digits}f})"))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--tau", type=float, nargs="+", default=[0.5, 0.97, 0.98])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many, at most %(default)s")
    parser.add_argument("--group", type=int, default=64, help="the river's group size (%(default)s)")
    parser.add_argument("--limit", type=int, default=8, help="tokens that may wait to be recomputed (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder, prompts = args.model_dir or demo_model(), PROMPTS[: args.prompts]
    engine = Engine.load(folder, ctx_size=1024, max_sequences=1, mode="river", river_group=args.group)
    model, layers = engine.model, engine.config.num_layers
    gates: dict[str, Callable[[], Gate]] = {f"tau {tau}": lambda tau=tau: SimilarityGate(tau) for tau in args.tau}
    gates[f"fixed, {layers // 2} layers"] = lambda: FixedDepth(layers // 2)

    rows: dict[tuple[str, str], list[Row]] = {}
    for number, text in enumerate(prompts):
        session = engine.session()
        list(session.send(text, SamplingParams(max_tokens=args.tokens, ignore_eos=True), mode="exact"))
        output = session.last_output
        assert output is not None
        session.close()
        prompt, ids = output.prompt_token_ids, output.token_ids[:-1]
        arena = KVArena(model.config, slots=1, ctx_size=len(prompt) + len(ids), dtype=model.dtype, device=model.device)
        exact = walk_through(KVShare(model, arena.slot(0), never()), prompt, ids)
        got = walk_through(KVShare(model, arena.slot(0), never()), prompt, ids)
        rows.setdefault(("never", "exact"), []).append(compare(exact, got, layers))
        for gate, make_gate in gates.items():
            for name, kind in STRATEGIES.items():
                options = {"limit": args.limit} if kind is BatchedRecompute else {}
                got = walk_through(kind(model, arena.slot(0), make_gate(), **options), prompt, ids)
                rows.setdefault((gate, name), []).append(compare(exact, got, layers))
        print(f"{number + 1}/{len(prompts)}", end="\r", flush=True)

    summaries = {key: summarize(measured) for key, measured in rows.items()}
    names = list(summaries["never", "exact"])
    title = f"{folder.name}, river 4 bits group {args.group}, {len(prompts)} prompts x {args.tokens} tokens"
    rows_shown = [table_row(gate, name, summary) for (gate, name), summary in summaries.items()]
    print_table([title, "strategy", *names], rows_shown)
    if args.save:
        table: dict[str, dict[str, Summary]] = {}
        for (gate, name), summary in summaries.items():
            table.setdefault(gate, {})[name] = summary
        settings = {"model": folder.name, "prompts": len(prompts)}
        settings |= {name: getattr(args, name) for name in ("tokens", "group", "limit")}
        save("figure8-cpu.json", {"settings": settings, "summary": table})


if __name__ == "__main__":
    main()
