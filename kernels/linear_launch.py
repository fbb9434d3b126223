"""How a matrix is cut for ``triton_linear``'s kernels, what a launch needs, and whether its arguments fit."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverinfer.kernels.packed_weights import PackedWeights
from riverinfer.kernels.require import require
from riverinfer.kernels.triton_gate import SUMS

MAX_TOKENS = 16
COLUMNS = 8  # tokens of a program: the narrowest right operand of the matrix unit
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@dataclass(frozen=True)
class Config:
    """How a matrix is cut. ``split`` orders its sums; with a fused norm all the others may, through that of x * x.

    A program of ``warps`` warps takes ``block_n`` rows and, of bfloat16 weights, ``block_k`` columns at a time, with
    ``stages`` of them on their way; of packed weights a group or ``packed_k`` columns, with ``packed_stages``.
    """

    block_n: int = 64  # a power of 2, at least 16, with silu 32
    split: int = 1
    warps: int = 2
    block_k: int = 64  # a power of 2, at least 16
    stages: int = 4
    packed_k: int = 128
    packed_stages: int = 4

    def unroll(self, group: int) -> int:
        """Groups that packed weights take at a time."""
        return min(2, max(1, self.packed_k // group))  # more of them take ptxas half a minute


measured: dict[tuple[int, int], Config] = {}  # by [N, K]: what ``triton_tuning`` found for this GPU
_WIDE = 65536  # rows of a head: more of them share each read of x
_PROGRAMS = 512  # about four for each multiprocessor of an H100
_SHORTEST = 256  # columns of a split: below this its partial sums cost more than it hides


def config_for(n: int, k: int) -> Config:
    """The blocks for an [N, K] matrix: a function of its shape alone, as batches must give the bits of single tokens.

    Not of the kind of weights either: the two forms of a dual matrix share a launch, and have the bits of each alone.
    Where nothing was measured, reasoned: enough programs to keep the memory busy.
    """
    if (n, k) in measured:
        return measured[n, k]
    if n >= _WIDE:
        return Config(block_n=128, warps=4)
    split = 1
    while triton.cdiv(n, 64) * split < _PROGRAMS and k // (2 * split) >= _SHORTEST:
        split *= 2
    return Config(split=split)


class Workspace:
    """Room for the partial sums of split matrices and gates. One serves all launches of a stream, one after the other.

    The counters are zero between launches; ``reset`` makes them so after a launch that did not finish.
    """

    def __init__(self, device: torch.device | str, floats: int = 2**22, counters: int = 2**12) -> None:
        self.sums = torch.empty(floats, dtype=torch.float32, device=device)
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)

    def reset(self) -> None:
        self.counters.zero_()


def check_arguments(
    x: Tensor,
    weights: tuple[Tensor | PackedWeights, ...],
    *,
    bias: Tensor | None,
    norms: tuple[Tensor | None, ...],
    silu: bool,
    residual: Tensor | None,
    out: Tensor | None,
    out_dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """``out``, made if None. Raises InvalidRequestError unless all is as ``linear`` says, for every weight and norm."""
    n, k = weights[0].shape
    tokens = x.shape[0] if x.dim() == 2 else 0
    require(1 <= tokens <= MAX_TOKENS, "x", f"has shape {list(x.shape)}, not 1 .. {MAX_TOKENS} rows")
    require(k % 8 == 0, "weight", f"has {k} columns, not a multiple of 8")
    require(not silu or n % 2 == 0, "weight", f"has {n} rows: gates and ups are equally many")
    require(not silu or config.block_n >= 32, "config", "gates and ups need block_n 32")
    for value, least in ((config.block_n, 16), (config.block_k, 16), (config.warps, 1)):
        require(value >= least and value & (value - 1) == 0, "config", f"{value} is not a power of 2 from {least} on")
    require(config.split >= 1, "config", f"split is {config.split}")

    floats = (torch.float32,)
    halves = (torch.bfloat16, torch.float32)
    normed = norms[0] is not None
    expect: list[tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("x", x, (tokens, k), floats if normed else (torch.bfloat16,)),
        ("bias", bias, (n,), halves),
    ]
    for norm in norms:
        require((norm is not None) == normed, "norm", "is missing for one path")
        expect.append(("norm", norm, (k,), floats))
    for weight in weights:
        if isinstance(weight, PackedWeights):
            require(weight.shape == (n, k), "weight", f"is {list(weight.shape)}, not {[n, k]}")
            expect.append(("q", weight.q, tuple(weight.q.shape), (torch.int16, torch.uint8)))
            expect.append(("pairs", weight.pairs, tuple(weight.pairs.shape), (torch.int32,)))
        else:
            expect.append(("weight", weight, (n, k), (torch.bfloat16,)))
    shape = (tokens, n // 2 if silu else n)
    expect.append(("residual", residual, shape, floats))
    if out is None:
        out = torch.empty(shape, dtype=out_dtype if residual is None else torch.float32, device=x.device)
    expect.append(("out", out, shape, halves if residual is None else floats))
    for name, tensor, size, dtypes in expect:
        if tensor is None:
            continue
        fits = tuple(tensor.shape) == size and tensor.dtype in dtypes
        require(fits, name, f"is {tensor.dtype} {list(tensor.shape)}, not {dtypes[0]} {list(size)}")
        require(tensor.is_contiguous(), name, "is not contiguous")
        require(tensor.device == x.device, name, f"is on {tensor.device}, x on {x.device}")
        # Triton compiles another kernel for pointers that are not.
        require(tensor.data_ptr() % 16 == 0, name, "does not start at a multiple of 16 bytes")
    usable = x.device.type == "cuda" or (INTERPRETED.value and x.device.type == "cpu")
    require(usable, "x", f"is on {x.device}, and Triton's kernels need an NVIDIA GPU")
    return out


def _tiles(tokens: int, n: int, config: Config, silu: bool) -> tuple[int, int]:
    """Blocks of tokens, and of rows."""
    rows, block = (n // 2, config.block_n // 2) if silu else (n, config.block_n)
    return triton.cdiv(tokens, COLUMNS), triton.cdiv(rows, block)


def workspace_for(tokens: int, n: int, config: Config, *, silu: bool, parts: int, gated: bool) -> tuple[int, int]:
    """Floats and counters of the workspace that a launch needs; the arguments are those of ``launch_shape``."""
    blocks, tiles = _tiles(tokens, n, config, silu)
    counters = floats = 0
    if config.split > 1:
        counters = parts * blocks * tiles
        floats = counters * config.split * (config.block_n + 1) * COLUMNS
    if gated:
        counters += blocks
        floats += blocks * tiles * SUMS * COLUMNS
    return floats, counters


def launch_shape(
    tokens: int,
    n: int,
    config: Config,
    silu: bool,
    parts: int,
    workspace: Workspace | None,
    device: torch.device,
    gated: bool = False,
) -> tuple[tuple[int, int, int], Tensor | None, Tensor | None]:
    """Grid, partial sums and counters of a launch that has ``parts`` kinds of weights and, ``gated``, a gate.

    Those of the gate come last. Raises InvalidRequestError.
    """
    # Neighbours in the first dimension read the same weights, at nearly the same time.
    grid = (*_tiles(tokens, n, config, silu), config.split)
    floats, counters = workspace_for(tokens, n, config, silu=silu, parts=parts, gated=gated)
    if not counters:
        return grid, None, None
    workspace = workspace or Workspace(device, floats, counters)
    fits = workspace.sums.numel() >= floats and workspace.counters.numel() >= counters
    require(fits, "workspace", f"is too small: {floats} floats and {counters} counters are needed")
    require(workspace.sums.device == device, "workspace", f"is on {workspace.sums.device}, not {device}")
    return grid, workspace.sums, workspace.counters
