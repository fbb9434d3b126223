"""Whether drafts should pass some backbone layers before the river: lossless mode's speed with each.

    python bench/draft_depth.py [MODEL_DIR] [--tokens 128] [--runs 3] [--save]

Greedy, every depth in turn on the same prompts; the draft policy learns for each depth by itself, one warm-up round. A
token that was drafted through d backbone layers has its states there already, so its verification could begin at layer
d; it does not here. "with credit" therefore takes d / layers off the measured verification time, more than could be
saved. ``--save`` writes bench/results/draft-depth-cpu.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

import torch
from harness import print_table, save

from riverinfer import Engine, SamplingParams
from riverinfer.demo import demo_model
from riverinfer.draft_policy import Beliefs, Costs
from riverinfer.outputs import Output
from riverinfer.river import RiverOptions

PROMPTS = [
    "Explain how a river shapes the land it flows through.",
    "What should I pack for three days in the mountains?",
    "Tell me a short story about a lighthouse keeper.",
    "Why do leaves change colour in autumn?",
]
DRAFTS = {"straight through the river": RiverOptions(gate="always")}
DRAFTS |= {f"first {d} layers backbone": RiverOptions(gate="fixed", min_depth=d) for d in (2, 4, 8)}
DRAFTS |= {"similarity gate, tau 0.5": RiverOptions(tau=0.5)}


def answer(engine: Engine, text: str, tokens: int, mode: str, river: RiverOptions | None) -> Output:
    session = engine.session()
    list(session.send(text, SamplingParams(max_tokens=tokens, ignore_eos=True), mode=mode, river=river))
    output = session.last_output
    assert output is not None
    session.close()
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.model_dir or demo_model()
    engine = Engine.load(folder, ctx_size=1024, max_sequences=1, river_bits=4, river_group=args.group, draft="river")
    layers = engine.config.num_layers
    drafts = {name: river for name, river in DRAFTS.items() if river.min_depth < layers}
    learned = {name: (Costs(), Beliefs()) for name in drafts}
    exact: list[float] = []
    seen: dict[str, list[Output]] = {name: [] for name in drafts}
    for run in range(-1, args.runs):
        for text in PROMPTS:
            output = answer(engine, text, args.tokens, "exact", None)
            if run >= 0:
                exact.append(output.stats.decode_tokens_per_s)
            for name, river in drafts.items():
                engine.costs, engine.beliefs = learned[name]
                output = answer(engine, text, args.tokens, "lossless", river)
                if run >= 0:
                    seen[name].append(output)
    rows, saved = [], {}
    for name, outputs in seen.items():
        ratios, credited = [], []
        for output, base in zip(outputs, exact, strict=True):
            stats, drafts = output.stats, output.stats.drafts
            assert drafts is not None
            depth = DRAFTS[name].min_depth if DRAFTS[name].gate == "fixed" else 0
            ratios.append(stats.decode_tokens_per_s / base)
            less = stats.decode_s - drafts.verify_s * depth / layers
            credited.append((stats.new_tokens - 1) / less / base)
        agreement = statistics.mean(o.stats.drafts.agreement or 0.0 for o in outputs if o.stats.drafts is not None)
        figures = [statistics.median(ratios), statistics.median(credited), agreement]
        saved[name] = dict(zip(("x exact", "x exact with credit", "agreement"), figures, strict=True))
        rows.append([name, f"{figures[0]:.2f}", f"{figures[1]:.2f}", f"{agreement * 100:.1f}"])
    title = f"{folder.name}, river 4 bits group {args.group}"
    print_table([title, "x exact", "with credit", "agreement %"], rows)
    if args.save:
        save("draft-depth-cpu.json", {"summary": saved})


if __name__ == "__main__":
    main()
