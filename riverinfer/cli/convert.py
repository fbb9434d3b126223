"""``riverinfer convert SRC DST``."""

from __future__ import annotations

import argparse
import sys

from riverinfer.progress import ConsoleProgress


def run(args: argparse.Namespace) -> int:
    """Convert and say what was made."""
    from riverinfer.weights_convert import convert

    report = convert(args.src, args.dst, dtype=args.dtype, progress=ConsoleProgress())
    print(report)
    for note in report.notes:
        print(f"riverinfer: note: {' '.join(note.split())}", file=sys.stderr)
    return 0
