"""What a token costs by how many stand in the cache already, next to the peers, and what it must cost at least.

    python bench/context.py [MODEL_DIR] [--contexts 16,512,2048,4096,8000] [--new-tokens 32] [--runs 5] [--threads 2]
        [--gguf FILE] [--openvino PYTHON] [--save]

Each contender reads the context once. Every run then takes --new-tokens steps of a token after it, and the cache is
rolled back to the context for the next run. In a run each contender has its turn, in an order that rotates, after one
run that warms up. Milliseconds a token are the mean over a run's steps; medians over runs with 95 % intervals; ratios
are taken within runs. ``--save`` writes bench/results/context-cpu.json and a figure.

- Exact, and river mode with the gate always open after an exact context: these two bound the others. Lossless mode is
  left out: what its drafts gain depends on the text more than on its length (bench/decode.py).
- Comparable: transformers bfloat16 with exact bfloat16. llama.cpp and OpenVINO compute in 4 bits on the grid of the
  GGUF; llama.cpp keeps K and V in float16, OpenVINO in 8 bits. llama.cpp is there also without the flash attention that
  it takes by default, which on a CPU may be the slower way.
- "At least": bytes of weights, K and V that exact mode reads for a token, over this machine's reading bandwidth as it
  was measured before the runs (riverinfer.profiling).
"""

from __future__ import annotations

import argparse
import os
from functools import partial

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; holds for the peers too

import torch
from contenders import REFERENCE, RiverinferPeer, add_arguments, find_peers, set_up, versions
from harness import figure, interleave, print_table, save
from peers import Peer
from sweep import Sweep, draw_lines, numbers, ratio_rows, rows, text_ids

from riverinfer import Engine
from riverinfer.profiling.limits import token_limit
from riverinfer.profiling.probe import probe
from riverinfer.profiling.result import Machine, Run
from riverinfer.river import RiverOptions

EXACT = "exact bfloat16"


def measure(contenders: dict[str, Peer], ids: list[int], contexts: list[int], new_tokens: int, runs: int) -> Sweep:
    """Seconds a token."""
    seconds: Sweep = {name: {} for name in contenders}
    for context in contexts:
        for peer in contenders.values():
            peer.write(ids[:context], 1)
        calls = {name: partial(peer.resume, new_tokens) for name, peer in contenders.items()}
        for name, found in interleave(calls, runs=runs, progress=f"{context} tokens").items():
            seconds[name][context] = [run / new_tokens for run in found]
    return seconds


def least_seconds(engine: Engine, machine: Machine, context: int, new_tokens: int) -> float:
    """A token's in exact mode. The run only says how many steps there were: the limit does not depend on its times."""
    steps = Run(0.0, 0.0, 0.0, (1.0,) * new_tokens, prompt_tokens=context, new_tokens=new_tokens + 1)
    positions = context + (new_tokens + 1) / 2  # the first of these tokens attends to one more than the context
    return token_limit(engine, "exact", [steps], machine, positions=positions, batch=1).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, runs=5)
    parser.add_argument(
        "--contexts", type=numbers, default="16,512,2048,4096,8000", help="tokens in the cache (%(default)s)"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="a run (%(default)s)")
    args = parser.parse_args()
    if args.new_tokens < 1:
        parser.error("--new-tokens must be at least 1")
    folder, gguf = set_up(args)
    ctx_size = args.contexts[-1] + args.new_tokens + 1
    engine = Engine.load(
        folder,
        device="cpu",
        dtype="bfloat16",
        ctx_size=ctx_size,
        max_sequences=2,
        mode="river",
        river_bits=4,
        river_group=args.group,
    )
    if engine.ctx_size < ctx_size:
        parser.error(f"the model's context is {engine.ctx_size} tokens, {ctx_size} are needed")
    machine = probe(torch.device("cpu"), torch.bfloat16)
    limits = {context: least_seconds(engine, machine, context, args.new_tokens) for context in args.contexts}
    peers = find_peers(folder, gguf, ctx_size, openvino=args.openvino, variants=False)
    contenders = peers | {
        EXACT: RiverinferPeer(engine, "exact"),
        f"river w4g{args.group}, always": RiverinferPeer(engine, "river", RiverOptions(gate="always")),
    }
    ids = text_ids(engine, args.contexts[-1])
    seconds = measure(contenders, ids, args.contexts, args.new_tokens, args.runs)

    title = f"{folder.name}, {args.threads} threads"
    columns = [f"{context} cached" for context in args.contexts]
    print(f"median of {args.runs} runs of {args.new_tokens} tokens (95 % interval)\n")
    table = rows(seconds, lambda _, run: run * 1000, 2)
    table.append([f"{EXACT}, at least", *(f"{limit * 1000:.2f}" for limit in limits.values())])
    print_table([f"{title}: ms a token", *columns], table)
    print(f"At least: at {machine.bytes_per_s / 1e9:.1f} GB/s, as measured before the runs.\n")
    if REFERENCE in seconds:
        print_table([f"times as fast as {REFERENCE}", *columns], ratio_rows(seconds, REFERENCE))
    if args.save:
        settings = {"model": folder.name, "runs": args.runs, "new tokens": args.new_tokens, "gguf": gguf and gguf.name}
        result = {
            "settings": {**settings, "packages": versions(peers.values())},
            "bytes/s": machine.bytes_per_s,
            "seconds": seconds,
            "at least": limits,
        }
        save("context-cpu.json", result, args.save)
        draw = draw_lines(seconds, lambda _, run: run * 1000, x="tokens in the cache", y="ms a token", limits=limits)
        figure("context-cpu", draw, title=f"Decoding by context: {title}", folder=args.save)


if __name__ == "__main__":
    main()
