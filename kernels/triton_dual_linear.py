"""A matrix in two forms, the backbone's bfloat16 and the river's packed one: flags on the device choose, row by row.

No host decides and no graph branches: a program looks at the flags of its tokens and reads what they need. With all
tokens in one place, which is the rule for one user, that is the bytes of one form; mixed, it is both.

``triton_linear`` has the loops: a row gets the bits of ``linear`` on its form, with the same ``Config``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverinfer.errors import InvalidRequestError
from riverinfer.kernels.linear_launch import COLUMNS, Config, Workspace, check_arguments, config_for, launch_shape
from riverinfer.kernels.packed_weights import PackedWeights
from riverinfer.kernels.triton_gate import SUMS, DeviceGate, decide
from riverinfer.kernels.triton_linear import compute

BACKBONE, RIVER, FINISHED = 0, 1, 2
_BACKBONE: tl.constexpr = tl.constexpr(BACKBONE)
_RIVER: tl.constexpr = tl.constexpr(RIVER)
_SUMS: tl.constexpr = tl.constexpr(SUMS)


@triton.jit(do_not_specialize=["T", "eps", "layer"])
def dual_linear_kernel(
    x, path, norm, river_norm, w, q, pairs, bias, residual, out, workspace, counters, T, eps,
    SILU: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PACKED_STAGES: tl.constexpr, UNROLL: tl.constexpr, SPLIT: tl.constexpr,
    before=None, tau=None, limits=None, depth=None, undefined=None, similarities=None, layer=0,
):  # fmt: skip
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    paths = tl.load(path + tokens, mask=tokens < T, other=-1)  # [BM]
    if w is None:
        paths = tl.where(paths == _BACKBONE, _RIVER, paths)
    backbone, river = paths == _BACKBONE, paths == _RIVER
    some_backbone, some_river = tl.max(backbone.to(tl.int32), 0), tl.max(river.to(tl.int32), 0)
    shares = None
    if before is not None:
        blocks = tl.num_programs(0) * tl.num_programs(1)
        shares = workspace + tl.program_id(0) * tl.num_programs(1) * (_SUMS * BM)
        counter = counters + tl.program_id(0)
        if SPLIT > 1:  # behind the partial sums of both parts
            shares += 2 * blocks * (SPLIT * (BN + 1) * BM)
            counter += 2 * blocks
    completed = 0
    if w is not None:  # noqa: SIM102 (no condition at run time)
        if some_backbone > 0:
            completed += compute(
                x, norm, w, None, bias, residual, out, workspace, counters, T, eps, backbone, 0, before, shares,
                SILU, N, K, 16, 0, BN, BM, BK, STAGES, 1, SPLIT,
            )  # fmt: skip
    if some_river > 0:
        completed += compute(
            x, river_norm, q, pairs, bias, residual, out, workspace, counters, T, eps, river, 1, before, shares,
            SILU, N, K, BITS, GROUP, BN, BM, BK, PACKED_STAGES, UNROLL, SPLIT,
        )  # fmt: skip
    if before is not None:
        decide(
            completed, some_backbone + some_river, shares, counter, path, backbone, backbone | river,
            tau, limits, depth, undefined, similarities, layer, T, _RIVER, (N + BN - 1) // BN, BM,
        )  # fmt: skip


def dual_linear(
    x: Tensor,
    path: Tensor,
    weight: Tensor | None,
    river: PackedWeights,
    *,
    out: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    river_norm: Tensor | None = None,
    eps: float = 0.0,
    silu: bool = False,
    residual: Tensor | None = None,
    config: Config | None = None,
    workspace: Workspace | None = None,
    gate: DeviceGate | None = None,
) -> Tensor:
    """``linear`` with ``weight`` (bfloat16 [N, K]) or ``river`` (the same shape), as ``path`` says. Returns ``out``.

    path: int32 [T], BACKBONE, RIVER or FINISHED. Of finished rows, ``out`` is left as it is and x is of no effect.
    weight: None where the backbone's form is not loaded. Then no row may be in the backbone; one that is, nonetheless,
    is treated as a river row, and its flag and depth stay as they are.
    river_norm: float32 [K], the norm's weight for river rows, ``norm`` if None (channel scales are folded into it).
    gate: ``out`` (float32 [T, N], so no ``silu``) is the state that leaves the layer, and the gate decides which rows
    go on in the river: ``path`` and the gate's tensors are updated. It changes no bit of ``out``.
    The rest, and the errors, as in ``linear``.
    """
    if not isinstance(river, PackedWeights):
        raise InvalidRequestError("is not packed", field="river", remedy="make it with packed_weights")
    n, k = river.shape if weight is None else weight.shape
    config = config or config_for(n, k)
    river_norm = norm if river_norm is None else river_norm
    weights = (river,) if weight is None else (weight, river)
    check_arguments(
        x, weights, bias=bias, norms=(norm, river_norm), silu=silu, residual=residual, out=out,
        out_dtype=out.dtype, config=config,
    )  # fmt: skip
    tokens = x.shape[0]
    fits = path.shape == (tokens,) and path.dtype == torch.int32 and path.device == x.device and path.is_contiguous()
    if not fits or path.data_ptr() % 16:
        raise InvalidRequestError(
            f"is {path.dtype} {list(path.shape)} on {path.device}, "
            f"not contiguous, aligned int32 {[tokens]} on {x.device}",
            field="path",
        )
    decision: dict[str, Tensor | int | None] = {}
    if gate is not None:
        if silu or out.dtype != torch.float32:
            raise InvalidRequestError("needs a float32 output, and no silu", field="gate")
        gate.check(tokens, n, x.device)
        decision = {
            "before": gate.before, "tau": gate.tau, "limits": gate.limits, "depth": gate.depth,
            "undefined": gate.undefined, "similarities": gate.similarities, "layer": gate.layer,
        }  # fmt: skip
    grid, sums, counters = launch_shape(tokens, n, config, silu, 2, workspace, x.device, gate is not None)
    dual_linear_kernel[grid](
        x, path, norm, river_norm, weight, river.q, river.pairs, bias, residual, out, sums, counters, tokens, eps,
        SILU=silu, N=n, K=k, BITS=river.bits, GROUP=river.group,
        BN=config.block_n, BM=COLUMNS, BK=config.block_k,
        STAGES=config.stages, PACKED_STAGES=config.packed_stages, UNROLL=config.unroll(river.group), SPLIT=config.split,
        num_warps=config.warps, enable_fp_fusion=False, **decision,
    )  # fmt: skip
    return out
