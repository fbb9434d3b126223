"""Tokenizers against the golden cases, transformers, and broken or unusual files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from riverinfer.errors import TokenizerError
from riverinfer.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if (path / "golden.json").is_file())
CASES = {name: json.loads((GOLDEN / name / "golden.json").read_text("utf-8")) for name in NAMES}
TOKENIZERS = {name: Tokenizer.load(GOLDEN / name) for name in NAMES}
JSON_NAMES = [name for name in NAMES if name != "llama-spm"]
SPM = "llama-spm"
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture
def folder(tmp_path: Path):
    """A copy of the tokenizer files of a golden folder, by name."""

    def copy(name: str) -> Path:
        for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
            if (GOLDEN / name / file).is_file():
                shutil.copy(GOLDEN / name / file, tmp_path)
        return tmp_path

    return copy


def config_of(folder: Path) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text("utf-8"))


def write_config(folder: Path, config: dict) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_golden_cases(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for case in CASES[name]["tokenizer_cases"]:
        # The golden SentencePiece ids are the library's own, to which "<unk>" is ordinary text.
        parse = not (name == SPM and "<unk>" in case["text"])
        assert tokenizer.encode(case["text"], add_special_tokens=False, parse_special=parse) == case["ids"]
        assert tokenizer.encode(case["text"], parse_special=parse) == case["ids_add_special_tokens"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        ids = case["ids_add_special_tokens"]
        skipped = case.get("decoded_skip_special_tokens", case["decoded"])
        assert tokenizer.decode(ids, skip_special_tokens=True) == skipped
        if "decoded_add_special_tokens" in case:
            assert tokenizer.decode(ids) == case["decoded_add_special_tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_golden_chats(name: str) -> None:
    for chat in CASES[name]["chat"]:
        ids = TOKENIZERS[name].encode(chat["text"], add_special_tokens=False)
        assert ids == chat["ids"]
        assert TOKENIZERS[name].decode(ids) == chat["text"]


@pytest.mark.parametrize("name", NAMES)
def test_attributes(name: str) -> None:
    config = json.loads((GOLDEN / name / "config.json").read_text("utf-8"))
    tokenizer = Tokenizer.load(GOLDEN / name, vocab_size=config["vocab_size"])
    assert tokenizer.vocab_size == config["vocab_size"]
    kind = "tokenizer.model (SentencePiece)" if name == SPM else "tokenizer.json (BPE)"
    assert tokenizer.kind == kind
    named = config_of(GOLDEN / name)
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token_id = getattr(tokenizer, f"{key}_id")
        if named.get(key) is None:
            assert token_id is None
            assert key not in tokenizer.special_tokens_map
        else:
            assert token_id in tokenizer.special_ids
            assert tokenizer.token_text(token_id) == named[key] == tokenizer.special_tokens_map[key]


@pytest.mark.parametrize("name", JSON_NAMES)
def test_same_as_transformers(name: str) -> None:
    import transformers

    oracle = transformers.AutoTokenizer.from_pretrained(GOLDEN / name)
    tokenizer = TOKENIZERS[name]
    assert set(oracle.all_special_ids) <= tokenizer.special_ids
    for sample in ("<|im_end|>x <|bos|>", " a\u0301\u1e0b <think>b</think>", "\x00\t\n  \r\n", "x" * 500):
        for add in (False, True):
            ids = oracle.encode(sample, add_special_tokens=add)
            assert tokenizer.encode(sample, add_special_tokens=add) == ids
            for skip in (False, True):
                expected = oracle.decode(ids, skip_special_tokens=skip)
                assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("name", JSON_NAMES)
def test_decode_any_ids_as_the_library_does(name: str) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(GOLDEN / name / "tokenizer.json"))

    @given(st.lists(st.integers(0, TOKENIZERS[name].vocab_size + 3), max_size=30), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        expected = library.decode(ids, skip_special_tokens=skip)
        assert TOKENIZERS[name].decode(ids, skip_special_tokens=skip) == expected

    check()


def test_decode_any_ids_as_sentencepiece_does() -> None:
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / SPM / "tokenizer.model"))

    # Control pieces and the unknown piece are shown here, not there.
    @given(st.lists(st.integers(3, TOKENIZERS[SPM].vocab_size - 1), max_size=30))
    def check(ids: list[int]) -> None:
        assert TOKENIZERS[SPM].decode(ids) == library.decode(ids)

    check()


def test_encode_any_text_as_sentencepiece_does() -> None:
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / SPM / "tokenizer.model"))

    @given(text)
    def check(sample: str) -> None:
        ids = TOKENIZERS[SPM].encode(sample, add_special_tokens=False, parse_special=False)
        assert ids == library.encode(sample)
        assert TOKENIZERS[SPM].decode(ids) == sample.replace("\u2581", " ")

    check()


@pytest.mark.parametrize("name", [name for name in JSON_NAMES if not name.startswith("qwen")])
def test_round_trip(name: str) -> None:
    @given(text)
    def check(sample: str) -> None:
        ids = TOKENIZERS[name].encode(sample, add_special_tokens=False)
        assert TOKENIZERS[name].decode(ids) == sample

    check()


@pytest.mark.parametrize("name", NAMES)
def test_text_that_spells_special_tokens(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    spelled = [tokenizer.token_text(i) for i in sorted(tokenizer.special_ids)]

    @given(st.lists(st.sampled_from([*spelled, "a", " ", "\n", "<", "|>"]), max_size=8).map("".join))
    def check(sample: str) -> None:
        plain = tokenizer.encode(sample, add_special_tokens=False, parse_special=False)
        assert tokenizer.special_ids.isdisjoint(plain)
        assert tokenizer.decode(plain) == sample
        parsed = tokenizer.encode(sample, add_special_tokens=False)
        assert sum(i in tokenizer.special_ids for i in parsed) == sum(sample.count(s) for s in spelled)
        assert tokenizer.decode(parsed) == sample

    check()


def test_parse_special_keeps_the_bos_of_the_post_processor() -> None:
    assert TOKENIZERS["llama"].encode("<|bos|>", parse_special=False)[0] == 380
    assert TOKENIZERS["llama"].encode("<|bos|>", parse_special=False).count(380) == 1
    assert TOKENIZERS[SPM].encode("<s>", parse_special=False)[0] == 1
    assert TOKENIZERS[SPM].encode("<s></s><unk>") == [1, 1, 2, 0]


def test_added_token_that_is_not_special_is_always_found() -> None:
    assert TOKENIZERS["qwen3"].encode("<think>", parse_special=False) == [374]


def test_special_token_that_merges_back_into_itself(folder) -> None:
    path = folder("llama")
    source = json.loads((path / "tokenizer.json").read_text("utf-8"))
    config = config_of(path)
    word = next(w for w in source["model"]["vocab"] if w.isalpha() and w.isascii() and len(w) > 2)
    config["additional_special_tokens"] = [word]
    write_config(path, config)
    tokenizer = Tokenizer.load(path)
    token_id = source["model"]["vocab"][word]
    assert token_id in tokenizer.special_ids
    assert tokenizer.encode(word, add_special_tokens=False) == [token_id]
    plain = tokenizer.encode(word, add_special_tokens=False, parse_special=False)
    assert token_id not in plain
    assert tokenizer.decode(plain) == word


# ------------------------------------------------------------------------------ SentencePiece


def test_dummy_prefix_only_at_the_start(folder) -> None:
    path = folder(SPM)
    hello = TOKENIZERS[SPM].encode("Hello", add_special_tokens=False)
    assert hello[0] == 439
    assert TOKENIZERS[SPM].encode("<s>Hello", add_special_tokens=False) == [1, *hello[1:]]
    config = config_of(path)
    write_config(path, config | {"legacy": True})
    assert Tokenizer.load(path).encode("<s>Hello", add_special_tokens=False) == [1, *hello]
    write_config(path, config | {"add_prefix_space": False})
    plain = Tokenizer.load(path)
    assert plain.encode("Hello", add_special_tokens=False) == hello[1:]
    assert plain.decode(hello) == " Hello"


def test_decode_keeps_the_space_after_a_shown_token() -> None:
    ids = TOKENIZERS[SPM].encode("Hello")
    assert TOKENIZERS[SPM].decode(ids) == "<s> Hello"
    assert TOKENIZERS[SPM].decode(ids, skip_special_tokens=True) == "Hello"


def test_special_tokens_in_text_as_transformers_does() -> None:
    import transformers

    oracle = transformers.AutoTokenizer.from_pretrained(GOLDEN / SPM)
    parts = ["<s>", "</s>", "<unk>", "<|im_start|>", " ", "a", "é", "Hello", "\n", "  the"]

    @given(st.lists(st.sampled_from(parts), max_size=8).map("".join))
    def check(sample: str) -> None:
        ids = TOKENIZERS[SPM].encode(sample)
        # transformers puts no dummy prefix before a leading space, the original code does.
        if not sample.startswith(" "):
            assert ids == oracle.encode(sample)
        for skip in (False, True):
            expected = oracle.decode(ids, skip_special_tokens=skip)
            assert TOKENIZERS[SPM].decode(ids, skip_special_tokens=skip) == expected

    check()


def test_threads_do_not_share_parse_special() -> None:
    wrong = []

    def work(parse: bool) -> None:
        for _ in range(500):
            ids = TOKENIZERS["qwen3"].encode("<|im_start|>x", parse_special=parse)
            wrong.extend([parse] if (372 in ids) != parse else [])

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bos_and_eos_flags(folder) -> None:
    path = folder(SPM)
    write_config(path, config_of(path) | {"add_bos_token": False, "add_eos_token": True})
    assert Tokenizer.load(path).encode("") == [2]
    (path / "tokenizer_config.json").unlink()
    bare = Tokenizer.load(path)
    assert (bare.bos_token_id, bare.eos_token_id, bare.unk_token_id, bare.pad_token_id) == (1, 2, 0, None)
    assert bare.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert bare.encode("<|im_start|>") == [1, 3]
    # Without the configuration the user-defined symbols are not special.
    assert bare.special_ids == {0, 1, 2}


def test_added_tokens_beyond_the_model(folder) -> None:
    path = folder(SPM)
    config = config_of(path)
    config["added_tokens_decoder"]["512"] = {"content": "<pad>", "special": True}
    config["added_tokens_decoder"]["513"] = {"content": "<x>", "lstrip": True, "rstrip": True}
    config["added_tokens_decoder"]["514"] = {"content": "<xx>", "single_word": True}
    write_config(path, config | {"pad_token": "<pad>"})
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.vocab_size, tokenizer.pad_token_id) == (515, 512)
    assert tokenizer.encode("<pad>  <x>  <xx>", add_special_tokens=False) == [512, 513, 514]
    assert 514 not in tokenizer.encode("a<xx>b")
    assert tokenizer.decode([512, 513]) == "<pad><x>"
    with pytest.raises(TokenizerError, match=r"highest id is 514 \('<xx>'\).*only 512 ids"):
        Tokenizer.load(path, vocab_size=512)


def test_old_added_tokens_files(folder) -> None:
    path = folder(SPM)
    config = config_of(path)
    for key in ("added_tokens_decoder", "bos_token"):
        del config[key]
    write_config(path, config)
    (path / "added_tokens.json").write_text('{"<pad>": 512, "<tool>": 513}')
    (path / "special_tokens_map.json").write_text(
        '{"bos_token": {"content": "</s>"}, "eos_token": "<unk>", "additional_special_tokens": ["<tool>"]}'
    )
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 2)
    assert tokenizer.encode("<tool><pad>", add_special_tokens=False) == [513, 512]
    assert {512, 513} & tokenizer.special_ids == {513}


# ------------------------------------------------------------------------------ special token spellings


@pytest.mark.parametrize(
    "spelling",
    [
        "<|bos|>",
        {"content": "<|bos|>", "lstrip": False},
        {"__type": "AddedToken", "content": "<|bos|>", "special": True},
    ],
)
def test_named_special_token_spellings(folder, spelling: object) -> None:
    path = folder("qwen2")
    write_config(path, config_of(path) | {"bos_token": spelling, "image_token": spelling})
    tokenizer = Tokenizer.load(path)
    assert tokenizer.bos_token_id == 396
    assert tokenizer.special_tokens_map["bos_token"] == "<|bos|>"
    assert tokenizer.special_tokens_map["image_token"] == "<|bos|>"


def test_extra_special_tokens(folder) -> None:
    path = folder("qwen2")
    config = config_of(path)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        write_config(path, config | {key: ["<|im_start|>", {"content": "<|im_end|>"}]})
        listed = Tokenizer.load(path).special_tokens_map["additional_special_tokens"]
        assert listed == ["<|im_start|>", "<|im_end|>"]
    write_config(path, config | {"extra_special_tokens": {"image_token": "<|im_start|>"}})
    mapped = Tokenizer.load(path).special_tokens_map
    assert mapped["image_token"] == "<|im_start|>"
    assert "additional_special_tokens" not in mapped


def test_tokens_only_in_the_configuration(folder) -> None:
    path = folder("qwen2")
    config = config_of(path)
    config["added_tokens_decoder"]["400"] = {"content": "<tool>", "special": True}
    write_config(path, config)
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("a<tool>")[-1] == 400
    assert tokenizer.decode([400], skip_special_tokens=True) == ""
    # A gap: the library would number it 401.
    config["added_tokens_decoder"]["410"] = {"content": "<gap> x", "special": False}
    write_config(path, config)
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("<tool><gap> x") == [400, 410]
    assert tokenizer.decode([400, 405, 410]) == "<tool><gap> x"
    assert tokenizer.vocab_size == 411
    config["added_tokens_decoder"]["5"] = {"content": "<clash>"}
    write_config(path, config)
    with pytest.raises(TokenizerError, match=r"declares '<clash>' as id 5, which is '&' here"):
        Tokenizer.load(path)


def test_truncation_and_padding_are_off(folder) -> None:
    path = folder("llama")
    source = json.loads((path / "tokenizer.json").read_text("utf-8"))
    source["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    source["padding"] = {
        "strategy": {"Fixed": 20},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    (path / "tokenizer.json").write_text(json.dumps(source), "utf-8")
    case = CASES["llama"]["tokenizer_cases"][4]
    assert Tokenizer.load(path).encode(case["text"]) == case["ids_add_special_tokens"]
    assert Tokenizer.load(path).encode("a") == TOKENIZERS["llama"].encode("a")


# ------------------------------------------------------------------------------ other formats


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_vocab_and_merges_of_qwen(tmp_path: Path, name: str) -> None:
    split_vocabulary(GOLDEN / name, tmp_path)
    write_config(tmp_path, config_of(GOLDEN / name) | {"tokenizer_class": "Qwen2Tokenizer"})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.kind == "vocab.json + merges.txt"
    for case in CASES[name]["tokenizer_cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_vocab_and_merges_of_gpt2(tmp_path: Path) -> None:
    import tokenizers

    split_vocabulary(GOLDEN / "mistral", tmp_path)
    config = config_of(GOLDEN / "mistral") | {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    write_config(tmp_path, config)
    tokenizer = Tokenizer.load(tmp_path)
    oracle = tokenizers.Tokenizer.from_file(str(GOLDEN / "mistral" / "tokenizer.json"))
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for sample in ("It's 12 + 30?  Yes", "<|im_start|>a"):
        ids = oracle.encode(sample, add_special_tokens=False).ids
        assert tokenizer.encode(sample) == [0, *ids]
        assert tokenizer.encode(sample, add_special_tokens=False) == ids


def split_vocabulary(source: Path, target: Path) -> None:
    model = json.loads((source / "tokenizer.json").read_text("utf-8"))["model"]
    (target / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (target / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")


# ------------------------------------------------------------------------------ broken files


@pytest.mark.parametrize(
    "content",
    [b"", b'{"version": "1.0", "model": {"type"', b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 99999],
)
def test_broken_tokenizer_json(folder, content: bytes) -> None:
    path = folder("llama")
    (path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_truncated_tokenizer_json(folder) -> None:
    path = folder("llama")
    content = (path / "tokenizer.json").read_bytes()
    (path / "tokenizer.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*download"):
        Tokenizer.load(path)


@pytest.mark.parametrize("cut", [0, 1, 100, 3000, -1])
def test_broken_sentencepiece_model(folder, cut: int) -> None:
    path = folder(SPM)
    content = (path / "tokenizer.model").read_bytes()
    (path / "tokenizer.model").write_bytes(content[:cut])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        Tokenizer.load(path)


@given(st.binary(max_size=60))
def test_garbage_sentencepiece_model(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "tokenizer.model").write_bytes(content)
        with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
            Tokenizer.load(Path(name))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 99999])
def test_broken_small_files(folder, file: str, content: str) -> None:
    path = folder(SPM)
    config = config_of(path)
    del config["added_tokens_decoder"]
    write_config(path, config)
    (path / file).write_text(content)
    with pytest.raises(TokenizerError, match=file):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"\u00b2": {"content": "a"}}},
        {"added_tokens_decoder": {"7": {"special": True}}},
        {"bos_token": 7},
        {"extra_special_tokens": "x"},
    ],
)
def test_malformed_configuration(folder, change: dict) -> None:
    for name in ("llama", SPM):
        path = folder(name)
        write_config(path, config_of(path) | change)
        with pytest.raises(TokenizerError, match=f"tokenizer_config.json: {next(iter(change))}"):
            Tokenizer.load(path)


def test_ids_over_the_model(folder) -> None:
    with pytest.raises(TokenizerError, match=r"highest id is 383 \('<\|im_end\|>'\), but the model has only 380"):
        Tokenizer.load(folder("llama"), vocab_size=380)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="not a folder"):
        Tokenizer.load(tmp_path / "none")
    for name in ("tekken.json", "qwen.tiktoken"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(TokenizerError, match=name):
            Tokenizer.load(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(TokenizerError, match="tiktoken"):
        Tokenizer.load(tmp_path)


def test_paths_in_the_configuration_are_not_opened(folder, tmp_path: Path) -> None:
    path = folder(SPM)
    write_config(path, config_of(path) | {"vocab_file": "/nonexistent/x", "tokenizer_file": "/nonexistent/y"})
    assert Tokenizer.load(path).encode("Hello") == TOKENIZERS[SPM].encode("Hello")


@pytest.mark.parametrize("name", ["llama", SPM])
def test_lone_surrogate(name: str) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        TOKENIZERS[name].encode("a\ud800")


def test_ids_without_a_token() -> None:
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode([-1, 100_000, 1 << 40]) == ""
        assert tokenizer.token_text(100_000) == "<id 100000>"


def test_token_text() -> None:
    assert TOKENIZERS[SPM].token_text(439) == " "
    assert TOKENIZERS[SPM].token_text(200) == "<0xC3>"
    assert TOKENIZERS["llama"].token_text(127) == "<0xC3>"


def test_imports_stay_light() -> None:
    code = (
        "import sys, riverinfer.tokenizer, riverinfer.detokenizer, riverinfer.chat_template;"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'sentencepiece', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
