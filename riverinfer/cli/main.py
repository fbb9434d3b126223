"""Entry point: parse, run one command, turn errors into one line and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from riverinfer.cli.arguments import parse_arguments
from riverinfer.errors import RiverinferError, RiverinferWarning

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``riverinfer ARGS``; returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    _clean_up_when_terminated()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", RiverinferWarning)
    command: Callable[..., int] = import_module(f"riverinfer.cli.{args.command}").run
    try:
        return command(args)
    except RiverinferError as exc:
        if args.debug:
            raise
        print(f"riverinfer: {_one_line(str(exc))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away; a second failure at interpreter exit must not print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as exc:
        if args.debug:
            raise
        print(f"riverinfer: {_one_line(str(exc))}", file=sys.stderr)
        return 2


def _clean_up_when_terminated() -> None:
    """Let SIGTERM and SIGHUP unwind the stack, so that half-written files are removed as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), leave)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, RiverinferWarning):
        print(f"riverinfer: note: {_one_line(str(message))}", file=sys.stderr)


def _one_line(text: str) -> str:
    return " ".join(text.split())
