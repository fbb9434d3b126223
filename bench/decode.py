"""Decode speed of every mode and of the peers on this machine, side by side in one run, and where the time goes.

    python bench/decode.py [MODEL_DIR] [--new-tokens 128] [--runs 5] [--threads 2] [--gguf FILE] [--openvino PYTHON]
        [--save]

Every run gives each prompt to each contender in turn, in an order that rotates from prompt to prompt and run to run,
after one run that warms up. Prompts stand under the model's chat template, if it has one; all contenders get the same
ids and write as many tokens as the exact text has up to its end, --new-tokens at most. The rate of a kind of prompts
is all its tokens after the first over their seconds; prefill, and text processing before the first token, are not in
it. Ratios are taken within a run; tables have medians over runs. ``transformers``, llama.cpp and OpenVINO take part
where they are installed (bench/peers/). ``--save`` writes bench/results/decode-cpu.json and a figure.

- All but the kind "sampled" is greedy. That kind is the worst for drafts: temperature 1.0 without filters, one seed.
- lossless: "default" is the engine's own choice of a river, "lookup" drafts only what stands in the text already. What
  its draft policy has learnt stays from prompt to prompt, as in a chat; the warm-up run has taught it these prompts.
- Comparable: transformers bfloat16 with riverinfer bfloat16, exact and lossless: the same weights, the same greedy text
  up to near ties. River mode writes another text, at the quality that bench/river.py measures.
- Not comparable without more ado: llama.cpp and OpenVINO. They compute in 4 bits with activations of 8 bits, on the
  GGUF's own grid, and read a third of the bytes of the bfloat16 backbone. "As built" llama.cpp repacks weights, for AMX
  where the CPU has it; "no flash attention" is that too. Both are greedy for the sampled prompts too.
- The demo's weights come from that 4-bit file, with groups of 32: a river of group 32 lies on nearly the same grid,
  agrees with the backbone more often than other models' rivers will, and flatters lossless mode. Hence the w4g64 rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; holds for the peers too

from contenders import (
    REFERENCE,
    Contender,
    Request,
    add_arguments,
    find_peers,
    ours,
    peer_contender,
    river_name,
    set_up,
    versions,
)
from decode_report import Equality, Record, compare_texts, draw_speed, lossless_rows, speed_rows, worst_prompt
from harness import figure, print_table, save, turn
from prompts import KINDS, Prompt
from step_costs import LINEARS, breakdown, cost_rows, step_costs

from riverinfer import Engine, SamplingParams
from riverinfer.errors import ChatTemplateError
from riverinfer.river import RiverOptions

CTX_SIZE = 2048
EXACT = "exact bfloat16"


def load_engines(folder: Path, group: int) -> dict[str, Engine]:
    """By what they are for. All hold the same backbone, but float32."""
    common = {"device": "cpu", "ctx_size": CTX_SIZE, "max_sequences": 1}
    return {
        "default": Engine.load(folder, dtype="bfloat16", mode="lossless", **common),
        "river": Engine.load(folder, dtype="bfloat16", mode="river", river_bits=4, river_group=group, **common),
        "lookup": Engine.load(folder, dtype="bfloat16", mode="lossless", draft="lookup", **common),
        "float32": Engine.load(folder, dtype="float32", mode="exact", **common),
    }


def own_contenders(engines: dict[str, Engine], group: int) -> dict[str, Contender]:
    river = f"w4g{group}"
    return {
        EXACT: ours(engines["default"], "exact"),
        "exact float32": ours(engines["float32"], "exact"),
        f"river {river}, tau 0.5": ours(engines["river"], "river", RiverOptions(tau=0.5)),
        f"river {river}, always": ours(engines["river"], "river", RiverOptions(gate="always")),
        f"lossless, default ({river_name(engines['default'])})": ours(engines["default"], "lossless"),
        f"lossless, {river}": ours(engines["river"], "lossless"),
        "lossless, lookup": ours(engines["lookup"], "lossless"),
    }


def takes_part(name: str, prompt: Prompt) -> bool:
    return prompt.kind == "chat" or name != "exact float32"  # slow, and no other in kind than bfloat16


def make_requests(engine: Engine, new_tokens: int) -> dict[Prompt, Request]:
    """Prompts under the template; each ends where the exact text does, since what follows an end repeats itself."""
    try:
        session = engine.session()
    except ChatTemplateError:
        session = engine.session(use_template=False)
    requests = {}
    for prompt in KINDS:
        text = session.prompt_text([{"role": "user", "content": prompt.text}])
        ids = engine.tokenizer.encode(text, add_special_tokens=session.template is None)
        whole = Request(ids, new_tokens, prompt.sampled)
        said = engine.generate(ids, whole.params(), mode="exact").token_ids
        ends = {*engine.generation_config.eos_token_ids, engine.tokenizer.eos_token_id}
        count = next((number for number, token in enumerate(said, 1) if token in ends), new_tokens)
        requests[prompt] = Request(ids, max(2, count), prompt.sampled)
    return requests


def measure(contenders: dict[str, Contender], requests: dict[Prompt, Request], runs: int) -> Record:
    """By contender and prompt what each run, but the first, gave.

    A run goes through all prompts: what lossless mode learns from one it meets at the next, not at the same again.
    """
    record: Record = {name: {} for name in contenders}
    for run in range(-1, runs):
        for number, (prompt, request) in enumerate(requests.items()):
            calls = {name: partial(call, request) for name, call in contenders.items() if takes_part(name, prompt)}
            for name, timed in turn(calls, run + number).items():
                if run >= 0:
                    record[name].setdefault(prompt, []).append(timed)
        print(f"run {run + 1}/{runs}", end="\r", file=sys.stderr, flush=True)
    return record


def print_breakdown(engine: Engine, parts: dict[str, float], scripted: float) -> None:
    """``scripted``: milliseconds of the exact step as it is taken without clocks."""
    total = sum(parts.values())
    print_table(
        [f"where a bfloat16 token's {total:.1f} ms go, in the plain walk", "ms", "%"],
        [[name, f"{value:.2f}", f"{value / total * 100:.0f}"] for name, value in parts.items()],
    )
    gigabytes, linear = engine.model.weight_bytes / 1e9, sum(parts[name] for name in (*LINEARS, "head"))
    print(f"The matrices are {gigabytes:.3f} GB, read at {gigabytes / linear * 1000:.1f} GB/s.")
    print(
        f"Clocks can look into the plain walk only; the scripted one, used otherwise, takes {scripted:.1f} ms a step.\n"
    )


def print_equality(texts: dict[str, Equality]) -> bool:
    """Whether all greedy ids are those of exact mode."""
    equal = True
    for name, found in texts.items():
        print(f"{name}: token ids equal to exact mode's for {found.equal} of {found.prompts} prompts")
        for difference in found.differences:
            equal = equal and difference.sampled
            print(
                f"  {difference.prompt}{' (sampled)' if difference.sampled else ''}: first at token"
                f" {difference.position}, where exact mode's two highest logits are {difference.gap:.4f} apart"
            )
    print()
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, runs=5)
    parser.add_argument("--new-tokens", type=int, default=128, help="(%(default)s)")
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error("--new-tokens must be at least 2")
    folder, gguf = set_up(args)

    peers = find_peers(folder, gguf, CTX_SIZE, openvino=args.openvino)
    engines = load_engines(folder, args.group)
    default = engines["default"]
    contenders = {name: peer_contender(peer) for name, peer in peers.items()} | own_contenders(engines, args.group)
    requests = make_requests(default, args.new_tokens)
    record = measure(contenders, requests, args.runs)

    title = f"{folder.name}, up to {args.new_tokens} new tokens, {args.threads} threads"
    kinds = list(dict.fromkeys(prompt.kind for prompt in requests))
    print(f"tokens/s: median of {args.runs} runs (min..max), ratio to {EXACT}\n")
    print_table([title, *kinds, f"all, x {REFERENCE}"], speed_rows(record, requests, EXACT, REFERENCE))
    print_table(
        ["drafts", "kind", "tokens a round", "agreement %", "% by river", "% by lookup", "% by backbone"],
        lossless_rows(record, requests),
    )
    lossless = [name for name in record if name.startswith("lossless")]
    worst = {name: worst_prompt(record, name, EXACT) for name in lossless}
    for name, (prompt, ratio) in worst.items():
        print(f"Worst prompt of {name}: {prompt.kind}, {prompt.name}: {ratio:.2f} x exact")
    print()
    texts = {name: compare_texts(default, requests, record, name, EXACT) for name in lossless}
    equal = print_equality(texts)

    answer = default.generate(requests[KINDS[0]].ids, SamplingParams(max_tokens=64, ignore_eos=True), mode="exact")
    rivers = {river_name(default): default, river_name(engines["river"]): engines["river"]}
    costs = step_costs(rivers, answer.prompt_token_ids + answer.token_ids)
    print_table(["step", "ms: median (middle half)", "x exact step"], cost_rows(costs))
    parts = breakdown(default, answer.prompt_token_ids, args.new_tokens)
    print_breakdown(default, parts, statistics.median(costs["exact"]))

    if args.save:
        figures = {
            name: [
                {
                    "kind": prompt.kind,
                    "prompt": prompt.name,
                    "tokens/s": [(requests[prompt].count - 1) / timed.seconds for timed in runs],
                    "drafts": [t.output.stats.drafts.as_dict() for t in runs if t.output and t.output.stats.drafts],
                }
                for prompt, runs in by_prompt.items()
            ]
            for name, by_prompt in record.items()
        }
        prompts = [
            {"kind": prompt.kind, "prompt": prompt.name, "ids": len(request.ids), "new tokens": request.count}
            for prompt, request in requests.items()
        ]
        packages = versions(peers.values())
        settings = {"model": folder.name, "new tokens": args.new_tokens, "runs": args.runs}
        result = {
            "settings": {**settings, "packages": packages, "gguf": gguf and gguf.name, "prompts": prompts},
            "table": speed_rows(record, requests, EXACT, REFERENCE),
            "contenders": figures,
            "worst": {name: [prompt.kind, prompt.name, ratio] for name, (prompt, ratio) in worst.items()},
            "equal": {name: found.as_dict() for name, found in texts.items()},
            "step_ms": {name: statistics.median(values) for name, values in costs.items()},
            "milliseconds": parts,
        }
        save("decode-cpu.json", result, args.save)
        figure("decode-cpu", draw_speed(record, requests), title=f"Decoding: {title}", folder=args.save)
    if not equal:
        sys.exit("lossless mode's greedy text is not exact mode's")


if __name__ == "__main__":
    main()
