"""From token ids to text, all at once or token by token, with the same result.

A token stands for bytes; text is the bytes of all tokens put together and read as UTF-8. A character
may be spread over several tokens, so a stream keeps up to three bytes back until the character is
complete. Both ``Tokenizer.decode`` and ``StreamingDetokenizer`` run the decoders in this module.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from riverinfer.tokenizer import Tokenizer

EACH_BYTE = "riverinfer_each_byte"
"""UTF-8 error handler that writes one U+FFFD for every invalid byte, as sentencepiece does. Python's own
``"replace"`` writes one for the longest broken character, as byte-level tokenizers do."""


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd", error.start + 1


def _show_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return f"<0x{error.object[error.start]:02X}>", error.start + 1


_SHOW_BYTES = "riverinfer_show_bytes"
codecs.register_error(EACH_BYTE, _each_byte)
codecs.register_error(_SHOW_BYTES, _show_bytes)


class TokenDecoder(Protocol):
    """Turns ids into text. The texts returned by ``feed`` and ``finish`` put together are the whole text."""

    def feed(self, ids: Iterable[int]) -> str:
        """Text completed by these further ids."""
        ...

    def continue_from(self, prompt_ids: Iterable[int]) -> None:
        """Take ids whose text was given out before. Call it first, or not at all."""
        ...

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed. Leaves the decoder at the end."""
        ...


class TokenBytes(dict[int, bytes]):
    """Bytes of each token, worked out when first asked for. Ids that mean nothing have none."""

    def __init__(self, compute: Callable[[int], bytes]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, token_id: int) -> bytes:
        value = self[token_id] = self._compute(token_id)
        return value


class ByteDecoder:
    """A ``TokenDecoder`` for vocabularies whose tokens have fixed bytes (byte-level BPE, SentencePiece).

    ``table`` gives the bytes; ids in ``skip`` count as absent; ``errors`` is the UTF-8 error handler. At most
    ``strip`` spaces are taken from the start of the text, none of them from tokens in ``keep_space``.
    """

    def __init__(
        self,
        table: TokenBytes,
        *,
        skip: frozenset[int] = frozenset(),
        errors: str = "replace",
        strip: int = 0,
        keep_space: frozenset[int] = frozenset(),
    ) -> None:
        self._table = table
        self._skip = skip
        self._strip = strip
        self._keep_space = keep_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def feed(self, ids: Iterable[int]) -> str:
        if self._skip:
            skip = self._skip
            ids = [i for i in ids if i not in skip]
        if not self._strip:
            return self._utf8.decode(b"".join(map(self._table.__getitem__, ids)))
        pieces = []
        for token_id in ids:
            piece = self._table[token_id]
            while self._strip and piece.startswith(b" ") and token_id not in self._keep_space:
                piece = piece[1:]
                self._strip -= 1
            if piece:
                self._strip = 0
            pieces.append(piece)
        return self._utf8.decode(b"".join(pieces))

    def continue_from(self, prompt_ids: Iterable[int]) -> None:
        self.feed(prompt_ids)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def display(self, token_id: int) -> str:
        """One token by itself, bytes that are no character as ``<0xE6>``. Does not change the decoder."""
        return self._table[token_id].decode("utf-8", _SHOW_BYTES)


class WholeTextDecoder:
    """A ``TokenDecoder`` around any ``decode`` function, for tokenizers whose decoder is not known here.

    Every ``feed`` decodes everything again, since nothing says where a later token cannot change earlier
    text. Text is given out when it is still there after one more token, so it lags by a token.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._text = ""
        self._emitted = ""
        self._began = False

    def continue_from(self, prompt_ids: Iterable[int]) -> None:
        self._ids += prompt_ids
        self._text = self._decode(self._ids)
        # A character that the prompt leaves incomplete belongs to the continuation.
        self._emitted = self._text.rstrip("\ufffd")

    def feed(self, ids: Iterable[int]) -> str:
        new = list(ids)
        if not new:
            return ""
        self._ids += new
        before, self._text = self._text, self._decode(self._ids)
        # As long as nothing was given out, what the ids change in the prompt's text is theirs.
        while not self._began and not self._text.startswith(self._emitted):
            self._emitted = self._emitted[:-1]
        agreed = len(self._emitted)
        if not self._text.startswith(self._emitted):
            return ""
        limit = min(len(before), len(self._text))
        while agreed < limit and before[agreed] == self._text[agreed]:
            agreed += 1
        while agreed > len(self._emitted) and self._text[agreed - 1] == "\ufffd":
            agreed -= 1
        return self._emit(agreed)

    def finish(self) -> str:
        if not self._text.startswith(self._emitted):
            return ""
        return self._emit(len(self._text))

    def _emit(self, end: int) -> str:
        text = self._text[len(self._emitted) : end]
        self._emitted += text
        self._began = self._began or bool(text)
        return text


class StreamingDetokenizer:
    """Text of one generated sequence, piece by piece.

    All pieces put together are ``tokenizer.decode(ids, skip_special_tokens=...)``. With ``prompt_ids`` they
    are what the ids add to the prompt's text, so that a leading space is kept where the answer continues a
    text; if the prompt ends within a character, the first piece holds that whole character. The cost of a
    token does not depend on how many came before (see ``WholeTextDecoder`` for the exception).
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._decoder = tokenizer.new_decoder(skip_special_tokens=skip_special_tokens)
        self._decoder.continue_from(prompt_ids)
        self._pieces: list[str] = []
        self._finished = False

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; "" while a character is incomplete.

        Raises RuntimeError after ``finish``.
        """
        if self._finished:
            raise RuntimeError("push() after finish(): use a new StreamingDetokenizer for the next sequence")
        piece = self._decoder.feed((token_id,))
        if piece:
            self._pieces.append(piece)
        return piece

    def finish(self) -> str:
        """What is left; bytes of a character never completed come out as U+FFFD. "" when repeated."""
        if self._finished:
            return ""
        self._finished = True
        piece = self._decoder.finish()
        if piece:
            self._pieces.append(piece)
        return piece

    @property
    def text(self) -> str:
        """Everything given out so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""
