"""Files in the page cache of the system: read in, dropped, and how much of them is there. Needs no root."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

CAN_DROP = hasattr(os, "posix_fadvise")


def read(files: Iterable[Path]) -> None:
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(2**22):
                pass


def drop(files: Iterable[Path]) -> None:
    """Ask the system to forget them. It keeps pages that a process has mapped: see ``resident_share``.

    Below a virtual machine the host may have a cache of its own, which nothing here reaches.
    """
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages not yet written would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(files: Iterable[Path]) -> float:
    """The share of the files' pages that are in the page cache, by ``mincore``; 0 of no pages."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    found = pages = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        flags = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            failed = mincore(view.ctypes.data, size, flags.ctypes.data)
            del view  # the mapping cannot be closed under it
            if failed:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        found, pages = found + int((flags & 1).sum()), pages + len(flags)
    return found / pages if pages else 0.0
