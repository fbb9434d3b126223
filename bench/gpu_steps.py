"""How fast are whole steps, and what do they need: models of known shapes, with random weights.

A step is what the engine queues for a token: embedding, layers, head, choice, and its result on the way to the host; a
graph that is replayed. Its floor is the bytes of the matrices that it reads over the copy bandwidth: the cache, which
grows with the context, is not in it. A round is timed as lossless mode times it, drafts and verification apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from gpu_models import LLAMA_8B, SHAPES, TINY, Shape, Steps, random_model
from gpu_run import DRY, Part, Results, Setting, Stopwatch, heat, peak_memory, release, seconds_of, synchronize

from riverinfer.decode import decode_one, prefill
from riverinfer.draft_policy import MAX_DRAFT
from riverinfer.gates import FixedDepth
from riverinfer.kernels.linear import Linear
from riverinfer.memory import gib
from riverinfer.memory_report import memory_report
from riverinfer.model import Model

ROWS = (1, 2) if DRY else (1, 2, 4, 8, 16)
DRAFTS = 1 if DRY else 8
CONTEXT, LONG = (20, 50) if DRY else (1024, 16384)
SHALLOW, DEEP = ((1, 1), 2) if DRY else ((3, 4), 8)  # depths in turn, and another
ACCEPTED = (0.8, 0.9, 0.95)
COLUMNS = "| model, random weights | step | ms | tokens/s | of the floor's speed | x exact |"


def steps(part: Part, setting: Setting) -> None:
    print(COLUMNS + "\n|---|---|---|---|---|---|", flush=True)
    for shape in SHAPES:
        made = part.make(f"{shape.name} model", lambda: Steps(random_model(shape), 64 if DRY else 4096))  # noqa: B023
        if made is not None:
            _of_model(part, setting, shape, made)
        del made
        release()
    print("\nlossless speed-up over exact mode, computed from these costs: at an acceptance of")
    print(f"| model | {' | '.join(str(each) for each in ACCEPTED)} |\n|---|---|---|---|")
    for shape in SHAPES:
        computed = part.attempt(f"{shape.name} lossless, computed", partial(_lossless, part.results, shape.name))
        if computed:
            cells = [f"{each['speedup']:.2f} ({each['drafts']} drafts)" for each in computed["at"].values()]
            print(f"| {shape.name} | {' | '.join(cells)} |", flush=True)


def _of_model(part: Part, setting: Setting, shape: Shape, made: Steps) -> None:
    def show(name: str, measure: Callable[[], Results], *, needs: float = 2) -> None:
        found = part.attempt(f"{shape.name} {name}", measure, needs=needs)
        if found is None:
            return
        exact = part.results.get(f"{shape.name} exact", {}).get("ms")
        share = f"{found['share']:.0%}" if "share" in found else ""
        ratio = f"{exact / found['ms'] * found.get('tokens', 1):.2f}" if exact else ""
        rate = f"{1000 * found.get('tokens', 1) / found['ms']:.0f}"
        print(f"| {shape.name} | {name} | {found['ms']:.3f} | {rate} | {share} | {ratio} |", flush=True)

    depths: list[tuple[str, Sequence[int | None]]] = [
        ("exact", [None]),
        ("river, depth 0", [0]),
        (f"river, depth {sum(SHALLOW) / 2:g}", SHALLOW),
        (f"river, depth {DEEP}", [DEEP]),
    ]
    for name, depth in depths:
        show(name, partial(_steps, made, setting, depth, CONTEXT))
    show("draft", partial(_draft, made, setting))
    for rows in ROWS:
        show(f"verify {rows}", partial(_verify, made, setting, rows))
    show("prefill of 512" if not DRY else "prefill of 20", partial(_prefill, made))
    if shape.name in (LLAMA_8B.name, TINY.name):
        release()
        long = part.make(f"{shape.name} long context", lambda: Steps(made.model, 64 if DRY else 2 * LONG))
        if long is not None:
            for name, depth in (depths[0], depths[2]):
                show(f"{name}, at {LONG}", partial(_steps, long, setting, depth, LONG))
        del long
    show("exact, launches without graphs", partial(_without_graphs, made, setting))
    show("exact, torch layer by layer", partial(_torch, made, setting))


# --- bytes ---


def matrix_bytes(model: Model, depth: int | None) -> int:
    """What a step reads of matrices that leaves the backbone after ``depth`` layers (None: never)."""
    layers = len(model.layers)
    depth = layers if depth is None else depth
    total = 0
    for index in range(layers):
        layer = model.layers[index] if index < depth else model.river[index]
        parts: list[Linear] = [layer.qkv, layer.o, layer.gate_up, layer.down]
        total += sum(linear.weight_bytes for linear in parts)
    river: Any = model.river_head
    return total + (model.head.weight_bytes if depth >= layers or river is None else river.weight_bytes)


def _against_floor(setting: Setting, seconds: float, nbytes: float, **more: Any) -> Results:
    floor = nbytes / setting.bandwidth
    return {"ms": seconds * 1000, "floor_ms": floor * 1000, "share": floor / seconds, "bytes": nbytes, **more}


# --- steps ---


def _steps(made: Steps, setting: Setting, depths: Sequence[int | None], context: int) -> Results:
    """Steps at the depths in turn, from ``context`` on; they queue up on the device."""
    path, limits = "", []
    for depth in depths:
        path = made.path(depth)  # one graph for all of them
        limits.append(made.walk.state.limits.clone())
    made.place(context)
    turn, each = 0, len(limits) * (1 if DRY else 24 // len(limits))

    def queue() -> float:
        """As many steps as are timed together; the host's seconds for one."""
        nonlocal turn
        began = time.perf_counter()
        for _ in range(each):
            if len(limits) > 1:
                made.walk.state.limits.copy_(limits[turn % len(limits)])
            made.queue(path)
            turn += 1
        return (time.perf_counter() - began) / each

    heat()
    host = queue()
    if not DRY:
        synchronize()
        host = queue()
    moments = [Stopwatch()]
    for _ in range(1 if DRY else 5):
        queue()
        moments.append(Stopwatch())
    synchronize()
    taken = sorted(b.since(a) / each for a, b in pairwise(moments))
    seconds = statistics.median(taken)
    nbytes = statistics.mean(matrix_bytes(made.model, depth) for depth in depths)
    more: Results = {"host_ms": host * 1000, "context": context, "depths": list(depths)}
    more["range_ms"] = [taken[0] * 1000, taken[-1] * 1000]
    return _against_floor(setting, seconds, nbytes, **more)


def _rounds(made: Steps, queue: Callable[[], tuple[Any, ...]]) -> tuple[float, float]:
    """Median seconds of drafting and of verifying."""
    made.place(CONTEXT)
    heat()
    drafting, verifying = [], []
    for number in range(1 if DRY else 18):
        began, drafted, done = queue()
        done.wait()
        made.rounds.read()
        if DRY or number >= 3:
            drafting.append(drafted.since(began))
            verifying.append(done.since(drafted))
    return statistics.median(drafting), statistics.median(verifying)


def _draft(made: Steps, setting: Setting) -> Results:
    drafting, _ = _rounds(made, lambda: made.round(7, CONTEXT, drafts=DRAFTS))
    return _against_floor(setting, drafting / DRAFTS, matrix_bytes(made.model, 0))


def _verify(made: Steps, setting: Setting, rows: int) -> Results:
    _, verifying = _rounds(made, lambda: made.round(7, CONTEXT, given=[8] * (rows - 1)))
    return _against_floor(setting, verifying, matrix_bytes(made.model, None))


def _prefill(made: Steps) -> Results:
    count = 20 if DRY else 512
    ids, slot = [5 + i % 50 for i in range(count)], made.arena.slot(0)
    return {"ms": seconds_of(lambda: prefill(made.model, ids, CONTEXT, slot), repeats=5) * 1000, "tokens": count}


def _without_graphs(made: Steps, setting: Setting) -> Results:
    made.launch(graphs=False)
    made.place(CONTEXT)
    path = made.path(None)
    seconds = seconds_of(lambda: made.queue(path), repeats=20, warm=5)
    return _against_floor(setting, seconds, matrix_bytes(made.model, None))


def _torch(made: Steps, setting: Setting) -> Results:
    """``decode.walk`` and an argmax that the host reads, as ``graph=False`` has it."""
    made.model.device_walk = None
    slot = made.arena.slot(0)

    def step() -> None:
        int(decode_one(made.model, 7, CONTEXT, slot).argmax())

    return _against_floor(setting, seconds_of(step, repeats=20, warm=5), matrix_bytes(made.model, None))


def _lossless(results: Results, model: str) -> Results:
    """The best draft length and its speed-up: (1 - a**(g + 1)) / (1 - a) tokens for g drafts and a verification."""
    names = ["exact", "draft", *(f"verify {rows}" for rows in ROWS)]
    costs = {name: results.get(f"{model} {name}", {}).get("ms") for name in names}
    missing = [name for name, ms in costs.items() if ms is None]
    if missing:
        raise ValueError(f"not measured: {', '.join(missing)}")
    exact, draft = costs["exact"], costs["draft"]
    found = {}
    for a in ACCEPTED:
        choices = []
        for drafts in range(1, min(MAX_DRAFT, ROWS[-1] - 1) + 1):
            rows = next(rows for rows in ROWS if rows > drafts)
            tokens = sum(a**i for i in range(drafts + 1))
            choices.append((tokens * exact / (drafts * draft + costs[f"verify {rows}"]), drafts))
        speedup, drafts = max(choices)
        found[str(a)] = {"speedup": speedup, "drafts": drafts}
    return {"computed": True, "at": found}


# --- memory ---


def memory(part: Part, setting: Setting) -> None:
    """Peak of steps at the end of a long context beside the sum of what is held, and of a prompt's last chunk."""
    shape, length = (TINY, 64) if DRY else (LLAMA_8B, 65536)
    print(f"{shape.name}, random weights, {length} tokens\n| mode | parts | peak of steps | peak of 512 tokens |")
    print("|---|---|---|---|", flush=True)
    few = 1 if DRY else 5
    kinds = (("4-bit only", True, 0), (f"river, {few} backbone layers", True, few), ("exact", False, None))
    for name, river, held in kinds:
        found = part.attempt(f"memory, {name}", partial(_peak, shape, length, river, held), needs=6)
        if found:
            sizes = [found[each] for each in ("parts", "steps", "prefill")]
            parts = ["out of memory" if size is None else gib(size) for size in sizes]
            print(f"| {name} | {' | '.join(parts)} |", flush=True)
        release()


def _peak(shape: Shape, length: int, river: bool, held: int | None) -> Results:
    made = Steps(random_model(shape, river=river, held=held), length)
    report = memory_report(made.model, made.arena)
    release()
    end = length - 16
    with peak_memory() as peak:
        path = made.path(held)
        made.place(end)
        for _ in range(1 if DRY else 8):
            made.queue(path)
        synchronize()
        at_steps = peak()
    gate = None if held is None else FixedDepth(held)
    count = 20 if DRY else 512
    try:
        with peak_memory() as peak:
            prefill(made.model, [5 + i % 50 for i in range(count)], end - count, made.arena.slot(0), gate=gate)
            synchronize()
            prompt = peak()
    except torch.OutOfMemoryError:
        prompt = None
    parts = report.total + made.scratch_bytes()
    return {"parts": parts, "steps": at_steps, "prefill": prompt, "report": report.as_dict()}
