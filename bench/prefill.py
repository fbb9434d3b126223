"""How fast prompts are read, by their length, next to the peers.

    python bench/prefill.py [MODEL_DIR] [--lengths 16,128,512,2048] [--runs 5] [--threads 2] [--gguf FILE]
        [--openvino PYTHON] [--save]

Timed is what a user waits: from the ids of a prompt, with an empty cache, to the first token, chosen greedily; prompt
tokens/s are the length over these seconds. At each length every run has each contender once, in an order that rotates,
after one run that warms up. Medians over runs with 95 % intervals; ratios are taken within runs. ``--save`` writes
bench/results/prefill-cpu.json and a figure.

- Comparable: transformers with riverinfer's exact mode in the same dtype. Lossless mode reads prompts as exact mode
  does, and so does river mode by default.
- "river, half the layers": the rest of the prompt's layers are the river's (prefill="fixed"). It is lossy, and made to
  need less memory, not less time: packed weights are for few rows at a time.
- llama.cpp and OpenVINO compute in 4 bits, with activations of 8 bits, on the grid of the GGUF. llama.cpp is there as
  it is by default, and also without the flash attention that it then takes, or without repacked weights.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; holds for the peers too

from contenders import REFERENCE, RiverinferPeer, add_arguments, find_peers, set_up, versions
from harness import figure, interleave, print_table, save
from peers import Peer
from sweep import Sweep, draw_lines, numbers, ratio_rows, rows, text_ids

from riverinfer import Engine
from riverinfer.river import RiverOptions


def own_contenders(folder: Path, group: int, ctx_size: int) -> tuple[Engine, dict[str, Peer]]:
    common = {"device": "cpu", "ctx_size": ctx_size}
    engine = Engine.load(
        folder, dtype="bfloat16", mode="river", river_bits=4, river_group=group, max_sequences=2, **common
    )
    plain = Engine.load(folder, dtype="float32", mode="exact", max_sequences=1, **common)
    half = RiverOptions(prefill="fixed", prefill_depth=engine.config.num_layers // 2)
    return engine, {
        "exact bfloat16": RiverinferPeer(engine, "exact"),
        "exact float32": RiverinferPeer(plain, "exact"),
        f"river w4g{group}, half the layers": RiverinferPeer(engine, "river", half),
    }


def measure(contenders: dict[str, Peer], ids: list[int], lengths: list[int], runs: int) -> Sweep:
    """Seconds to the first token, from an empty cache."""
    seconds: Sweep = {name: {} for name in contenders}
    for length in lengths:
        calls = {name: partial(peer.write, ids[:length], 1) for name, peer in contenders.items()}
        for name, found in interleave(calls, runs=runs, progress=f"{length} tokens").items():
            seconds[name][length] = [times.first for times in found]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, runs=5)
    parser.add_argument("--lengths", type=numbers, default="16,128,512,2048", help="of prompts (%(default)s)")
    args = parser.parse_args()
    folder, gguf = set_up(args)
    ctx_size = args.lengths[-1] + 1
    engine, own = own_contenders(folder, args.group, ctx_size)
    if engine.ctx_size < ctx_size:
        parser.error(f"the model's context is {engine.ctx_size} tokens")
    peers = find_peers(folder, gguf, ctx_size, openvino=args.openvino)
    seconds = measure(peers | own, text_ids(engine, args.lengths[-1]), args.lengths, args.runs)

    title = f"{folder.name}, {args.threads} threads"
    columns = [f"{length} tokens" for length in args.lengths]
    print(f"median of {args.runs} runs (95 % interval)\n")
    print_table([f"{title}: prompt tokens/s", *columns], rows(seconds, lambda length, run: length / run, 0))
    print_table(["ms to the first token", *columns], rows(seconds, lambda _, run: run * 1000, 1))
    if REFERENCE in seconds:
        print_table([f"times as fast as {REFERENCE}", *columns], ratio_rows(seconds, REFERENCE))
    if args.save:
        settings = {"model": folder.name, "runs": args.runs, "gguf": gguf and gguf.name}
        packages = versions(peers.values())
        save("prefill-cpu.json", {"settings": {**settings, "packages": packages}, "seconds": seconds}, args.save)
        draw = draw_lines(
            seconds, lambda length, run: length / run, x="tokens of the prompt", y="prompt tokens/s", log=True
        )
        figure("prefill-cpu", draw, title=f"Reading a prompt: {title}", folder=args.save)


if __name__ == "__main__":
    main()
