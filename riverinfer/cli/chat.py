"""``riverinfer chat``: a conversation in the terminal, or one message a line through a pipe."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from riverinfer.cli.chat_commands import Commands, Leave, Regenerate, Send
from riverinfer.cli.generate import format_stats
from riverinfer.cli.setup import describe_params, given_prompt, load_engine, make_session, sampling_params
from riverinfer.cli.terminal import Terminal, open_terminal
from riverinfer.errors import ContextLengthError, RiverinferError

if TYPE_CHECKING:
    from riverinfer.engine import Engine
    from riverinfer.outputs import Step
    from riverinfer.sampling import SamplingParams
    from riverinfer.session import ChatSession


def run(args: argparse.Namespace) -> int:
    """Chat until the input ends. Answers go to stdout, everything else to stderr."""
    first = given_prompt(args)
    terminal = open_terminal(color=args.color, history=not args.no_history)
    with load_engine(args) as engine:
        session = make_session(args, engine)
        params = sampling_params(args, engine)
        if terminal.interactive:
            _greet(terminal, engine, params)
        chat = _Chat(terminal, session, params, stats=terminal.interactive and not args.no_stats)
        try:
            if first is not None:
                if terminal.interactive:
                    terminal.note(f"> {first.rstrip()}")
                chat.answer(session.send, first)
            elif args.single_turn:
                chat.turn(terminal.read())
            if not args.single_turn:
                chat.loop()
        except (EOFError, Leave):
            pass
    return 2 if chat.failures and args.single_turn else 0


class _Chat:
    """The loop around one session."""

    def __init__(self, terminal: Terminal, session: ChatSession, params: SamplingParams, *, stats: bool) -> None:
        self.terminal, self.session, self.stats = terminal, session, stats
        self.commands = Commands(session, params, terminal)
        self.failures = 0

    def loop(self) -> None:
        """Turns until end of input or /exit."""
        draft = ""
        while True:
            try:
                line = self.terminal.read(draft, complete=self.commands.names)
            except KeyboardInterrupt:
                self.terminal.note("Ctrl-D or /exit leaves; Ctrl-C stops an answer")
                continue
            draft = self.turn(line)

    def turn(self, line: str) -> str:
        """One input: a message or a command. Returns the text the next input line should start with."""
        if not line.strip():
            return ""
        try:
            action = self.commands.interpret(line)
            if isinstance(action, Send):
                self.answer(self.session.send, action.text)
            elif isinstance(action, Regenerate):
                self.answer(self.session.regenerate)
            elif isinstance(action, str):
                return action
        except RiverinferError as exc:
            self.problem(exc)
        return ""

    def answer(self, ask: object, *text: str) -> None:
        """Stream one answer; Ctrl-C stops it and keeps what was said."""
        assert callable(ask)
        before = self.session.last_output
        try:
            steps: Iterator[Step] = ask(*text, self.commands.params)
            try:
                for step in steps:
                    self.terminal.write(step.text)
            finally:
                close = getattr(steps, "close", None)
                if close is not None:
                    close()
                if self.session.last_output is not before:
                    self.terminal.end_answer()
        except KeyboardInterrupt:
            if not self.terminal.interactive:
                raise
            said = self.session.last_output is not before
            self.terminal.note("stopped" if said else "stopped before the answer began; the message was taken back")
        except ContextLengthError as exc:
            self.problem(exc)
            return
        except RiverinferError as exc:
            self.problem(exc)
            return
        output = self.session.last_output
        if self.stats and output is not None and output is not before:
            self.terminal.note(format_stats(output))

    def problem(self, exc: RiverinferError) -> None:
        """Say what went wrong and go on."""
        self.failures += 1
        text = str(exc)
        if isinstance(exc, ContextLengthError):
            text = f"{exc.problem}; /clear starts afresh, /undo takes back a turn, --ctx-size N at the start gives room"
        self.terminal.note(" ".join(text.split()))


def _greet(terminal: Terminal, engine: Engine, params: SamplingParams) -> None:
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
    terminal.note(f"sampling: {describe_params(params, engine)}")
    terminal.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
