"""A weight matrix as a callable, in the form that is fastest on its device.

On a CPU, oneDNN multiplies from a blocked copy of the weights: for bfloat16 at decode sizes about 1.6x the speed of
``F.linear``, and nearly the same time for 1 and for 16 rows. The blocked copy replaces the plain one.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """y = x W^T + b. ``weight_bytes`` counts what a pass over the matrix reads."""

    in_features: int
    weight_bytes: int
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] to [T, N] in x's dtype."""
        ...


class PlainLinear:
    """The reference: ``F.linear`` on the row-major weight [N, K]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.in_features = weight.shape[1]
        self.weight_bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """oneDNN on weights blocked once at load. CPU only; ``weight`` [N, K] may be freed afterwards."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.in_features = weight.shape[1]
        self.weight_bytes = weight.nbytes
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self.packed, self.bias, "none", [], "")


class AbsentLinear:
    """Stands where a matrix was not loaded. ``bias`` is there; a call is a bug: AssertionError."""

    in_features = weight_bytes = 0

    def __init__(self, bias: Tensor | None = None) -> None:
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("this layer of the backbone is not loaded")


@cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether this torch build and CPU multiply ``dtype`` from blocked weights, and rightly. Tried, not guessed."""
    if dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 32, generator=generator).to(dtype)
        weight = torch.randn(48, 32, generator=generator).to(dtype)
        got = PackedLinear(weight)(x)
        want = x.float() @ weight.float().T
        return bool(torch.allclose(got.float(), want, rtol=2e-2, atol=2e-2))
    except (AttributeError, RuntimeError):
        return False


@cache
def triton_runs(device_type: str) -> bool:
    """Whether Triton's kernels run there: on NVIDIA GPUs from Ampere on; on a CPU interpreted, for tests."""
    if find_spec("triton") is None:
        return False
    if device_type == "cuda":
        nvidia = torch.version.hip is None and torch.cuda.is_available()
        return nvidia and torch.cuda.get_device_capability() >= (8, 0)
    return device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one, on which Triton launches; of no effect for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest exact form of ``weight`` [N, K] for its device and dtype.

    Float32 stays plain: its blocked form was no faster, and cost a second copy of a tied head.
    """
    if weight.device.type == "cpu" and packing_works(weight.dtype) and not triton_runs("cpu"):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)
