"""Encoding and decoding with a SentencePiece ``tokenizer.model``.

Added tokens are cut out of the text first. The dummy prefix (a space in front) goes to text at the very
start only, never to text after an added token, unless ``legacy`` asks for it everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from riverinfer.detokenizer import EACH_BYTE, ByteDecoder, TokenBytes, TokenDecoder
from riverinfer.errors import TokenizerError
from riverinfer.tokenizer_files import AddedTokenSpec, TokenizerFiles

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = "\u2581"
_WHITESPACE = re.compile(r"\s*")


class SentencePieceBackend:
    """The vocabulary of one ``tokenizer.model``. Raises TokenizerError if the file is not such a model."""

    kind = "tokenizer.model (SentencePiece)"

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise TokenizerError(f"cannot be read ({exc.strerror or exc})", file=path) from exc
        _refuse_tiktoken(data, path)
        try:
            proto = _Proto(data)
        except (ValueError, UnicodeDecodeError) as exc:
            raise TokenizerError(
                f"is not a SentencePiece model ({exc})", file=path, remedy="download the file again"
            ) from exc
        self._proto = proto
        self.added = self._added_tokens(files)
        self._added_ids = {spec.content: token_id for token_id, spec in self.added.items()}
        self.special_ids = frozenset(i for i, spec in self.added.items() if spec.special)
        self.max_id = max(len(proto.pieces) - 1, *self.added, 0)

        config = files.config
        dummy = proto.add_dummy_prefix and config.get("add_prefix_space") is not False
        self._every_segment = dummy and config.get("legacy") is True
        # Special pieces become control pieces, which sentencepiece never finds in a text.
        ordinary = proto.rewritten(self.special_ids - {proto.unk_id})
        self._plain = _load(ordinary + _NO_DUMMY_PREFIX, path)
        self._prefixed = _load(ordinary, path) if dummy else self._plain
        self._strip = 1 if dummy else 0
        if proto.remove_extra_whitespaces:
            self._strip = 1 << 30

        self.bos_id = self._named(files, "bos_token", "<s>")
        self.eos_id = self._named(files, "eos_token", "</s>")
        self.unk_id = self._named(files, "unk_token", "<unk>")
        self._prefix = [self.bos_id] if config.get("add_bos_token", True) and self.bos_id is not None else []
        self._suffix = [self.eos_id] if config.get("add_eos_token", False) and self.eos_id is not None else []

        self._all = _Splitter(self.added.values())
        self._ordinary = _Splitter(spec for spec in self.added.values() if not spec.special)
        self._table = TokenBytes(self._token_bytes)
        self._keep_space = frozenset(
            i
            for i, (piece, kind) in enumerate(proto.pieces)
            if (kind == _BYTE and piece == "<0x20>") or (kind == _USER_DEFINED and piece.startswith(" "))
        )

    def _added_tokens(self, files: TokenizerFiles) -> dict[int, AddedTokenSpec]:
        special = set(files.special_contents)
        added: dict[int, AddedTokenSpec] = {}
        for token_id, (piece, kind) in enumerate(self._proto.pieces):
            if kind in (_CONTROL, _UNKNOWN) or (piece in special and kind != _BYTE):
                added[token_id] = AddedTokenSpec(piece, special=True)
            elif kind == _USER_DEFINED and _SPACE not in piece:
                # With the space mark they match normalised text only, which sentencepiece sees to.
                added[token_id] = AddedTokenSpec(piece)
        added.update(files.added)
        return added

    def _named(self, files: TokenizerFiles, name: str, default: str) -> int | None:
        """Id of a named token; the usual text of it where ``tokenizer_config.json`` says nothing."""
        text = files.named.get(name, None if name in files.config else default)
        return None if text is None else self.token_to_id(text)

    def token_to_id(self, text: str) -> int | None:
        """Id of the token that is exactly ``text``, None if there is none."""
        if text in self._added_ids:
            return self._added_ids[text]
        return self._proto.ids.get(text)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as it stands in the vocabulary, None for an id without a token."""
        if token_id in self.added:
            return self.added[token_id].content
        return self._proto.pieces[token_id][0] if 0 <= token_id < len(self._proto.pieces) else None

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        """See ``Tokenizer.encode``."""
        splitter = self._all if parse_special else self._ordinary
        ids = []
        for start, segment, is_token in splitter.split(text):
            if is_token:
                ids.append(self._added_ids[segment])
            else:
                model = self._prefixed if start == 0 or self._every_segment else self._plain
                ids += model.encode(segment)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def new_decoder(self, skip: frozenset[int]) -> TokenDecoder:
        """A decoder at the start of a text that leaves out the ids in ``skip``."""
        return ByteDecoder(self._table, skip=skip, errors=EACH_BYTE, strip=self._strip, keep_space=self._keep_space)

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self.added:
            return self.added[token_id].content.encode("utf-8", "replace")
        if not 0 <= token_id < len(self._proto.pieces):
            return b""
        piece, kind = self._proto.pieces[token_id]
        if kind == _BYTE:
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode("utf-8")


class _Splitter:
    """Cuts a text at added tokens; of two that start at the same place the longer one wins."""

    def __init__(self, specs: Iterable[AddedTokenSpec]) -> None:
        self._specs = {spec.content: spec for spec in specs}
        longest_first = sorted(self._specs.values(), key=lambda spec: -len(spec.content))
        patterns = [
            rf"(?<!\w){re.escape(spec.content)}(?!\w)" if spec.single_word else re.escape(spec.content)
            for spec in longest_first
        ]
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def split(self, text: str) -> Iterator[tuple[int, str, bool]]:
        """Yield (start, text, is an added token) for each part that is not empty."""
        position = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            spec = self._specs[match.group()]
            before = text[position : match.start()]
            before = before.rstrip() if spec.lstrip else before
            if before:
                yield position, before, False
            yield match.start(), spec.content, True
            position = match.end()
            if spec.rstrip:
                position = _WHITESPACE.match(text, position).end()  # type: ignore[union-attr]
        if position < len(text):
            yield position, text[position:], False


class _Proto:
    """The few fields of a serialized ``sentencepiece.ModelProto`` that are needed here.

    Fields: 1 pieces (1 piece, 3 type), 3 normalizer_spec (3 add_dummy_prefix, 4 remove_extra_whitespaces),
    4 self_test_data.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.pieces: list[tuple[str, int]] = []
        self.add_dummy_prefix = True
        self.remove_extra_whitespaces = True
        self._spans: list[tuple[int, int, int, int]] = []
        for number, start, begin, end in _fields(data, 0, len(data)):
            self._spans.append((number, start, begin, end))
            if number == 1:
                self.pieces.append(self._piece(begin, end))
            elif number == 3:
                for inner, _, at, stop in _fields(data, begin, end):
                    if inner == 3:
                        self.add_dummy_prefix = bool(_varint(data, at, stop)[0])
                    elif inner == 4:
                        self.remove_extra_whitespaces = bool(_varint(data, at, stop)[0])
        if not self.pieces:
            raise ValueError("it has no pieces")
        self.ids = {piece: i for i, (piece, _) in enumerate(self.pieces)}
        self.unk_id = next((i for i, (_, kind) in enumerate(self.pieces) if kind == _UNKNOWN), -1)

    def _piece(self, begin: int, end: int) -> tuple[str, int]:
        text, kind = "", 1
        for number, _, at, stop in _fields(self._data, begin, end):
            if number == 1:
                text = self._data[at:stop].decode("utf-8")
            elif number == 3:
                kind = _varint(self._data, at, stop)[0]
        if kind == _BYTE and not re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            raise ValueError(f"byte piece {text!r} is malformed")
        return text, kind

    def rewritten(self, control_ids: frozenset[int]) -> bytes:
        """The model with these pieces turned into control pieces.

        The self test is left out: it compares with the unchanged model.
        """
        out = []
        index = -1
        for number, start, begin, end in self._spans:
            index += number == 1
            if number == 1 and index in control_ids:
                # A repeated field overrides the earlier one: type = CONTROL.
                body = self._data[begin:end] + bytes([0x18, _CONTROL])
                out += [b"\x0a", _encode_varint(len(body)), body]
            elif number != 4:
                out.append(self._data[start:end])
        return b"".join(out)


# normalizer_spec { add_dummy_prefix: false }; a repeated message is merged into the earlier one.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def _fields(data: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, start of the field, start of its value, end) of a protobuf message."""
    while at < stop:
        start = at
        key, at = _varint(data, at, stop)
        wire = key & 7
        begin = at
        if wire == 0:
            _, at = _varint(data, at, stop)
        elif wire == 2:
            length, begin = _varint(data, at, stop)
            at = begin + length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire} at byte {start}")
        if at > stop or key >> 3 == 0:
            raise ValueError(f"field at byte {start} runs past the end")
        yield key >> 3, start, begin, at


def _varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"number at byte {at} is cut short")


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _load(data: bytes, path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
    except RuntimeError as exc:
        raise TokenizerError(
            f"is not a usable SentencePiece model ({exc})", file=path, remedy="download the file again"
        ) from exc
    return model


def _refuse_tiktoken(data: bytes, path: Path) -> None:
    """A ``tokenizer.model`` in tiktoken format is lines of base64 and a rank."""
    if not data:
        raise TokenizerError("is empty", file=path, remedy="download the file again")
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data[:200]):
        raise TokenizerError(
            "is a tiktoken vocabulary, which riverinfer does not read",
            file=path,
            remedy="use the model folder in Hugging Face format, which has a tokenizer.json",
        )
