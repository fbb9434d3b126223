"""tokenizer.model files: the fields of SentencePiece's ModelProto that matter, in protobuf wire format."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

_VARINT, _BYTES, _FIXED32 = 0, 2, 5
# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
_NAMES = {"unk": 45, "bos": 46, "eos": 47, "pad": 48}
_BPE = 2
_BYTE = 6


def sentencepiece_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    named: Mapping[str, int],
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
) -> bytes:
    """A BPE ModelProto. ``types`` are SentencePiece's (1 normal … 6 byte, the same numbers as in GGUF);
    ``named`` has the ids of ``unk`` and of those of ``bos``, ``eos`` and ``pad`` that exist."""
    out = bytearray()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        entry = _text(1, piece) + _key(2, _FIXED32) + struct.pack("<f", score) + _number(3, kind)
        out += _message(_PIECES, entry)
    trainer = _number(_MODEL_TYPE, _BPE) + _number(_VOCAB_SIZE, len(pieces))
    trainer += _number(_BYTE_FALLBACK, int(_BYTE in types))
    for name, field in _IDS.items():
        trainer += _number(field, named.get(name, -1))
        if name in named:
            trainer += _text(_NAMES[name], pieces[named[name]])
    normalizer = _text(1, "identity") + _number(3, int(add_dummy_prefix))
    normalizer += _number(4, int(remove_extra_whitespaces)) + _number(5, 1)
    return bytes(out) + _message(_TRAINER_SPEC, trainer) + _message(_NORMALIZER_SPEC, normalizer)


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(value: int) -> bytes:
    # Negative int32 values take ten bytes, as if they were 64 bits wide.
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _key(field, _VARINT) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(content)) + content


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode("utf-8"))
