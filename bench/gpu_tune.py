"""Blocks of every matrix by measurement, as ``kernels.triton_tuning`` chooses them: the table to ship for this card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from gpu_models import GROUP, SHAPES, random_matrix, random_packed
from gpu_run import DEVICE, DRY, Part, Results, Setting, normal, read_json, release, write_json

from riverinfer.kernels.linear_launch import Config, Workspace, config_for
from riverinfer.kernels.triton_linear import linear
from riverinfer.kernels.triton_tuning import DeviceTimer, best, candidates, file_name

Size = tuple[int, int]


def _sizes() -> list[Size]:
    found = dict.fromkeys(matrix[:2] for shape in SHAPES for matrix in shape.matrices.values())
    return [size for size in found if size[1] % GROUP == 0][: 2 if DRY else None]


def compile_candidates(part: Part, _: Setting) -> None:
    """In several processes at once: each candidate takes seconds to compile, and a moment to run."""
    jobs = [(size, config) for size in _sizes() for config in candidates(*size)]
    workspace = Workspace(DEVICE, 2**24, 2**14)
    while (number := part.claim()) < len(jobs):
        (n, k), config = jobs[number]

        def run(n: int = n, k: int = k, config: Config = config) -> bool:
            x = normal(1, k).bfloat16()
            for weight in (random_matrix(n, k), random_packed(n, k).packed):
                linear(x, weight, config=config, workspace=workspace)
            return True

        part.attempt(f"{n}x{k} {config}", run, needs=5)
        release()


def tune(part: Part, _: Setting) -> None:
    """The best of the candidates for every size, and what each of them took."""
    timer = DeviceTimer(DEVICE, GROUP)
    for n, k in _sizes():
        taken: list[Results] = []

        def timed(shape: Size, config: Config) -> tuple[float, float]:
            if DRY:
                return 1.0, 1.0
            seconds = timer(shape, config)
            taken.append({"config": asdict(config), "bf16_us": seconds[0] * 1e6, "packed_us": seconds[1] * 1e6})  # noqa: B023
            return seconds

        def run(n: int = n, k: int = k) -> Results:
            default, chosen = config_for(n, k), best((n, k), timed)
            return {"default": asdict(default), "chosen": asdict(chosen), "timed": taken}  # noqa: B023

        made = part.attempt(f"{n}x{k}", run, needs=10)
        if made is not None:
            mark = " (the default)" if made["chosen"] == made["default"] else ""
            print(f"{n}x{k}: {made['chosen']}{mark}", flush=True)
            for each in made["timed"]:
                c = each["config"]
                times = f"{each['bf16_us']:.1f} bf16, {each['packed_us']:.1f} packed"
                print(f"    {times}: {c['block_n']} rows, {c['warps']} warps, {c['split']} splits")
        release()


def write_table(results: Results, folder: Path) -> Path | None:
    """The chosen blocks as ``--table`` and ``kernels/tables`` take them."""
    chosen = {size: each["chosen"] for size, each in results.items() if isinstance(each, dict) and "chosen" in each}
    if not chosen:
        return None
    path = folder / (file_name("cpu") if DRY else f"table-{file_name(_name(results))}")
    write_json(path, {**read_json(path), **chosen})
    return path


def _name(results: Results) -> str:
    return str(results.get("gpu", torch.version.cuda))
