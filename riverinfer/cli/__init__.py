"""The command line. ``main`` is the console script; nothing here imports torch before a command needs it."""

from riverinfer.cli.main import main

__all__ = ["main"]
