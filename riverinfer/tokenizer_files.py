"""What the tokenizer files of a model folder declare, apart from the vocabulary itself.

Reads ``tokenizer_config.json`` and, where that has no ``added_tokens_decoder``, the older
``special_tokens_map.json`` and ``added_tokens.json``. Paths and class names written inside those
files are never followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from riverinfer.errors import ChatTemplateError, TokenizerError

CONFIG = "tokenizer_config.json"
STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_KEYS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedTokenSpec:
    """A token that is cut out of the text before the vocabulary model sees it."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """The declarations of one model folder."""

    config: Mapping[str, object]
    """``tokenizer_config.json``, ``{}`` if there is none."""
    added: Mapping[int, AddedTokenSpec] = field(default_factory=dict)
    """Added tokens by id."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Named special tokens (``bos_token``, ``image_token``, ...) as text. Those set to null are absent."""
    extra: tuple[str, ...] = ()
    """Special tokens without a name."""

    @property
    def special_contents(self) -> tuple[str, ...]:
        """Every text declared to be a special token, named or not."""
        return tuple(dict.fromkeys((*self.named.values(), *self.extra)))


def read_text(path: Path, error: type[TokenizerError] | type[ChatTemplateError]) -> str:
    """The UTF-8 text of ``path``. Raises ``error`` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise error(f"cannot be read ({exc.strerror or exc})", file=path) from exc
    except UnicodeDecodeError as exc:
        raise error(f"is not UTF-8 text (byte {exc.start})", file=path, remedy="download the file again") from exc


def read_json_object(path: Path, error: type[TokenizerError] | type[ChatTemplateError]) -> dict[str, object] | None:
    """The JSON object in ``path``; None if there is no such file. Raises ``error`` if it is anything else."""
    if not path.is_file():
        return None
    text = read_text(path, error)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        what = "is empty" if not text.strip() else f"is not valid JSON ({exc})"
        raise error(what, file=path, remedy="the file may be cut short: download it again") from exc
    if not isinstance(value, dict):
        raise error(f"should hold a JSON object, not {type(value).__name__}", file=path)
    return value


def read_tokenizer_files(model_dir: Path) -> TokenizerFiles:
    """Read the declarations of ``model_dir``. Raises TokenizerError if one of the files is broken."""
    config_path = model_dir / CONFIG
    config = read_json_object(config_path, TokenizerError) or {}
    named, extra = _special_tokens(config, config_path)
    declared = config.get("added_tokens_decoder")
    if declared is not None:
        return TokenizerFiles(config, _added_tokens(declared, config_path), named, extra)
    map_path = model_dir / "special_tokens_map.json"
    old_named, old_extra = _special_tokens(read_json_object(map_path, TokenizerError) or {}, map_path)
    old_named = {name: text for name, text in old_named.items() if name not in config}
    named, extra = {**old_named, **named}, tuple(dict.fromkeys((*extra, *old_extra)))
    special = {*named.values(), *extra}
    added_path = model_dir / "added_tokens.json"
    added: dict[int, AddedTokenSpec] = {}
    for content, token_id in (read_json_object(added_path, TokenizerError) or {}).items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0 or not content:
            raise TokenizerError(f"should be a token id, not {token_id!r}", file=added_path, field=repr(content))
        added[token_id] = AddedTokenSpec(content, special=content in special)
    return TokenizerFiles(config, added, named, extra)


def _added_tokens(declared: object, path: Path) -> dict[int, AddedTokenSpec]:
    where = "added_tokens_decoder"
    if not isinstance(declared, dict):
        raise TokenizerError("should be an object from ids to tokens", file=path, field=where)
    added: dict[int, AddedTokenSpec] = {}
    for key, value in declared.items():
        content = _content(value)
        # isascii: "²".isdigit() is true, and int() refuses it.
        if not (key.isascii() and key.isdigit()) or not content:
            raise TokenizerError(
                "should be a token id with an object that has a content", file=path, field=f"{where}.{key}"
            )
        flags = value if isinstance(value, dict) else {}
        added[int(key)] = AddedTokenSpec(
            content,
            special=bool(flags.get("special", False)),
            lstrip=bool(flags.get("lstrip", False)),
            rstrip=bool(flags.get("rstrip", False)),
            single_word=bool(flags.get("single_word", False)),
            normalized=bool(flags.get("normalized", False)),
        )
    return added


def _special_tokens(source: Mapping[str, object], path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    named: dict[str, str] = {}
    extra: list[str] = []
    for key, value in source.items():
        # add_bos_token and the like are booleans and so have no content.
        if key.endswith("_token") and (content := _content(value)):
            named[key] = content
        elif key in STANDARD_NAMES and value is not None and not isinstance(value, (str, dict)):
            raise TokenizerError(f"should be a token's text, not {type(value).__name__}", file=path, field=key)
    for key in _EXTRA_KEYS:
        value = source.get(key)
        if isinstance(value, dict):
            named.update({name: content for name, item in value.items() if (content := _content(item))})
        elif isinstance(value, list):
            extra += [content for item in value if (content := _content(item))]
        elif value is not None:
            raise TokenizerError(
                f"should be a list or an object of tokens, not {type(value).__name__}", file=path, field=key
            )
    return named, tuple(dict.fromkeys(extra))


def _content(value: object) -> str | None:
    """The text of a token written as a string, ``{"content": ...}`` or ``{"__type": "AddedToken", ...}``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
