"""Decode speed on this machine, peers side by side in one run, and where a token's time goes.

    python bench/decode.py [MODEL_DIR] [--new-tokens 128] [--runs 5] [--threads 2] [--save]

Every run times each contender once, in turn, so that a noisy machine disturbs all alike; the table has medians and
the ratio to the first peer, run by run. ``transformers`` takes part where it is installed. Prompts and lengths are
the same for all; text processing is not timed. ``--save`` writes bench/results/decode-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; holds for the peers too

import torch

import riverinfer
from riverinfer import Engine, SamplingParams
from riverinfer import model as model_module
from riverinfer.demo import demo_model

PROMPT = "Explain how a river shapes the land it flows through, from its source to the sea."
Contender = Callable[[list[int], int], float]  # (prompt ids, new tokens) -> seconds for the tokens after the first


def ours(folder: Path, dtype: str) -> tuple[Engine, Contender]:
    engine = Engine.load(folder, device="cpu", dtype=dtype, ctx_size=2048, max_sequences=1)

    def run(ids: list[int], count: int) -> float:
        out = engine.generate(ids, SamplingParams(max_tokens=count, ignore_eos=True))
        return out.stats.decode_s

    return engine, run


def transformers_peer(folder: Path, dtype: torch.dtype) -> Contender | None:
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    class Clock(transformers.generation.streamers.BaseStreamer):
        """Notes when the first and the last token came."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(ids: list[int], count: int) -> float:
        prompt, clock = torch.tensor([ids]), Clock()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            streamer=clock,
        )
        # The streamer is first called with the prompt.
        assert len(clock.times) == count + 1
        return clock.times[-1] - clock.times[1]

    return run


def breakdown(engine: Engine, ids: list[int], count: int) -> dict[str, float]:
    """Milliseconds a token by operator: every operator of the walk is timed by a clock around its call.

    The clocks themselves cost about 0.2 us a call. ``rest`` is what no clock covers: Python, views, cache writes.
    """
    spent: dict[str, float] = {}

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **options)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return result

        return call

    model = engine.model
    operators = ("rms_norm", "rotate", "attention", "silu_mul")
    plain = {name: getattr(model_module, name) for name in operators}
    linears = [
        (layer, name, getattr(layer, name)) for layer in model.layers for name in ("qkv", "o", "gate_up", "down")
    ]
    head = model.head
    try:
        for name, function in plain.items():
            setattr(model_module, name, clocked(name, function))
        for layer, name, linear in linears:
            setattr(layer, name, clocked(name, linear))
        model.head = clocked("head", head)  # type: ignore[assignment]
        extend = clocked("walk", engine.extend)
        engine.extend = extend  # type: ignore[method-assign]
        engine.generate(ids, SamplingParams(max_tokens=2, ignore_eos=True))
        spent.clear()
        stream = engine.stream(ids, SamplingParams(max_tokens=count, ignore_eos=True))
        next(stream)
        spent.clear()
        began = time.perf_counter()
        for _ in stream:
            pass
        total = time.perf_counter() - began
    finally:
        for name, function in plain.items():
            setattr(model_module, name, function)
        for layer, name, linear in linears:
            setattr(layer, name, linear)
        model.head = head
        del engine.extend
    walk = spent.pop("walk")
    spent["rest"] = walk - sum(spent.values())
    spent["sampling and text"] = total - walk
    return {name: seconds / (count - 1) * 1000 for name, seconds in sorted(spent.items(), key=lambda item: -item[1])}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "riverinfer": riverinfer.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.model_dir or demo_model()

    contenders: dict[str, Contender] = {}
    for dtype in ("bfloat16", "float32"):
        peer = transformers_peer(folder, getattr(torch, dtype))
        if peer is not None:
            contenders[f"transformers {dtype}"] = peer
    engines = {}
    for dtype in ("bfloat16", "float32"):
        engines[dtype], contenders[f"riverinfer exact {dtype}"] = ours(folder, dtype)
    ids = engines["bfloat16"].tokenizer.encode(PROMPT)

    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(-1, args.runs):  # one warm-up
        for name, contender in contenders.items():
            rate = (args.new_tokens - 1) / contender(ids, args.new_tokens)
            if run >= 0:
                rates[name].append(rate)
    base = next(iter(contenders))
    print(f"| {folder.name}, {len(ids)} prompt + {args.new_tokens} new tokens | tokens/s (median of {args.runs}) "
          f"| min..max | x {base} |")  # fmt: skip
    print("|---|---|---|---|")
    ratios = {}
    for name, values in rates.items():
        ratios[name] = statistics.median(a / b for a, b in zip(values, rates[base], strict=True))
        print(
            f"| {name} | {statistics.median(values):.1f} | {min(values):.1f}..{max(values):.1f} | {ratios[name]:.2f} |"
        )

    parts = breakdown(engines["bfloat16"], ids, args.new_tokens)
    total = sum(parts.values())
    print(f"\n| where a bfloat16 token's {total:.1f} ms go | ms | % |\n|---|---|---|")
    for name, value in parts.items():
        print(f"| {name} | {value:.2f} | {value / total * 100:.0f} |")
    gigabytes = engines["bfloat16"].model.weight_bytes / 1e9
    linear = sum(parts[name] for name in ("qkv", "o", "gate_up", "down", "head"))
    print(f"\nThe matrices are {gigabytes:.3f} GB, read at {gigabytes / linear * 1000:.1f} GB/s.")
    if args.save:
        result = {"machine": machine(), "rates": rates, "ratios": ratios, "milliseconds": parts}
        path = Path(__file__).parent / "results" / "decode-cpu.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"saved {path}")


if __name__ == "__main__":
    main()
