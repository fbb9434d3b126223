"""The head in the river: its shortlist against the exact head's rows, who reads from it, its file, its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import CPU, ROOT, copy_model, make_cache, open_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from riverinfer import Engine, SamplingParams
from riverinfer.checkpoint import Checkpoint
from riverinfer.cli import main
from riverinfer.decode import decode_batch, decode_one, prefill
from riverinfer.errors import InvalidRequestError, WeightsError
from riverinfer.gates import FixedDepth, Gate, always, never
from riverinfer.kernels.torch_ops import rms_norm
from riverinfer.loader import head_rows
from riverinfer.model import Model
from riverinfer.river import RiverOptions, attach_river
from riverinfer.river_head import K_SHORTLIST, RiverHead, make_river_head
from riverinfer.tokenizer import Tokenizer
from riverinfer.weights_convert import river_artifact as artifact
from riverinfer.weights_convert.quantize import quantize
from riverinfer.weights_convert.river_artifact import (
    RiverSettings,
    build_river,
    find_river,
    head_group,
    list_rivers,
    open_river,
)

SETTINGS = RiverSettings(4, 32, "rtn")
FLAGS: dict[str, Any] = {"device": "cpu", "ctx_size": 64, "mode": "river", "river_group": 32, "river_method": "rtn"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all tests, but set anew for each: the demo model must come from the user's own."""
    monkeypatch.setenv("RIVERINFER_CACHE", str(folder))


def load(name: str, dtype: torch.dtype = torch.bfloat16, settings: RiverSettings = SETTINGS) -> Model:
    checkpoint, model = Checkpoint.open(ROOT / name), open_model(ROOT / name, dtype)
    attach_river(model, find_river(checkpoint, settings), head_rows(checkpoint, model))
    return model


def exact_rows(folder: Path) -> Tensor:
    """The weights of the head as a bfloat16 model multiplies with them, float64 [vocab, H]."""
    checkpoint = Checkpoint.open(folder)
    with checkpoint.reader() as read:
        return read(checkpoint.head_name).bfloat16().double()


def states(model: Model, count: int = 50) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return 3 * torch.randn(count, model.config.hidden_size, generator=generator)


# --- the logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-untied", "ministral3"])  # tied; untied, in float32 and bfloat16
@torch.inference_mode()
def test_the_shortlist_is_the_exact_heads_and_the_rest_the_copys(name: str) -> None:
    model, rows = load(name), exact_rows(ROOT / name)
    assert isinstance(model.river_head, RiverHead)
    h = states(model)
    got, exact = model.logits(h, river=True), model.logits(h)
    x = rms_norm(h, model.final_norm, model.config.rms_norm_eps).bfloat16()
    want = x.double() @ rows.T
    copy = make_river_head(
        open_river(Checkpoint.open(ROOT / name), SETTINGS).head(),
        lambda ids: torch.full((len(ids), x.shape[1]), float("nan")),
        dtype=torch.bfloat16,
        device=CPU,
    )
    assert copy is not None
    approximate = copy(x)  # NaN where exact rows were asked for
    shortlist = approximate.isnan()
    assert got.dtype == torch.float32
    assert (shortlist.sum(1) == K_SHORTLIST).all()
    assert (got - want)[shortlist].abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(got[~shortlist], approximate[~shortlist])
    # The exact head rounds its logits to bfloat16.
    assert ((got - exact).abs() <= 2**-8 * want.abs() + 1e-5 * want.abs().max())[shortlist].all()
    assert (got - want)[~shortlist].abs().max() <= 0.1 * want.abs().max()


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
@pytest.mark.parametrize("settings", [SETTINGS, RiverSettings(8, 0), RiverSettings(8, 32)], ids=str)
@torch.inference_mode()
def test_the_top_is_the_exact_heads(name: str, settings: RiverSettings) -> None:
    model = load(name, settings=settings)
    h = states(model, 200)
    x = rms_norm(h, model.final_norm, model.config.rms_norm_eps).bfloat16()
    got, exact = model.logits(h, river=True).argmax(-1), model.logits(h)
    assert torch.equal(got, (x.double() @ exact_rows(ROOT / name).T).argmax(-1))
    # The exact head may see a tie there, made by rounding its logits.
    assert torch.equal(exact.gather(1, got.unsqueeze(1))[:, 0], exact.amax(-1))


@torch.inference_mode()
def test_the_top_is_the_exact_heads_on_the_demo_model(demo_dir: Path) -> None:
    checkpoint = Checkpoint.open(demo_dir)
    tokenizer = Tokenizer.load(demo_dir, vocab_size=checkpoint.config.vocab_size)
    with checkpoint.reader() as read:
        table, norm = read(checkpoint.head_name), read("model.norm.weight").float()
    head = make_river_head(
        quantize(table, bits=4, group=64, method="rtn"), lambda ids: table[ids].float(), dtype=table.dtype, device=CPU
    )
    assert head is not None
    ids = tokenizer.encode("The river carries what the mountain gives it, and the sea takes all of it, every day.")
    # A token's own row, turned away from itself by the norm's weight and by noise.
    h = table[ids].float()
    h = h + h.std() * torch.randn(h.shape, generator=torch.Generator().manual_seed(1))
    x = rms_norm(h, norm, checkpoint.config.rms_norm_eps).to(table.dtype)
    assert torch.equal(head(x).argmax(-1), (x.float() @ table.float().T).argmax(-1))


def test_a_vocabulary_smaller_than_the_shortlist_is_exact() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    head = make_river_head(
        quantize(weight, bits=4, group=32), lambda ids: weight[ids].float(), dtype=torch.bfloat16, device=CPU
    )
    assert head is not None
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.allclose(head(x), x.float() @ weight.float().T, atol=1e-5)


# --- who reads from it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, never(), FixedDepth(5), FixedDepth(4), FixedDepth(2), always()], ids=str)
def test_tokens_that_left_read_from_it_and_no_others(gate: Gate | None) -> None:
    model = load("llama")  # of 5 layers
    model.river_head = lambda x: torch.full((len(x), model.config.vocab_size), -1.0)
    left = isinstance(gate, FixedDepth) and gate.depth < 5
    cache = make_cache(model)
    assert not (prefill(model, [9, 10, 11], 0, cache) == -1).all()
    assert (decode_one(model, 12, 3, cache, gate=gate) == -1).all() == left
    # A prompt in chunks, of 2 and 1 tokens.
    every = prefill(model, [9, 10, 11], 0, cache, chunk=2, gate=gate, all_logits=True)
    assert ((every == -1).all(1) == left).all()
    assert (prefill(model, [9, 10, 11], 0, cache, gate=gate) == -1).all() == left


@pytest.mark.parametrize("depths", [(5, 5, 5), (0, 0, 0), (5, 2, 5), (3, 5, 0)], ids=str)
def test_in_a_batch_each_reads_from_its_own(depths: tuple[int, ...]) -> None:
    model = load("llama")
    caches = [make_cache(model) for _ in depths]
    for cache in caches:
        prefill(model, [9, 10, 11], 0, cache)
    kept = model.river_head
    model.river_head = None
    exact = decode_batch(model, [12, 13, 14], [3] * 3, caches, gates=[FixedDepth(depth) for depth in depths])
    model.river_head = kept
    mixed = decode_batch(model, [12, 13, 14], [3] * 3, caches, gates=[FixedDepth(depth) for depth in depths])
    for row, depth in enumerate(depths):
        alone = decode_one(model, 12 + row, 3, caches[row], gate=FixedDepth(depth))
        near = [torch.allclose(mixed[row], other, rtol=0.02, atol=0.05) for other in (exact[row], alone[0])]
        assert near == ([True, True] if depth == 5 else [False, True])
    if depths == (5, 5, 5):
        assert torch.equal(mixed, exact)


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_a_gate_that_never_opens_is_exact_to_the_bit(name: str) -> None:
    common = FLAGS | {"dtype": "bfloat16"}
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3)
    with (
        Engine.load(ROOT / name, **common) as engine,
        Engine.load(ROOT / name, **common | {"mode": "exact"}) as exact_engine,
    ):
        prompt = [9, 10, 11, 12]
        exact = exact_engine.generate(prompt, params)
        for how in ({"mode": "exact"}, {"river": RiverOptions(gate="never")}):
            out = engine.generate(prompt, params, **how)  # type: ignore[arg-type]
            assert out.token_ids == exact.token_ids
            assert out.logprobs == exact.logprobs
        model, plain = engine.model, exact_engine.model
        cache, plain_cache = make_cache(model), make_cache(plain)
        for gate in (never(), FixedDepth(model.config.num_layers)):
            got = prefill(model, prompt, 0, cache, gate=gate, all_logits=True)
            assert torch.equal(got, prefill(plain, prompt, 0, plain_cache, all_logits=True))
            assert torch.equal(decode_one(model, 13, 4, cache, gate=gate), decode_one(plain, 13, 4, plain_cache))


# --- the engine and the command line ----------------------------------------------------------------------------


def test_where_no_packed_kernel_reads_it_the_exact_head_serves() -> None:
    for model in (load("llama", torch.float32), load("qwen3")):  # float32; 376 rows, which are no multiple of 16
        h = states(model, 3)
        assert model.river_head is None
        assert torch.equal(model.logits(h, river=True), model.logits(h))


def test_the_exact_head_can_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    common = FLAGS | {"dtype": "bfloat16", "gate": "always"}
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=1)
    outs = []
    for which in ("quantized", "exact"):
        with Engine.load(ROOT / "llama", **common, river_head=which) as engine:
            assert (engine.model.river_head is None) == (which == "exact")
            outs.append(engine.generate("Once upon", params))
            model = engine.model
        assert model.river_head is None  # a closed engine keeps nothing
    assert outs[0].logprobs[0] == outs[1].logprobs[0]  # the prompt's last token is exact
    assert outs[0].logprobs[1:] != outs[1].logprobs[1:]
    with pytest.raises(InvalidRequestError, match="river_head: is 'none'; use quantized or exact"):
        Engine.load(ROOT / "llama", river_head="none")
    flags = ["--mode", "river", "--river-group", "32", "--river-method", "rtn", "--device", "cpu", "-n", "4", "-p", "x"]
    assert main(["generate", str(ROOT / "llama"), *flags, "--river-head", "exact"]) == 0
    with pytest.raises(SystemExit):
        main(["generate", str(ROOT / "llama"), *flags, "--river-head", "none"])
    assert "invalid choice: 'none'" in capsys.readouterr().err


def test_it_counts_in_the_memory_check(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("riverinfer.engine_loading.require_memory", lambda _, *, weights, **__: asked.append(weights))
    for which in ("quantized", "exact"):
        for dtype in ("bfloat16", "float32"):
            Engine.load(ROOT / "llama", **FLAGS, dtype=dtype, river_head=which).close()
    assert asked[0] - asked[2] == 384 * 64 // 2 + 384 * 2 * 4  # 4 bits, and two groups of scale and offset a row
    assert asked[1] == asked[3]


# --- the file ---------------------------------------------------------------------------------------------------


def test_the_group_is_the_rivers_if_it_divides_the_columns() -> None:
    config = Checkpoint.open(ROOT / "llama").config
    for hidden, group, want in (
        (576, 64, 64),
        (576, 128, 64),
        (576, 32, 32),
        (96, 64, 32),
        (512, 128, 128),
        (512, 0, 64),
        (48, 0, 0),
    ):
        assert head_group(replace(config, hidden_size=hidden), RiverSettings(8, group)) == want


def test_a_file_without_a_head_leaves_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "head_group", lambda *_: 0)
    model = load("mistral", settings=RiverSettings(8, 32, "rtn"))
    assert model.river
    assert model.river_head is None


def test_files_of_the_layout_before_are_refused_and_made_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(copy_model("llama", tmp_path / "llama"))
    path = build_river(checkpoint, SETTINGS)
    new = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    layers = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("head.")}
    save_file(layers, path, metadata | {"format": "1"})
    with pytest.raises(WeightsError, match=r"format: is 1, not 2.*riverinfer river build"):
        open_river(checkpoint, SETTINGS)
    assert [info.problem for info in list_rivers(checkpoint)] == ["has format 1, not 2"]
    assert find_river(checkpoint, SETTINGS).head() is not None
    assert path.read_bytes() == new


def test_a_damaged_head_is_named(tmp_path: Path) -> None:
    folder = copy_model("llama", tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"^head: .*NaN"):
        build_river(Checkpoint.open(folder), SETTINGS)
    assert not list_rivers(Checkpoint.open(folder))
