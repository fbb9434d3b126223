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
from riverinfer.kernels.triton_linear import (
    COLUMNS,
    Config,
    PackedWeights,
    Workspace,
    check_arguments,
    compute,
    config_for,
    launch_shape,
)

BACKBONE, RIVER, FINISHED = 0, 1, 2
_BACKBONE: tl.constexpr = tl.constexpr(BACKBONE)
_RIVER: tl.constexpr = tl.constexpr(RIVER)


@triton.jit(do_not_specialize=["T", "eps"])
def dual_linear_kernel(
    x, path, norm, river_norm, w, q, pairs, bias, residual, out, workspace, counters, T, eps,
    SILU: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PACKED_STAGES: tl.constexpr, UNROLL: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    paths = tl.load(path + tokens, mask=tokens < T, other=-1)  # [BM]
    if tl.max((paths == _BACKBONE).to(tl.int32), 0) > 0:
        compute(
            x, norm, w, None, bias, residual, out, workspace, counters, T, eps, paths == _BACKBONE, 0,
            SILU, N, K, 16, 0, BN, BM, BK, STAGES, 1, SPLIT,
        )  # fmt: skip
    if tl.max((paths == _RIVER).to(tl.int32), 0) > 0:
        compute(
            x, river_norm, q, pairs, bias, residual, out, workspace, counters, T, eps, paths == _RIVER, 1,
            SILU, N, K, BITS, GROUP, BN, BM, BK, PACKED_STAGES, UNROLL, SPLIT,
        )  # fmt: skip


def dual_linear(
    x: Tensor,
    path: Tensor,
    weight: Tensor,
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
) -> Tensor:
    """``linear`` with ``weight`` (bfloat16 [N, K]) or ``river`` (the same shape), as ``path`` says. Returns ``out``.

    path: int32 [T], BACKBONE, RIVER or FINISHED. Of finished rows, ``out`` is left as it is and x is of no effect.
    river_norm: float32 [K], the norm's weight for river rows, ``norm`` if None (channel scales are folded into it).
    The rest, and the errors, as in ``linear``.
    """
    n, k = weight.shape
    config = config or config_for(n, k)
    if not isinstance(river, PackedWeights):
        raise InvalidRequestError("is not packed", field="river", remedy="make it with packed_weights")
    river_norm = norm if river_norm is None else river_norm
    check_arguments(
        x, (weight, river), bias=bias, norms=(norm, river_norm), silu=silu, residual=residual, out=out,
        out_dtype=out.dtype, config=config,
    )  # fmt: skip
    tokens = x.shape[0]
    if path.shape != (tokens,) or path.dtype != torch.int32 or path.device != x.device or path.data_ptr() % 16:
        raise InvalidRequestError(
            f"is {path.dtype} {list(path.shape)} on {path.device}, not aligned int32 {[tokens]} on {x.device}",
            field="path",
        )
    grid, sums, counters = launch_shape(tokens, n, config, silu, 2, workspace, x.device)
    dual_linear_kernel[grid](
        x, path, norm, river_norm, weight, river.q, river.pairs, bias, residual, out, sums, counters, tokens, eps,
        SILU=silu, N=n, K=k, BITS=river.bits, GROUP=river.group,
        BN=config.block_n, BM=COLUMNS, BK=config.block_k,
        STAGES=config.stages, PACKED_STAGES=config.packed_stages, UNROLL=config.unroll(river.group), SPLIT=config.split,
        num_warps=config.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out
