"""Input and output of a chat: a line editor with history on a terminal, bare lines in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from riverinfer.cache_dir import history_file
from riverinfer.cli.pacing import Pacer

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

_DIM, _RESET = "\x1b[2m", "\x1b[0m"
_BLOCK = '"""'


class Terminal(Protocol):
    """What the chat loop needs of its surroundings."""

    interactive: bool

    def read(self, draft: str = "", *, complete: Sequence[str] = ()) -> str:
        """The next input. Raises EOFError at its end, KeyboardInterrupt on Ctrl-C."""
        ...

    def write(self, text: str) -> None:
        """Part of an answer."""
        ...

    def end_answer(self) -> None:
        """The answer is complete."""
        ...

    def note(self, text: str) -> None:
        """A line that is not part of an answer."""
        ...


def open_terminal(*, color: str = "auto", history: bool = True) -> Terminal:
    """A line editor if both ends are a terminal, else plain lines."""
    dim = color == "on" or (color == "auto" and sys.stderr.isatty() and not os.environ.get("NO_COLOR"))
    if sys.stdin.isatty() and sys.stdout.isatty():
        return EditorTerminal(dim=dim, history=history)
    return PipeTerminal(dim=dim)


class PipeTerminal:
    """One message a line from stdin; answers to stdout, notes to stderr."""

    interactive = False

    def __init__(self, *, dim: bool = False) -> None:
        self._dim = dim
        self._line_open = False

    def read(self, draft: str = "", *, complete: Sequence[str] = ()) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def write(self, text: str) -> None:
        if text:
            self._line_open = not text.endswith("\n")
            print(text, end="", flush=True)

    def end_answer(self) -> None:
        if self._line_open:
            print(flush=True)
        self._line_open = False

    def note(self, text: str) -> None:
        if self._line_open:
            print(flush=True)
            self._line_open = False
        print(f"{_DIM}{text}{_RESET}" if self._dim else text, file=sys.stderr, flush=True)


class EditorTerminal(PipeTerminal):
    """A line editor: history across restarts, completion of commands, multi-line paste and input.

    Enter sends. Alt-Enter, a backslash at the end of a line, or an open triple quote start a new line. Answers that
    come in bursts are shown smoothly; whatever follows an answer waits for all of it.
    """

    interactive = True

    def __init__(self, *, dim: bool, history: bool) -> None:
        super().__init__(dim=dim)
        self._session = _prompt_session(history)
        self._pacer: Pacer | None = None  # of the answer that is being shown

    def write(self, text: str) -> None:
        if self._pacer is None:
            self._pacer = Pacer(super().write)
        self._pacer.push(text)

    def end_answer(self) -> None:
        self._show_all()
        super().end_answer()

    def note(self, text: str) -> None:
        self._show_all()
        super().note(text)

    def _show_all(self) -> None:
        if self._pacer is not None:
            self._pacer.finish()
        self._pacer = None

    def read(self, draft: str = "", *, complete: Sequence[str] = ()) -> str:
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.document import Document

        completer = WordCompleter(list(complete), sentence=True) if complete else None
        text = self._session.prompt("> ", default=Document(draft) if draft else "", completer=completer)
        text = text.replace("\r\n", "\n")
        if text.startswith(_BLOCK) and text.rstrip().endswith(_BLOCK) and len(text.strip()) >= 2 * len(_BLOCK):
            text = text.strip()[len(_BLOCK) : -len(_BLOCK)].strip("\n")
            return "/" + text if text.startswith("/") else text  # quoted, so it is a message
        return text


def _prompt_session(history: bool) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    kept: History = InMemoryHistory()
    if history:
        path = history_file()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            kept = FileHistory(str(path))
        except OSError:
            # A read-only home is no reason not to chat.
            kept = InMemoryHistory()
    return PromptSession(
        history=kept,
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        complete_while_typing=False,
        enable_open_in_editor=True,
    )


def _keys() -> KeyBindings:
    from prompt_toolkit.filters import completion_is_selected
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter", filter=~completion_is_selected)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = buffer.text
        at_end = buffer.cursor_position == len(text)
        if at_end and text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif text.startswith(_BLOCK) and text.count(_BLOCK) < 2:
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("enter", filter=completion_is_selected)
    def _accept(event: KeyPressEvent) -> None:
        event.current_buffer.complete_state = None

    # Not Ctrl-J: it is what Enter sends when typed ahead, while an answer is still being printed.
    @keys.add("escape", "enter")
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
