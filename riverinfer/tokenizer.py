"""The tokenizer of a model folder: text to token ids and back."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from riverinfer.detokenizer import EACH_BYTE, ByteDecoder, TokenBytes, TokenDecoder, WholeTextDecoder
from riverinfer.errors import TokenizerError
from riverinfer.tokenizer_files import AddedTokenSpec, TokenizerFiles, read_json_object, read_tokenizer_files

_GPT2_CLASS, _QWEN2_CLASS = "GPT2Tokenizer", "Qwen2Tokenizer"
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Backend(Protocol):
    kind: str
    special_ids: frozenset[int]
    max_id: int

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]: ...
    def new_decoder(self, skip: frozenset[int]) -> TokenDecoder: ...
    def token_to_id(self, text: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str | None: ...


class Tokenizer:
    """Encodes and decodes with ``tokenizer.json``, else ``tokenizer.model``, else ``vocab.json`` and
    ``merges.txt`` of a model folder. Safe to use from several threads.

    Text that spells a special token (``<|im_end|>``, ``<s>``) becomes that token when encoded with
    ``parse_special=True``, which is what a rendered chat needs, and ordinary tokens with
    ``parse_special=False``, which is what text from outside needs. Added tokens that are not special
    (``<think>``) are found either way.
    """

    kind: str
    """``"tokenizer.json (BPE)"``, ``"tokenizer.model (SentencePiece)"`` or ``"vocab.json + merges.txt"``."""
    vocab_size: int
    """Number of ids the tokenizer can produce: its highest id + 1. The model may have more rows."""
    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None
    special_ids: frozenset[int]
    """Ids that ``skip_special_tokens`` leaves out."""
    special_tokens_map: dict[str, str | list[str]]
    """Special tokens as chat templates see them: ``bos_token``, ``eos_token``, ... as text, and
    ``additional_special_tokens`` as a list if there are any."""

    def __init__(self, backend: _Backend, files: TokenizerFiles) -> None:
        self._backend = backend
        self.kind = backend.kind
        self.vocab_size = backend.max_id + 1
        self.special_ids = backend.special_ids
        named = dict(files.named)
        for name in ("bos_token", "eos_token", "unk_token"):
            token_id = getattr(backend, f"{name[:3]}_id", None)
            if name not in named and name not in files.config and token_id is not None:
                named[name] = str(backend.id_to_token(token_id))
        ids = {name: backend.token_to_id(text) for name, text in named.items()}
        self.bos_token_id = ids.get("bos_token")
        self.eos_token_id = ids.get("eos_token")
        self.unk_token_id = ids.get("unk_token")
        self.pad_token_id = ids.get("pad_token")
        self.special_tokens_map = dict(named)
        if files.extra:
            self.special_tokens_map["additional_special_tokens"] = list(files.extra)

    @classmethod
    def load(cls, model_dir: Path, *, vocab_size: int | None = None) -> Tokenizer:
        """Load the tokenizer of ``model_dir``.

        ``vocab_size`` is the model's number of embedding rows. Raises TokenizerError if there is no tokenizer
        of a supported kind, a file is broken, or the tokenizer has ids the model has no row for.
        """
        model_dir = Path(model_dir)
        if not model_dir.is_dir():
            raise TokenizerError("is not a folder", file=model_dir, remedy="give the model's folder")
        files = read_tokenizer_files(model_dir)
        backend, path = _open_backend(model_dir, files)
        if vocab_size is not None and backend.max_id >= vocab_size:
            raise TokenizerError(
                f"its highest id is {backend.max_id} ({backend.id_to_token(backend.max_id)!r}), "
                f"but the model has only {vocab_size} ids",
                file=path,
                field="vocabulary",
                remedy="use the tokenizer files that came with these weights",
            )
        return cls(backend, files)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of ``text``.

        ``add_special_tokens`` puts BOS (and EOS) where the tokenizer's files say so; leave it off for a
        rendered chat template, which brings its own. With ``parse_special=False`` no text yields a special
        token.
        Raises TokenizerError for text that is not valid Unicode (a lone surrogate).
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens, parse_special=parse_special)
        except (UnicodeError, TypeError, RuntimeError) as exc:
            if not isinstance(text, str):
                raise
            raise TokenizerError(
                f"the text cannot be encoded ({exc})", remedy="remove lone surrogates from it"
            ) from exc

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ``ids``. Bytes that are not valid UTF-8 come out as U+FFFD, ids without a token as nothing.

        A space that the tokenizer put in front of the text is taken off at the very start only.
        """
        decoder = self.new_decoder(skip_special_tokens=skip_special_tokens)
        return decoder.feed(ids) + decoder.finish()

    def new_decoder(self, *, skip_special_tokens: bool) -> TokenDecoder:
        """An incremental decoder at the start of a text."""
        return self._backend.new_decoder(self.special_ids if skip_special_tokens else frozenset())

    def token_text(self, id: int) -> str:
        """One token for display: its text with spaces kept, ``<0xE6>`` for a byte that is not a character by
        itself, ``<id 7>`` for an id without a token."""
        token = self._backend.id_to_token(id)
        if token is None:
            return f"<id {id}>"
        decoder = self._backend.new_decoder(frozenset())
        if not isinstance(decoder, ByteDecoder):
            return self.decode([id])
        return decoder.display(id)


def _open_backend(model_dir: Path, files: TokenizerFiles) -> tuple[_Backend, Path]:
    path = model_dir / "tokenizer.json"
    if path.is_file():
        return TokenizersBackend(path, _library().from_file, files, model_dir), path
    path = model_dir / "tokenizer.model"
    if path.is_file():
        from riverinfer.sentencepiece_backend import SentencePieceBackend

        return SentencePieceBackend(path, files), path
    path = model_dir / "vocab.json"
    if path.is_file() and (model_dir / "merges.txt").is_file():
        return TokenizersBackend(path, lambda _: _from_vocab_and_merges(model_dir, files), files), path
    foreign = sorted(p.name for p in model_dir.iterdir() if p.name == "tekken.json" or "tiktoken" in p.name.lower())
    if foreign:
        raise TokenizerError(
            f"only {foreign[0]} was found, a format riverinfer does not read (Tekken, tiktoken)",
            file=model_dir,
            remedy="add the tokenizer.json of the model's Hugging Face repository to the folder",
        )
    raise TokenizerError(
        "no tokenizer.json, tokenizer.model, or vocab.json with merges.txt in this folder",
        file=model_dir,
        remedy="download the tokenizer files as well",
    )


def _library() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer as Library

    return Library


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """For bad files the library raises a plain Exception or a PanicException, which is no Exception."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as exc:
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"is not a usable tokenizer file ({exc})", file=path, remedy="download the file again"
        ) from exc


class TokenizersBackend:
    """A tokenizer of the ``tokenizers`` library. ``open_file(path)`` makes it; ``model_dir`` is given if its
    file may lack added tokens declared elsewhere at ids of their own."""

    def __init__(
        self,
        path: Path,
        open_file: Callable[[str], Any],
        files: TokenizerFiles,
        model_dir: Path | None = None,
    ) -> None:
        with _library_errors(path):
            library = open_file(str(path))
            library.no_truncation()
            library.no_padding()
            library = _with_declared_tokens(library, files, path, rebuild=model_dir is not None)
            added = library.get_added_tokens_decoder()
            self.max_id = max(library.get_vocab(with_added_tokens=True).values(), default=-1)
            decoder = json.loads(library.decoder.__getstate__()) if library.decoder is not None else None
            name = "BPE" if model_dir is None else type(library.model).__name__
        if self.max_id < 0:
            raise TokenizerError("has no tokens", file=path, remedy="download the file again")
        self.kind = f"tokenizer.json ({name})" if model_dir is not None else "vocab.json + merges.txt"
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._library = library
        # encode_special_tokens is a switch on the shared library object.
        self._lock = threading.Lock()
        self._table: TokenBytes | None = None
        self._errors, self._strip = "replace", 0
        if decoder is not None and _is_byte_level(decoder):
            self._table = TokenBytes(self._bytes_of(_byte_level_bytes))
        elif decoder is not None and (strip := _byte_fallback_strip(decoder)) is not None:
            self._table = TokenBytes(self._bytes_of(_byte_fallback_bytes))
            self._errors, self._strip = EACH_BYTE, strip

    def token_to_id(self, text: str) -> int | None:
        """Id of the token that is exactly ``text``, None if there is none."""
        return self._library.token_to_id(text)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as it stands in the vocabulary, None for an id without a token."""
        return self._library.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        """See ``Tokenizer.encode``."""
        with self._lock:
            self._library.encode_special_tokens = not parse_special
            encoding = self._library.encode(text, add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
            if parse_special or self.special_ids.isdisjoint(ids):
                return ids
            out = []
            for token_id, from_template in zip(ids, encoding.special_tokens_mask, strict=True):
                if from_template or token_id not in self.special_ids:
                    out.append(token_id)
                else:
                    out += self._spelled(token_id)
            return out

    def _spelled(self, token_id: int) -> list[int]:
        """A special token's text character by character: its merges can lead to the special token itself."""
        return [
            part
            for character in str(self.id_to_token(token_id))
            for part in self._library.encode(character, add_special_tokens=False).ids
        ]

    def new_decoder(self, skip: frozenset[int]) -> TokenDecoder:
        """A decoder at the start of a text that leaves out the ids in ``skip``."""
        if self._table is not None:
            return ByteDecoder(self._table, skip=skip, errors=self._errors, strip=self._strip)

        def decode(ids: list[int]) -> str:
            kept = [i for i in ids if i not in skip and 0 <= i < 1 << 32]
            return str(self._library.decode(kept, skip_special_tokens=False))

        return WholeTextDecoder(decode)

    def _bytes_of(self, convert: Callable[[str], bytes]) -> Callable[[int], bytes]:
        def compute(token_id: int) -> bytes:
            token = self.id_to_token(token_id)
            return b"" if token is None else convert(token)

        return compute


def _with_declared_tokens(library: Any, files: TokenizerFiles, path: Path, *, rebuild: bool) -> Any:
    """Add the tokens that only the configuration declares, at the ids it declares them at."""
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    missing = {}
    for token_id, spec in sorted(files.added.items()):
        if spec.content in known:
            continue
        if library.token_to_id(spec.content) is not None:
            # In the vocabulary: becomes an added token under the id it has there.
            _add(library, [spec])
            continue
        taken = library.id_to_token(token_id) if token_id < 1 << 32 else "out of range"
        if taken is not None:
            raise TokenizerError(
                f"tokenizer_config.json declares {spec.content!r} as id {token_id}, which is {taken!r} here",
                file=path,
                field="added_tokens",
                remedy="use tokenizer files of the same model",
            )
        missing[token_id] = spec
    _add(library, list(missing.values()))
    if any(library.token_to_id(spec.content) != token_id for token_id, spec in missing.items()):
        # The library numbers new tokens itself; a token that is in the vocabulary keeps its id.
        if not rebuild:
            raise TokenizerError("declares added tokens with gaps between their ids", file=path)
        library = _rebuilt(path, {spec.content: token_id for token_id, spec in missing.items()})
        _add(library, list(missing.values()))
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    _add(
        library,
        [
            AddedTokenSpec(text, special=True)
            for text in files.special_contents
            if text not in known and library.token_to_id(text) is not None
        ],
    )
    return library


def _add(library: Any, specs: Sequence[AddedTokenSpec]) -> None:
    from tokenizers import AddedToken

    for spec in specs:
        token = AddedToken(
            spec.content,
            special=spec.special,
            lstrip=spec.lstrip,
            rstrip=spec.rstrip,
            single_word=spec.single_word,
            normalized=spec.normalized,
        )
        (library.add_special_tokens if spec.special else library.add_tokens)([token])


def _rebuilt(path: Path, ids: dict[str, int]) -> Any:
    source: Any = read_json_object(path, TokenizerError) or {}
    vocab = source.get("model", {}).get("vocab")
    if not isinstance(vocab, dict):
        first = min(ids, key=lambda content: ids[content])
        raise TokenizerError(
            f"tokenizer_config.json declares {first!r} as id {ids[first]}, which this vocabulary cannot take",
            file=path,
            field="model.vocab",
        )
    vocab.update(ids)
    library = _library().from_str(json.dumps(source))
    library.no_truncation()
    library.no_padding()
    return library


def _from_vocab_and_merges(model_dir: Path, files: TokenizerFiles) -> Any:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

    library = _library()(models.BPE.from_file(str(model_dir / "vocab.json"), str(model_dir / "merges.txt")))
    tokenizer_class = str(files.config.get("tokenizer_class", _GPT2_CLASS)).removesuffix("Fast")
    if tokenizer_class == _QWEN2_CLASS:
        library.normalizer = normalizers.NFC()
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        prefix = files.config.get("add_prefix_space") is True
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel()
    bos = files.named.get("bos_token")
    if files.config.get("add_bos_token") is True and bos is not None:
        bos_id = library.token_to_id(bos)
        bos_id = next((i for i, t in files.added.items() if t.content == bos), None) if bos_id is None else bos_id
        if bos_id is not None:
            library.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, bos_id)])
    return library


def _is_byte_level(decoder: dict[str, Any]) -> bool:
    kinds = [step.get("type") for step in decoder.get("decoders", [decoder])]
    # ByteLevel leaves one piece, which Fuse cannot change.
    return kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}


def _byte_fallback_strip(decoder: dict[str, Any]) -> int | None:
    """Spaces to strip if the decoder is Replace(▁ by space), ByteFallback, Fuse and perhaps Strip; else None.

    The library turns a whole run of byte tokens into U+FFFD if one byte of it is invalid, which no stream
    could follow. Here only the invalid bytes do, as in sentencepiece.
    """
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else None
    if not steps or [step["type"] for step in steps[:3]] != ["Replace", "ByteFallback", "Fuse"]:
        return None
    if steps[0]["pattern"] != {"String": "\u2581"} or steps[0]["content"] != " ":
        return None
    if len(steps) == 3:
        return 0
    last = steps[3]
    if len(steps) == 4 and last["type"] == "Strip" and last["content"] == " " and last["stop"] == 0:
        return int(last["start"])
    return None


def _byte_level_alphabet() -> dict[str, int]:
    """The byte behind each character of byte-level tokens: printable Latin-1 stands for itself, the other
    bytes are, in order, the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + i): byte for i, byte in enumerate(others)},
    }


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        # An added token with a character outside the alphabet, such as a space, is plain text.
        return token.encode("utf-8")


def _byte_fallback_bytes(token: str) -> bytes:
    token = token.replace("\u2581", " ")
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.encode("utf-8")
