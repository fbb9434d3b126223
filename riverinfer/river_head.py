"""The head in the river: logits from a 4-bit copy, and the highest of them from the checkpoint's own rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from riverinfer.kernels.linear import Linear
from riverinfer.kernels.quantized_linear import make_quantized_linear, packed_group, quantized_bytes
from riverinfer.weights_convert.river_artifact import HEAD_BITS

if TYPE_CHECKING:
    from riverinfer.weights_convert.quantize import QuantizedMatrix

K_SHORTLIST = 64


class RiverHead:
    """Normed states to logits. A token that leads the exact logits does so here if it is among the 64 of the copy."""

    def __init__(self, linear: Linear, rows: Callable[[Tensor], Tensor]) -> None:
        """``linear``: the copy, [T, H] to [T, vocab]. ``rows``: the exact head's, int64 [n] to float32 [n, H]."""
        self.linear, self._rows = linear, rows
        self.weight_bytes = linear.weight_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H] in the weights' dtype to float32 logits [T, vocab].

        Those of the shortlist are sums of the exact head's products in float32, not rounded to x's dtype as its own
        logits are; the others are the copy's.
        """
        logits = self.linear(x).float()  # [T, vocab]
        self.rescore(x, logits)
        return logits

    def rescore(self, x: Tensor, logits: Tensor, chosen: Tensor | None = None) -> None:
        """Replace the highest of the copy's logits, float32 [T, vocab], by the exact head's; ``chosen`` bool [T] rows.

        x [T, H] are the states they come from.
        """
        for i, (state, row) in enumerate(zip(x.float(), logits, strict=True)):
            ids = row.topk(min(K_SHORTLIST, len(row)), sorted=False).indices  # [64]
            # The file may hold a wider dtype than the model computes with.
            exact = self._rows(ids).to(x.dtype).float() @ state
            row[ids] = exact if chosen is None else torch.where(chosen[i], exact, row[ids])


def make_river_head(
    matrix: QuantizedMatrix | None, rows: Callable[[Tensor], Tensor], *, dtype: torch.dtype, device: torch.device
) -> RiverHead | None:
    """The head of ``matrix`` [vocab, H] for states of ``dtype`` on ``device``.

    None without a matrix, and without a packed kernel for it: a dequantized copy gains nothing over the exact head.
    """
    if matrix is None:
        return None
    vocab, hidden = matrix.q.shape
    if not river_head_bytes(vocab, hidden, matrix.group, dtype=dtype, device=device):
        return None
    q, scale, offset = (x.to(device) for x in (matrix.q, matrix.scale, matrix.offset))
    return RiverHead(make_quantized_linear(q, scale, offset, bits=matrix.bits, dtype=dtype), rows)


def river_head_bytes(vocab: int, hidden: int, group: int, *, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that the copy takes; 0 where there is none: ``group`` 0, or no packed kernel."""
    if not group or not packed_group(vocab, hidden, HEAD_BITS, group, dtype, device):
        return 0
    return quantized_bytes(vocab, hidden, HEAD_BITS, group, dtype, device)
