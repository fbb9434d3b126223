"""``riverinfer chat``: a conversation in the terminal, or one message a line through a pipe."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from riverinfer.cli.chat_commands import Commands, Edit, Leave, Regenerate, Send
from riverinfer.cli.depth_colors import color
from riverinfer.cli.generate import format_stats
from riverinfer.cli.setup import (
    check_flags,
    describe_params,
    given_prompt,
    load_engine,
    make_session,
    recommended,
    sampling_params,
)
from riverinfer.cli.terminal import Terminal, open_terminal
from riverinfer.errors import ContextLengthError, RiverinferError

if TYPE_CHECKING:
    from riverinfer.engine import Engine
    from riverinfer.outputs import Step
    from riverinfer.sampling import SamplingParams
    from riverinfer.session import ChatSession


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends. Answers go to stdout, everything else to stderr."""
    check_flags(args)
    first = given_prompt(args)
    terminal = open_terminal(color=args.color, history=not args.no_history)
    with load_engine(args) as engine:
        session = make_session(args, engine)
        taken = recommended(args, engine)
        params = sampling_params(args, taken)
        sampling = describe_params(params, taken, engine.generation_config.origin)
        if terminal.interactive:
            _greet(terminal, engine)
        terminal.note(f"sampling: {sampling}")
        if terminal.interactive:
            terminal.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        chat = _Chat(terminal, session, params, stats=terminal.interactive and not args.no_stats, debug=args.debug)
        if args.show_depth:
            chat.turn("/depth")
        try:
            if first is not None:
                if terminal.interactive:
                    terminal.note(f"> {first.rstrip()}")
                chat.message(first)
            elif args.single_turn:
                chat.turn(terminal.read())
            if not args.single_turn:
                chat.loop()
        except (EOFError, Leave):
            pass
    return 2 if chat.failures and args.single_turn else 0


class _Chat:
    """The loop around one session."""

    def __init__(
        self, terminal: Terminal, session: ChatSession, params: SamplingParams, *, stats: bool, debug: bool
    ) -> None:
        self.terminal, self.session, self.stats, self.debug = terminal, session, stats, debug
        self.commands = Commands(session, params, terminal)
        self.failures = 0
        self._edited: Edit | None = None  # the message that the next line replaces

    def loop(self) -> None:
        """Turns until end of input or /exit."""
        while True:
            draft = self._edited.text if self._edited else ""
            try:
                line = self.terminal.read(draft, complete=self.commands.names)
            except KeyboardInterrupt:
                self._edited = None
                self.terminal.note("Ctrl-D or /exit leaves; Ctrl-C stops an answer")
                continue
            try:
                self.turn(line)
            except KeyboardInterrupt:
                # Outside an answer, or once more while one was being ended.
                if not self.terminal.interactive:
                    raise
                self.terminal.end_answer()
                self.terminal.note("stopped")

    def turn(self, line: str) -> None:
        """One input: a message or a command. Whatever goes wrong with it is said, and the chat goes on."""
        edited, self._edited = self._edited, None
        if not line.strip():
            return
        with self._surviving():
            action = self.commands.interpret(line)
            if isinstance(action, Edit):
                self._edited = action
            elif isinstance(action, Regenerate):
                self._stream(self.session.regenerate(self.commands.params))
            elif isinstance(action, Send):
                if edited is not None:
                    self.session.undo()
                self._stream(self.session.send(action.text, self.commands.params))

    def message(self, text: str) -> None:
        """Answer ``text`` as it is, slashes and all."""
        with self._surviving():
            self._stream(self.session.send(text, self.commands.params))

    def _stream(self, steps: Iterator[Step]) -> None:
        """Print one answer; Ctrl-C stops it and keeps what was said."""
        before, shown = self.session.last_output, 0
        try:
            with contextlib.closing(steps):  # type: ignore[type-var]
                for step in steps:
                    text = step.text
                    if self.commands.show_depth and text and step.exit_depth is not None:
                        text = color(text, step.exit_depth, self.session.engine.config.num_layers)
                    shown += len(step.text)
                    self.terminal.write(text)
        except KeyboardInterrupt:
            if not self.terminal.interactive:
                raise
            said = self.session.last_output
            if said is None or said is before:
                self.terminal.note("stopped before the answer began; the message was taken back")
            else:
                self.terminal.write(said.text[shown:])  # kept, though the interrupt came before it was shown
                self.terminal.note("stopped")
        finally:
            self.terminal.end_answer()
        output = self.session.last_output
        if self.stats and output is not None and output is not before:
            self.terminal.note(format_stats(output))

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except (Leave, BrokenPipeError):
            raise
        except ContextLengthError as exc:
            room = "/clear starts afresh, /undo takes back a turn, --ctx-size N at the start gives room"
            self._problem(f"{exc.problem}; {room}")
        except RiverinferError as exc:
            self._problem(str(exc))
        except Exception as exc:
            # A bug of ours must not take the conversation with it.
            if self.debug:
                raise
            self._problem(f"internal error, {type(exc).__name__}: {exc}; --debug shows where")

    def _problem(self, text: str) -> None:
        self.failures += 1
        self.terminal.note(" ".join(text.split()))


def _greet(terminal: Terminal, engine: Engine) -> None:
    import torch

    import riverinfer

    dtype = str(engine.model.dtype).removeprefix("torch.")
    place = str(engine.model.device)
    if place == "cpu":
        place += f", {torch.get_num_threads()} threads"
    terminal.note(
        f"riverinfer {riverinfer.__version__} · {engine.model_dir.resolve().name} · {engine.mode} · {dtype} on {place}"
        f" · context {engine.ctx_size}"
    )
