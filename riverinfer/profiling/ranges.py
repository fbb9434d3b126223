"""NVTX ranges for NVIDIA's profilers (Nsight): named spans around what the host starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from riverinfer.errors import InvalidRequestError


class Ranges:
    """``of(name)`` is a context: with ``on`` a range of that name is open in it. Ranges nest.

    Raises InvalidRequestError where ``on`` and torch has no NVTX.
    """

    def __init__(self, on: bool = False) -> None:
        self.on = on
        if on and not torch.cuda.is_available():
            raise InvalidRequestError(
                "needs an NVIDIA GPU that torch can use",
                field="nvtx",
                remedy="leave --nvtx out; --trace works anywhere",
            )

    def of(self, name: str) -> AbstractContextManager[None]:
        return _range(name) if self.on else nullcontext()


@contextmanager
def _range(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
