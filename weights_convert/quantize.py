"""A matrix as small integers with one scale and one offset per group of weights along its rows.

Two methods. ``rtn``, the control: the range of each group is cut into equal steps, weights are rounded to nearest.
``hqq``: half-quadratic quantization (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models",
2023, mobiusml.github.io/hqq_blog; the solver of github.com/mobiusml/hqq, hqq/core/optimize.py), then refits of scale
and offset by least squares. No calibration data is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from riverinfer.errors import InvalidRequestError, WeightsError

METHODS = ("hqq", "rtn")
BITS = (4, 8)
GROUPS = (32, 64, 128)

# The settings of the HQQ reference.
_LP_NORM, _BETA, _ITERATIONS = 0.7, 10.0, 20
_MAX_STEPS_PER_UNIT, _MIN_SPAN = 2e4, 1e-4
_REFITS = 10
_MIN_GAIN = 1e-4  # share of the squared error below which another refit is not worth its time
# Blocks that stay in a core's cache are several times faster; a GPU wants few launches.
_BLOCK_CPU, _BLOCK_GPU = 2**18, 2**21
# Below this a bfloat16 scale could become subnormal; such a group is stored as zero.
_TINY_EXPONENT = -100
_BELOW_TWO = 2.0 - 2.0**-7  # the largest bfloat16 below 2


@dataclass(frozen=True)
class QuantizedMatrix:
    """``w[n, k] = (q[n, k] - 2**(bits - 1)) * scale[n, k // group] + offset[n, k // group]``.

    ``group`` 0 means one group per row. N and K are the rows and columns of the matrix.
    """

    bits: int
    group: int
    q: Tensor  # uint8 [N, K], 0 .. 2**bits - 1
    scale: Tensor  # bfloat16 [N, K / group], not negative
    offset: Tensor  # bfloat16 [N, K / group]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that the integers stand for, computed in float32 from the stored values."""
        rows, columns = self.q.shape
        q = self.q.view(rows, self.scale.shape[1], -1).to(torch.float32)  # [N, K / group, group]
        scale, offset = self.scale.to(torch.float32).unsqueeze(-1), self.offset.to(torch.float32).unsqueeze(-1)
        return q.sub_(2 ** (self.bits - 1)).mul_(scale).add_(offset).view(rows, columns).to(dtype)


def check_settings(bits: int, group: int, method: str) -> None:
    """Raise InvalidRequestError unless bits, group and method can be combined. ``group`` 0 needs 8 bits."""
    if bits not in BITS:
        raise InvalidRequestError(f"{bits} bits are not supported", field="bits", remedy="use 4 or 8")
    if group not in GROUPS and group != 0:
        raise InvalidRequestError(
            f"group {group} is not supported", field="group", remedy="use 32, 64 or 128, or 0 for whole rows of 8 bits"
        )
    if group == 0 and bits != 8:
        raise InvalidRequestError(
            "one group per row needs 8 bits", field="group", remedy="use 32, 64 or 128, or 8 bits"
        )
    if method not in METHODS:
        raise InvalidRequestError(f"unknown method {method!r}", field="method", remedy=f"use {' or '.join(METHODS)}")


def check_shape(shape: tuple[int, ...], bits: int, group: int, name: str = "weight") -> None:
    """Raise InvalidRequestError unless ``group`` divides the columns of a matrix of this shape."""
    if len(shape) != 2 or 0 in shape:
        raise InvalidRequestError(f"has shape {list(shape)}, not that of a matrix", field=name)
    if group and shape[1] % group:
        fits = [str(size) for size in GROUPS if shape[1] % size == 0]
        choices = [f"group {' or '.join(fits)}"] if fits else []
        choices.append("8 bits and group 0 (whole rows)")
        raise InvalidRequestError(
            f"has shape {list(shape)}, whose {shape[1]} columns are not whole groups of {group}",
            field=name,
            remedy=f"use {', or '.join(choices)}",
        )


def quantize(weight: Tensor, *, bits: int, group: int, method: str = "hqq") -> QuantizedMatrix:
    """Quantize a matrix [N, K] of any floating dtype, on its device, in float32, a few rows at a time.

    ``q`` is the nearest integer for the stored bfloat16 scale and offset. With ``hqq`` the squared error of no group
    exceeds that of ``rtn``. Groups whose largest magnitude is below 2**-100 become zero.

    Raises InvalidRequestError for settings that do not exist or do not fit the shape, WeightsError for NaN or inf.
    """
    check_settings(bits, group, method)
    check_shape(tuple(weight.shape), bits, group)
    rows, columns = weight.shape
    size = group or columns
    q = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((rows, columns // size), dtype=torch.bfloat16, device=weight.device)
    offset = torch.empty_like(scale)
    block = max(1, (_BLOCK_CPU if weight.device.type == "cpu" else _BLOCK_GPU) // columns)
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        groups = weight[part].to(torch.float32).reshape(-1, size)  # [G, size]: G groups
        _quantize_groups(groups, bits, method, q[part].view(-1, size), scale[part], offset[part])
    return QuantizedMatrix(bits, group, q, scale, offset)


def _quantize_groups(weight: Tensor, bits: int, method: str, q: Tensor, scale: Tensor, offset: Tensor) -> None:
    """Quantize ``weight`` float32 [G, size] into ``q`` [G, size] and ``scale``, ``offset`` of G elements."""
    half = 2 ** (bits - 1)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)  # [G, 1]; NaN is passed on
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise WeightsError("holds NaN or inf", remedy="the weights are damaged: download them again")
    solved = _half_quadratic(weight, low, high, 2 * half - 1) if method == "hqq" else None

    # Each group is divided by a power of two, which is exact and commutes with rounding to bfloat16, so that its
    # largest magnitude lies in [1, 2): squares can then neither overflow nor vanish.
    magnitude = torch.maximum(low.abs(), high.abs())
    exponent = torch.frexp(magnitude).exponent - 1
    tiny = exponent < _TINY_EXPONENT
    unit = torch.ldexp(torch.ones_like(magnitude), exponent.masked_fill(tiny, 0))
    weight, low, high = (torch.where(tiny, 0.0, x / unit) for x in (weight, low, high))

    fit = _Fit(weight, half)
    s, b = _min_max(low, high, half)
    if solved is not None:
        steps, zero = solved
        s, b = _refit(fit, (s, b), (_bfloat16(1 / steps / unit), _bfloat16((half - zero) / steps / unit)))
    q.copy_(fit.round(s, b).add_(half))
    scale.copy_((s * unit).view_as(scale))
    offset.copy_((b * unit).view_as(offset))


def _refit(fit: _Fit, *starts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The scale and offset [G, 1] of least squared error met on the way from the best of ``starts``, per group."""
    s, b = starts[0]
    error, next_s, next_b = fit(s, b)
    for other_s, other_b in starts[1:]:
        other_error, other_next_s, other_next_b = fit(other_s, other_b)
        better = other_error < error  # false for NaN, which the reference's scale limits can lead to
        s, b, error = _choose(better, (other_s, other_b, other_error), (s, b, error))
        next_s, next_b = _choose(better, (other_next_s, other_next_b), (next_s, next_b))
    before = float(error.sum())
    for _ in range(_REFITS):
        new_s, new_b = next_s, next_b
        new_error, next_s, next_b = fit(new_s, new_b)
        s, b, error = _choose(new_error < error, (new_s, new_b, new_error), (s, b, error))
        after = float(error.sum())
        if after >= before * (1 - _MIN_GAIN):
            break
        before = after
    # At 8 bits, rounding a scale moves the outer levels by up to a quarter of a step: its neighbours may fit better.
    for factor in (1 + 2**-7, 1 - 2**-8):
        new_s = _bfloat16(s * factor)
        new_error, _, _ = fit(new_s, b)
        s, error = _choose(new_error < error, (new_s, new_error), (s, error))
    return s, b


def _min_max(low: Tensor, high: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Scale and offset [G, 1] with which 2 * half levels span low .. high, as bfloat16 values in float32.

    The scale follows from the rounded offset, so that the levels still reach both ends where bfloat16 is coarser
    than the group is wide; a constant group comes out close to its value that way.
    """
    b = _bfloat16(low + half * ((high - low) / (2 * half - 1)))
    return _bfloat16(torch.maximum((high - b) / (half - 1), (b - low) / half)), b


def _half_quadratic(weight: Tensor, low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The HQQ solver: steps per unit of weight, and the zero point in steps, both [G, 1]; w = (q - zero) / steps.

    ``weight`` is float32 [G, size] with its group minima and maxima [G, 1]; q runs from 0 to ``top``. Only the zero
    point is optimised. Iterations, all in units of steps, e = w * steps + zero - q being the error:
        q = clamp(round(w * steps + zero)),  zero -= mean(e - shrink(e))
    where shrink takes lp_norm 0.7 and beta 10 in units of weights: an error is kept as an outlier, and does not move
    the zero point, only by as much as it exceeds |error|**(0.7 - 1) / 10. The end: 20 iterations, or the mean
    absolute error of the block no longer falls. On a matrix of one block the
    result is the reference's but for rounding.
    """
    span = high - low
    steps = torch.where(span <= _MIN_SPAN, 1.0, top / span).clamp_(max=_MAX_STEPS_PER_UNIT)
    zero = first = -low * steps
    scaled = weight * steps
    # |error|**(p - 1) / beta with the error in weights is limit * |e|**(p - 1) steps with the error in steps.
    limit = steps.pow(2 - _LP_NORM) / _BETA
    slack = 0.5 + 1e-6 * first.abs()
    error, q = torch.empty_like(scaled), torch.empty_like(scaled)
    best = float("inf")
    for _ in range(_ITERATIONS):
        torch.add(scaled, zero, out=error)
        torch.round(error, out=q).clamp_(0, top)
        error.sub_(q)
        # An error is at most half a step, or what the zero point has moved out of the range. Where the shrinkage
        # leaves nothing of the largest, as it does for narrow groups, no powers need be computed.
        reach = slack + (zero - first).abs()
        exact = bool((reach.pow(2 - _LP_NORM) <= limit).all())
        magnitude = torch.abs(error, out=q)
        current = float((magnitude.sum(1, keepdim=True) / steps).sum())
        if not exact:
            error = torch.copysign(torch.minimum(magnitude, magnitude.pow(_LP_NORM - 1).mul_(limit)), error)
        zero = zero - error.mean(1, keepdim=True)
        if not current < best:
            break
        best = current
    return steps, zero


class _Fit:
    """Squared errors and least-squares refits of ``weight`` float32 [G, size]. Integers are centred: q - half."""

    def __init__(self, weight: Tensor, half: int) -> None:
        self._weight, self._half = weight, half
        self._error, self._q = torch.empty_like(weight), torch.empty_like(weight)

    def round(self, s: Tensor, b: Tensor) -> Tensor:
        """The centred integers [G, size] nearest to the weights for scale and offset [G, 1]; a reused buffer."""
        # Multiplied, not divided: much faster. A zero scale belongs to a group that its offset gives exactly.
        inverse = torch.where(s > 0, 1 / s, 0.0)
        torch.sub(self._weight, b, out=self._error).mul_(inverse)
        return torch.round(self._error, out=self._q).clamp_(-self._half, self._half - 1)

    def __call__(self, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The squared error of (s, b) with the nearest integers, and the (s, b) that fit these integers best.

        All [G, 1]. The fit is the regression of the weights on the integers (slope = cov(q, w) / var(q)); its offset
        is rounded to bfloat16 first and the slope fitted again to what is left.
        """
        size = self._weight.shape[1]
        q = self.round(s, b)
        error = self._error.sub_(q)  # in steps
        sum_e, sum_q = error.sum(1, keepdim=True), q.sum(1, keepdim=True)
        sum_ee = torch.linalg.vector_norm(error, dim=1, keepdim=True).square_()
        sum_qq = torch.linalg.vector_norm(q, dim=1, keepdim=True).square_()
        sum_qe = error.mul_(q).sum(1, keepdim=True)
        variance = sum_qq - sum_q * sum_q / size
        # Integers that are all equal have no slope: the scale then stays.
        slope = torch.where(variance > 0.5, (sum_qe - sum_q * sum_e / size) / variance, 0.0)
        next_b = _bfloat16(b + s * (sum_e - slope * sum_q) / size)
        moved = torch.where(s > 0, (next_b - b) / s, 0.0)
        next_s = _bfloat16(s * torch.where(sum_qq > 0.5, 1 + (sum_qe - moved * sum_q) / sum_qq, 1.0)).clamp_(min=0)
        return s * s * sum_ee, next_s, next_b


def _choose(better: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.where(better, a, b) for a, b in zip(new, old, strict=True)]


def _bfloat16(x: Tensor) -> Tensor:
    """float32 values that bfloat16 holds exactly, of magnitude below 2 as groups are normalised."""
    return x.clamp(-_BELOW_TWO, _BELOW_TWO).to(torch.bfloat16).to(torch.float32)
