"""Where a token's time goes, by operator and by kind of step."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from riverinfer import Engine, SamplingParams
from riverinfer import model as model_module
from riverinfer.river import RiverOptions
from riverinfer.sampling import Sampler
from riverinfer.sequence import TokenSequence

VERIFIED = (2, 4, 8, 16)  # tokens of a verified batch: those drafted, and the one before
LINEARS = ("qkv", "o", "gate_up", "down")


def breakdown(engine: Engine, ids: list[int], count: int) -> dict[str, float]:
    """Milliseconds of an exact token by operator: each is timed by a clock around its call from Python.

    That takes the plain walk, layer by layer in Python; a scripted one has no seams for clocks and takes less. The
    clocks themselves cost about 0.2 us a call. ``rest`` is what no clock covers: Python, views, cache writes.
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
    places: list[tuple[Any, str, str]] = [
        (model_module, "rms_norm", "rms_norm"),
        (model_module, "rms_norm_heads", "rms_norm"),
        (model_module, "rotate", "rotate"),
        (model_module, "silu_mul", "silu_mul"),
        (model_module, "attention", "attention"),
        (model_module.few_rows, "attention", "attention"),
        (model, "head", "head"),
        *((layer, name, name) for layer in model.layers for name in LINEARS),
    ]
    plain = [getattr(place, attribute) for place, attribute, _ in places]
    try:
        model.backbone_script = model.river_script = None
        for (place, attribute, name), function in zip(places, plain, strict=True):
            setattr(place, attribute, clocked(name, function))
        engine.extend = clocked("walk", engine.extend)  # type: ignore[method-assign]
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        engine.generate(ids, SamplingParams(max_tokens=2, ignore_eos=True), mode="exact")
        stream = engine.stream(ids, params, mode="exact")
        next(stream)
        spent.clear()
        began = time.perf_counter()
        for _ in stream:
            pass
        total = time.perf_counter() - began
    finally:
        for (place, attribute, _), function in zip(places, plain, strict=True):
            setattr(place, attribute, function)
        del engine.extend
        model.script()
    walk = spent.pop("walk")
    spent["rest"] = walk - sum(spent.values())
    spent["sampling and text"] = total - walk
    return {name: seconds / (count - 1) * 1000 for name, seconds in sorted(spent.items(), key=lambda item: -item[1])}


def step_costs(rivers: dict[str, Engine], ids: list[int], cycles: int = 40) -> dict[str, list[float]]:
    """Milliseconds of each kind of step after ``ids`` but the last 16, one a cycle, in an order drawn each cycle.

    ``rivers``: engines by the name of their river, all with the same backbone; the first also takes exact steps and
    verifies. Taken in turn, since a step finds in the CPU's caches what the step before it left there.
    """
    start = len(ids) - max(VERIFIED)
    assert start > 0
    backbone = next(iter(rivers.values()))
    sequences = {name: TokenSequence(engine.model, engine.ctx_size) for name, engine in rivers.items()}
    sampler = Sampler(SamplingParams(), backbone.tokenizer.vocab_size)
    always, early = RiverOptions(gate="always").make_gate(), RiverOptions(tau=0.5).make_gate()

    def extend(name: str, count: int, **options: Any) -> Callable[[], None]:
        engine, sequence = rivers[name], sequences[name]
        return lambda: engine.extend(sequence, ids[start : start + count], **options)  # type: ignore[func-returns-value]

    def draft(name: str) -> Callable[[], None]:
        engine, sequence = rivers[name], sequences[name]
        return lambda: sampler.guess(engine.draft(sequence, ids[start], 0, gate=always)[0], ids)  # type: ignore

    first = next(iter(rivers))
    steps = {"exact": extend(first, 1)}
    for name, engine in rivers.items():
        if engine.model.river:
            steps[f"river, tau 0.5, {name}"] = extend(name, 1, gate=early)
            steps[f"draft and its choice, {name}"] = draft(name)
    steps |= {f"verify {count} tokens": extend(first, count, all_logits=True) for count in VERIFIED}

    costs: dict[str, list[float]] = {name: [] for name in steps}
    rng = random.Random(0)
    try:
        for name, engine in rivers.items():
            engine.slots.acquire(sequences[name])
            engine.extend(sequences[name], ids[:start])
        for cycle in range(-2, cycles):
            for name in rng.sample(list(steps), len(steps)):
                began = time.perf_counter()
                steps[name]()
                seconds = time.perf_counter() - began
                for sequence in sequences.values():
                    sequence.truncate(start)
                if cycle >= 0:
                    costs[name].append(seconds * 1000)
    finally:
        for name, engine in rivers.items():
            engine.slots.release(sequences[name], keep=False)
    return costs


def cost_rows(costs: dict[str, list[float]]) -> list[list[str]]:
    """Table rows: step, median ms (middle half), and the median of the ratios to the exact step of the same cycle."""
    rows = []
    for name, values in costs.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratio = statistics.median(a / b for a, b in zip(values, costs["exact"], strict=True))
        rows.append([name, f"{middle:.2f} ({low:.2f}..{high:.2f})", f"{ratio:.2f}"])
    return rows
