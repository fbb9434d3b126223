"""Weights on their way from mapped files to a GPU: through two pinned buffers, so that reading and copying overlap."""

from __future__ import annotations

import torch
from torch import Tensor

BUFFER_BYTES = 1 << 25


class Upload:
    """Copies tensors to ``device``. At no time is more than two buffers of them in the host's own memory."""

    def __init__(self, device: torch.device, nbytes: int = BUFFER_BYTES) -> None:
        pinned = device.type == "cuda"
        self._device = device
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._busy: list[torch.cuda.Event | None] = [None, None]  # until when a buffer is being read
        self._turn = 0

    def __call__(self, source: Tensor, target: Tensor) -> None:
        """target <- source, of the same shape; both contiguous. Converts the dtype on the host."""
        source, target = source.reshape(-1), target.view(-1)
        step = self._buffers[0].numel() // target.element_size()
        for start in range(0, len(target), step):
            buffer, busy = self._buffers[self._turn], self._busy[self._turn]
            if busy is not None:
                busy.synchronize()
            part = target[start : start + step]
            staged = buffer[: part.nbytes].view(target.dtype)
            staged.copy_(source[start : start + step])
            part.copy_(staged, non_blocking=True)
            if self._device.type == "cuda":
                self._busy[self._turn] = event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self._device))
            self._turn = 1 - self._turn
