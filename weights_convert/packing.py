"""The order in which quantized integers lie in memory: the one that the GPU kernels read.

4 bits: int16 words of four nibbles, in *planes*. The G weights of a group of one row are cut into four runs of G/4
consecutive weights; word c holds the c-th weight of each run, the first run in the lowest nibble:

    word c of group g  =  bits  3..0   k = g*G + 0*(G/4) + c
                          bits  7..4   k = g*G + 1*(G/4) + c
                          bits 11..8   k = g*G + 2*(G/4) + c
                          bits 15..12  k = g*G + 3*(G/4) + c          c = 0 .. G/4 - 1

Bit 15 is the sign bit of the int16, so words whose last nibble is 8 or more are negative. Group g of a row takes the
words g*G/4 .. (g+1)*G/4 - 1; rows follow each other. In a file the low byte of a word comes first. One mask and one
shift of a word's pair then give two weights of the same run, next to each other as the activations they multiply are.

8 bits: one uint8 a weight in the order of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from riverinfer.errors import InvalidRequestError


def pack(q: Tensor, bits: int, group: int) -> Tensor:
    """Integers uint8 [N, K] below 2**bits as stored: int16 [N, K/4] for 4 bits, uint8 [N, K] for 8 (``q`` itself).

    ``group`` is a multiple of 4 that divides K (4 bits). Raises InvalidRequestError if it is not.
    """
    _check(q, torch.uint8, bits, group, q.shape[-1])
    if bits == 8:
        return q
    rows, columns = q.shape
    runs = q.view(rows, columns // group, 4, group // 4)  # [N, K/G, run, c]
    nibbles = runs[:, :, 0::2] | runs[:, :, 1::2] << 4  # uint8 [N, K/G, byte of the word, c]
    return nibbles.transpose(2, 3).reshape(rows, columns // 2).view(torch.int16)  # [N, K/4]


def unpack(packed: Tensor, bits: int, group: int) -> Tensor:
    """The integers uint8 [N, K] that ``pack`` was given. Raises InvalidRequestError like ``pack``."""
    _check(packed, torch.uint8 if bits == 8 else torch.int16, bits, group, packed.shape[-1] * (1 if bits == 8 else 4))
    if bits == 8:
        return packed
    rows, words = packed.shape
    nibbles = packed.contiguous().view(torch.uint8).view(rows, words * 4 // group, group // 4, 2)  # [.., c, byte]
    runs = torch.stack((nibbles & 15, nibbles >> 4), dim=-1)  # [N, K/G, c, byte, nibble]
    return runs.permute(0, 1, 3, 4, 2).reshape(rows, words * 4)


def _check(tensor: Tensor, dtype: torch.dtype, bits: int, group: int, columns: int) -> None:
    if bits not in (4, 8):
        raise InvalidRequestError(f"{bits} bits are not supported", field="bits", remedy="use 4 or 8")
    if tensor.dim() != 2 or tensor.dtype != dtype:
        raise InvalidRequestError(f"is {tensor.dtype} {list(tensor.shape)}, not a matrix of {dtype}", field="packing")
    if bits == 4 and (group <= 0 or group % 4 or columns % group):
        raise InvalidRequestError(f"{columns} columns are not whole groups of {group}", field="group")
