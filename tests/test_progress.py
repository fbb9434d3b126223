"""Progress in a pipe and on a terminal."""

from __future__ import annotations

import io

from riverinfer.progress import ConsoleProgress


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_one_line_at_each_end() -> None:
    out = io.StringIO()
    progress = ConsoleProgress(out)
    for done in range(4):
        progress("Reading", done * 2**20, 3 * 2**20, "B")
    progress("Counting", 0, 2, "sheep")
    progress("Counting", 2, 2, "sheep")
    assert out.getvalue().splitlines() == [
        "Reading ...",
        "Reading: done (3 MiB)",
        "Counting ...",
        "Counting: done (2 sheep)",
    ]


def test_short_steps_can_be_silent_in_a_pipe() -> None:
    out = io.StringIO()
    progress = ConsoleProgress(out, quiet_s=60)
    progress("Reading", 0, 2, "B")
    progress("Reading", 2, 2, "B")
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    out = Tty()
    progress = ConsoleProgress(out, quiet_s=60)
    for done in range(4):
        progress("Reading", done, 3, "files")
    assert "Reading" in out.getvalue()
    assert "\n" not in out.getvalue()
