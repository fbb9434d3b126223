"""A false clock, and a sleep on it that TorchScript can call, which reads annotations as they stand: none postponed."""

import torch
from torch import Tensor

from riverinfer.kernels import scripted

SLEEP = 0.05


class Clock:
    """``time.perf_counter`` that goes on by a microsecond a reading, and by what sleeps take."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


CLOCK = Clock()
plain_attend = scripted._attend


@torch.jit.ignore
def pause() -> None:
    """Sleep on the false clock."""
    CLOCK.now += SLEEP


def slow_attend(q: Tensor, cache: Tensor, parts: list[list[int]], masks: list[Tensor | None]) -> Tensor:
    """``scripted._attend`` after a sleep."""
    pause()
    return plain_attend(q, cache, parts, masks)


plain_multiply = scripted._multiply


def slow_multiply(x: Tensor, kind: int, weight: Tensor, scales: Tensor, group: int, bias: Tensor | None) -> Tensor:
    """``scripted._multiply`` after a sleep."""
    pause()
    return plain_multiply(x, kind, weight, scales, group, bias)
