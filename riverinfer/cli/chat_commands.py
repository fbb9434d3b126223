"""Slash commands of the chat. Each changes the session or the parameters, or says something; none can crash it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from riverinfer.cli.depth_colors import legend
from riverinfer.cli.generate import format_drafts, format_stats
from riverinfer.cli.setup import describe_params, read_text
from riverinfer.cli.terminal import Terminal
from riverinfer.errors import InvalidRequestError, SessionFileError
from riverinfer.whole_file import whole_file

if TYPE_CHECKING:
    from riverinfer.sampling import SamplingParams
    from riverinfer.session import ChatSession


class Leave(Exception):
    """The user wants to go."""


@dataclass(frozen=True)
class Send:
    """A message for the model."""

    text: str


class Regenerate:
    """Answer the last message again."""


@dataclass(frozen=True)
class Edit:
    """Offer the last message for changing; what is then sent replaces it."""

    text: str


Action = Send | Regenerate | Edit | None
"""What the loop does next."""

# What /set accepts: name -> (field of SamplingParams, how to read a value).
_SETTABLE: dict[str, tuple[str, Callable[[str], Any]]] = {
    "temp": ("temperature", float),
    "temperature": ("temperature", float),
    "top-k": ("top_k", int),
    "top-p": ("top_p", float),
    "min-p": ("min_p", float),
    "repeat-penalty": ("repetition_penalty", float),
    "repetition-penalty": ("repetition_penalty", float),
    "seed": ("seed", lambda text: None if int(text) == -1 else int(text)),
    "max-tokens": ("max_tokens", lambda text: None if int(text) == -1 else int(text)),
    "stop": ("stop", lambda text: () if text == "none" else (_unescape(text),)),
    "ignore-eos": ("ignore_eos", lambda text: {"on": True, "off": False}[text]),
}


class Commands:
    """Interprets input lines for one session; ``params`` is what the next answer uses."""

    def __init__(self, session: ChatSession, params: SamplingParams, terminal: Terminal) -> None:
        self.session, self.params, self.terminal = session, params, terminal
        self._table: dict[str, tuple[Callable[[str], Action], str]] = {
            "help": (self._help, "this list"),
            "exit": (self._exit, "leave (also /quit, /bye, Ctrl-D)"),
            "clear": (self._clear, "forget the conversation, keep the system prompt"),
            "regen": (self._regen, "answer the last message again"),
            "edit": (self._edit, "change the last message and send it again"),
            "undo": (self._undo, "take back the last message and its answer"),
            "system": (self._system, "[TEXT|none]  show or set the system prompt"),
            "set": (self._set, "[NAME VALUE]  show or change sampling: " + ", ".join(_shown_names())),
            "show": (self._show, "[messages|prompt|template|model]  what the model sees"),
            "save": (self._save, "FILE  write the conversation"),
            "load": (self._load, "FILE  read a conversation back"),
            "read": (self._read, "FILE [QUESTION]  send a text file, with a question before it"),
            "depth": (self._depth, "river mode: colour each token by its exit depth, or stop doing so"),
            "stats": (self._stats, "figures of the last answer and the cache"),
        }
        self.show_depth = False
        self._aliases = {"quit": "exit", "bye": "exit", "?": "help", "h": "help", "retry": "regen", "reset": "clear"}

    @property
    def names(self) -> list[str]:
        """Commands for completion."""
        return [f"/{name}" for name in self._table]

    def interpret(self, line: str) -> Action:
        """A line of input: ``/command``, or a message (``//`` for one that begins with a slash).

        Raises Leave, or a RiverinferError to be shown.
        """
        if line.startswith("//"):
            return Send(line[1:])
        if not line.startswith("/"):
            return Send(line)
        word, rest = _first_word(line[1:])
        name = self._aliases.get(word.lower(), word.lower())
        if name not in self._table:
            raise InvalidRequestError(
                f"unknown command /{word}", remedy="/help lists them; // sends a line that begins with a slash"
            )
        return self._table[name][0](rest)

    def _say(self, text: str) -> None:
        for line in text.splitlines() or [""]:
            self.terminal.note(line)

    def _help(self, _: str) -> None:
        for name, (_command, text) in self._table.items():
            arguments, _, meaning = text.rpartition("  ")
            self._say(f"{f'/{name} {arguments}'.rstrip():<42} {meaning}")
        self._say("//text sends a literal slash. Enter sends; Alt-Enter or a trailing \\ begins a new line,")
        self._say('and so does everything between """ and """. Ctrl-C stops an answer and keeps what was said.')

    def _exit(self, _: str) -> None:
        raise Leave

    def _clear(self, _: str) -> None:
        self.session.clear()
        self._say("the conversation is empty")

    def _regen(self, _: str) -> Action:
        if self.params.temperature == 0:
            self._say("sampling is greedy, so the answer will be the same: /set temp 0.7 varies it")
        else:
            self.params = replace(self.params, seed=None).with_seed()
            self._say(f"new seed {self.params.seed}")
        return Regenerate()

    def _edit(self, _: str) -> Action:
        if not self.terminal.interactive:
            raise InvalidRequestError("/edit needs a terminal", remedy="use /undo and send the message again")
        asked = [message["content"] for message in self.session.messages if message["role"] == "user"]
        if not asked:
            raise InvalidRequestError("there is no message to edit", remedy="send one first")
        return Edit(asked[-1])

    def _undo(self, _: str) -> None:
        text = self.session.undo()
        self._say("there is nothing to take back" if text is None else f"took back: {_short(text)}")

    def _system(self, text: str) -> None:
        if text:
            self.session.system = None if text == "none" else text
        self._say(f"system prompt: {self.session.system or 'none'}")

    def _set(self, text: str) -> None:
        if text:
            word, _, value = text.replace("=", " ", 1).partition(" ")
            name, value = word.replace("_", "-").lower(), value.strip()
            if name not in _SETTABLE:
                raise InvalidRequestError(f"unknown parameter {word!r}", remedy=f"known: {', '.join(_shown_names())}")
            field, read = _SETTABLE[name]
            try:
                parsed = read(value)
            except (ValueError, KeyError):
                raise InvalidRequestError(f"{name} cannot be {value!r}", remedy="/set shows the values now") from None
            self.params = replace(self.params, **{field: parsed}).with_seed()
        self._say(describe_params(self.params))

    def _show(self, what: str) -> None:
        session = self.session
        if what == "prompt":
            self._say(session.prompt_text())
        elif what == "template":
            self._say(session.template.source if session.template else "none: messages are sent as bare text")
        elif what in ("", "model"):
            engine = session.engine
            self._say(f"{engine.model_dir} ({engine.config.family}, mode {engine.mode}, context {engine.ctx_size})")
            self._say(f"sampling: {describe_params(self.params)}")
            self._say(f"system prompt: {session.system or 'none'}")
        elif what == "messages":
            for message in session.messages:
                self._say(f"{message['role']}: {message['content']}")
        else:
            raise InvalidRequestError(f"cannot show {what!r}", remedy="/show messages, prompt, template or model")

    def _save(self, text: str) -> None:
        path = _path(text, "/save FILE")
        data = self.session.to_dict() | {"params": _params_as_dict(self.params)}
        if not path.name or path.is_dir():
            raise SessionFileError("is a folder", file=path, remedy="give a file name")
        try:
            with whole_file(path) as aside:
                aside.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as exc:
            raise SessionFileError(
                f"cannot be written ({exc.strerror})", file=path, remedy="choose another place"
            ) from exc
        self._say(f"saved {len(self.session.messages)} messages to {path}")

    def _load(self, text: str) -> None:
        path = _path(text, "/load FILE")
        content = read_text(path)
        try:
            data = json.loads(content)
        except (ValueError, RecursionError) as exc:
            raise SessionFileError(f"is not JSON ({exc})", file=path, remedy="give a file written by /save") from exc
        params = _params_from_dict(data.get("params") if isinstance(data, dict) else None, path)
        self.session.load_dict(data)
        if params is not None:
            self.params = params
        self._say(f"loaded {len(self.session.messages)} messages from {path}")
        other = data.get("model")
        if other != self.session.engine.model_dir.name:
            self._say(f"note: they were written with the model {other}")

    def _read(self, text: str) -> Action:
        name, question = _first_word(text)
        path = _path(name, "/read FILE [QUESTION]")
        content = read_text(path)
        if not content.strip():
            raise InvalidRequestError("is empty", file=path, remedy="give a file with text")
        return Send(f"{question}\n\n{content}" if question else content)

    def _depth(self, _: str) -> None:
        if self.session.engine.mode != "river":
            raise InvalidRequestError("only river mode has exit depths", remedy="start with --mode river")
        self.show_depth = not self.show_depth
        self._say(legend(self.session.engine.config.num_layers) if self.show_depth else "exit depths are not shown")

    def _stats(self, _: str) -> None:
        session = self.session
        if session.last_output is None:
            self._say("no answer yet")
        else:
            stats = session.last_output.stats
            self._say(format_stats(session.last_output))
            self._say(
                f"prefill {stats.prefill_s * 1000:.0f} ms ({stats.prefill_tokens_per_s:.0f} tokens/s)"
                f" · finish reason {session.last_output.finish_reason or 'cut short'} · seed {session.last_output.seed}"
            )
            if stats.drafts is not None:
                self._say(format_drafts(stats.drafts))
        self._say(f"{session.cached_tokens()} of {session.engine.ctx_size} positions of context in the cache")
        self._say(str(session.engine.memory()))


def _shown_names() -> list[str]:
    seen: dict[str, str] = {}
    for name, (field, _) in _SETTABLE.items():
        seen.setdefault(field, name)
    return list(seen.values())


def _unescape(text: str) -> str:
    """Backslash escapes for line break, tab and backslash."""
    return re.sub(r"\\[nt\\]", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[0][1]], text)


def _short(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _first_word(text: str) -> tuple[str, str]:
    """The first word, quotes respected, and the rest, of which line breaks stay."""
    if text[:1] in ("'", '"'):
        end = text.find(text[0], 1)
        if end > 0:
            return text[1:end], text[end + 1 :].strip()
    words = text.split(None, 1)
    return (words[0] if words else ""), (words[1].strip() if len(words) > 1 else "")


def _path(text: str, usage: str) -> Path:
    if not text:
        raise InvalidRequestError("a file name is missing", remedy=usage)
    if text[:1] in ("'", '"'):
        try:
            text = " ".join(shlex.split(text))
        except ValueError:
            raise InvalidRequestError(f"{text} has an open quote", remedy=usage) from None
    try:
        return Path(text).expanduser()
    except RuntimeError as exc:  # no such ~user
        raise InvalidRequestError(str(exc), file=text, remedy=usage) from exc


def _params_as_dict(params: SamplingParams) -> dict[str, Any]:
    return {field: getattr(params, field) for field, _ in _SETTABLE.values()}


def _params_from_dict(data: Any, path: Path) -> SamplingParams | None:
    if data is None:
        return None
    from riverinfer.sampling import SamplingParams

    known = {field for field, _ in _SETTABLE.values()}
    try:
        if not isinstance(data, dict) or not set(data) <= known:
            raise TypeError("unknown parameters")
        return SamplingParams(**data)
    except (TypeError, ValueError) as exc:
        raise SessionFileError(str(exc), file=path, field="params", remedy="give a file written by /save") from exc
