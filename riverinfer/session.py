"""A chat: messages, a template, and a sequence whose KV cache lives on between turns."""

from __future__ import annotations

import inspect
import threading
import time
import warnings
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from riverinfer.chat_template import ChatTemplate, choose_template, load_templates
from riverinfer.detokenizer import StreamingDetokenizer
from riverinfer.errors import ChatTemplateError, InvalidRequestError, RiverinferWarning, SessionFileError
from riverinfer.outputs import Output, Step
from riverinfer.sampling import SamplingParams
from riverinfer.sequence import TokenSequence
from riverinfer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from riverinfer.engine import Engine
    from riverinfer.river import RiverOptions

FILE_VERSION = 1
ROLES = ("system", "user", "assistant", "tool")
# What rendering itself sets or takes.
RESERVED_VARIABLES = frozenset(
    ("self", "messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "now")
)


class ChatSession:
    """One conversation with an engine.

    A turn renders all messages, but only the tokens that differ from what the cache holds are computed. The answer's
    own tokens are kept as generated, not encoded again from its text. Made by ``Engine.session``.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        messages: Sequence[Mapping[str, str]] = (),
        chat_template: str | None = None,
        template_name: str | None = None,
        use_template: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """system: the system prompt; "" is an empty one, None none at all (some templates then put in their own).
        chat_template: Jinja source to use instead of the model's. template_name: which of the model's templates, if
        it has several. use_template=False sends the bare text of all messages, one after the other.
        template_kwargs: extra variables for the template.

        Raises ChatTemplateError when there is no such template, InvalidRequestError for reserved variables.
        """
        self.engine = engine
        self.template: ChatTemplate | None = None
        if use_template:
            self.template = _make_template(engine, chat_template, template_name)
        self._template_kwargs = dict(template_kwargs or {})
        reserved = self._template_kwargs.keys() & RESERVED_VARIABLES
        if reserved:
            raise InvalidRequestError(
                f"{', '.join(sorted(reserved))} cannot be given", field="template_kwargs", remedy="leave it out"
            )
        self.messages: list[dict[str, str]] = []
        self.last_output: Output | None = None
        self._sequence = TokenSequence(engine.model, engine.ctx_size)
        # Text and ids that correspond, and the (text, id) lengths at which both may be cut.
        self._text = ""
        self._ids: list[int] = []
        self._marks: list[tuple[int, int]] = []
        self._current: weakref.ref[Generator[Step, None, None]] | None = None
        self._owner = 0  # ident of the thread that asked for the current answer
        self._lock = threading.RLock()
        self.set_messages(messages)
        if system is not None:
            self.system = system

    @property
    def system(self) -> str | None:
        """The system prompt; assign to change it, None removes it."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        with self._lock:
            self._stop_current()
            rest = self.messages[1:] if self.system is not None else self.messages
            self.messages = ([] if text is None else [{"role": "system", "content": text}]) + rest

    def set_messages(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Replace the conversation. Raises InvalidRequestError for anything but role/content strings."""
        checked = []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ROLES or not isinstance(content, str):
                raise InvalidRequestError(
                    f"message {dict(message)!r} is malformed",
                    field="messages",
                    remedy=f"give objects with a role ({', '.join(ROLES)}) and a content string",
                )
            checked.append({"role": role, "content": content})
        with self._lock:
            self._stop_current()
            self.messages = checked

    def send(
        self,
        text: str,
        params: SamplingParams | None = None,
        *,
        mode: str | None = None,
        river: RiverOptions | None = None,
        similarities: bool = False,
        output: Output | None = None,
    ) -> Iterator[Step]:
        """Answer ``text``, one step a token (a step's text may be empty until a character is whole).

        Stopping early keeps what was said, as the assistant's message and in the cache. A turn that fails before its
        first token leaves the conversation as it was. Raises InvalidRequestError, ContextLengthError,
        ChatTemplateError, EngineClosedError. ``mode``, ``river`` and ``similarities`` are those of ``Engine.generate``;
        ``output`` is filled along the way (``last_output`` holds it afterwards).
        """
        if not text:
            raise InvalidRequestError("the message is empty", remedy="say something")
        with self._lock:
            self._stop_current()
            messages = [*self.messages, {"role": "user", "content": text}]
            return self._answer(messages, params, mode, river, similarities, output)

    def regenerate(
        self, params: SamplingParams | None = None, *, mode: str | None = None, river: RiverOptions | None = None
    ) -> Iterator[Step]:
        """Answer the last user message again; the answer it had is dropped once the new one begins."""
        with self._lock:
            self._stop_current()
            messages = list(self.messages)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages or messages[-1]["role"] != "user":
                raise InvalidRequestError("there is no message to answer again", remedy="send one first")
            return self._answer(messages, params, mode, river, False, None)

    def undo(self) -> str | None:
        """Take back the last user message and everything after it; returns its text, None if there is none."""
        with self._lock:
            self._stop_current()
            for index in range(len(self.messages) - 1, -1, -1):
                if self.messages[index]["role"] == "user":
                    text = self.messages[index]["content"]
                    del self.messages[index:]
                    return text
        return None

    def clear(self) -> None:
        """Forget the conversation but the system prompt."""
        with self._lock:
            self._stop_current()
            self.messages = self.messages[:1] if self.system is not None else []

    def prompt_text(self, messages: Sequence[Mapping[str, str]] | None = None) -> str:
        """The text the model sees for the conversation (or for ``messages``), ready for an answer."""
        shown = self.messages if messages is None else messages
        if self.template is None:
            return "".join(message["content"] for message in shown)
        return self.template.render(shown, add_generation_prompt=True, **self._template_kwargs)

    def cached_tokens(self) -> int:
        """Positions whose K and V are in the cache now."""
        return len(self._sequence.tokens)

    def close(self) -> None:
        """Free the slot. The session can still be used: its next turn computes everything again."""
        self._stop_current()
        self.engine.slots.release(self._sequence, keep=False)

    def to_dict(self) -> dict[str, Any]:
        """The conversation as JSON types, for ``load_dict``."""
        return {"version": FILE_VERSION, "model": self.engine.model_dir.name, "messages": list(self.messages)}

    def load_dict(self, data: Any) -> None:
        """Take over a conversation saved by ``to_dict``. Raises SessionFileError, leaving this one unchanged."""
        if not isinstance(data, dict) or data.get("version") != FILE_VERSION:
            raise SessionFileError(
                "is no riverinfer chat of this version", field="version", remedy="give a file written by /save"
            )
        messages = data.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise SessionFileError("is no list of messages", field="messages", remedy="give a file written by /save")
        try:
            self.set_messages(messages)
        except InvalidRequestError as exc:
            raise SessionFileError(exc.problem, field="messages", remedy=exc.remedy) from exc

    def _answer(
        self,
        messages: list[dict[str, str]],
        params: SamplingParams | None,
        mode: str | None,
        river: RiverOptions | None,
        similarities: bool,
        output: Output | None,
    ) -> Iterator[Step]:
        began = time.perf_counter()
        text = self.prompt_text(messages)
        ids = self.engine.check_ids(self._encode(text))
        params = (params or self.engine.default_params()).with_seed()
        output = output if output is not None else Output()
        how = self.engine.choose_mode(mode, river, similarities)
        generator = self._run(messages, text, ids, params, how, similarities, output, began)
        self._current, self._owner = weakref.ref(generator), threading.get_ident()
        return generator

    def _run(
        self,
        messages: list[dict[str, str]],
        text: str,
        ids: list[int],
        params: SamplingParams,
        how: tuple[str, RiverOptions | None],
        similarities: bool,
        output: Output,
        began: float,
    ) -> Generator[Step, None, None]:
        engine = self.engine
        try:
            engine.slots.acquire(self._sequence)
            extra = () if engine.tokenizer.eos_token_id is None else (engine.tokenizer.eos_token_id,)
            yield from engine.run(
                self._sequence,
                ids,
                params,
                output,
                began=began,
                how=how,
                similarities=similarities,
                extra_stop_ids=extra,
            )
        finally:
            engine.slots.release(self._sequence, keep=True)
            if output.token_ids:
                self.messages = [*messages, {"role": "assistant", "content": output.text}]
                self._remember(text, ids, output)
                self.last_output = output

    def _stop_current(self) -> None:
        """Close an answer that was left half way. One that another thread asked for is not ours to close."""
        generator = self._current() if self._current is not None else None
        if generator is None or inspect.getgeneratorstate(generator) == inspect.GEN_CLOSED:
            return
        if self._owner != threading.get_ident():
            raise InvalidRequestError(
                "this session is answering another thread", remedy="wait for it, or use a session per thread"
            )
        generator.close()

    def _encode(self, text: str) -> list[int]:
        """Ids of a rendered prompt, reusing those of the longest known beginning."""
        tokenizer = self.engine.tokenizer
        for text_len, ids_len in reversed(self._marks):
            known, rest = self._text[:text_len], text[text_len:]
            if text.startswith(known) and rest:
                added = _encode_after(tokenizer, known, rest)
                if added is not None:
                    return self._ids[:ids_len] + added
        # A template writes BOS itself; bare text gets what the tokenizer's files say.
        ids = tokenizer.encode(text, add_special_tokens=self.template is None)
        if ids[:2] == [tokenizer.bos_token_id] * 2:
            warnings.warn("the prompt begins with two BOS tokens", RiverinferWarning, stacklevel=2)
        return ids

    def _remember(self, text: str, ids: list[int], output: Output) -> None:
        """Mark where the ids of this turn can be reused: after its prompt, and after its answer."""
        if not text.startswith(self._text[: self._marks[-1][0]] if self._marks else ""):
            self._marks = [mark for mark in self._marks if text.startswith(self._text[: mark[0]])]
        self._marks = [mark for mark in self._marks if mark[0] < len(text) and mark[1] < len(ids)]
        self._text, self._ids = text, list(ids)
        self._marks.append((len(text), len(ids)))
        answer = list(output.token_ids)
        ended = bool(answer) and answer[-1] in self.engine.tokenizer.special_ids and output.finish_reason == "stop"
        spoken = answer[:-1] if ended else answer
        if not self.engine.tokenizer.special_ids.isdisjoint(spoken):
            return  # tokens that no message shows
        detokenizer = StreamingDetokenizer(self.engine.tokenizer, prompt_ids=ids)
        said = "".join(detokenizer.push(token) for token in spoken) + detokenizer.finish()
        # A stop string, or a character cut in half: the ids say more than the message does.
        if said != output.text:
            return
        self._text += said + (self.engine.tokenizer.decode(answer[-1:]) if ended else "")
        self._ids += answer
        self._marks.append((len(self._text), len(self._ids)))


def _encode_after(tokenizer: Tokenizer, known: str, rest: str) -> list[int] | None:
    """Ids of ``rest`` as they stand in ``known + rest``; None unless a special token parts the two.

    Between ordinary tokens the encoding of a text depends on what stands before it.
    """
    for special in tokenizer.special_ids:
        mark = tokenizer.decode([special])
        if mark and known.endswith(mark):
            ids = tokenizer.encode(mark + rest, add_special_tokens=False)
            return ids[1:] if ids[:1] == [special] else None
    ids = tokenizer.encode(rest, add_special_tokens=False)
    if ids and ids[0] in tokenizer.special_ids and rest.startswith(tokenizer.decode(ids[:1])):
        return ids
    return None


def _make_template(engine: Engine, source: str | None, name: str | None) -> ChatTemplate:
    special = engine.tokenizer.special_tokens_map
    if source is not None:
        return ChatTemplate(source, special_tokens=special, origin="the given chat template")
    templates = load_templates(engine.model_dir)
    if not templates:
        raise ChatTemplateError(
            "this model has no chat template",
            file=engine.model_dir,
            remedy="give one with --chat-template FILE, or send bare text with --no-chat-template",
        )
    name, chosen = choose_template(templates, name=name)
    origin = f"{engine.model_dir}: chat template" + ("" if name == "default" else f" {name!r}")
    return ChatTemplate(chosen, special_tokens=special, origin=origin)
