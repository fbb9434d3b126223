"""The Triton kernels on an NVIDIA GPU: are they right, are batches and single tokens the same bits, how fast are they.

    python bench/gpu.py                 # checks, timings of every shape, a small sweep of blocks
    python bench/gpu.py --dry           # the checks alone, on tiny shapes under Triton's interpreter, on a CPU

Writes gpu.json into --out, else $OUT, else here. Needs torch, Triton and the checkout, no installation.

Timings: a graph of launches on copies of the weights that together exceed the L2 cache several times, so that each
launch reads from memory; microseconds a launch, gaps included, median of replays. The floor is the bytes of the weights
over the bandwidth of a large copy (bytes read and written), measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

from riverinfer.kernels import triton_reference as reference  # noqa: E402
from riverinfer.kernels.triton_dual_linear import dual_linear  # noqa: E402
from riverinfer.kernels.triton_linear import (  # noqa: E402
    Config,
    PackedWeights,
    Workspace,
    config_for,
    linear,
    packed_weights,
)
from riverinfer.weights_convert.packing import pack  # noqa: E402

DEVICE = torch.device("cpu" if DRY else "cuda")
# name: N, K, norm, silu, residual
MODELS: dict[str, dict[str, tuple[int, int, bool, bool, bool]]] = {
    "Llama-3.1-8B": {
        "qkv": (6144, 4096, True, False, False),
        "o": (4096, 4096, False, False, True),
        "gate_up": (28672, 4096, True, True, False),
        "down": (4096, 14336, False, False, True),
        "head": (128256, 4096, True, False, False),
    },
    "Llama-3.2-1B": {
        "qkv": (3072, 2048, True, False, False),
        "o": (2048, 2048, False, False, True),
        "gate_up": (16384, 2048, True, True, False),
        "down": (2048, 8192, False, False, True),
        "head": (128256, 2048, True, False, False),
    },
    "SmolLM2-135M": {
        "qkv": (960, 576, True, False, False),
        "o": (576, 576, False, False, True),
        "gate_up": (3072, 576, True, True, False),
        "down": (576, 1536, False, False, True),
        "head": (49152, 576, True, False, False),
    },
}
TINY = {"tiny": {"qkv": (40, 64, True, False, False), "gate_up": (64, 96, True, True, False)}}
CHECKED = TINY if DRY else MODELS
TOKENS = (1, 4, 8, 16)
ROTATED = 2**28  # bytes of weight copies: five times the L2 cache of an H100
FRESH = iter(range(10**9))  # seeds


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(next(FRESH))
    return torch.randn(*shape, generator=generator, device=DEVICE) * scale


def make_packed(n: int, k: int, bits: int, group: int) -> PackedWeights:
    generator = torch.Generator(DEVICE).manual_seed(next(FRESH))
    q = torch.randint(0, 2**bits, (n, k), generator=generator, device=DEVICE, dtype=torch.uint8)
    scale = normal(n, k // group).abs() / 2**bits / k**0.5
    offset = normal(n, k // group, scale=0.1 / k**0.5)
    return packed_weights(pack(q, bits, group), scale.bfloat16(), offset.bfloat16(), bits=bits, group=group)


def around(tokens: int, n: int, k: int, norm: bool, silu: bool, residual: bool) -> dict[str, Any]:
    """Arguments of ``linear`` beside the weights."""
    return {
        "x": normal(tokens, k) if norm else normal(tokens, k).bfloat16(),
        "norm": normal(k) if norm else None,
        "eps": 1e-5,
        "silu": silu,
        "residual": normal(tokens, n // 2 if silu else n) if residual else None,
    }


def rows_of(arguments: dict[str, Any], rows: Any) -> dict[str, Any]:
    picked = dict(arguments)
    for name in ("x", "residual"):
        if picked[name] is not None:
            picked[name] = picked[name][rows].contiguous()
    return picked


# --- right? ---


def checks() -> Iterator[tuple[str, Callable[[], str]]]:
    """Name, and what raises AssertionError or returns a remark."""
    every = [(16, 0), (4, 32), (8, 32)] if DRY else [(16, 0), *product((4, 8), (32, 64, 128))]
    for model, matrices in CHECKED.items():
        for name, shape in matrices.items():
            # A kernel takes seconds to compile: all kinds only where shapes are odd, and for the longest sums.
            some = model.startswith("Llama") and shape[1] != 14336
            for kind in [(16, 0), (4, 64)] if some else every:
                if kind[1] and shape[1] % kind[1]:
                    continue
                label = f"{model} {name} {shape[0]}x{shape[1]} {kind_name(kind)}"
                yield label, lambda shape=shape, kind=kind: check_linear(shape, kind)  # type: ignore[misc]
            group = 32 if DRY else 64
            yield f"{model} {name} dual", lambda shape=shape, group=group: check_dual(shape, group)  # type: ignore[misc]
    if not DRY:
        yield "captured in a graph", check_graph


def kind_name(kind: tuple[int, int]) -> str:
    return "bf16" if kind[0] == 16 else f"{kind[0]}-bit g{kind[1]}"


def check_linear(shape: tuple[int, int, bool, bool, bool], kind: tuple[int, int]) -> str:
    """Against the reference for 16 tokens; bits of 1 .. 15 of them, of other places, and of launches repeated."""
    n, k, *options = shape
    weight = normal(n, k, scale=k**-0.5).bfloat16() if kind[0] == 16 else make_packed(n, k, *kind)
    matrix = weight if isinstance(weight, Tensor) else weight.dequantize()
    arguments = around(16, n, k, *options)
    workspace = Workspace(DEVICE)

    def call(rows: Any) -> Tensor:
        given = rows_of(arguments, rows)
        width = n // 2 if shape[3] else n
        out = torch.full((len(given["x"]), width), float("nan"), device=DEVICE)  # what is not written shows
        return linear(**given, weight=weight, out=out, workspace=workspace)

    whole = call(slice(0, 16))
    want = reference.linear(weight=matrix, **arguments)
    error = float((whole - want).norm() / want.norm())
    assert error < 2e-4, f"relative error {error:.1e}"
    for tokens in range(1, 17) if not DRY else (1, 8, 9):
        assert torch.equal(call(slice(0, tokens)), whole[:tokens]), f"{tokens} tokens have other bits than 16"
        row = tokens - 1
        assert torch.equal(call(slice(row, row + 1)), whole[row : row + 1]), f"row {row} alone has other bits"
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(call(order), whole[order]), "another place in the batch gives other bits"
    for _ in range(1 if DRY else 20):
        assert torch.equal(call(slice(0, 16)), whole), "a repeated launch gives other bits"
    assert not workspace.counters.any(), "counters are not back at zero"
    return f"error {error:.1e}"


def check_dual(shape: tuple[int, int, bool, bool, bool], group: int) -> str:
    """Bits of each path alone for flags of all kinds; finished rows stay."""
    n, k, *options = shape
    dense, river = normal(n, k, scale=k**-0.5).bfloat16(), make_packed(n, k, 4, group)
    for flags in ([0], [1], [2], [0, 1, 2, 1, 0], [1] * 8, [0] * 8 + [1] * 3 + [2, 1, 1, 0, 2]):
        path = torch.tensor(flags, dtype=torch.int32, device=DEVICE)
        arguments = around(len(flags), n, k, *options)
        arguments["x"][path == 2] = float("nan")
        out = normal(len(flags), n // 2 if shape[3] else n)
        kept = out.clone()
        dual_linear(path=path, weight=dense, river=river, out=out, **arguments)
        alone = {
            0: linear(weight=dense, out=torch.empty_like(out), **arguments),
            1: linear(weight=river, out=torch.empty_like(out), **arguments),
            2: kept,
        }
        for row, flag in enumerate(flags):
            assert torch.equal(out[row], alone[flag][row]), f"row {row} of {flags} has other bits"
    return ""


def check_graph() -> str:
    """A captured launch follows flags and input that change on the device."""
    n, k = 4096, 4096
    dense, river = normal(n, k, scale=k**-0.5).bfloat16(), make_packed(n, k, 4, 64)
    x, out, path = normal(3, k).bfloat16(), normal(3, n), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    workspace = Workspace(DEVICE)

    def launch() -> None:
        dual_linear(x, path, dense, river, out=out, workspace=workspace)

    graph = capture(launch)
    for flags in ([0, 0, 0], [1, 1, 1], [0, 1, 2]):
        path.copy_(torch.tensor(flags, dtype=torch.int32))
        x.copy_(normal(3, k))
        want = dual_linear(x, path, dense, river, out=out.clone())
        graph.replay()
        assert torch.equal(out, want), f"{flags} replayed has other bits"
    return ""


def run_checks() -> list[dict[str, Any]]:
    results = []
    for name, check in checks():
        began = time.perf_counter()
        try:
            passed, remark = True, check()
        except Exception as error:  # the others are still wanted
            passed, remark = False, f"{type(error).__name__}: {str(error)[:300]}"
        results.append({"check": name, "passed": passed, "remark": remark})
        print(f"{'ok  ' if passed else 'FAIL'} {name}  {remark}  ({time.perf_counter() - began:.1f} s)", flush=True)
        if not DRY:
            torch.cuda.empty_cache()
    return results


# --- how fast? ---


def capture(launches: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """``launches`` as a graph, after a call outside of it that compiles."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launches()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    return graph


def microseconds(launch: Callable[[Any], Any], items: Sequence[Any], replays: int = 15) -> float:
    """Median time of ``launch`` on one of ``items``, which follow each other in a graph."""
    graph = capture(lambda: [launch(item) for item in items])
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(replays):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1000 / len(items))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second of a 2 GiB copy, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (microseconds(target.copy_, [source]) * 1e-6)


class Matrix:
    """Copies of a matrix in both forms, enough that a round of launches does not find them in the L2 cache."""

    def __init__(self, shape: tuple[int, int, bool, bool, bool]) -> None:
        self.shape = shape
        n, k = shape[:2]
        count = min(512, ROTATED // (n * k // 2) + 2)  # by the smaller form
        self.dense = [normal(n, k, scale=k**-0.5).bfloat16() for _ in range(min(512, ROTATED // (n * k * 2) + 2))]
        self.river = [make_packed(n, k, 4, 64) for _ in range(count)]
        self.workspace = Workspace(DEVICE)

    def bytes_read(self, kind: str) -> int:
        dense, river = self.dense[0].nbytes, self.river[0].nbytes
        by_kind = {"bf16": dense, "cuBLAS bf16": dense, "4-bit": river, "dual 0": dense, "dual 1": river}
        return by_kind.get(kind, dense + river)

    def time(self, kind: str, tokens: int, config: Config | None = None) -> float:
        """Microseconds of a launch of ``kind`` for ``tokens`` tokens."""
        n, k, norm, silu, residual = self.shape
        arguments = {**around(tokens, n, k, norm, silu, residual), "workspace": self.workspace, "config": config}
        if residual:
            arguments["out"] = arguments["residual"]
        else:
            out = torch.empty(tokens, n // 2 if silu else n, dtype=torch.bfloat16, device=DEVICE)
            arguments["out"] = out
        if kind == "cuBLAS bf16":
            x = normal(tokens, k).bfloat16()
            return microseconds(lambda w: x @ w.t(), self.dense)
        if kind in ("bf16", "4-bit"):
            return microseconds(lambda w: linear(weight=w, **arguments), self.dense if kind == "bf16" else self.river)
        if kind == "dual mixed":
            path = torch.arange(tokens, device=DEVICE, dtype=torch.int32) % 2
        else:
            path = torch.full((tokens,), int(kind == "dual 1"), device=DEVICE, dtype=torch.int32)
        pairs = list(zip(cycle(self.dense), self.river))
        return microseconds(lambda pair: dual_linear(path=path, weight=pair[0], river=pair[1], **arguments), pairs)


KINDS = ("cuBLAS bf16", "bf16", "4-bit", "dual 0", "dual 1", "dual mixed")


def timings(bandwidth: float) -> list[dict[str, Any]]:
    results = []
    for model, matrices in MODELS.items():
        print(f"\n{model}: us a launch (share of the floor's speed)\n| matrix | T | {' | '.join(KINDS)} |")
        print("|---" * (len(KINDS) + 2) + "|")
        for name, shape in matrices.items():
            matrix = Matrix(shape)
            for tokens in TOKENS:
                cells = []
                for kind in KINDS:
                    if kind == "dual mixed" and tokens == 1:
                        cells.append("")
                        continue
                    taken = matrix.time(kind, tokens)
                    floor = matrix.bytes_read(kind) / bandwidth * 1e6
                    cells.append(f"{taken:.1f} ({floor / taken:.0%})")
                    results.append(
                        {"model": model, "matrix": name, "n": shape[0], "k": shape[1], "tokens": tokens, "kind": kind,
                         "us": taken, "floor_us": floor, "config": asdict(config_for(*shape[:2]))}
                    )  # fmt: skip
                print(f"| {name} | {tokens} | {' | '.join(cells)} |", flush=True)
            del matrix
            torch.cuda.empty_cache()
    return results


def sweep(bandwidth: float, seconds: float) -> list[dict[str, Any]]:
    """Blocks for single tokens, the matrices of a layer in turn, until the time is over."""
    results = []
    began = time.perf_counter()
    for model, name in product(("Llama-3.1-8B", "Llama-3.2-1B"), ("gate_up", "down", "o", "qkv")):
        shape = MODELS[model][name]
        matrix, default = Matrix(shape), config_for(*shape[:2])
        choices = [default]
        for block_n, warps, split in product((32, 64, 128), (1, 2, 4), (1, 2, 4, 8)):
            if 16 <= block_n // warps <= 64 and 256 <= -(-shape[0] // block_n) * split <= 4096:
                choices.append(replace(default, block_n=block_n, warps=warps, split=split))
        choices += [replace(default, block_k=128), replace(default, stages=6, packed_stages=6)]
        for kind in ("bf16", "4-bit"):
            tried = []
            floor = matrix.bytes_read(kind) / bandwidth * 1e6
            for config in dict.fromkeys(choices):
                if time.perf_counter() - began > seconds:
                    break
                try:
                    tried.append((matrix.time(kind, 1, config), config))
                except Exception as error:  # too much shared memory, say
                    print(f"  {config}: {type(error).__name__}: {str(error)[:100]}")
            for taken, config in sorted(tried, key=lambda pair: pair[0])[:4]:
                mark = " (default)" if config == default else ""
                print(f"{model} {name} {kind}: {taken:.1f} us ({floor / taken:.0%}) {config}{mark}", flush=True)
            results += [
                {"model": model, "matrix": name, "kind": kind, "us": taken, "floor_us": floor, "config": asdict(config)}
                for taken, config in tried
            ]
        del matrix
        torch.cuda.empty_cache()
    return results


def machine() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if DRY:
        return versions
    properties = torch.cuda.get_device_properties(0)
    return {
        **versions,
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="checks only, tiny, on the CPU under Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for gpu.json")
    parser.add_argument("--checks-only", action="store_true", help="no timings")
    parser.add_argument("--sweep-seconds", type=float, default=120, help="time for the sweep of blocks; 0: none")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}

    def save() -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")

    print(result["machine"])
    result["checks"] = run_checks()
    save()
    if not (DRY or options.checks_only):
        bandwidth = result["copy_bytes_per_s"] = copy_bandwidth()
        print(f"\ncopy: {bandwidth / 1e12:.2f} TB/s")
        result["timings"] = timings(bandwidth)
        save()
        if options.sweep_seconds:
            result["sweep"] = sweep(bandwidth, options.sweep_seconds)
    save()
    failed = [check["check"] for check in result["checks"] if not check["passed"]]
    print(f"\n{len(result['checks']) - len(failed)} checks passed, {len(failed)} failed {failed or ''}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
