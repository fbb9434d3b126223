"""Damaged and unsupported model folders: a typed error in the library, one clear line and exit code 2 in the CLI."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_models import ROOT, copy_model, edit_json
from safetensors.torch import load_file, save_file

from riverinfer import Engine, errors, memory
from riverinfer.checkpoint import Checkpoint
from riverinfer.cli import main

WEIGHTS = "model.safetensors"
Damage = Callable[[Path], object]


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def rewrite_header(change: Callable[[dict[str, dict[str, list[int]]]], object]) -> Damage:
    """Edit the JSON header of the safetensors file, keeping its data."""

    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return damage


def overlap(header: dict[str, dict[str, list[int]]]) -> None:
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    header[second]["shape"] = header[first]["shape"]


def config(**changes: object) -> Damage:
    return lambda folder: edit_json(folder / "config.json", **changes)


def write(name: str, content: str | bytes) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cut(name: str, keep: float) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * keep)])

    return damage


def rename_tensor(old: str, new: str) -> Damage:
    return change_weights(lambda t: t.update({new: t.pop(old)}))


Q = "model.layers.0.self_attn.q_proj.weight"
# name -> (golden folder, damage, error, what the message must say)
CASES: dict[str, tuple[str, Damage, type[errors.RiverinferError], str]] = {
    "no config": ("llama", lambda f: (f / "config.json").unlink(), errors.ModelNotFoundError, "no config.json"),
    "broken config": ("llama", cut("config.json", 0.5), errors.ConfigError, r"config\.json: is not valid JSON"),
    "config no object": ("llama", write("config.json", "[1]"), errors.ConfigError, "not a JSON object"),
    "no model type": ("llama", config(model_type=...), errors.ConfigError, "model_type: is missing"),
    "unknown family": (
        "llama",
        config(model_type="mamba"),
        errors.UnsupportedModelError,
        "'mamba' is not supported; supported model types: llama, mistral",
    ),
    "mixture of experts": ("llama", config(num_local_experts=8), errors.UnsupportedModelError, "mixture-of-experts"),
    "unknown rope": (
        "llama",
        config(rope_scaling={"rope_type": "spiral", "factor": 2.0}),
        errors.UnsupportedModelError,
        "'spiral' is not supported; supported rope types: default, linear",
    ),
    "rope without factor": (
        "llama",
        config(rope_scaling={"type": "linear"}),
        errors.ConfigError,
        "rope_scaling.factor: is missing",
    ),
    "unknown activation": ("llama", config(hidden_act="gelu"), errors.UnsupportedModelError, "activation 'gelu'"),
    "soft-capping": ("llama", config(final_logit_softcapping=30.0), errors.UnsupportedModelError, "soft-capping"),
    "quantized": (
        "llama",
        config(quantization_config={"quant_method": "awq"}),
        errors.UnsupportedModelError,
        "quantized with 'awq'",
    ),
    "nested without its text part": (
        "llama",
        config(model_type="mistral3"),
        errors.ConfigError,
        "text_config: is missing",
    ),
    "model type a list": (
        "llama",
        lambda f: edit_json(f / "config.json", model_type="mistral3", text_config={"model_type": ["x"]}),
        errors.ConfigError,
        "text_config.model_type: must be a string",
    ),
    "config nested too deeply": (
        "llama",
        write("config.json", "[" * 200_000),
        errors.ConfigError,
        r"config\.json: is n(ested too deeply|ot valid JSON)",
    ),
    "layer types no strings": (
        "qwen2",
        config(use_sliding_window=True, layer_types=[["x"]] * 5),
        errors.ConfigError,
        "layer_types: must be a list",
    ),
    "size missing": ("llama", config(hidden_size=...), errors.ConfigError, "hidden_size: is missing"),
    "size a string": (
        "llama",
        config(num_hidden_layers="5"),
        errors.ConfigError,
        "num_hidden_layers: must be an integer",
    ),
    "heads do not divide": ("llama", config(num_key_value_heads=3), errors.ConfigError, "3 does not divide"),
    "broken generation config": (
        "llama",
        write("generation_config.json", "{"),
        errors.ConfigError,
        r"generation_config\.json: is not valid JSON",
    ),
    "absurd recommended sampling": (
        "llama",
        write("generation_config.json", '{"do_sample": true, "top_p": 7}'),
        errors.ConfigError,
        r"generation_config\.json: top_p: is 7",
    ),
    "no weights": ("llama", lambda f: (f / WEIGHTS).unlink(), errors.ModelNotFoundError, r"no model\.safetensors"),
    "only pickles": (
        "llama",
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        errors.ModelNotFoundError,
        "riverinfer convert",
    ),
    "truncated weights": ("llama", cut(WEIGHTS, 0.7), errors.WeightsError, "no valid safetensors file"),
    "truncated header": ("llama", cut(WEIGHTS, 0.0005), errors.WeightsError, "no valid safetensors file"),
    "garbage weights": ("llama", write(WEIGHTS, b"\x93garbage" * 99), errors.WeightsError, "no valid safetensors file"),
    "empty weights": ("llama", write(WEIGHTS, b""), errors.WeightsError, "no valid safetensors file"),
    "overlapping tensors": ("llama", rewrite_header(overlap), errors.WeightsError, "no valid safetensors file"),
    "shard missing": (
        "qwen2",
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        errors.WeightsError,
        r"model-00002-of-00002\.safetensors: this shard is missing",
    ),
    "index without map": (
        "qwen2",
        write("model.safetensors.index.json", "{}"),
        errors.WeightsError,
        "weight_map: is missing",
    ),
    "index leaves the folder": (
        "qwen2",
        write("model.safetensors.index.json", '{"weight_map": {"a": "../a.safetensors"}}'),
        errors.WeightsError,
        "outside the folder",
    ),
    "index names a tensor its shard lacks": (
        "qwen2",
        lambda f: edit_json(
            f / "model.safetensors.index.json",
            weight_map={"model.ghost": "model-00001-of-00002.safetensors"},
        ),
        errors.WeightsError,
        "lacks tensors the index places in it: model.ghost",
    ),
    "tensor missing": ("llama", change_weights(lambda t: t.pop(Q)), errors.WeightsError, f"missing: {Q}"),
    "tensor unexpected": (
        "llama",
        change_weights(lambda t: t.update(extra=torch.zeros(2))),
        errors.WeightsError,
        "unexpected tensors: extra",
    ),
    "tensor misnamed": ("llama", rename_tensor(Q, f"{Q}_"), errors.WeightsError, "tensors are missing"),
    "wrong shape": (
        "llama",
        change_weights(lambda t: t.update({Q: torch.zeros(64, 63)})),
        errors.WeightsError,
        rf"{Q}: has shape \[64, 63\] where config.json implies \[64, 64\]",
    ),
    "wrong config for the weights": ("llama", config(intermediate_size=99), errors.WeightsError, "config.json implies"),
    "untied without a head": (
        "llama",
        config(tie_word_embeddings=False),
        errors.WeightsError,
        "missing: lm_head.weight",
    ),
    "integer weights": (
        "llama",
        change_weights(lambda t: t.update({Q: torch.zeros(64, 64, dtype=torch.int8)})),
        errors.UnsupportedModelError,
        "stored as I8",
    ),
    "no tokenizer": ("llama", lambda f: (f / "tokenizer.json").unlink(), errors.TokenizerError, "no tokenizer.json"),
    "broken tokenizer": ("llama", cut("tokenizer.json", 0.5), errors.TokenizerError, r"tokenizer\.json"),
    "broken sentencepiece": (
        "llama-spm",
        write("tokenizer.model", b"\x00" * 50),
        errors.TokenizerError,
        r"tokenizer\.model",
    ),
}


def damaged(case: str, tmp_path: Path) -> tuple[Path, type[errors.RiverinferError], str]:
    name, damage, error, message = CASES[case]
    folder = copy_model(name, tmp_path / "model")
    damage(folder)
    return folder, error, message


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What the CLI said: exactly one line on stderr, nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("riverinfer: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("case", CASES)
def test_damaged_folders_are_refused_with_a_typed_error(case: str, tmp_path: Path) -> None:
    folder, error, message = damaged(case, tmp_path)
    with pytest.raises(error, match=message) as caught:
        Engine.load(folder, device="cpu")
    assert caught.value.remedy or "GGUF" in str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_damaged_folders_are_one_line_and_exit_2(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, _ = damaged(case, tmp_path)
    before = sorted(path.name for path in folder.iterdir())
    assert main(["generate", str(folder), "-p", "x", "-n", "1"]) == 2
    assert str(folder) in one_line(capsys)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = copy_model("llama", tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300].clone()
    save_file(tensors, folder / WEIGHTS)
    edit_json(folder / "config.json", vocab_size=300)
    with pytest.raises(errors.TokenizerError, match=r"highest id is 383 \('<\|im_end\|>'\).*only 300 ids"):
        Engine.load(folder, device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_found_with_check(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (Q, "model.embed_tokens.weight", "model.norm.weight", "model.layers.4.mlp.down_proj.weight"):
        folder = copy_model("llama", tmp_path / name)
        tensors = load_file(folder / WEIGHTS)
        tensors[name].view(-1)[7] = value
        save_file(tensors, folder / WEIGHTS)
        for dtype in ("float32", "bfloat16"):
            with pytest.raises(errors.WeightsError, match=f"{name}: has 1 weights that are NaN or infinite"):
                Engine.load(folder, device="cpu", dtype=dtype, check=True)
        assert main(["info", str(folder), "--check"]) == 2
        assert "NaN or infinite" in one_line(capsys)
        Engine.load(folder, device="cpu", mode="exact").close()


def test_places_that_are_no_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, gguf = tmp_path / "notes.txt", tmp_path / "m.gguf"
    file.write_text("x")
    gguf.write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "no such folder"),
        (file, "is a file, not a model folder; give the folder that holds config.json"),
        (gguf, f"convert it first: riverinfer convert {gguf} MODEL_DIR"),
        (tmp_path / "empty", "no config.json in this folder"),
    ):
        with pytest.raises(errors.ModelNotFoundError, match=message):
            Engine.load(path)
        assert main(["chat", str(path)]) == 2
        assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", "word " * 900, "-c", "64"], "the context 64"),
        (["-p", "x", "-n", "0"], "max_tokens: is 0"),
        (["-p", "x", "--temp", "-1"], "temperature: is -1"),
        (["-p", "x", "-c", "-5"], "ctx_size: is -5"),
        (["-p", "x", "--device", "tpu"], "unknown device 'tpu'"),
        (["-p", "x", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["-f", "no/such/file"], "no/such/file: cannot be read"),
        (["-p", "x", "--chat-template", "no/such/template"], "no/such/template: cannot be read"),
        (["-p", "x", "-sys", "a", "--system-prompt-file", "b"], "exclude each other"),
        (["-p", "x", "--logprobs", "2"], "--logprobs needs --json"),
        (["-p", "x", "-t", "20000"], "threads: is 20000"),
        (["-p", "x", "--chat-template-kwargs", '{"messages": 5, "self": 1}'], "messages, self cannot be given"),
        (["-p", "x", "--chat-template-name", "nothing"], "there is no template 'nothing'"),
        (["-f", "~nouser/x"], "cannot be read"),
        (["-f", "a\0b"], "cannot be read"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(ROOT / "llama"), *arguments]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only even turns') }}", "only even turns"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not finish"),
        ("{% for %}", "does not parse"),
    ],
)
def test_bad_templates_are_one_line_and_exit_2(
    template: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    model = str(ROOT / "llama")
    assert main(["generate", model, "-p", "x", "--chat-template", str(tmp_path / "t.jinja")]) == 2
    assert message in one_line(capsys)


def test_an_arena_beyond_memory_names_the_sum_and_the_knob(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = copy_model("llama", tmp_path / "model")
    edit_json(folder / "config.json", max_position_embeddings=10**11)
    assert main(["generate", str(folder), "-p", "x", "-c", "0"]) == 2
    line = one_line(capsys)
    assert "the KV cache of 1 sequence x 100000000000 positions" in line
    assert "lower --ctx-size (ctx_size; about" in line


def test_weights_and_cache_are_checked_as_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone fits into what is available, both do not."""
    with Engine.load(ROOT / "llama", device="cpu", dtype="float32", ctx_size=512) as engine:
        weights = sum(entry.nbytes for entry in Checkpoint.open(ROOT / "llama").entries.values()) * 2  # stored in bf16
        cache = 4 * 512 * engine.config.kv_bytes_per_token(4)
    monkeypatch.setattr(memory, "available_memory", lambda _: max(weights, cache) + 1000)
    with pytest.raises(errors.EngineMemoryError, match=r"weights \(.*\) and the KV cache .* need .* are available"):
        Engine.load(ROOT / "llama", device="cpu", dtype="float32", ctx_size=512)
    monkeypatch.setattr(memory, "available_memory", lambda _: weights + cache)
    Engine.load(ROOT / "llama", device="cpu", dtype="float32", ctx_size=512).close()


def test_a_cut_gguf_is_refused_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "cut.gguf"
    source.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 10, 4) + b"\x05")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert str(source) in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_sampling_and_templates_are_checked_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["-n", "0"],
        ["--temp", "-1"],
        ["--chat-template", "no/such"],
        ["--system-prompt-file", "no/such"],
    ):
        assert main(["generate", str(tmp_path / "nowhere"), "-p", "x", *arguments]) == 2
        assert "no such folder" not in one_line(capsys)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelNotFoundError):
        main(["chat", str(tmp_path / "nowhere"), "--debug"])


def test_a_folder_with_a_broken_link_or_no_rights_is_still_a_typed_error(tmp_path: Path) -> None:
    folder = copy_model("llama", tmp_path / "model")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "gone")
    with pytest.raises(errors.RiverinferError, match=r"model\.safetensors"):
        Engine.load(folder)


def test_an_allocator_that_gives_up_is_told_with_the_sum_and_the_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("riverinfer.engine_loading.load_model", full)
    said = r"^cpu ran out of memory: weights and river \(.*iB\), the KV cache"
    with pytest.raises(errors.EngineMemoryError, match=said) as told:
        Engine.load(ROOT / "llama", mode="exact", device="cpu", ctx_size=64)
    assert "--ctx-size" in str(told.value)
    assert "--backbone-layers" in str(told.value)
