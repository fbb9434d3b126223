"""Streamed text is decoded text, never ends within a character, and costs the same at any length."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from riverinfer.detokenizer import ByteDecoder, StreamingDetokenizer, WholeTextDecoder
from riverinfer.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if (path / "golden.json").is_file())
SPM = "llama-spm"


def llama_json(folder: Path) -> Path:
    """A tokenizer.json with byte fallback, as Llama 2 has."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("\u2581", "\u2581\u2581", "\u2581Hello", "a", "é", "日本", "\u2581x"):
        vocab[piece] = len(vocab)
    source = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": content, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, content in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True, "unk_token": "<unk>"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(source), "utf-8")
    return folder


def with_decoders(folder: Path, *decoders: dict) -> Tokenizer:
    """The golden llama's tokenizer with these decoders instead of its own."""
    source = json.loads((GOLDEN / "llama" / "tokenizer.json").read_text("utf-8"))
    source["decoder"] = {"type": "Sequence", "decoders": list(decoders)}
    (folder / "tokenizer.json").write_text(json.dumps(source), "utf-8")
    return Tokenizer.load(folder)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
NO_STRIP = {"type": "Strip", "content": " ", "start": 0, "stop": 0}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    loaded = {name: Tokenizer.load(GOLDEN / name) for name in NAMES}
    loaded["byte-fallback"] = Tokenizer.load(llama_json(tmp_path_factory.mktemp("tokenizer")))
    loaded["unknown"] = with_decoders(tmp_path_factory.mktemp("tokenizer"), BYTE_LEVEL, NO_STRIP)
    return loaded


ALL = [*NAMES, "byte-fallback"]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any ids, and runs of the bytes of real and broken UTF-8."""
    by_byte = {}
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.token_text(token_id)
        if len(text) == 6 and text.startswith("<0x"):
            by_byte[int(text[3:5], 16)] = token_id
        elif len(text) == 1 and text.isascii():
            by_byte.setdefault(ord(text), token_id)
    runs = st.one_of(st.binary(max_size=6), st.text(max_size=4).map(lambda t: t.encode("utf-8", "replace")))
    as_ids = runs.map(lambda run: [by_byte[byte] for byte in run if byte in by_byte])
    single = st.integers(-1, tokenizer.vocab_size + 2).map(lambda i: [i])
    return st.lists(st.one_of(as_ids, single), max_size=12).map(lambda parts: [i for part in parts for i in part])


def stream(tokenizer: Tokenizer, ids: list[int], **options) -> list[str]:
    detokenizer = StreamingDetokenizer(tokenizer, **options)
    pieces = [detokenizer.push(i) for i in ids]
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return pieces


@pytest.mark.parametrize("name", ALL)
def test_streamed_is_decoded(tokenizers, name: str) -> None:
    tokenizer = tokenizers[name]

    @given(ids_of(tokenizer), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        pieces = stream(tokenizer, ids, skip_special_tokens=skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("name", [*ALL, "unknown"])
def test_continuation_of_a_prompt(tokenizers, name: str) -> None:
    tokenizer = tokenizers[name]

    @given(ids_of(tokenizer), ids_of(tokenizer), st.booleans())
    def check(prompt: list[int], ids: list[int], skip: bool) -> None:
        before = tokenizer.decode(prompt, skip_special_tokens=skip)
        together = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
        continued = "".join(stream(tokenizer, ids, skip_special_tokens=skip, prompt_ids=prompt))
        if not before.endswith("\ufffd"):
            assert continued == together[len(before) :]
        else:
            # The prompt may end within a character, which then belongs to the continuation.
            assert together.endswith(continued)
            assert together[: len(together) - len(continued)] == before[: len(together) - len(continued)]

    check()


@pytest.mark.parametrize("name", ALL)
def test_prefixes_are_stable_and_prompt(tokenizers, name: str) -> None:
    """What is out by a token is what decode() gives for the ids so far, less an incomplete character."""
    tokenizer = tokenizers[name]

    @given(ids_of(tokenizer))
    def check(ids: list[int]) -> None:
        detokenizer = StreamingDetokenizer(tokenizer, skip_special_tokens=False)
        for count, token_id in enumerate(ids, 1):
            detokenizer.push(token_id)
            whole = tokenizer.decode(ids[:count])
            assert whole.startswith(detokenizer.text)
            held = whole[len(detokenizer.text) :]
            assert held.strip("\ufffd") == ""
            assert len(held) <= 3

    check()


@pytest.mark.parametrize("name", ALL)
def test_no_half_characters(tokenizers, name: str) -> None:
    tokenizer = tokenizers[name]
    text = "日本語 한국어 👩‍👩‍👧 é"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)
    if name == "byte-fallback":
        assert pieces[-1] == ""


def test_sentencepiece_spaces(tokenizers) -> None:
    tokenizer = tokenizers[SPM]
    ids = tokenizer.encode("one two", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == "one two"
    assert "".join(stream(tokenizer, ids, prompt_ids=tokenizer.encode("zero"))) == " one two"
    assert "".join(stream(tokenizer, ids, prompt_ids=[1])) == "one two"
    assert "".join(stream(tokenizer, ids, prompt_ids=[1], skip_special_tokens=False)) == " one two"


def test_invalid_bytes(tokenizers) -> None:
    """SentencePiece gives one U+FFFD per byte, byte-level BPE one per broken character."""
    for name, expected in ((SPM, "\ufffd\ufffdA"), ("byte-fallback", "\ufffd\ufffda")):
        tokenizer = tokenizers[name]
        first = 5 if name == SPM else 3
        letter = first + 0x41 if name == SPM else tokenizer.encode("a", add_special_tokens=False)[-1]
        assert stream(tokenizer, [first + 0xE2, first + 0x82, letter]) == ["", "", expected, ""]
        assert stream(tokenizer, [first + 0xE2, first + 0x82]) == ["", "", "\ufffd\ufffd"]
    tokenizer = tokenizers["qwen3"]
    euro = tokenizer.encode("€", add_special_tokens=False)
    assert stream(tokenizer, euro[:2]) == ["", "", "\ufffd"]


def test_push_after_finish(tokenizers) -> None:
    detokenizer = StreamingDetokenizer(tokenizers["llama"])
    detokenizer.push(70)
    assert detokenizer.finish() == detokenizer.finish() == ""
    with pytest.raises(RuntimeError, match="finish"):
        detokenizer.push(70)


@pytest.mark.parametrize("name", [SPM, "qwen3", "byte-fallback"])
def test_cost_does_not_grow(tokenizers, name: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("Hello wörld, 日本 ", add_special_tokens=False) * 2000
    start = time.perf_counter()
    stream(tokenizer, ids)
    # Decoding everything again at each token would take minutes.
    assert time.perf_counter() - start < 2.0


def test_unknown_decoder(tmp_path: Path) -> None:
    """A decoder riverinfer does not know still streams to the same text."""
    folder = llama_json(tmp_path)
    source = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    source["decoder"]["decoders"].insert(0, {"type": "Replace", "pattern": {"String": "aa"}, "content": "b"})
    (folder / "tokenizer.json").write_text(json.dumps(source), "utf-8")
    tokenizer = Tokenizer.load(folder)
    assert isinstance(tokenizer.new_decoder(skip_special_tokens=False), WholeTextDecoder)
    ids = tokenizer.encode("Hello a日本é x")
    assert tokenizer.decode(ids) == "Hello a日本é x" == "".join(stream(tokenizer, ids))
    assert tokenizer.token_text(tokenizer.encode("a", add_special_tokens=False)[-1]) == "a"


def test_prompt_with_an_unknown_decoder(tokenizers) -> None:
    tokenizer = tokenizers["unknown"]
    assert isinstance(tokenizer.new_decoder(skip_special_tokens=False), WholeTextDecoder)
    prompt, ids = (tokenizer.encode(text, add_special_tokens=False) for text in ("Hello, you", " and you"))
    assert stream(tokenizer, ids[:1], prompt_ids=prompt)[0] == ""
    assert "".join(stream(tokenizer, ids, prompt_ids=prompt)) == " and you"
    assert stream(tokenizer, [], prompt_ids=prompt) == [""]
    euro = tokenizer.encode("€", add_special_tokens=False)
    assert "".join(stream(tokenizer, euro[1:], prompt_ids=prompt + euro[:1])) == "€"


def test_text_of_the_prompt_that_changes() -> None:
    """The continuation begins where the prompt's text is no longer what it was."""
    decoder = WholeTextDecoder(lambda ids: "".join(map(chr, ids)).replace("aa", "b"))
    decoder.continue_from(map(ord, "xa"))
    pieces = [decoder.feed([ord(letter)]) for letter in "acd"]
    assert "".join([*pieces, decoder.finish()]) == "bcd"


def test_byte_level_with_fuse_is_known(tmp_path: Path, tokenizers) -> None:
    tokenizer = with_decoders(tmp_path, BYTE_LEVEL, {"type": "Fuse"})
    assert isinstance(tokenizer.new_decoder(skip_special_tokens=False), ByteDecoder)
    ids = tokenizer.encode("日本 é <|im_end|> x")
    assert tokenizer.decode(ids) == tokenizers["llama"].decode(ids)
    prompt = tokenizer.encode("Hello")
    assert StreamingDetokenizer(tokenizer, prompt_ids=prompt).push(ids[-1]) == tokenizer.token_text(ids[-1])
