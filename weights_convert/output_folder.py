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
    if this process is already writing it, or if the file system refuses (no space, no permission). An
    ``OSError`` of the block about a file outside the temporary folder becomes one that names this file.
    """
    with _os_errors(destination):
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
                with _source_errors(partial):
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
    """Raise ``ConversionError`` unless ``destination`` is absent or an empty folder other than the current one,
    which cannot be replaced under the processes that run in it. ``Path("")`` is the current folder."""
    with _os_errors(destination):
        if not os.path.lexists(destination):
            return
        if not destination.is_dir():
            raise ConversionError("exists and is not a folder", file=destination, remedy="choose another destination")
        if os.path.samefile(destination, os.curdir):
            raise ConversionError("is the current folder", file=destination, remedy="name a folder to be made")
        if any(destination.iterdir()):
            raise ConversionError(
                "exists and is not empty", file=destination, remedy="choose another destination or remove it"
            )


def _remove_stale(destination: Path) -> None:
    prefix = f".{destination.name}.partial-"
    for path in destination.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdecimal() and not process_is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def process_is_running(pid: int) -> bool:
    """Whether ``pid`` is a process other than this one."""
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
        raise ConversionError(
            f"cannot be written: {error.strerror or error}",
            file=destination,
            field=_file_name(error),
            remedy="check the free space and the permissions of the destination",
        ) from error


@contextmanager
def _source_errors(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = _file_name(error)
        if name is None or Path(os.path.realpath(name)).is_relative_to(partial):
            raise
        raise ConversionError(
            f"cannot be read: {error.strerror or error}", file=name, remedy="check the source"
        ) from error


def _file_name(error: OSError) -> str | None:
    # It may be a file descriptor.
    with suppress(TypeError):
        return os.fsdecode(error.filename) or None
    return None
