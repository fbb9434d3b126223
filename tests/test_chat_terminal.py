"""The chat on a real (pseudo) terminal: line editing, Ctrl-C, Ctrl-D, multi-line input, history across restarts."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from golden_models import ROOT

ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07|\x1b[=>]")


class Screen:
    """A chat process on a pseudo terminal."""

    def __init__(self, cache: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "riverinfer", "chat", str(ROOT / "llama"), "--dtype", "float32", *flags]
        environment = {**os.environ, "RIVERINFER_CACHE": str(cache), "TERM": "xterm", "NO_COLOR": "1"}
        environment["PROMPT_TOOLKIT_NO_CPR"] = "1"
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in a shell's background, and then by what it starts
            os.execvpe(command[0], command, environment)
        self._fresh = ""
        self.greeting = self.wait_for("Ctrl-D leaves")
        self.ready()

    def wait_for(self, pattern: str, timeout: float = 20) -> str:
        """Read until ``pattern`` shows; returns everything since the last wait up to its end."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self._fresh)):
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self._fresh!r}"
            try:
                chunk = os.read(self.fd, 65536)
            except OSError:
                chunk = b""
            assert chunk, f"the process ended without {pattern!r}: {self._fresh!r}"
            self._fresh = ANSI.sub("", self._fresh + chunk.decode(errors="replace"))
        shown, self._fresh = self._fresh[: found.end()], self._fresh[found.end() :]
        return shown

    def ready(self) -> None:
        """Wait for the next input line: what is typed before it is echoed by the terminal, not edited."""
        self.wait_for("\n>|^>")
        time.sleep(0.1)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def ask(self, typed: str) -> None:
        """Type a message and wait until it is answered and the next line can be typed."""
        self.type(typed + "\r")
        self.wait_for(r"tokens/s")
        self.ready()

    def leave(self) -> int:
        """Ctrl-D; returns the exit code."""
        self.ready()
        self.type("\x04")
        try:
            while os.read(self.fd, 65536):
                pass
        except OSError:
            pass  # the other end is closed
        status = os.waitpid(self.pid, 0)[1]
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    chat = Screen(tmp_path, "-n", "8", "--ignore-eos", "-c", "2048")
    yield chat
    chat.close()


def test_an_answer_is_followed_by_its_figures(screen: Screen) -> None:
    assert re.search(r"lossless · float32 on cpu, \d+ threads · context 2048", screen.greeting)
    assert "seed" in screen.greeting
    screen.type("Hello\r")
    screen.wait_for(r"prompt \d+ tokens · first token \d+ ms · 8 tokens at [\d.]+ tokens/s")
    screen.ready()
    screen.type("More\r")
    screen.wait_for(r"prompt \d+ tokens \(\d+ cached\).*tokens/s")
    assert screen.leave() == 0


def test_ctrl_c_stops_the_answer_and_only_hints_at_the_prompt(screen: Screen) -> None:
    screen.type("/set max-tokens -1\r")
    screen.wait_for("seed")
    screen.ready()
    screen.type("Hello\r")
    screen.wait_for(r"Hello\s+[^>]{40}")  # well into the answer, however slow the machine
    screen.type("\x03")
    screen.wait_for("stopped")
    said = screen.wait_for(r"prompt \d+ tokens.*tokens/s")
    tokens = int(re.search(r"(\d+) tokens at", said).group(1))  # type: ignore[union-attr]
    assert 1 < tokens < 2000
    screen.ready()
    screen.type("\x03")
    screen.wait_for("Ctrl-D or /exit leaves")
    screen.ready()
    screen.type("/set max-tokens 4\r")
    screen.wait_for("max-tokens 4")
    screen.ready()
    screen.type("Again\r")
    cached = screen.wait_for(r"\(\d+ cached\).*tokens")
    assert int(re.search(r"\((\d+) cached\)", cached).group(1)) > 10  # type: ignore[union-attr]
    screen.ready()
    screen.type("/show messages\r")
    screen.wait_for("user: Hello")
    screen.wait_for("assistant: ")
    screen.wait_for("user: Again")
    assert screen.leave() == 0


def test_multi_line_input_and_paste(screen: Screen) -> None:
    for typed in ("one\\\rtwo", "\x1b[200~three\nfour\x1b[201~", "five\x1b\rsix", '"""\rseven\reight\r"""'):
        screen.type(typed)
        time.sleep(0.3)
        screen.type("\r")
        screen.wait_for(r"tokens/s")
        screen.ready()
    screen.type("/show messages\r")
    for first, second in (("one", "two"), ("three", "four"), ("five", "six"), ("seven", "eight")):
        screen.wait_for(rf"user: {first}\r*\n.*{second}")
    assert screen.leave() == 0


def test_edit_offers_the_last_message_again(screen: Screen) -> None:
    screen.ask("Hello")
    screen.type("/edit\r")
    screen.wait_for("/edit")
    screen.wait_for("Hello")
    time.sleep(0.2)
    screen.ask(" there")
    screen.type("/show messages\r")
    assert "user: Hello\r" not in screen.wait_for(r"user: Hello there")
    screen.ready()
    screen.type("/nonsense\r")
    screen.wait_for("unknown command /nonsense")
    assert screen.leave() == 0


def test_an_edit_can_be_called_off(screen: Screen) -> None:
    screen.ask("Hello")
    screen.type("/edit\r")
    screen.wait_for("/edit")
    screen.wait_for("Hello")
    time.sleep(0.2)
    screen.type("\x03")
    screen.wait_for("Ctrl-D or /exit leaves")
    screen.ready()
    screen.type("/show messages\r")
    screen.wait_for("user: Hello")
    screen.wait_for("assistant: ")
    assert screen.leave() == 0


def test_a_quoted_block_is_a_message_whatever_it_begins_with(screen: Screen) -> None:
    screen.type('"""/exit\rnot a command"""\r')
    screen.wait_for(r"tokens/s")
    screen.ready()
    screen.type("/show messages\r")
    screen.wait_for(r"user: /exit\r*\n.*not a command")
    assert screen.leave() == 0


def test_enter_typed_ahead_of_the_prompt_still_sends(screen: Screen) -> None:
    screen.type("Hello\r")
    screen.wait_for("Hello")
    screen.type("/set temp 0.5\r")
    screen.wait_for("temp 0.5 ·")
    assert screen.leave() == 0


def test_history_survives_a_restart(tmp_path: Path) -> None:
    first = Screen(tmp_path, "-n", "2", "--ignore-eos")
    first.type("a message to remember\r")
    first.wait_for("tokens/s")
    assert first.leave() == 0
    first.close()
    history = tmp_path / "chat_history"
    assert history.stat().st_mode & 0o077 == 0
    second = Screen(tmp_path, "-n", "2", "--ignore-eos")
    second.type("\x1b[A")
    second.wait_for("a message to remember")
    second.close()
    third = Screen(tmp_path, "-n", "2", "--ignore-eos", "--no-history")
    third.type("not to be kept\r")
    third.wait_for("tokens/s")
    third.close()
    assert "not to be kept" not in history.read_text()
