"""The prompts of an audit or a calibration: the user's file, or a built-in sample. Reads JSONL for others too."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from riverinfer.chat_template import load_templates
from riverinfer.errors import ContextLengthError, InvalidRequestError, RiverinferWarning

if TYPE_CHECKING:
    from riverinfer.engine import Engine

SAMPLE = (
    "Explain how a river shapes the land it flows through.",
    "Write a Python function that counts the words in a text.",
    "What should I pack for three days in the mountains?",
    "Tell me a short story about a lighthouse keeper.",
    "Summarise the plot of Romeo and Juliet in three sentences.",
    "How does a bicycle stay upright?",
    "Write an email that asks for a day off.",
    "List the planets of the solar system with one fact each.",
    "Why do leaves change colour in autumn?",
    "Describe how to make a simple vegetable soup.",
    "What is the difference between a comet and an asteroid?",
    "Give me five ideas for a birthday party.",
    "A shop sells pens at 3 for 2 euros. What do 18 pens cost? Explain step by step.",
    "Translate into French: The train to Lyon leaves at nine.",
    "What does a SQL join do? Give an example.",
    "Erkläre kurz, warum der Himmel blau ist.",
)
_KEYS = ("prompt", "text", "question")


def read_prompts(path: Path | None) -> list[str]:
    """The texts of a file: ``.jsonl`` has an object with "prompt" (or "text", "question") or a string a line, anything
    else a prompt a line; blank lines are left out. None: the built-in sample.

    Raises InvalidRequestError naming file and line.
    """
    if path is None:
        return list(SAMPLE)
    if path.suffix.lower() == ".json":
        raise InvalidRequestError("is one JSON value", file=path, remedy="give .jsonl, a prompt on each line, or text")
    numbered = read_lines(path)
    if not numbered:
        raise InvalidRequestError("has no prompts", file=path, remedy="put a prompt on each line")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [line for _, line in numbered]
    return [_prompt(path, number, line) for number, line in numbered]


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, numbered from 1, without blanks around them.

    A line ends at a newline only: JSON strings may hold U+2028 and what else Unicode ends lines with.
    Raises InvalidRequestError naming the file.
    """
    try:
        lines = path.expanduser().read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as exc:
        raise InvalidRequestError("is not UTF-8 text", file=path, remedy="give a text or JSONL file") from exc
    except (OSError, RuntimeError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise InvalidRequestError(f"cannot be read ({reason})", file=path, remedy="check the path") from exc
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def parse_line(path: Path, number: int, line: str) -> Any:
    """A line's JSON value, all of its texts valid Unicode. Raises InvalidRequestError naming file and line."""
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as exc:
        problem = f"line {number} has half of a surrogate pair, {exc.object[exc.start]!r}"
        raise InvalidRequestError(problem, file=path, remedy="remove it, or write both halves") from exc
    except RecursionError as exc:
        problem = f"line {number} is nested too deeply"
        raise InvalidRequestError(problem, file=path, remedy="one object a line") from exc
    except ValueError as exc:
        raise InvalidRequestError(f"line {number} is not JSON ({exc})", file=path, remedy="one object a line") from exc


def _prompt(path: Path, number: int, line: str) -> str:
    value = parse_line(path, number, line)
    if isinstance(value, dict):
        value = next((value[key] for key in _KEYS if isinstance(value.get(key), str)), None)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequestError(
            f"line {number} has no prompt", file=path, field=_KEYS[0], remedy=f'give a text as "{_KEYS[0]}"'
        )
    return value


def different(prompts: Sequence[str]) -> list[str]:
    """Each prompt once, the first of those that repeat: a repeated one is no second draw. Warns of it."""
    once = list(dict.fromkeys(prompts))
    if len(once) < len(prompts):
        repeated = f"{len(prompts) - len(once)} of {len(prompts)} prompts repeat others"
        warnings.warn(f"{repeated}: each counts once, {len(once)} in all", RiverinferWarning, stacklevel=3)
    return once


def require_two(prompts: Sequence[object]) -> None:
    """Raise InvalidRequestError for fewer: one prompt has no spread."""
    if len(prompts) < 2:
        raise InvalidRequestError("there is only one prompt", field="prompts", remedy="give two, better twenty")


def require_room(engine: Engine, prompts: Sequence[tuple[str, Sequence[int]]], tokens: int, remedy: str) -> None:
    """Raise ContextLengthError for the first prompt that leaves no room for ``tokens`` more."""
    for text, ids in prompts:
        if len(ids) + tokens > engine.ctx_size:
            raise ContextLengthError(
                f"the prompt that begins {text[:40]!r} has {len(ids)} tokens, with {tokens} of answer more than the"
                f" context ({engine.ctx_size})",
                remedy=f"leave it out, raise --ctx-size (ctx_size), or {remedy}",
            )


def _checked(engine: Engine, text: str, ids: list[int]) -> list[int]:
    """As ``engine.check_ids``, but one that is too long is named."""
    if len(ids) > engine.ctx_size:
        raise ContextLengthError(
            f"the prompt that begins {text[:40]!r} has {len(ids)} tokens, more than the context ({engine.ctx_size})",
            remedy="leave it out, or raise --ctx-size (ctx_size)",
        )
    return engine.check_ids(ids)


def prompt_ids(engine: Engine, texts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Each prompt with its ids: one user message under the model's chat template, or bare text without one.

    Raises ContextLengthError naming the first that is too long by itself, and what ``Engine.encode_prompt`` raises.
    """
    if not load_templates(engine.model_dir):
        return [(text, _checked(engine, text, engine.tokenizer.encode(text) if text else [])) for text in texts]
    session = engine.session()
    found = []
    for text in texts:
        shown = session.prompt_text([{"role": "user", "content": text}])
        found.append((text, _checked(engine, text, engine.tokenizer.encode(shown, add_special_tokens=False))))
    return found
