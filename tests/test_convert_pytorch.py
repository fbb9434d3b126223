"""PyTorch and safetensors folders become plain model folders; damaged or hostile ones end in a clear error."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_fixtures import GOLDEN, golden_tensors, read_json, write_pytorch_folder, written_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from riverinfer.errors import ConversionError
from riverinfer.weights_convert import ConversionReport, convert
from riverinfer.weights_convert import safetensors_writer as writer
from riverinfer.weights_convert.output_folder import output_folder, process_is_running

INDEX = "pytorch_model.bin.index.json"


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    result = written_tensors(folder)
    assert result.keys() == expected.keys()
    for key, tensor in expected.items():
        assert result[key].dtype == tensor.dtype, key
        assert torch.equal(result[key], tensor), key


def write_shards(folder: Path, name: str, count: int = 3) -> list[str]:
    tensors = golden_tensors(name)
    keys = sorted(tensors)
    write_pytorch_folder(folder, name, {}, "unused.tmp")
    (folder / "unused.tmp").unlink()
    weight_map = {}
    files = []
    for part in range(count):
        file = f"pytorch_model-{part + 1:05d}-of-{count:05d}.bin"
        mine = keys[part::count]
        torch.save({key: tensors[key] for key in mine}, folder / file)
        weight_map.update(dict.fromkeys(mine, file))
        files.append(file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


@pytest.mark.parametrize("name", ["llama-untied", "qwen2", "phi3", "mistral"])
def test_single_file(tmp_path: Path, name: str) -> None:
    write_pytorch_folder(tmp_path / "src", name)
    report = convert(tmp_path / "src", tmp_path / "out")
    assert isinstance(report, ConversionReport)
    assert report.source_kind == "pytorch"
    assert report.model_type == read_json(GOLDEN / name / "config.json")["model_type"]
    assert_same(tmp_path / "out", golden_tensors(name))
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (GOLDEN / name / file).read_bytes()
    assert report.files == tuple(sorted(path.name for path in (tmp_path / "out").iterdir()))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "src", "llama-untied")
    convert(tmp_path / "src", tmp_path / "out")
    assert_same(tmp_path / "out", golden_tensors("llama-untied"))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    files = write_shards(tmp_path / "src", "llama-untied")
    (tmp_path / "src" / files[1]).unlink()
    with pytest.raises(ConversionError, match=rf"1 of 3 shards are missing: {files[1]}"):
        convert(tmp_path / "src", tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


def test_shard_without_its_tensors_is_named(tmp_path: Path) -> None:
    files = write_shards(tmp_path / "src", "llama-untied")
    torch.save({"x": torch.ones(1)}, tmp_path / "src" / files[2])
    with pytest.raises(ConversionError, match=rf"{files[2]}: lacks \d+ tensors"):
        convert(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../x.bin"}}',
        '{"weight_map": {"a": "/etc/x.bin"}}',
        "[" * 100000,
    ],
    ids=range(8),
)
def test_broken_index_is_named(tmp_path: Path, content: str) -> None:
    write_shards(tmp_path / "src", "llama-untied")
    (tmp_path / "src" / INDEX).write_text(content)
    with pytest.raises(ConversionError, match=INDEX):
        convert(tmp_path / "src", tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize("wrap", [["state_dict"], ["model"], ["module"], ["state_dict", "model"]])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_nested_state_dicts(tmp_path: Path, wrap: list[str], prefix: str) -> None:
    state: Any = {prefix + key: value for key, value in golden_tensors("llama-untied").items()}
    for key in reversed(wrap):
        state = {key: state, "epoch": 3}
    write_pytorch_folder(tmp_path / "src", "llama-untied", state, "weights.pth")
    report = convert(tmp_path / "src", tmp_path / "out")
    assert_same(tmp_path / "out", golden_tensors("llama-untied"))
    assert "epoch" in report.notes[0]


def test_tied_head_in_shared_storage_is_left_out(tmp_path: Path) -> None:
    state = golden_tensors("qwen2")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write_pytorch_folder(tmp_path / "src", "qwen2", state)
    report = convert(tmp_path / "src", tmp_path / "out")
    assert_same(tmp_path / "out", golden_tensors("qwen2"))
    assert report.notes == ()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_tied_head_that_differs_is_kept_and_untied(tmp_path: Path, dtype: str | None) -> None:
    import transformers

    state = golden_tensors("qwen2")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    write_pytorch_folder(tmp_path / "src", "qwen2", state)
    report = convert(tmp_path / "src", tmp_path / "out", dtype=dtype)
    kept = {key: value.to(torch.float32 if dtype else value.dtype) for key, value in state.items()}
    assert_same(tmp_path / "out", kept)
    assert len(report.notes) == 1
    assert "lm_head.weight differs" in report.notes[0]
    before, after = read_json(tmp_path / "src" / "config.json"), read_json(tmp_path / "out" / "config.json")
    assert (before["tie_word_embeddings"], after["tie_word_embeddings"]) == (True, False)
    if dtype is None:
        assert after == {**before, "tie_word_embeddings": False}
    ids = torch.tensor([[70, 71, 72]])
    with torch.no_grad():
        logits = [
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(ids).logits
            for name in ("src", "out")
        ]
    assert torch.equal(*logits)


def test_equal_tied_head_in_storage_of_its_own_is_left_out(tmp_path: Path) -> None:
    state = golden_tensors("qwen2")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    write_pytorch_folder(tmp_path / "src", "qwen2", state)
    report = convert(tmp_path / "src", tmp_path / "out")
    assert_same(tmp_path / "out", golden_tensors("qwen2"))
    assert report.notes == ()
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is True


@pytest.mark.parametrize("other", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_other_safetensors_beside_a_pickle(tmp_path: Path, other: str) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied")
    save_file({"x": torch.ones(2)}, tmp_path / "src" / other)
    assert convert(tmp_path / "src", tmp_path / "out").source_kind == "pytorch"
    assert_same(tmp_path / "out", golden_tensors("llama-untied"))
    save_file(golden_tensors("llama-untied"), tmp_path / "src" / "model.safetensors")
    assert convert(tmp_path / "src", tmp_path / "again").source_kind == "safetensors"


def test_command_prints_the_report_and_the_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from riverinfer.cli.convert import run

    state = {"state_dict": golden_tensors("llama-untied"), "epoch": 3}
    write_pytorch_folder(tmp_path / "src", "llama-untied", state)
    (tmp_path / "src" / "tokenizer.json").unlink()
    assert run(argparse.Namespace(src=tmp_path / "src", dst=tmp_path / "out", dtype="float16")) == 0
    captured = capsys.readouterr()
    what, numbers, seconds = captured.out.splitlines()
    assert what == f"Converted {tmp_path / 'src'} (pytorch) to {tmp_path / 'out'}"
    tensors = golden_tensors("llama-untied")
    count = sum(tensor.numel() for tensor in tensors.values())
    assert numbers.startswith(f"  llama, {count:,} parameters in {len(tensors)} tensors, ")
    assert numbers.endswith(" MiB float16")
    assert seconds.startswith("  took ")
    notes = [line for line in captured.err.splitlines() if line.startswith("riverinfer: note: ")]
    assert len(notes) == 2
    assert "epoch" in notes[0]
    assert "tokenizer" in notes[1]


def test_shared_storage_of_an_untied_model_is_written_twice(tmp_path: Path) -> None:
    state = golden_tensors("llama-untied")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    write_pytorch_folder(tmp_path / "src", "llama-untied", state)
    convert(tmp_path / "src", tmp_path / "out")
    assert_same(tmp_path / "out", state)


def test_views_of_one_buffer_are_written_as_they_look(tmp_path: Path) -> None:
    state = golden_tensors("llama-untied")
    key = "model.layers.0.mlp.up_proj.weight"
    state[key] = torch.arange(64 * 96).float().reshape(64, 96).t()
    state["extra.scalar"] = torch.tensor(3, dtype=torch.int64)
    state["extra.halves"] = torch.ones(3, dtype=torch.float16)
    state["extra.bools"] = torch.tensor([True, False, True])
    write_pytorch_folder(tmp_path / "src", "llama-untied", state)
    report = convert(tmp_path / "src", tmp_path / "out")
    assert_same(tmp_path / "out", state)
    assert report.dtype == "mixed"


def test_old_pickle_format(tmp_path: Path) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied", {})
    torch.save(
        golden_tensors("llama-untied"),
        tmp_path / "src" / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    convert(tmp_path / "src", tmp_path / "out")
    assert_same(tmp_path / "out", golden_tensors("llama-untied"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["llama-untied", "mistral"])
def test_dtype_is_converted_and_recorded(tmp_path: Path, name: str, dtype: str) -> None:
    write_pytorch_folder(tmp_path / "src", name)
    report = convert(tmp_path / "src", tmp_path / "out", dtype=dtype)
    target = getattr(torch, dtype)
    assert_same(tmp_path / "out", {key: value.to(target) for key, value in golden_tensors(name).items()})
    config = read_json(tmp_path / "out" / "config.json")
    assert (report.dtype, config["torch_dtype"]) == (dtype, dtype)
    assert "dtype" not in config
    rest = {key: value for key, value in read_json(GOLDEN / name / "config.json").items() if "dtype" not in key}
    assert {key: value for key, value in config.items() if "dtype" not in key} == rest


def test_dtype_must_be_known_and_wide_enough(tmp_path: Path) -> None:
    state = golden_tensors("llama-untied")
    state["model.norm.weight"] = torch.full((64,), 1e6)
    write_pytorch_folder(tmp_path / "src", "llama-untied", state)
    with pytest.raises(ConversionError, match=r"model\.norm\.weight.*float16"):
        convert(tmp_path / "src", tmp_path / "out", dtype="float16")
    with pytest.raises(ConversionError, match=r"int4.*bfloat16, float16, float32"):
        convert(tmp_path / "src", tmp_path / "out", dtype="int4")
    assert os.listdir(tmp_path) == ["src"]


class Malicious:
    """Unpickling this without care creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("new_format", [True, False])
def test_malicious_pickle_is_refused(tmp_path: Path, new_format: bool) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied", {})
    state = {**golden_tensors("llama-untied"), "x": Malicious(tmp_path / "evil")}
    torch.save(state, tmp_path / "src" / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin.*executed.*safetensors"):
        convert(tmp_path / "src", tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("pickled") / "src"
    write_pytorch_folder(folder, "llama-untied")
    return folder, (folder / "pytorch_model.bin").read_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_truncated_pickle_is_an_error(pickled: tuple[Path, bytes], data: st.DataObject) -> None:
    folder, content = pickled
    length = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, 64)))
    (folder / "pytorch_model.bin").write_bytes(content[:length])
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin"):
        convert(folder, folder.parent / "out")
    assert os.listdir(folder.parent) == ["src"]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"tok_embeddings.weight": torch.ones(2, 2)}, "original format.*Hugging Face version"),
        ({"base.lora_A.weight": torch.ones(2, 2)}, "LoRA adapter"),
        ({"encoder.weight": torch.ones(2, 2)}, "embed_tokens.*encoder.weight"),
        ({}, "embed_tokens.weight: is missing"),
        ({"a": 3}, "a: is a int, not a tensor"),
        ([torch.ones(2)], "holds a list"),
        ({"a": torch.ones(2, 2).to_sparse()}, "not a plain dense tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64 is not supported"),
    ],
    ids=range(8),
)  # fmt: skip
def test_other_contents_are_refused(tmp_path: Path, state: Any, text: str) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied", state)
    with pytest.raises(ConversionError, match=text):
        convert(tmp_path / "src", tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


def test_sources_that_are_no_model(tmp_path: Path) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied")
    source = tmp_path / "src"
    with pytest.raises(ConversionError, match="no such file or folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConversionError, match="give the folder"):
        convert(source / "pytorch_model.bin", tmp_path / "out")
    (source / "config.json").rename(source / "c.json")
    with pytest.raises(ConversionError, match=r"config\.json: is missing"):
        convert(source, tmp_path / "out")
    (source / "c.json").rename(source / "config.json")
    (source / "pytorch_model.bin").rename(source / "consolidated.00.pth")
    with pytest.raises(ConversionError, match="Meta's original format"):
        convert(source, tmp_path / "out")
    shutil.copy(source / "consolidated.00.pth", source / "a.pt")
    (source / "consolidated.00.pth").rename(source / "b.pt")
    with pytest.raises(ConversionError, match=r"2 weight files.*a\.pt, b\.pt"):
        convert(source, tmp_path / "out")
    (source / "a.pt").unlink()
    (source / "b.pt").unlink()
    with pytest.raises(ConversionError, match="holds no weights"):
        convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize("name", ["qwen2", "llama-spm", "ministral3"])
def test_safetensors_folder_is_copied(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "src"
    shutil.copytree(GOLDEN / name, source, ignore=shutil.ignore_patterns("golden*"))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    report = convert(source, tmp_path / "out")
    assert report.source_kind == "safetensors"
    assert_same(tmp_path / "out", golden_tensors(name))
    assert "additional_chat_templates/tool_use.jinja" in report.files
    tokenizer = "tokenizer.model" if name == "llama-spm" else "tokenizer.json"
    assert (tmp_path / "out" / tokenizer).read_bytes() == (GOLDEN / name / tokenizer).read_bytes()


def test_damaged_safetensors_are_named(tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(GOLDEN / "llama", source, ignore=shutil.ignore_patterns("golden*"))
    content = (source / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        (source / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(ConversionError, match=r"model\.safetensors"):
            convert(source, tmp_path / "out")
    (source / "model.safetensors").rename(source / "a.safetensors")
    shutil.copy(source / "a.safetensors", source / "b.safetensors")
    with pytest.raises(ConversionError, match="2 safetensors files"):
        convert(source, tmp_path / "out")
    (source / "a.safetensors").unlink()
    save_file({"x": torch.ones(2)}, source / "b.safetensors")
    (source / "b.safetensors").rename(source / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match="adapter"):
        convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


def test_output_is_sharded_by_size(tmp_path: Path) -> None:
    tensors = golden_tensors("llama-untied")
    entries = [
        writer.TensorEntry(key, value.dtype, tuple(value.shape), lambda value=value: [value[:1], value[1:]])
        for key, value in tensors.items()
    ]
    writer.write_safetensors(tmp_path, entries, max_shard_bytes=100_000)
    assert_same(tmp_path, tensors)
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 3
    for file in files:
        with safe_open(tmp_path / file, "pt") as handle:
            keys = list(handle.keys())
        assert {key for key, shard in index["weight_map"].items() if shard == file} == set(keys)
        assert (tmp_path / file).stat().st_size < 110_000 or len(keys) == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_entry_with_too_little_or_too_much_data_is_an_error(tmp_path: Path, rows: int) -> None:
    entry = writer.TensorEntry("x", torch.float32, (2, 4), lambda: [torch.ones(rows, 4)])
    with pytest.raises(ConversionError, match=r"x: has (less|more) data than its shape \[2, 4\]"):
        writer.write_safetensors(tmp_path, [entry])


def test_destination_that_is_taken_stops_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ConversionError, match=r"out: exists and is not empty"):
        convert(tmp_path / "nowhere", out)
    assert (out / "mine.txt").read_text() == "keep"
    with pytest.raises(ConversionError, match="not a folder"):
        convert(tmp_path / "nowhere", out / "mine.txt")


def test_empty_destination_and_missing_parents_are_fine(tmp_path: Path) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied")
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    convert(tmp_path / "src", tmp_path / "link")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    convert(tmp_path / "src", tmp_path / "a" / "b" / "c")
    assert os.listdir(tmp_path / "a" / "b") == ["c"]


def test_partial_folders_of_dead_processes_are_removed(tmp_path: Path) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied")
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = tmp_path / f".out.partial-{int(child.stdout)}"
    own = tmp_path / f".out.partial-{os.getpid()}"
    running = tmp_path / f".out.partial-{os.getppid()}"
    others = [tmp_path / f".else.partial-{int(child.stdout)}", tmp_path / ".out.partial-x"]
    for folder in (dead, own, running, *others):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    convert(tmp_path / "src", tmp_path / "out")
    assert not dead.exists()
    assert not own.exists()
    assert all(folder.exists() for folder in (running, *others))


def test_one_process_writes_a_destination_once_at_a_time(tmp_path: Path) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied")
    seen: list[str] = []

    def again(label: str, done: int, total: int, unit: str) -> None:
        if not seen:
            with pytest.raises(ConversionError, match="another conversion") as caught:
                convert(tmp_path / "src", tmp_path / "out")
            seen.append(str(caught.value))

    convert(tmp_path / "src", tmp_path / "out", progress=again)
    assert seen
    assert_same(tmp_path / "out", golden_tensors("llama-untied"))


def test_full_disk_is_a_conversion_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "_write_tensor", full)
    with pytest.raises(ConversionError, match=r"No space left on device; check the free space"):
        convert(tmp_path / "src", tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize("destination", ["", "."])
def test_current_folder_is_no_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destination: str) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for path in (Path(destination), work):
        with pytest.raises(ConversionError, match="current folder"):
            convert(tmp_path / "src", path)
    work.rmdir()
    for path in (Path(destination), Path("out")):
        with pytest.raises(ConversionError, match=r"current folder|cannot be written"):
            convert(tmp_path / "src", path)
    assert os.listdir(tmp_path) == ["src"]


def test_errors_name_the_source_or_the_destination(tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as caught, output_folder(tmp_path / "out"):
        (tmp_path / "gone.json").read_bytes()
    assert caught.value.file == str(tmp_path / "gone.json")
    assert caught.value.problem.startswith("cannot be read")
    with pytest.raises(ConversionError) as caught, output_folder(tmp_path / "out") as folder:
        (folder / "no" / "config.json").write_bytes(b"")
    assert caught.value.file == str(tmp_path / "out")
    assert caught.value.problem.startswith("cannot be written")
    assert os.listdir(tmp_path) == []


def test_unreadable_companion_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied")
    read_bytes = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path == tmp_path / "src" / "tokenizer.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(ConversionError, match=r"tokenizer\.json: cannot be read: Input/output error"):
        convert(tmp_path / "src", tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


def test_process_is_running() -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    assert process_is_running(os.getppid())
    assert not process_is_running(os.getpid())
    assert not process_is_running(int(child.stdout))
    assert not process_is_running(2**80)


def test_destination_without_permission(tmp_path: Path) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="cannot be written"):
        convert(tmp_path / "src", tmp_path / "file" / "out")


@pytest.mark.parametrize("when", [0.0, 0.7])
def test_interrupted_conversion_leaves_nothing(tmp_path: Path, when: float) -> None:
    write_pytorch_folder(tmp_path / "src", "llama-untied")

    def interrupt(label: str, done: int, total: int, unit: str) -> None:
        if done >= when * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "src", tmp_path / "out", progress=interrupt)
    assert os.listdir(tmp_path) == ["src"]


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys; from riverinfer.weights_convert import convert; "
        "assert callable(convert); import riverinfer.weights_convert.convert; "
        "from riverinfer.weights_convert import convert; assert callable(convert); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'gguf', 'numpy', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
