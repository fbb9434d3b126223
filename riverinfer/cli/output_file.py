"""Files that commands write: refused before the work if they could not be, and never half there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from riverinfer.errors import InvalidRequestError
from riverinfer.whole_file import whole_file


def output_path(path: Path, suffixes: Sequence[str]) -> Path:
    """Where to write. Raises InvalidRequestError for another suffix, a folder, or a place that cannot be written to."""
    try:
        path = path.expanduser()
    except RuntimeError as exc:  # no such ~user
        raise InvalidRequestError(str(exc), file=path, remedy="check the path") from exc
    if path.suffix.lower() not in suffixes:
        raise InvalidRequestError(
            f"cannot tell the format from {path.suffix.lower()!r}", file=path, remedy=f"name it {', '.join(suffixes)}"
        )
    if path.is_dir():
        raise InvalidRequestError("is a folder", file=path, remedy="give a file name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        problem = "cannot be written to" if path.parent.exists() else "there is no such folder"
        raise InvalidRequestError(problem, file=path.parent, remedy="choose another place")
    return path


def write_whole(path: Path, content: bytes) -> None:
    """As ``whole_file``. Raises InvalidRequestError."""
    try:
        with whole_file(path) as aside:
            aside.write_bytes(content)
    except OSError as exc:
        raise InvalidRequestError(
            f"cannot be written ({exc.strerror})", file=path, remedy="choose another place"
        ) from exc
