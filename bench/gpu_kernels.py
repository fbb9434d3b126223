"""How fast is each kernel: microseconds a launch in a graph, and the share of the floor's speed.

The floor is the bytes that a launch has to read over the bandwidth of a large copy (read and written), measured in the
same run. Launches take turns on copies that together exceed the L2 cache several times, so each reads from memory; gaps
between launches are in the times. Beside them stand cuBLAS on bfloat16, torch's own 4-bit kernel, and gemlite's if it
is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import cycle
from typing import Any

import torch
import triton
from gpu_checks import out_of
from gpu_models import (
    GROUP,
    LLAMA_8B,
    SHAPES,
    Matrix,
    Shape,
    Steps,
    cut,
    random_matrix,
    random_model,
    random_packed,
)
from gpu_run import DEVICE, DRY, Part, Results, Setting, capture, heat, ints, normal, release, seconds_each, seconds_of
from torch import Tensor

from riverinfer.device_walk import StepKind
from riverinfer.kernels.linear_launch import Workspace, config_for
from riverinfer.kernels.packed_weights import PackedWeights
from riverinfer.kernels.triton_attention import decode_attention, workspace_size
from riverinfer.kernels.triton_dual_linear import dual_linear
from riverinfer.kernels.triton_gate import DeviceGate
from riverinfer.kernels.triton_linear import linear
from riverinfer.kernels.triton_sampling import SamplingState, SamplingWorkspace, sample
from riverinfer.sampling import SamplingParams

TOKENS = (1,) if DRY else (1, 8, 16)
KINDS = ("cuBLAS bf16", "bf16", "4-bit", "dual 0", "dual 1", "torch int4")
CONTEXTS = {16: 64} if DRY else {1024: 4096, 16384: 32768, 65536: 65536}  # and the arena's length
ROTATED = 2**14 if DRY else 2**28  # bytes of copies: five times the L2 cache of an H100


@triton.jit
def nothing(x):  # type: ignore[no-untyped-def]
    pass


def kernels(part: Part, setting: Setting) -> None:
    gap = part.attempt("empty kernel", _launch_gap)
    if gap:
        print(f"an empty kernel: {gap['us']:.2f} us in a graph\n", flush=True)
    for shape in SHAPES:
        _print_header(shape)
        for name, matrix in shape.matrices.items():
            _time_matrix(part, setting, shape, name, matrix)
    print("\nattention of one layer: us (share)\n| model | context | 1 row | 8 rows | 16 rows |\n|---|---|---|---|---|")
    for shape in SHAPES:
        for context, length in CONTEXTS.items():
            _time_attentions(part, setting, shape, context, length)
    print("\nother launches of a step: us\n| model | launch | us |\n|---|---|---|")
    for shape in SHAPES:
        for name, measure in _others(part, shape):
            made = part.attempt(f"{shape.name} {name}", measure)
            if made:
                print(f"| {shape.name} | {name} | {made['us']:.1f} |", flush=True)
        release()
    _time_gemlite(part, setting)


def bandwidth() -> float:
    """Bytes a second of a 2 GiB copy, read and written."""
    source = torch.empty(2**16 if DRY else 2**31, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    heat(1.0)
    return 2 * source.nbytes / seconds_of(capture(lambda: target.copy_(source)))


def _launch_gap() -> Results:
    x, count = torch.zeros(1, device=DEVICE), 2 if DRY else 200
    return {"us": seconds_each(lambda _: nothing[(1,)](x), range(count)) * 1e6}


# --- matrices ---


class Copies:
    """A matrix in every form, each as often as it takes for its bytes to exceed the L2 cache."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix, self.workspace = matrix, Workspace(DEVICE)
        self._made: dict[str, list[Any]] = {}

    def __call__(self, kind: str) -> tuple[list[Any], int]:
        """Copies that a kind of launch takes in turn, and the bytes that each reads."""
        if kind in ("cuBLAS bf16", "bf16"):
            return self._form("dense")
        if kind in ("4-bit", "torch int4"):
            return self._form(kind)
        dense, dense_bytes = self._form("dense")
        packed, packed_bytes = self._form("4-bit")
        return list(zip(cycle(dense), packed, strict=False)), dense_bytes if kind == "dual 0" else packed_bytes

    def _form(self, form: str) -> tuple[list[Any], int]:
        if form not in self._made:
            n, k, *_ = self.matrix
            first: Any
            if form == "dense":
                first = random_matrix(n, k)
                copy: Callable[[], Any] = first.clone
            elif form == "4-bit":
                first = random_packed(n, k).packed
                copy = lambda: PackedWeights(first.q.clone(), first.pairs.clone(), first.bits, first.group)  # noqa: E731
            else:
                first = TorchInt4.random(n, k)
                copy = first.clone
            count = 2 if DRY else min(512, ROTATED // first.nbytes + 2)
            self._made[form] = [first, *(copy() for _ in range(count - 1))]
        made = self._made[form]
        return made, made[0].nbytes


class TorchInt4:
    """torch's 4-bit kernel for CUDA ("tinygemm"), or its counterpart for CPUs."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        self.weight, self.scales = weight, scales
        self.nbytes = weight.nbytes + scales.nbytes

    @classmethod
    def random(cls, n: int, k: int) -> TorchInt4:
        scales = normal(k // GROUP, n, 2, scale=0.2 * k**-0.5).bfloat16()
        if DRY:
            q = torch.randint(0, 16, (n, k), dtype=torch.int32)
            return cls(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1), scales)
        q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
        inner = next(tiles for tiles in (8, 4, 2) if k % (16 * tiles) == 0)
        return cls(torch.ops.aten._convert_weight_to_int4pack(q, inner), scales)

    def clone(self) -> TorchInt4:
        return TorchInt4(self.weight.clone(), self.scales.clone())

    def __call__(self, x: Tensor) -> Tensor:
        operators = torch.ops.aten
        multiply = operators._weight_int4pack_mm_for_cpu if DRY else operators._weight_int4pack_mm
        return multiply(x, self.weight, GROUP, self.scales)


def _print_header(shape: Shape) -> None:
    print(f"\n{shape.name}: us a launch (share of the floor's speed)\n| matrix | T | {' | '.join(KINDS)} |")
    print("|---" * (len(KINDS) + 2) + "|", flush=True)


def _time_matrix(part: Part, setting: Setting, shape: Shape, name: str, matrix: Matrix) -> None:
    copies = Copies(matrix)
    for tokens in TOKENS:
        cells = []
        for kind in KINDS:
            measure = partial(_time, copies, kind, tokens, setting.bandwidth)
            made = part.attempt(f"{shape.name} {name} {tokens} {kind}", measure)
            cells.append(cell(made))
        print(f"| {name} | {tokens} | {' | '.join(cells)} |", flush=True)
    del copies
    release()


def cell(made: Results | None) -> str:
    return "-" if made is None else f"{made['us']:.1f} ({made['floor_us'] / made['us']:.0%})"


def _time(copies: Copies, kind: str, tokens: int, bandwidth: float) -> Results:
    n, k, norm, silu, residual = copies.matrix
    items, nbytes = copies(kind)
    out = out_of(copies.matrix, tokens).nan_to_num_(1.0)
    x = normal(tokens, k) if norm else normal(tokens, k).bfloat16()
    given: Results = {
        "norm": 1 + 0.1 * normal(k) if norm else None, "eps": 1e-5, "silu": silu, "residual": out if residual else None,
        "out": out, "workspace": copies.workspace,
    }  # fmt: skip
    if kind in ("cuBLAS bf16", "torch int4"):
        half = x.bfloat16()
        launch: Callable[[Any], Any] = (lambda w: half @ w.t()) if kind == "cuBLAS bf16" else (lambda w: w(half))
    elif kind in ("bf16", "4-bit"):
        launch = lambda w: linear(x, w, **given)  # noqa: E731
    else:
        path = ints([int(kind == "dual 1")] * tokens)
        launch = lambda pair: dual_linear(x, path, *pair, **given)  # noqa: E731
    us = seconds_each(launch, items) * 1e6
    floor = nbytes / bandwidth * 1e6
    return {"us": us, "floor_us": floor, "n": n, "k": k, "copies": len(items), "config": asdict(config_for(n, k))}


def _time_gemlite(part: Part, setting: Setting) -> None:
    """Last of all: it tunes itself for as long as it likes."""
    try:
        from gemlite import DType, GemLiteLinear
    except Exception as error:  # it looks for a GPU when it is imported
        print(f"\ngemlite is left out: {type(error).__name__}: {error}")
        return

    def measure(n: int, k: int) -> Results:
        def made() -> Any:
            layer = GemLiteLinear(
                4, group_size=GROUP, in_features=k, out_features=n, input_dtype=DType.BF16, output_dtype=DType.BF16
            )
            q = torch.randint(0, 16, (n, k), device=DEVICE, dtype=torch.uint8)
            scales = normal(n, k // GROUP, scale=0.2 * k**-0.5).bfloat16()
            layer.pack(q, scales, torch.full_like(scales, 8.0), None)
            return layer

        nbytes = n * k // 2 + n * k // GROUP * 4
        layers, x = [made() for _ in range(ROTATED // nbytes + 2)], normal(1, k).bfloat16()
        us = seconds_each(lambda layer: layer(x), layers) * 1e6
        return {"us": us, "floor_us": nbytes / setting.bandwidth * 1e6}

    for name, (n, k, *_) in LLAMA_8B.matrices.items():
        if name != "head":
            made = part.attempt(f"{LLAMA_8B.name} {name} 1 gemlite", partial(measure, n, k), needs=20)
            print(f"gemlite, {LLAMA_8B.name} {name}: {cell(made)}", flush=True)
            release()


# --- attention, and what has no bytes to speak of ---


def _time_attentions(part: Part, setting: Setting, shape: Shape, context: int, length: int) -> None:
    cells = []
    for rows in (1, 8, 16):
        measure = partial(_time_attention, shape, context, length, rows, setting.bandwidth)
        cells.append(cell(part.attempt(f"{shape.name} attention {context} rows {rows}", measure)))
        release()
    print(f"| {shape.name} | {context} | {' | '.join(cells)} |", flush=True)


def _time_attention(shape: Shape, context: int, length: int, rows: int, bandwidth: float) -> Results:
    """The last ``rows`` of ``context`` positions, in layers that take turns."""
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    nbytes = 2 * kv_heads * context * dim * 2
    layers = [
        torch.empty(1, 2, kv_heads, length, dim, dtype=torch.bfloat16, device=DEVICE).normal_()
        for _ in range(2 if DRY else ROTATED // nbytes + 2)
    ]
    sizes = workspace_size(rows, rows, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, length=length)
    q, out = normal(rows, heads, dim).bfloat16(), normal(rows, heads * dim).bfloat16()
    position, zeros = ints([context - rows + i for i in range(rows)]), ints([0] * rows)
    options: Results = {"rows_per_sequence": rows, "out": out, "workspace": Workspace(DEVICE, *sizes)}
    us = seconds_each(lambda kv: decode_attention(q, kv, position, zeros, zeros, **options), layers) * 1e6
    return {"us": us, "floor_us": nbytes / bandwidth * 1e6}


def _others(part: Part, shape: Shape) -> Iterator[tuple[str, Callable[[], Results]]]:
    """Launches of a step that read next to nothing, or whose reading is measured above."""
    length = 64 if DRY else 4096
    steps = part.make(f"{shape.name} model of one layer", lambda: Steps(random_model(cut(shape, 1)), length))
    if steps is None:
        return
    steps.place(20)
    walk, decoder, model = steps.walk, steps.decoder, steps.model
    repeats = range(2 if DRY else 50)

    def timed(launch: Callable[[], Any]) -> Results:
        return {"us": seconds_each(lambda _: launch(), repeats) * 1e6}

    def choose(sampled: bool) -> Results:
        state, room = SamplingState(1, DEVICE), SamplingWorkspace(DEVICE, shape.vocab, 1)
        state.set(SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=1) if sampled else SamplingParams())
        logits, position = normal(1, shape.vocab, scale=2.5), ints([9])
        options: Results = {"vocab_size": shape.vocab, "workspace": room, "sampled": sampled}
        return timed(lambda: sample(logits, state, position, **options))

    def gate(gated: bool) -> Results:
        n, k, *_ = shape.matrices["down"]
        copies = Copies(shape.matrices["down"])
        pairs, _ = copies("dual 0")
        x, after, before = normal(1, k).bfloat16(), normal(1, n), normal(1, n)
        tau, limits = torch.full((1,), 0.9, device=DEVICE), ints([0, 2**30])
        decision = DeviceGate(before, 0, tau, limits, depth=ints([0]), undefined=ints([0])) if gated else None
        options: Results = {"out": after, "residual": after, "workspace": copies.workspace, "gate": decision}
        path = ints([0])
        return {"us": seconds_each(lambda pair: dual_linear(x, path, *pair, **options), pairs) * 1e6}

    kind = StepKind("river", 1, 1)
    h, logits = normal(1, shape.hidden), normal(1, shape.vocab)
    yield "choice, greedy", partial(choose, False)
    yield "choice, top-k and top-p", partial(choose, True)
    yield "down, dual 0, without a gate", partial(gate, False)
    yield "down, dual 0, with a gate", partial(gate, True)
    yield "the river head's exact rows", lambda: timed(lambda: model.river_head.rescore(model.normed(h), logits))  # type: ignore
    yield "embedding, one river layer", lambda: timed(lambda: walk.launch(kind))
    yield "the same, head and choice", lambda: timed(lambda: decoder.choose(kind))
