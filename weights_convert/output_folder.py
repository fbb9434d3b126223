"""A folder that appears under its final name only when it is complete."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from riverinfer.errors import ConversionError

_active: set[Path] = set()
_active_lock = threading.Lock()


@contextmanager
def output_folder(destination: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder of ``destination``; rename it to ``destination`` when the block ends.

    If the block raises anything, the temporary folder is removed and ``destination`` is not created.
    Temporary folders that dead processes left for the same destination are removed first.

    Raises ``ConversionError`` if ``destination`` exists and is not an empty folder (before the block runs),
    if this process is already writing it, or if the file system refuses (no space, no permission).
    """
    destination = Path(os.path.realpath(destination))
    check_destination(destination)
    partial = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    with _active_lock:
        if partial in _active:
            raise ConversionError("is being written by another conversion of this process", file=destination)
        _active.add(partial)
    try:
        with _os_errors(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(destination)
            partial.mkdir()
            try:
                yield partial
                check_destination(destination)
                partial.rename(destination)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    finally:
        with _active_lock:
            _active.discard(partial)


def check_destination(destination: Path) -> None:
    """Raise ``ConversionError`` unless ``destination`` is absent or an empty folder."""
    with _os_errors(destination):
        if not os.path.lexists(destination):
            return
        if not destination.is_dir():
            raise ConversionError("exists and is not a folder", file=destination, remedy="choose another destination")
        if any(destination.iterdir()):
            raise ConversionError(
                "exists and is not empty", file=destination, remedy="choose another destination or remove it"
            )


def _remove_stale(destination: Path) -> None:
    prefix = f".{destination.name}.partial-"
    for path in destination.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        # A leftover of an earlier process with the same id (usual in containers): this process' own folder
        # does not exist yet.
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


@contextmanager
def _os_errors(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error}"
        where = None
        with suppress(TypeError, AttributeError):
            where = os.fspath(error.filename)
        raise ConversionError(
            problem,
            file=destination,
            field=str(where) if where else None,
            remedy="check the free space and the permissions of the destination",
        ) from error
