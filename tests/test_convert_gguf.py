"""GGUF files made from the golden models convert back into them; damaged ones end in a clear error."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_fixtures import (
    ADDS_BOS,
    GGUF_ARCH,
    GOLDEN,
    PRE,
    add_sentencepiece,
    encode,
    gguf_name,
    golden_tensors,
    llama3_factors,
    read_json,
    write_golden_gguf,
    written_tensors,
)
from gguf import GGUFWriter, quants
from gguf.constants import GGML_QUANT_SIZES, RopeScalingType
from gguf.constants import GGMLQuantizationType as Ggml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from riverinfer.errors import ConversionError, RiverinferError, TokenizerError, UnsupportedModelError
from riverinfer.weights_convert import convert
from riverinfer.weights_convert.gguf_file import GgufFile
from riverinfer.weights_convert.pre_tokenizers import BPE_RULES

LEGACY_QUANTS = (Ggml.Q8_0, Ggml.Q4_0, Ggml.Q4_1, Ggml.Q5_0, Ggml.Q5_1)
K_QUANTS = (Ggml.Q4_K, Ggml.Q5_K, Ggml.Q6_K)
BPE_MODELS = sorted(PRE)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Every golden model, written as GGUF in its own dtype and converted."""
    root = tmp_path_factory.mktemp("converted")
    kinds = {"bfloat16": Ggml.BF16, "float16": Ggml.F16, "float32": Ggml.F32}
    folders = {}
    for name in GGUF_ARCH:
        kind = kinds[read_json(GOLDEN / name / "golden.json")["stored_dtype"]]
        write_golden_gguf(root / f"{name}.gguf", name, kind)
        report = convert(root / f"{name}.gguf", root / name)
        assert report.tensors == len(golden_tensors(name))
        folders[name] = root / name
    yield folders
    shutil.rmtree(root)


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix != ".gguf")


@pytest.mark.parametrize("name", GGUF_ARCH)
def test_tensors_come_back_bit_for_bit(converted: dict[str, Path], name: str) -> None:
    original, result = golden_tensors(name), written_tensors(converted[name])
    assert result.keys() == original.keys()
    for key, tensor in original.items():
        assert result[key].dtype == tensor.dtype, key
        assert torch.equal(result[key], tensor), key


@pytest.mark.parametrize("kind", [Ggml.F32, Ggml.F16, Ggml.BF16, *LEGACY_QUANTS], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_every_type_dequantizes_as_gguf_does(tmp_path: Path, kind: Ggml, dtype: str | None) -> None:
    written = write_golden_gguf(tmp_path / "m.gguf", "llama", kind)
    report = convert(tmp_path / "m.gguf", tmp_path / "out", dtype=dtype)
    default = {Ggml.F32: torch.float32, Ggml.F16: torch.float16}.get(kind, torch.bfloat16)
    expected_dtype = torch.float32 if dtype else default
    assert report.dtype == str(expected_dtype).removeprefix("torch.")
    result = written_tensors(tmp_path / "out")
    for key in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        stored = kind if result[key].dim() > 1 else Ggml.F32
        values = torch.from_numpy(quants.dequantize(written[gguf_name(key)], stored))
        assert torch.equal(result[key], values.to(expected_dtype)), key


def test_moving_quantized_rows_is_exact(tmp_path: Path) -> None:
    write_golden_gguf(tmp_path / "m.gguf", "llama", Ggml.Q4_0)
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    for name in ("q", "k"):
        key = f"model.layers.1.self_attn.{name}_proj.weight"
        original = golden_tensors("llama")[key]
        expected = quants.dequantize(encode(original, Ggml.Q4_0), Ggml.Q4_0)
        assert torch.equal(written_tensors(tmp_path / "out")[key], torch.from_numpy(expected))


def write_tiny_llama(path: Path, kind: Ggml) -> dict[str, np.ndarray]:
    """One layer of width 256 with random blocks of ``kind``, large enough for super-blocks."""
    rng = np.random.default_rng(3)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(chr(97 + index) for index in range(15)), "ab"])
    writer.add_token_merges(["a b"])
    block, size = GGML_QUANT_SIZES[kind]
    half = {Ggml.Q6_K: (208,), Ggml.Q4_K: (0, 2), Ggml.Q5_K: (0, 2)}.get(kind, ())
    written = {}
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    rows = {"token_embd.weight": 16, **{f"blk.0.{name}.weight": 256 for name in matrices}}
    for name, count in rows.items():
        raw = rng.integers(0, 256, (count, 256 // block, size), dtype=np.uint8)
        for at in half:
            scale = rng.uniform(0.001, 0.01, raw.shape[:2]).astype(np.float16)
            raw[:, :, at : at + 2] = scale[..., None].view(np.uint8)
        written[name] = raw.reshape(count, -1)
        writer.add_tensor(name, written[name], raw_dtype=kind)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(256, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.mark.parametrize("kind", K_QUANTS, ids=lambda kind: kind.name)
def test_super_blocks_dequantize_as_gguf_does(tmp_path: Path, kind: Ggml) -> None:
    written = write_tiny_llama(tmp_path / "m.gguf", kind)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    result = written_tensors(tmp_path / "out")
    for key in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        values = torch.from_numpy(quants.dequantize(written[gguf_name(key)], kind))
        assert values.abs().max() < 1e4
        assert torch.equal(result[key], values.bfloat16())


@pytest.mark.parametrize("kind", [Ggml.Q2_K, Ggml.Q3_K, Ggml.IQ4_XS], ids=lambda kind: kind.name)
def test_other_types_are_refused_by_name(tmp_path: Path, kind: Ggml) -> None:
    write_tiny_llama(tmp_path / "m.gguf", kind)
    with pytest.raises(ConversionError, match=rf"token_embd.weight.*{kind.name}.*Q4_K"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert leftovers(tmp_path) == []


SAME_FIELDS = (
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)


@pytest.mark.parametrize("name", GGUF_ARCH)
def test_config_means_the_same(converted: dict[str, Path], name: str) -> None:
    original, result = read_json(GOLDEN / name / "config.json"), read_json(converted[name] / "config.json")
    for field in SAME_FIELDS:
        assert result[field] == original[field], field
    for field in ("no_rope_layers", "partial_rotary_factor", "original_max_position_embeddings"):
        assert result.get(field) == original.get(field), field
    if not name.startswith("qwen"):
        assert result.get("sliding_window") == original.get("sliding_window")
    assert not result.get("use_sliding_window")
    head_dim = original.get("head_dim") or original["hidden_size"] // original["num_attention_heads"]
    assert result["head_dim"] == head_dim
    dtype = original.get("torch_dtype") or original["dtype"]
    assert result["torch_dtype"] == dtype
    rope = result.get("rope_parameters") or result
    expected = original.get("rope_parameters") or original
    assert rope["rope_theta"] == expected["rope_theta"]
    if "rope_parameters" in original and name != "ministral3":
        assert result["rope_scaling"] is None
    elif name == "ministral3":
        assert rope == expected
    else:
        assert result["rope_scaling"] == original["rope_scaling"]
    generation = read_json(GOLDEN / name / "generation_config.json")
    made = read_json(converted[name] / "generation_config.json")
    assert made["bos_token_id"] == generation["bos_token_id"]
    assert set(made["eos_token_id"]) == set(generation["eos_token_id"])
    assert made["eos_token_id"][0] == original["eos_token_id"]


@pytest.mark.parametrize("name", GGUF_ARCH)
def test_transformers_computes_the_golden_logits(converted: dict[str, Path], name: str) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        converted[name], dtype=torch.float32, attn_implementation="eager"
    )
    golden = load_file(GOLDEN / name / "golden.safetensors")
    with torch.no_grad():
        logits = model(golden["prompt2.input_ids"][None]).logits[0]
        assert torch.allclose(logits, golden["f32.prompt2.logits"], atol=1e-3, rtol=0)
        if name == "phi3":
            last = model(golden["prompt3.input_ids"][None]).logits[0, -1]
            assert torch.allclose(last, golden["f32.prompt3.last_logits"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", BPE_MODELS)
def test_bpe_tokenizer_gives_the_golden_ids(converted: dict[str, Path], name: str) -> None:
    tokenizer = Tokenizer.from_file(str(converted[name] / "tokenizer.json"))
    golden = read_json(GOLDEN / name / "golden.json")
    for case in golden["tokenizer_cases"]:
        plain = tokenizer.encode(case["text"], add_special_tokens=False).ids
        full = tokenizer.encode(case["text"]).ids
        assert plain == case["ids"], case["text"]
        assert full == case["ids_add_special_tokens"], case["text"]
        assert tokenizer.decode(plain, skip_special_tokens=False) == case["decoded"]
        assert tokenizer.decode(full, skip_special_tokens=True) == case["decoded_skip_special_tokens"]
        assert tokenizer.decode(full, skip_special_tokens=False) == case["decoded_add_special_tokens"]
    for chat in golden["chat"]:
        assert tokenizer.encode(chat["text"], add_special_tokens=False).ids == chat["ids"]


@pytest.mark.parametrize("name", BPE_MODELS)
def test_split_patterns_are_those_of_the_original(converted: dict[str, Path], name: str) -> None:
    original = read_json(GOLDEN / name / "tokenizer.json")
    result = read_json(converted[name] / "tokenizer.json")
    assert result["pre_tokenizer"] == original["pre_tokenizer"]
    assert result["normalizer"] == original["normalizer"]
    assert result["added_tokens"] == original["added_tokens"]
    assert (result["post_processor"]["type"] == "Sequence") == (name in ADDS_BOS)


def test_sentencepiece_tokenizer_gives_the_golden_ids(converted: dict[str, Path]) -> None:
    import sentencepiece

    path = str(converted["llama-spm"] / "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=path)
    for case in read_json(GOLDEN / "llama-spm" / "golden.json")["tokenizer_cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"], out_type=str) == case["pieces"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    config = read_json(converted["llama-spm"] / "tokenizer_config.json")
    assert config["add_bos_token"] is True
    assert config["add_eos_token"] is False
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert config["added_tokens_decoder"]["3"]["content"] == "<|im_start|>"


def test_transformers_reads_the_sentencepiece_folder(converted: dict[str, Path]) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(converted["llama-spm"])
    golden = read_json(GOLDEN / "llama-spm" / "golden.json")
    for chat in golden["chat"]:
        assert (
            tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=True, tokenize=False) == chat["text"]
        )
        assert tokenizer.encode(chat["text"], add_special_tokens=False) == chat["ids"]
    for case in golden["tokenizer_cases"]:
        if case["transformers_same"]:
            assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]


def test_sentencepiece_control_tokens_stay_out_of_text(tmp_path: Path) -> None:
    import sentencepiece

    from riverinfer.weights_convert.gguf_tokenizer import write_tokenizer

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    add_sentencepiece(writer, GOLDEN / "llama-spm", control=(3, 4))
    writer.add_bos_token_id(1)
    writer.add_add_space_prefix(False)
    writer.add_bool("tokenizer.ggml.remove_extra_whitespaces", True)
    writer.add_chat_template([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T\n"}])
    writer.add_string("tokenizer.chat_template.../evil", "E")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "out").mkdir()
    with GgufFile(tmp_path / "m.gguf") as gguf:
        notes = write_tokenizer(gguf, tmp_path / "out", vocab_rows=512, context=64)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert tokenizer.is_control(3)
    assert 3 not in tokenizer.encode("<|im_start|>")
    assert tokenizer.encode(" a  b ", out_type=str)[0] == "a"
    config = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert config["added_tokens_decoder"]["3"]["special"] is True
    assert config["add_prefix_space"] is False
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "D"
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "T\n"
    assert len(notes) == 1
    assert "evil" in notes[0]


@pytest.mark.parametrize("name", GGUF_ARCH)
def test_chat_template_and_named_tokens(converted: dict[str, Path], name: str) -> None:
    original = read_json(GOLDEN / name / "tokenizer_config.json")
    result = read_json(converted[name] / "tokenizer_config.json")
    template = (converted[name] / "chat_template.jinja").read_bytes().decode()
    assert template == original["chat_template"]
    assert result["eos_token"] == original["eos_token"]
    assert result["bos_token"] == ("<s>" if name == "llama-spm" else "<|bos|>")


@pytest.mark.parametrize(
    ("pre", "key", "adds"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_bos_default_depends_on_the_pre_tokenizer(tmp_path: Path, pre: str, key: bool | None, adds: bool) -> None:
    write_golden_gguf(tmp_path / "m.gguf", "llama", pre=pre, add_bos=key)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    ids = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a b").ids
    assert (ids[0] == 380) == adds


def test_unknown_pre_tokenizer_lists_the_known_ones(tmp_path: Path) -> None:
    write_golden_gguf(tmp_path / "m.gguf", "llama", pre="kimi-k2")
    with pytest.raises(TokenizerError, match=r"kimi-k2.*llama-bpe.*tekken"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("pre", sorted(BPE_RULES))
def test_every_pre_tokenizer_builds(tmp_path: Path, pre: str) -> None:
    from riverinfer.weights_convert.bpe_tokenizer import build_bpe

    text = build_bpe("f", {"a": 0, "<x>": 1}, [], BPE_RULES[pre], special=[("<x>", 1)], added=[], bos="<x>", eos=None)
    assert Tokenizer.from_str(text).encode("a<x>").ids == [1, 0, 1]


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (16.0, 4096)])
@pytest.mark.parametrize(("theta", "dim"), [(500000.0, 128), (500000.0, 64)])
def test_llama3_scaling_is_recovered(tmp_path: Path, factor: float, original: int, theta: float, dim: int) -> None:
    from riverinfer.weights_convert.gguf_rope import rope_fields

    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    gguf = rope_file(tmp_path, "llama", {"rope_freqs.weight": llama3_factors(scaling, theta, dim)}, theta)
    assert rope_fields(gguf, "llama", head_dim=dim, context=131072)["rope_scaling"] == scaling


def rope_file(folder: Path, arch: str, tensors: dict[str, Any], theta: float, **numbers: float) -> GgufFile:
    writer = GGUFWriter(folder / "rope.gguf", arch)
    writer.add_rope_freq_base(theta)
    for key, value in numbers.items():
        if key == "scaling":
            writer.add_rope_scaling_type(RopeScalingType(value))
        elif isinstance(value, int):
            writer.add_uint32(f"{arch}.rope.scaling.{key}", value)
        else:
            writer.add_float32(f"{arch}.rope.scaling.{key}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(folder / "rope.gguf")


def test_rope_scaling_kinds(tmp_path: Path) -> None:
    from riverinfer.weights_convert.gguf_rope import rope_fields

    def fields(**numbers: Any) -> Any:
        gguf = rope_file(tmp_path, "qwen2", {}, 1e6, **numbers)
        return rope_fields(gguf, "qwen2", head_dim=64, context=131072)["rope_scaling"]

    assert fields() is None
    assert fields(scaling="none") is None
    assert fields(scaling="linear", factor=2.5) == {"rope_type": "linear", "factor": 2.5}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert fields(scaling="yarn", factor=4.0, original_context_length=32768) == yarn
    assert fields(scaling="yarn", factor=4.0) == yarn
    attention = fields(scaling="yarn", factor=4.0, attn_factor=0.5)["attention_factor"]
    assert attention == pytest.approx(0.5 * (0.1 * np.log(4) + 1))
    with pytest.raises(UnsupportedModelError, match="longrope"):
        fields(scaling="longrope")


def test_unexplained_frequency_factors_are_refused(tmp_path: Path) -> None:
    from riverinfer.weights_convert.gguf_rope import rope_fields

    gguf = rope_file(tmp_path, "llama", {"rope_freqs.weight": np.linspace(1, 7, 32)}, 500000.0)
    with pytest.raises(ConversionError, match=r"rope_freqs\.weight"):
        rope_fields(gguf, "llama", head_dim=64, context=4096)
    gguf = rope_file(tmp_path, "llama", {"rope_freqs.weight": np.ones(32)}, 500000.0)
    assert rope_fields(gguf, "llama", head_dim=64, context=4096)["rope_scaling"] is None


def test_attention_and_mlp_biases_are_moved_too(tmp_path: Path) -> None:
    tensors = golden_tensors("llama")
    biases, expected = {}, {}
    for layer in range(5):
        for name, size, heads in (("q", 64, 4), ("k", 32, 2), ("v", 32, 0), ("output", 64, 0)):
            values = torch.arange(size).float() + layer
            expected[f"model.layers.{layer}.self_attn.{name if heads or name == 'v' else 'o'}_proj.bias"] = values
            moved = values.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1) if heads else values
            biases[f"blk.{layer}.attn_{name}.bias"] = moved.numpy()
    write_golden_gguf(tmp_path / "m.gguf", "llama", extra=biases)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["attention_bias"] is True
    result = written_tensors(tmp_path / "out")
    assert result.keys() == tensors.keys() | expected.keys()
    for key, values in expected.items():
        assert torch.equal(result[key], values), key


def test_padding_tokens_are_not_part_of_the_vocabulary(tmp_path: Path) -> None:
    from riverinfer.weights_convert.gguf_tokenizer import write_tokenizer

    writer = GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["a", "b", "ab", "<|end|>", "[PAD4]", "[PAD5]"])
    writer.add_token_types([1, 1, 1, 3, 5, 5])
    writer.add_token_merges(["a b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with GgufFile(tmp_path / "m.gguf") as gguf:
        write_tokenizer(gguf, tmp_path, vocab_rows=6, context=64)
        with pytest.raises(TokenizerError, match="6 tokens, but the embedding has 5 rows"):
            write_tokenizer(gguf, tmp_path, vocab_rows=5, context=64)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4
    assert tokenizer.encode("ab<|end|>").ids == [2, 3]


def test_control_tokens_that_end_a_turn_are_found_by_text(tmp_path: Path) -> None:
    from riverinfer.weights_convert.gguf_tokenizer import end_of_text_ids

    def ids(tokens: list[str], types: list[int], rows: int = 99, **named: int) -> list[int]:
        writer = GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        for name, index in named.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with GgufFile(tmp_path / "m.gguf") as gguf:
            return end_of_text_ids(gguf, rows)

    smollm2 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert ids(smollm2, [3, 3, 3], eos=2) == [2, 0]
    assert ids(smollm2, [3, 3, 3], eos=2, eot=1) == [2, 1, 0]
    assert ids(smollm2, [1, 3, 4], eos=1) == [1]
    ends = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|endoftext|>"]
    assert ids(["a", "<|eom_id|>", *ends], [3] * 8) == [2, 3, 4, 5, 6, 7]
    assert ids(["a", *ends], [3] * 7, rows=3, eos=0) == [0, 1, 2]
    assert ids(["a", *ends], [3, 3], eos=5) == [5, 1]


def test_report_of_a_quantized_source_names_its_types(tmp_path: Path) -> None:
    write_golden_gguf(tmp_path / "m.gguf", "llama", Ggml.Q8_0)
    report = convert(tmp_path / "m.gguf", tmp_path / "out")
    lines = str(report).splitlines()
    assert len(lines) == 4
    count = report.source_types
    assert lines[2] == f"  tensors in the source: {count['F32']} F32, {count['Q8_0']} Q8_0"
    write_golden_gguf(tmp_path / "n.gguf", "llama", Ggml.F16)
    assert len(str(convert(tmp_path / "n.gguf", tmp_path / "plain")).splitlines()) == 3


def metadata_change(*changes: tuple[str, Any]) -> Any:
    def change(writer: GGUFWriter) -> None:
        for key, value in changes:
            for table in writer.kv_data:
                table.pop(key, None)
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            elif value is not None:
                writer.add_uint32(key, value)

    return change


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (("general.architecture", "gemma3"), UnsupportedModelError, "gemma3.*supported: llama"),
        (("general.type", "mmproj"), UnsupportedModelError, "mmproj"),
        (("llama.expert_count", 8), UnsupportedModelError, "mixture"),
        (("llama.block_count", 6), ConversionError, r"tensors are missing: blk\.5\."),
        (("llama.block_count", 4), ConversionError, r"no place in a llama model: blk\.4\."),
        (("llama.block_count", 2**31), ConversionError, "layers, but only"),
        (("llama.block_count", None), ConversionError, "llama.block_count: is missing"),
        (("llama.block_count", 0), ConversionError, "llama.block_count: is 0"),
        (("llama.block_count", "five"), ConversionError, "llama.block_count: has type str"),
        (("llama.feed_forward_length", 161), ConversionError, "has shape .* the metadata say"),
        (("llama.feed_forward_length", [160, 160, 160, 160, 96]), UnsupportedModelError, "layers differ"),
        (("llama.attention.head_count", 3), ConversionError, "no multiple of 3 heads"),
        (("llama.attention.layer_norm_rms_epsilon", None), ConversionError, "rms_epsilon: is missing"),
        (("llama.rope.dimension_count", 8), UnsupportedModelError, "8 of 16 dimensions"),
        (("split.count", 2), ConversionError, "llama-gguf-split --merge"),
        (("tokenizer.ggml.model", "bert"), TokenizerError, "bert.*SentencePiece"),
        (("tokenizer.ggml.model", None), TokenizerError, "is missing"),
        (("tokenizer.ggml.merges", None), TokenizerError, "merges: is missing"),
        (("tokenizer.ggml.merges", ["nospace"]), TokenizerError, "nospace.*two tokens"),
        (("tokenizer.ggml.merges", ["zq qz"]), TokenizerError, "merges"),
        (("tokenizer.ggml.token_type", [1, 1]), TokenizerError, "2 entries for 384 tokens"),
        (("tokenizer.ggml.tokens", ["a", "a"]), TokenizerError, "there twice|2 tokens"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_contradicting_metadata_are_refused(
    tmp_path: Path, change: tuple[str, Any], error: type[Exception], text: str
) -> None:
    write_golden_gguf(tmp_path / "m.gguf", "llama", metadata=metadata_change(change))
    with pytest.raises(error, match=text) as caught:
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert leftovers(tmp_path) == []


def test_unnamed_pre_tokenizer_and_missing_template_are_noted(tmp_path: Path) -> None:
    drop = metadata_change(("tokenizer.chat_template", None))
    write_golden_gguf(tmp_path / "m.gguf", "llama-untied", pre=None, metadata=drop)
    report = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert len(report.notes) == 2
    assert "pre-tokenizer" in report.notes[0]
    assert "chat template" in report.notes[1]
    assert "chat_template.jinja" not in report.files


def test_empty_tokens_and_bad_scores(tmp_path: Path) -> None:
    from riverinfer.weights_convert.gguf_tokenizer import write_tokenizer

    def write(scores: list[float], types: list[int]) -> None:
        writer = GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "", "a"])
        writer.add_token_types(types)
        writer.add_token_scores(scores)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with GgufFile(tmp_path / "m.gguf") as gguf:
            write_tokenizer(gguf, tmp_path, vocab_rows=3, context=64)

    write([0.0, 0.0, -1.0], [2, 5, 1])
    assert b"[EMPTY_1]" in (tmp_path / "tokenizer.model").read_bytes()
    with pytest.raises(TokenizerError, match="not finite"):
        write([0.0, 0.0, float("nan")], [2, 5, 1])
    with pytest.raises(TokenizerError, match="2 tokens are marked unknown"):
        write([0.0, 0.0, 0.0], [2, 2, 1])
    with pytest.raises(TokenizerError, match="unknown token types"):
        write([0.0, 0.0, 0.0], [2, 7, 1])


def test_uniform_arrays_count_as_one_number(tmp_path: Path) -> None:
    change = metadata_change(("llama.attention.head_count_kv", [2] * 5))
    write_golden_gguf(tmp_path / "m.gguf", "llama", metadata=change)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["num_key_value_heads"] == 2


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    write_golden_gguf(tmp_path / "a.gguf", "llama", drop=("blk.2.ffn_up.weight", "output_norm.weight"))
    with pytest.raises(ConversionError, match=r"2 tensors are missing: blk\.2\.ffn_up\.weight, output_norm"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    write_golden_gguf(tmp_path / "b.gguf", "llama", extra={"blk.0.attn_sinks.weight": np.ones(4)})
    with pytest.raises(ConversionError, match=r"blk\.0\.attn_sinks\.weight"):
        convert(tmp_path / "b.gguf", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    write_golden_gguf(
        tmp_path / "m.gguf", "llama", drop=("output_norm.weight",), extra={"output_norm.weight": np.full(64, 1e6)}
    )
    with pytest.raises(ConversionError, match=r"output_norm\.weight.*float16.*bfloat16"):
        convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float16")
    assert leftovers(tmp_path) == []


@pytest.fixture(scope="module")
def golden_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    write_golden_gguf(path, "llama", Ggml.Q8_0)
    data = path.read_bytes()
    with GgufFile(path) as gguf:
        end = max(tensor.offset + tensor.nbytes for tensor in gguf.tensors.values())
    return data[:end]


def expect_failure(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "m.gguf").write_bytes(data)
        with pytest.raises(RiverinferError) as caught:
            convert(folder / "m.gguf", folder / "out")
        assert str(folder / "m.gguf") in str(caught.value)
        assert leftovers(folder) == []


def test_truncation_in_the_header_is_an_error(golden_bytes: bytes) -> None:
    for length in (*range(64), *range(64, 4096, 97), *range(4096, len(golden_bytes), 9973), len(golden_bytes) - 1):
        expect_failure(golden_bytes[:length])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncation_anywhere_is_an_error(golden_bytes: bytes, data: st.DataObject) -> None:
    expect_failure(golden_bytes[: data.draw(st.integers(0, len(golden_bytes) - 1))])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_end_in_another_error(golden_bytes: bytes, data: st.DataObject) -> None:
    damaged = bytearray(golden_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 12000))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "m.gguf").write_bytes(damaged)
        try:
            convert(folder / "m.gguf", folder / "out")
        except RiverinferError:
            assert leftovers(folder) == []
        else:
            assert leftovers(folder) == ["out"]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_garbage_is_an_error(garbage: bytes, with_magic: bool) -> None:
    expect_failure(b"GGUF" + struct.pack("<I", 3) + garbage if with_magic else garbage)


def test_wrong_versions_and_endianness(golden_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for version, text in (
        (struct.pack("<I", 1), "version 1 is not supported"),
        (struct.pack("<I", 4), "version 4"),
        (struct.pack(">I", 3), "big-endian"),
    ):
        path.write_bytes(golden_bytes[:4] + version + golden_bytes[8:])
        with pytest.raises(ConversionError, match=text):
            convert(path, tmp_path / "out")
    path.write_bytes(b"<!DOCTYPE html>" + golden_bytes)
    with pytest.raises(ConversionError, match="not a GGUF file"):
        convert(path, tmp_path / "out")


def test_endless_array_is_refused_at_once(tmp_path: Path) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    key = b"some.array"
    field = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 4, 2**60)
    (tmp_path / "m.gguf").write_bytes(header + field + bytes(64))
    with pytest.raises(ConversionError, match=r"some\.array"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_parts_of_a_split_file_are_refused(tmp_path: Path) -> None:
    write_golden_gguf(tmp_path / "m-00001-of-00002.gguf", "llama")
    with pytest.raises(ConversionError, match="llama-gguf-split --merge"):
        convert(tmp_path / "m-00001-of-00002.gguf", tmp_path / "out")


def test_folder_with_one_gguf(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_golden_gguf(source / "m.gguf", "qwen3")
    (source / "training_args.bin").write_bytes(b"not weights")
    report = convert(source, tmp_path / "out")
    assert (report.source_kind, report.source) == ("gguf", source / "m.gguf")
    shutil.copy(source / "m.gguf", source / "n.gguf")
    with pytest.raises(ConversionError, match=r"2 GGUF files \(m.gguf, n.gguf\)"):
        convert(source, tmp_path / "other")


@pytest.mark.parametrize("when", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_interrupted_conversion_leaves_nothing(tmp_path: Path, when: float, kind: type[BaseException]) -> None:
    write_golden_gguf(tmp_path / "m.gguf", "llama")

    def interrupt(label: str, done: int, total: int, unit: str) -> None:
        if done >= when * total:
            assert any(name.startswith(".out.partial-") for name in os.listdir(tmp_path))
            raise kind

    with pytest.raises(kind):
        convert(tmp_path / "m.gguf", tmp_path / "out", progress=interrupt)
    assert leftovers(tmp_path) == []


def test_progress_counts_up_to_the_total_once(tmp_path: Path) -> None:
    write_golden_gguf(tmp_path / "m.gguf", "llama")
    calls: list[tuple[str, int, int, str]] = []
    report = convert(tmp_path / "m.gguf", tmp_path / "out", progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(set(done))
    assert {call[2] for call in calls} == {done[-1]}
    assert report.parameters * 4 == done[-1]
