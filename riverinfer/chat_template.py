"""Chat templates: finding those of a model folder and rendering them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import SecurityError

from riverinfer.errors import ChatTemplateError
from riverinfer.template_sandbox import TemplateLimitError, TemplateRefusal, compile_template, render_template
from riverinfer.tokenizer_files import CONFIG, read_json_object, read_text

MAX_TEMPLATE_CHARS = 1 << 20
_REMEDY = "pass another template, or none"


# --------------------------------------------------------------------------------------------- finding


def load_templates(model_dir: Path) -> dict[str, str]:
    """The chat templates of a model folder by name, ``{}`` if it has none.

    ``chat_template.jinja`` is "default", and with it come ``additional_chat_templates/*.jinja``; else those
    in ``tokenizer_config.json``; else those in ``chat_template.json``. Raises ChatTemplateError if one of
    the files cannot be read.
    """
    model_dir = Path(model_dir)
    templates = {}
    folder = model_dir / "additional_chat_templates"
    if folder.is_dir():
        templates = {path.stem: read_text(path, ChatTemplateError) for path in sorted(folder.glob("*.jinja"))}
    default = model_dir / "chat_template.jinja"
    if default.is_file():
        return {"default": read_text(default, ChatTemplateError), **templates}
    for name in (CONFIG, "chat_template.json"):
        path = model_dir / name
        declared = _declared(read_json_object(path, ChatTemplateError) or {}, path)
        if declared:
            return {**declared, **templates}
    return templates


def _declared(config: Mapping[str, object], path: Path) -> dict[str, str]:
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):
        value = [{"name": name, "template": template} for name, template in value.items()]
    templates = {}
    for item in value if isinstance(value, list) else [None]:
        name, template = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise ChatTemplateError(
                'should be a string or a list of {"name", "template"} objects', file=path, field="chat_template"
            )
        templates[name] = template
    return templates


def choose_template(templates: Mapping[str, str], *, name: str | None = None, tools: bool = False) -> tuple[str, str]:
    """The (name, source) to use: ``name`` if given, else "tool_use" if there are tools and such a template,
    else "default", else the only one. Raises ChatTemplateError, listing the names, if there is none such.
    """
    if not templates:
        raise ChatTemplateError(
            "the model has no chat template",
            remedy="pass a template file, or use the model without a chat template",
        )
    if name is not None:
        wanted = [name]
    else:
        wanted = ["tool_use", "default"] if tools else ["default"]
        wanted += templates if len(templates) == 1 else []
    for candidate in wanted:
        if candidate in templates:
            return candidate, templates[candidate]
    names = ", ".join(repr(known) for known in templates)
    problem = "none of them is called 'default'" if name is None else f"there is no template {name!r}"
    raise ChatTemplateError(problem, field="chat template", remedy=f"choose one of {names}")


# ------------------------------------------------------------------------------------------- rendering


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads.

    ``special_tokens`` are the names a template sees (``bos_token``, ...); ``origin`` is the file named in
    errors. Raises ChatTemplateError if the template does not parse.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, object], origin: str) -> None:
        self.source = source
        self.origin = origin
        self._special_tokens = {key: value for key, value in _plain(dict(special_tokens)).items() if value is not None}
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(f"is longer than {MAX_TEMPLATE_CHARS} characters", file=origin, remedy=_REMEDY)
        try:
            self._template = compile_template(source)
        except TemplateSyntaxError as exc:
            raise ChatTemplateError(
                f"does not parse: {exc.message}", file=origin, field=f"line {exc.lineno}", remedy=_REMEDY
            ) from exc
        except (TemplateError, SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as exc:
            raise ChatTemplateError(
                f"does not parse: {exc or type(exc).__name__}", file=origin, remedy=_REMEDY
            ) from exc

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        continue_final_message: bool | str = False,
        now: datetime | None = None,
        **kwargs: object,
    ) -> str:
        """The text of a conversation, to be encoded with ``add_special_tokens=False``.

        ``tools`` are JSON schemas. ``continue_final_message`` leaves the last message open, at the end of its
        ``content`` or of the field given, and implies ``add_generation_prompt=False``. ``now`` is the time
        that ``strftime_now`` shows (default: local time). ``kwargs`` are further template variables and win
        over the special tokens. Keys of a message whose value is None are left out.

        Raises ChatTemplateError if the template raises, uses something undefined or forbidden, or goes over
        its time or size, or if the messages are not a list of objects.
        """
        try:
            chat = _messages(messages)
            variables = {
                **self._special_tokens,
                **_plain(kwargs),
                "tools": _plain(tools),
                "documents": _plain(documents),
            }
        except RecursionError as exc:
            raise ChatTemplateError("the messages are nested too deeply", file=self.origin) from exc
        except ValueError as exc:
            raise ChatTemplateError(str(exc), file=self.origin, field="messages") from exc
        if not continue_final_message:
            variables |= {"messages": chat, "add_generation_prompt": add_generation_prompt}
            return self._run(variables, now)
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        last = _mark_end(chat[-1], field, self.origin)
        variables |= {"messages": chat, "add_generation_prompt": False}
        text = self._run(variables, now)
        end = text.rfind(_MARK.strip())
        if end < 0 or last.strip() not in text:
            raise ChatTemplateError(
                f"does not show the last message's {field}, so it cannot be continued",
                file=self.origin,
                field="continue_final_message",
                remedy="start a new message instead",
            )
        return text[:end] if text.startswith(_MARK, end) else text[:end].rstrip()

    def _run(self, variables: Mapping[str, object], now: datetime | None) -> str:
        try:
            return render_template(self._template, variables, now=now)
        except Exception as exc:
            raise self._error(exc) from exc

    def _error(self, exc: Exception) -> ChatTemplateError:
        line = None
        traceback = exc.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == "<template>":
                line = traceback.tb_lineno
            traceback = traceback.tb_next
        remedy: str | None = _REMEDY
        if isinstance(exc, TemplateRefusal):
            problem, remedy = f"the template refused the conversation: {exc.message}", None
        elif isinstance(exc, TemplateLimitError):
            problem = str(exc)
        elif isinstance(exc, UndefinedError):
            problem = f"uses something that is not defined: {exc.message}"
        elif isinstance(exc, SecurityError):
            problem = f"does something that is not allowed: {exc.message}"
        elif isinstance(exc, RecursionError):
            problem = "calls itself too deeply"
        else:
            problem = f"failed: {type(exc).__name__}: {str(exc)[:500]}"
        field = None if line is None else f"line {line}"
        return ChatTemplateError(problem, file=self.origin, field=field, remedy=remedy)


_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = "CONTINUE_FROM_HERE_7f3a "


def _messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    """Plain copies without None values, with the reasoning text under each name templates look for."""
    chat = []
    for message in messages:
        plain = _plain(message)
        if not isinstance(plain, dict):
            raise ValueError(f"each message should be an object, not {type(message).__name__}")
        plain = {key: value for key, value in plain.items() if value is not None}
        reasoning = next((plain[key] for key in _REASONING if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        chat.append(plain)
    if not chat:
        raise ValueError("there are none; give at least one")
    return chat


def _mark_end(message: dict[str, Any], field: str, origin: str) -> str:
    """Put the mark behind the text to continue, in place; returns that text."""
    value = message.get(field)
    if isinstance(value, list):
        for part in reversed(value):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text: str = part["text"]
                part["text"] = text + _MARK
                return text
    if not isinstance(value, str):
        raise ChatTemplateError(f"the last message has no text in {field!r} to continue", file=origin, field="messages")
    for key in _REASONING if field in _REASONING else (field,):
        if message.get(key) == value:
            message[key] = value + _MARK
    return value


def _plain(value: Any) -> Any:
    """Rebuilt from JSON types; anything else becomes a text naming its type. Rich objects have methods that
    the sandbox knows nothing about."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"
