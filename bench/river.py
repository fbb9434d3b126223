"""What leaving the backbone early costs and brings: gates against their controls, on one model, prompt by prompt.

    python bench/river.py [MODEL_DIR] [--bits 4] [--group 64] [--method hqq] [--tokens 96] [--all]
                          [--repair 16 64] [--repair-tokens 192] [--threads 2] [--save]

For each prompt the exact engine writes a greedy continuation. Each gate then walks the same tokens one by one, prompt
exact, as river mode does (teacher forcing, so that positions compare), and its logits are held against the exact ones.
Controls: a fixed depth, and depths drawn at random from the histogram that the similarity gate showed on that prompt.
``--all`` adds rows for two more rivers: 8 bits of the same group, and 4 bits by the awq method, both loaded as well.
The second table repairs: every so many tokens one backbone pass rewrites the K and V that the river left, and its time
is part of the rate. It has the KL by thirds of the text, where errors in the cache would add up.
Intervals are 95 % bootstrap over prompts. tokens/s is timed in the same walks, in turn for all.
``--save`` writes bench/results/river-cpu.json, for another river than the default river-SETTINGS-cpu.json.

Comparable: rows with each other, and with other models' rows at the same settings. Not comparable: a river of group 32
on the demo model, whose weights come from a 4-bit file with groups of 32: it lies on nearly the same grid, and every
figure is flattered. Teacher forcing never lets an early token lead the text astray, as it may in use.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

import torch
from harness import interval, print_table, save
from prompts import PROMPTS
from torch import Tensor

from riverinfer import Engine, SamplingParams
from riverinfer.demo import demo_model
from riverinfer.gates import FixedDepth, Gate, ShuffledDepths, SimilarityGate, always, never
from riverinfer.sequence import TokenSequence
from riverinfer.trace import Trace

Row = dict[str, float]
Summary = dict[str, dict[str, tuple[float, float, float]]]  # by row and measure: mean and its interval
DIGITS = {"mean depth": 1, "top-1 %": 1, "tokens/s": 1}  # others have 3
PLAIN = ("mean depth", "tokens/s")  # printed without their interval
THIRDS = ("first third", "middle third", "last third")


@dataclass
class Walked:
    """One teacher-forced walk: logits [T, V], the last layer's K and V [Hkv, T, D], exit depths, seconds."""

    logits: Tensor
    k: Tensor
    v: Tensor
    depths: list[int]
    seconds: float


def walk_through(engine: Engine, prompt: list[int], ids: list[int], gate: Gate, *, repair: int = 0) -> Walked:
    """``ids`` one by one through ``gate``, after an exact ``prompt``; K and V made exact every ``repair`` tokens."""
    sequence = TokenSequence(engine.model, engine.ctx_size)
    engine.slots.acquire(sequence)
    try:
        engine.extend(sequence, prompt)
        rows, depths, began = [], [], time.perf_counter()
        for token in ids:
            if repair and len(sequence.tokens) - sequence.exact >= repair:
                sequence.repair(token)
            trace = Trace()
            rows.append(engine.extend(sequence, [token], gate=gate, trace=trace))
            depths.append(trace.depth)
        seconds = time.perf_counter() - began
        k, v = sequence._kv[-1]
        span = slice(len(prompt), len(sequence.tokens))
        return Walked(torch.cat(rows), k[:, span].float().clone(), v[:, span].float().clone(), depths, seconds)
    finally:
        engine.slots.release(sequence, keep=False)


def divergence(exact: Walked, got: Walked) -> Tensor:
    """KL at each position, [T]."""
    p, q = exact.logits.log_softmax(-1), got.logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def compare(exact: Walked, got: Walked) -> Row:
    """How far a walk is from the exact one."""
    return {
        "mean depth": statistics.mean(got.depths),
        "KL": float(divergence(exact, got).mean()),
        "top-1 %": float((exact.logits.argmax(-1) == got.logits.argmax(-1)).float().mean()) * 100,
        "K cosine": float(torch.cosine_similarity(exact.k, got.k, dim=-1).mean()),
        "V cosine": float(torch.cosine_similarity(exact.v, got.v, dim=-1).mean()),
        "tokens/s": len(got.depths) / got.seconds,
    }


def compare_thirds(exact: Walked, got: Walked) -> Row:
    """The same by thirds of the text."""
    kl = divergence(exact, got).tensor_split(3)
    row = {f"KL, {third}": float(part.mean()) for third, part in zip(THIRDS, kl, strict=True)}
    return {**row, "tokens/s": len(got.depths) / got.seconds}


def summarize(rows: dict[str, list[Row]]) -> Summary:
    return {
        name: {measure: interval([row[measure] for row in measured]) for measure in measured[0]}
        for name, measured in rows.items()
    }


def print_summary(title: str, summary: Summary) -> None:
    measures = list(next(iter(summary.values())))
    table = []
    for name, row in summary.items():
        cells = [name]
        for measure, (mean, low, high) in row.items():
            digits = DIGITS.get(measure, 3)
            spread = "" if measure in PLAIN else f" ({low:.{digits}f}..{high:.{digits}f})"
            cells.append(f"{mean:.{digits}f}{spread}")
        table.append(cells)
    print_table([title, *measures], table)


def exact_text(engine: Engine, text: str, tokens: int) -> tuple[list[int], list[int]]:
    """Ids of a prompt under the chat template, and of its greedy answer without the last, past any end."""
    session = engine.session()
    list(session.send(text, SamplingParams(max_tokens=tokens, ignore_eos=True), mode="exact"))
    output = session.last_output
    assert output is not None
    session.close()
    return output.prompt_token_ids, output.token_ids[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--bits", type=int, default=4, help="of the river (%(default)s)")
    parser.add_argument("--group", type=int, default=64, help="of the river (%(default)s)")
    parser.add_argument("--method", choices=("hqq", "awq", "rtn"), default="hqq")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--all", action="store_true", help="rows for further rivers: 8 bits, and the awq method")
    parser.add_argument("--repair", type=int, nargs="*", default=[16, 64], help="tokens between repairs (%(default)s)")
    parser.add_argument("--repair-tokens", type=int, default=192, help="tokens of that table (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.repair and (min(args.repair) < 1 or args.repair_tokens < 4):
        parser.error("--repair takes numbers from 1, --repair-tokens one from 4")
    torch.set_num_threads(args.threads)
    folder = args.model_dir or demo_model()

    def load(bits: int, method: str) -> Engine:
        river = {"river_bits": bits, "river_group": args.group, "river_method": method}
        return Engine.load(folder, ctx_size=1024, max_sequences=1, mode="river", **river)

    engine = load(args.bits, args.method)
    others = [(8, "hqq"), (4, "awq")] if args.all else []
    others = [each for each in others if each != (args.bits, args.method)]
    rivers = {f"{bits} bits {method}": load(bits, method) for bits, method in others}
    gates: dict[str, Callable[[], Gate]] = {"tau 0.5": lambda: SimilarityGate(0.5), "always": always}

    rows: dict[str, list[Row]] = {}
    repaired: dict[str, list[Row]] = {}
    for number, text in enumerate(PROMPTS):
        longest = max(args.tokens, args.repair_tokens if args.repair else 0)
        prompt, whole = exact_text(engine, text, longest)
        ids = whole[: args.tokens - 1]
        exact = walk_through(engine, prompt, ids, never())

        def note(name: str, got: Walked, exact: Walked = exact) -> list[int]:
            rows.setdefault(name, []).append(compare(exact, got))
            return got.depths

        note("exact", walk_through(engine, prompt, ids, never()))
        for tau in (0.5, 0.9, 0.95, 0.97, 0.98):
            depths = note(f"similarity, tau {tau}", walk_through(engine, prompt, ids, SimilarityGate(tau)))
            shuffled = ShuffledDepths(dict(Counter(depths)), seed=number)
            note(f"  shuffled {tau}", walk_through(engine, prompt, ids, shuffled))
        for depth in (0, 2, 4, 8, 12, 16, 24):
            note(f"fixed, first {depth} layers", walk_through(engine, prompt, ids, FixedDepth(depth)))
        for name, other in rivers.items():
            for gate, make_gate in gates.items():
                note(f"{name}, {gate}", walk_through(other, prompt, ids, make_gate()))

        if args.repair:
            ids = whole[: args.repair_tokens - 1]
            exact = walk_through(engine, prompt, ids, never())
            for every in (0, *args.repair):
                got = walk_through(engine, prompt, ids, SimilarityGate(0.5), repair=every)
                name = f"repaired every {every} tokens" if every else "never repaired"
                repaired.setdefault(name, []).append(compare_thirds(exact, got))
        print(f"{number + 1}/{len(PROMPTS)}", end="\r", flush=True)

    quantized = f"{args.bits} bits group {args.group}" + ("" if args.method == "hqq" else f" {args.method}")
    title = f"{folder.name}, river {quantized}, {len(PROMPTS)} prompts x"
    summary = summarize(rows)
    print_summary(f"{title} {args.tokens} tokens", summary)
    names = ("bits", "group", "method", "tokens", "repair_tokens")
    settings = {"model": folder.name, **{name: getattr(args, name) for name in names}}
    result = {"settings": settings, "summary": summary}
    if repaired:
        result["repair"] = summarize(repaired)
        print_summary(f"{title} {args.repair_tokens} tokens, similarity, tau 0.5", result["repair"])
    if args.save:
        usual = (args.bits, args.group, args.method) == (4, 64, "hqq")
        infix = "" if usual else f"w{args.bits}g{args.group}-{args.method}-"
        save(f"river-{infix}cpu.json", result)


if __name__ == "__main__":
    main()
