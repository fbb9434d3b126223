"""Where chat templates, programs from the internet, run: Jinja's immutable sandbox as the hub sets it up.

Limits on time and size end templates that loop for ever or repeat a text until memory is full.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import FrameType
from typing import Any, cast

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_SECONDS = 2.0
"""Time one rendering may take, in seconds. Ordinary templates take milliseconds."""
MAX_LENGTH = 1 << 25
"""Most characters of the rendered text, and most characters or elements of a value made by an operator."""
_MAX_BITS = 1 << 16


class TemplateRefusal(TemplateError):
    """The template called ``raise_exception``."""


class TemplateLimitError(Exception):
    """The template takes too long or makes too much."""


def compile_template(source: str) -> Template:
    """A template for ``render_template``.

    If it does not parse: TemplateError, SyntaxError, ValueError, RecursionError, MemoryError, OverflowError.
    """
    template = _ENVIRONMENT.from_string(source)
    # The code of ``~`` calls these two by name; no hook of the environment is on that way.
    names = cast(Any, template.root_render_func).__globals__
    for name in ("str_join", "markup_join"):
        names[name] = _limited(names[name])
    return template


def render_template(template: Template, variables: Mapping[str, object], *, now: datetime | None = None) -> str:
    """The text of a compiled template. ``now`` is what ``strftime_now`` shows (default: local time).

    Raises TemplateLimitError after RENDER_SECONDS or MAX_LENGTH characters, and whatever the template raises.
    Works in any thread: only this thread is traced, and its trace function is put back.
    """
    seconds, clock = RENDER_SECONDS, time.monotonic
    deadline = clock() + seconds

    def check(frame: FrameType, event: str, arg: object) -> Any:
        if clock() > deadline:
            raise TemplateLimitError(f"does not finish: it ran for more than {seconds:g} s")
        return check

    # Raising stops the tracing, so it must happen only where nothing on the way up swallows exceptions:
    # in the template's own code.
    def enter(frame: FrameType, event: str, arg: object) -> Any:
        return check if frame.f_code.co_filename == "<template>" else None

    variables = {"strftime_now": lambda format: (now or datetime.now()).strftime(format), **variables}
    chunks, length = [], 0
    previous = sys.gettrace()
    sys.settrace(enter)
    try:
        for chunk in template.generate(variables):
            length += len(chunk)
            _check_length(length)
            chunks.append(chunk)
    finally:
        sys.settrace(previous)
    return "".join(chunks)


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise TemplateLimitError(f"makes more than {MAX_LENGTH} characters or elements")


def _check_operation(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if operator != "+" and bits > _MAX_BITS:
            raise TemplateLimitError(f"calculates a number of more than {_MAX_BITS} bits")
        return
    sizes = [len(side) if isinstance(side, (str, bytes, list, tuple)) else 0 for side in (left, right)]
    if operator == "+":
        _check_length(sum(sizes))
    elif isinstance(right, int):
        _check_length(sizes[0] * right)
    elif isinstance(left, int):
        _check_length(left * sizes[1])


def _limited(join: Callable[[Iterable[Any]], str]) -> Callable[[Iterable[Any]], str]:
    def joined(parts: Iterable[Any]) -> str:
        parts = tuple(parts)
        _check_length(sum(len(part) for part in parts if isinstance(part, str)))
        return join(parts)

    return joined


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "+"))
    # What ``{% set %}`` blocks and macros printed becomes one text.
    concat = staticmethod(_limited("".join))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}`` marks what the assistant wrote, and prints it unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise TemplateRefusal(str(message))


_ENVIRONMENT = _Environment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
)
_ENVIRONMENT.filters["tojson"] = _to_json
_ENVIRONMENT.globals["raise_exception"] = _raise_exception
