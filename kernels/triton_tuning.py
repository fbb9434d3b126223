"""Blocks of matrices by measurement: tables that are shipped for a GPU's name, and what was measured here once.

A table is JSON, {"N x K": {fields of Config}}. A shape has one entry for all kinds of weights, as ``config_for`` asks.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from riverinfer.kernels import linear_launch
from riverinfer.kernels.linear_launch import Config, Workspace, config_for
from riverinfer.kernels.packed_weights import PackedWeights, packed_weights
from riverinfer.kernels.triton_linear import linear
from riverinfer.whole_file import whole_file

SHIPPED = Path(__file__).parent / "tables"
_ROTATED = 96 << 20  # bytes of copies of a matrix, so that launches in turn do not find it in the L2 cache
Shape = tuple[int, int]
Timer = Callable[[Shape, Config], tuple[float, float]]  # seconds with bfloat16 and with packed weights


def candidates(n: int, k: int) -> list[Config]:
    """The default for an [N, K] matrix and its neighbours: each takes seconds to compile, so there are few."""
    default = config_for(n, k)
    splits = {default.split, default.split * 2, max(1, default.split // 2)}
    found = [replace(default, split=split) for split in sorted(splits) if k // split >= 256 or split == default.split]
    found.append(replace(default, block_n=128, warps=4, split=default.split * 2))
    found.append(replace(default, block_n=32, warps=1, split=max(1, default.split // 2)))
    return list(dict.fromkeys(found))


def best(shape: Shape, timer: Timer) -> Config:
    """The candidate with the least sum of both kinds' times, each relative to its fastest."""
    timed: list[tuple[Config, tuple[float, float]]] = []
    for config in candidates(*shape):
        with suppress(RuntimeError):  # more memory, of the chip or of a multiprocessor, than there is
            timed.append((config, timer(shape, config)))
    if not timed:
        return config_for(*shape)
    least = [min(times[kind] for _, times in timed) for kind in (0, 1)]
    return min(timed, key=lambda each: each[1][0] / least[0] + each[1][1] / least[1])[0]


def prepare(
    shapes: Iterable[Shape],
    gpu: str,
    cache: Path,
    timer: Timer,
    *,
    progress: Callable[[str, int, int, str], None] | None = None,
) -> None:
    """Let ``config_for`` know these shapes: from the table shipped for ``gpu``, from ``cache``, else measured and kept.

    cache: a folder. A file in it that cannot be read, or written, is done without.
    """
    path = cache / file_name(gpu)
    kept = _read(path)
    known = {**kept, **_read(SHIPPED / file_name(gpu))}
    wanted = list(dict.fromkeys(shapes))
    missing = [shape for shape in wanted if shape not in known]
    for number, shape in enumerate(missing):
        if progress is not None:
            progress("Tuning kernels", number, len(missing), "matrices")
        known[shape] = kept[shape] = best(shape, timer)
    if missing:
        if progress is not None:
            progress("Tuning kernels", len(missing), len(missing), "matrices")
        _write(path, kept)
    linear_launch.measured.update({shape: known[shape] for shape in wanted})


def file_name(gpu: str) -> str:
    """The name of a GPU's table: H100 and H200 of several makes differ in bandwidth, and so in their tables."""
    return "".join(c if c.isalnum() else "_" for c in gpu) + ".json"


def _read(path: Path) -> dict[Shape, Config]:
    try:
        table = json.loads(path.read_text())
        return {
            (int(n), int(k)): Config(**fields) for (n, k), fields in ((key.split("x"), f) for key, f in table.items())
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, table: dict[Shape, Config]) -> None:
    text = json.dumps({f"{n}x{k}": asdict(config) for (n, k), config in sorted(table.items())}, indent=1)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as aside:
            aside.write_text(text + "\n")


class DeviceTimer:
    """Times one token's launch of a matrix on a GPU: a graph of launches on copies of it, median of several replays."""

    def __init__(self, device: torch.device, group: int) -> None:
        """``group``: of the packed weights; 4 bits."""
        self._device, self._group = device, group
        self._workspace = Workspace(device, 2**24, 2**14)
        self._shape: Shape | None = None
        self._dense: list[Tensor] = []
        self._packed: list[PackedWeights] = []

    def __call__(self, shape: Shape, config: Config) -> tuple[float, float]:
        if shape != self._shape:
            self._make(shape)
        x = torch.randn(1, shape[1], device=self._device).bfloat16()
        return self._time(x, self._dense, config), self._time(x, self._packed, config)

    def _make(self, shape: Shape) -> None:
        n, k = shape
        self._shape, self._dense, self._packed = None, [], []
        for _ in range(min(64, _ROTATED // (2 * n * k) + 2)):
            self._dense.append(torch.randn(n, k, device=self._device).bfloat16())
        scale = torch.rand(n, k // self._group, device=self._device).bfloat16()
        for _ in range(min(64, 2 * _ROTATED // (n * k) + 2)):
            q = torch.randint(-(2**15), 2**15, (n, k // 4), device=self._device, dtype=torch.int16)
            self._packed.append(packed_weights(q, scale, -scale, bits=4, group=self._group))
        self._shape = shape

    def _time(self, x: Tensor, weights: list[Tensor] | list[PackedWeights], config: Config) -> float:
        out = torch.empty(1, self._shape[0], device=self._device, dtype=torch.bfloat16)  # type: ignore[index]

        def launches() -> None:
            for weight in weights:
                linear(x, weight, out=out, config=config, workspace=self._workspace)

        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            launches()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launches()
        graph.replay()
        seconds = []
        for _ in range(7):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            seconds.append(began.elapsed_time(ended) / 1000 / len(weights))
        return statistics.median(seconds)
