"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a place beside ``path`` to write to. It replaces ``path`` at once when the block ends, and is removed where
    the block raises.

    Its name, ``.NAME.partial-PID``, says which process it is of: what a killed one left behind can be told from it.
    Raises OSError.
    """
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield aside
        aside.replace(path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
