"""River mode with only the first layers of the backbone loaded, and what memory that and everything else takes."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import ROOT, make_cache

from riverinfer import Engine, SamplingParams
from riverinfer.checkpoint import TensorReader
from riverinfer.cli import main
from riverinfer.decode import decode_one, prefill
from riverinfer.errors import EngineClosedError, InvalidRequestError
from riverinfer.gates import FixedDepth, SimilarityGate
from riverinfer.kernels.linear import AbsentLinear, PackedLinear, packing_works
from riverinfer.loader import Embedding
from riverinfer.memory import gib
from riverinfer.memory_report import measure
from riverinfer.river import RiverOptions

PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)
PROMPT = [9 + i * 7 % 200 for i in range(20)]
LAYERS = 5
LINEARS = (64 + 2 * 32) * 64 + 64 * 64 + 2 * 160 * 64 + 64 * 160  # weights of a layer of the golden llama


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIVERINFER_CACHE", str(folder))
        yield folder


def load(name: str = "llama", **options: Any) -> Engine:
    """A river engine in float32, as every golden model can have one unless ``options`` say otherwise."""
    defaults: dict[str, Any] = {"river_bits": 8, "river_group": 0, "ctx_size": 128, "mode": "river", "min_depth": 0}
    return Engine.load(ROOT / name, device="cpu", **{"dtype": "float32", **defaults, **options})


@pytest.fixture(scope="module")
def whole(cache: Path) -> Iterator[Engine]:
    with load() as engine:
        yield engine


@pytest.fixture(scope="module")
def three(whole: Engine) -> Iterator[Engine]:
    with load(backbone_layers=3) as engine:
        yield engine


# --- what is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_of_absent_layers_only_norms_and_biases_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load(name).close()  # makes the river, which reads everything
    read, names = TensorReader.__call__, list[str]()

    def spy(self: TensorReader, tensor: str) -> torch.Tensor:
        names.append(tensor)
        return read(self, tensor)

    monkeypatch.setattr(TensorReader, "__call__", spy)
    with load(name, backbone_layers=2) as engine:
        layers = engine.config.num_layers
        assert (engine.model.held_layers, engine.model.offloaded) == (2, True)
        deep = [tensor for i in range(2, layers) for tensor in names if tensor.startswith(f"model.layers.{i}.")]
        assert {tensor.partition("layers.")[2][2:] for tensor in deep if not tensor.endswith(".bias")} == {
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            *(["self_attn.q_norm.weight", "self_attn.k_norm.weight"] if name == "qwen3" else []),
        }
        assert any(tensor.endswith(".bias") for tensor in deep) == (name == "qwen2")
        assert "model.layers.1.mlp.down_proj.weight" in names
        for layer in engine.model.layers[2:]:
            assert all(isinstance(x, AbsentLinear) for x in (layer.qkv, layer.o, layer.gate_up, layer.down))


@pytest.mark.parametrize("held", [0, 3, LAYERS])
def test_the_memory_check_counts_only_what_is_held(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}

    def remember(_: object, *, weights: int, **__: int) -> None:
        asked["weights"] = weights

    monkeypatch.setattr("riverinfer.engine_loading.require_memory", remember)
    with load(backbone_layers=held) as engine:
        report, rotary = engine.memory(), engine.model.rope.nbytes
    # The embedding is tied: the head is the copy that is held.
    assert asked["weights"] == report.backbone + report.river + report.head + report.other - rotary
    assert report.backbone == held * LINEARS * 4


# --- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", range(LAYERS + 1))
@pytest.mark.parametrize("tau", [0.5, 0.7])
def test_outputs_are_those_of_a_whole_engine_that_must_exit_there(whole: Engine, held: int, tau: float) -> None:
    limits: dict[str, Any] = {"max_depth": held, "prefill": "fixed", "prefill_depth": held}
    with load(backbone_layers=held, tau=tau) as engine:
        got = engine.generate(PROMPT, PARAMS)
        batch = engine.generate_batch([PROMPT, PROMPT[:3]], PARAMS)
        session, other = engine.session(), whole.session()
        said = [step.token_id for text in ("Hello", "More") for step in session.send(text, PARAMS)]
    options = RiverOptions(tau=tau, min_depth=0, **limits)
    want = whole.generate(PROMPT, PARAMS, river=options)
    assert (got.token_ids, got.exit_depths) == (want.token_ids, want.exit_depths)
    assert got.logprobs == want.logprobs
    assert got.exit_depths[0] == held
    assert max(got.exit_depths) <= held
    assert [output.token_ids for output in batch] == [
        whole.generate(prompt, PARAMS, river=options).token_ids for prompt in (PROMPT, PROMPT[:3])
    ]
    assert said == [step.token_id for text in ("Hello", "More") for step in other.send(text, PARAMS, river=options)]
    other.close()


def test_the_whole_backbone_is_no_offloading(whole: Engine) -> None:
    with load(backbone_layers=LAYERS) as engine:
        assert not engine.model.offloaded
        for mode in ("river", "exact"):
            assert engine.generate(PROMPT, PARAMS, mode=mode).token_ids == (
                whole.generate(PROMPT, PARAMS, mode=mode).token_ids
            )
        assert torch.equal(engine.logits(PROMPT), whole.logits(PROMPT))


@pytest.mark.parametrize(
    "options",
    [
        RiverOptions(gate="never"),
        RiverOptions(gate="fixed", min_depth=3),
        RiverOptions(gate="always"),
        RiverOptions(tau=1.0, min_depth=2),
        RiverOptions(tau=1.0, max_depth=2),
        RiverOptions(tau=1.0, max_depth=99),
        RiverOptions(tau=1.0, prefill="last"),
        RiverOptions(tau=1.0, prefill="min"),
        RiverOptions(gate="never", prefill="last"),
        RiverOptions(tau=1.0, prefill="fixed", prefill_depth=1),
        RiverOptions(tau=1.0, prefill="fixed"),
    ],
    ids=str,
)
def test_no_token_goes_deeper_than_what_is_loaded(three: Engine, whole: Engine, options: RiverOptions) -> None:
    for output in [
        three.generate(PROMPT, PARAMS, river=options),
        *three.generate_batch([PROMPT, PROMPT[:2]], PARAMS, river=options),
    ]:
        assert len(output.exit_depths) == 16
        assert max(output.exit_depths) <= 3
    if options.gate == "never":
        assert set(three.generate(PROMPT, PARAMS, river=options).exit_depths) == {3}


def test_longrope_turns_all_k_without_the_deep_layers() -> None:
    """At the border everything is computed again: as deep as the backbone goes, and with the other frequencies."""
    prompt = [7 + i % 50 for i in range(58)]
    with load("phi3") as engine:
        model, layers = engine.model, engine.config.num_layers
        with load("phi3", backbone_layers=2, tau=0.6) as held:
            output = held.generate(prompt, PARAMS)
            batch = held.generate_batch([prompt, prompt[:9], prompt[:55]], PARAMS)
            together = held.generate_batch([prompt, prompt[:9]], PARAMS, river=RiverOptions(tau=0.6, scope="batch"))
        cache, ids, gate = make_cache(model, 128), list(prompt), SimilarityGate(0.6, 0, 2)
        logits, depths = prefill(model, ids, 0, cache, gate=FixedDepth(2)), [2]
        for token in output.token_ids[:-1]:
            assert token == int(logits[0].argmax())
            ids.append(token)
            if len(ids) == 65:
                logits = prefill(model, ids, 0, cache, gate=FixedDepth(2))
            else:
                logits = decode_one(model, token, len(ids) - 1, cache, gate=gate)
        depths = output.exit_depths
        assert depths[7] == 2
        assert max(depths) <= 2 < layers
        for got, length in zip(batch, (58, 9, 55), strict=True):
            assert max(got.exit_depths) <= 2
            assert (got.token_ids == output.token_ids) == (length == 58)
        assert together[0].exit_depths[7] == together[1].exit_depths[7] == 2


# --- what is refused --------------------------------------------------------------------------------------------


def test_exact_calls_are_refused_and_told_the_remedy(three: Engine) -> None:
    message = (
        r"only 3 of 5 backbone layers are loaded; use mode=\"river\", or load without backbone_layers "
        r"\(--backbone-layers\)"
    )
    session = three.session()
    for call in (
        lambda: three.logits(PROMPT),
        lambda: three.generate(PROMPT, PARAMS, mode="exact"),
        lambda: three.stream(PROMPT, PARAMS, mode="exact"),
        lambda: three.generate_batch([PROMPT], PARAMS, mode="exact"),
        lambda: session.send("Hi", PARAMS, mode="exact"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            call()
    assert three.slots.busy == 0
    assert list(session.send("Hi", PARAMS))
    session.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_depth": 4}, "min_depth: is 4, but only 3 backbone layers are loaded; lower it"),
        ({"prefill": "fixed", "prefill_depth": 4}, "prefill_depth: is 4, but only 3 backbone layers are loaded"),
        ({"mode": "exact"}, "backbone_layers: needs river mode"),
        ({"mode": "lossless"}, "backbone_layers: needs river mode"),
        ({"backbone_layers": -1}, "backbone_layers: is -1; give an integer of at least 0 and at most 5"),
        ({"backbone_layers": 6}, "backbone_layers: is 6"),
        ({"backbone_layers": True}, "backbone_layers: is True"),
        ({"backbone_layers": "2"}, "backbone_layers: is '2'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        load(**{"backbone_layers": 3, **options})


def test_options_of_a_call_are_held_against_what_is_loaded(three: Engine) -> None:
    fixed = RiverOptions(prefill="fixed", prefill_depth=4)
    for options, field in ((RiverOptions(min_depth=4), "min_depth"), (fixed, "prefill_depth")):
        with pytest.raises(InvalidRequestError, match=f"{field}: is 4, but only 3 backbone layers are loaded"):
            three.generate(PROMPT, PARAMS, river=options)


def test_an_awq_river_is_made_with_the_whole_backbone_and_used_without() -> None:
    awq: dict[str, Any] = {"river_bits": 4, "river_group": 32, "river_method": "awq"}
    with pytest.raises(InvalidRequestError, match="made with the whole backbone; make it first, with riverinfer river"):
        load(backbone_layers=3, **awq)
    options = RiverOptions(min_depth=0, max_depth=3, prefill="fixed", prefill_depth=3)
    with load(**awq) as engine:
        want = engine.generate(PROMPT, PARAMS, river=options)
    with load(backbone_layers=3, **awq) as engine:
        assert engine.generate(PROMPT, PARAMS).token_ids == want.token_ids


# --- memory -----------------------------------------------------------------------------------------------------


def test_the_report_adds_up(whole: Engine, three: Engine) -> None:
    embedding, head, kv = 384 * 64 * 2, 384 * 64 * 4, 4 * 128 * LAYERS * 2 * 2 * 16 * 4
    with load(mode="exact", ctx_size=256, max_sequences=2) as exact:
        reports = {3: three.memory(), LAYERS: whole.memory(), None: exact.memory()}
    for held, report in reports.items():
        assert report.backbone == (LAYERS if held is None else held) * LINEARS * 4
        assert report.river == (0 if held is None else LAYERS * LINEARS * 4)
        assert (report.embedding, report.embedding_mapped) == (embedding, True)
        assert report.head == head
        rotary = 2 * (256 if held is None else 128) * 16 * 4
        assert report.other == rotary + (2 * LAYERS + 1) * 64 * 4
        assert report.kv == (2 * 256 * LAYERS * 2 * 2 * 16 * 4 if held is None else kv)
        assert report.total == report.backbone + report.river + report.head + report.other + report.kv
        assert report.as_dict()["total"] == report.total
        assert ("river" in str(report)) == (held is not None)
        assert str(report).startswith(f"memory {gib(report.total)}: backbone {gib(report.backbone)} + ")
        assert f"embedding {gib(embedding)} in its mapped file" in str(report)
    # The norms that the river shares count once; those of an awq river are its own.
    assert reports[3].other == reports[LAYERS].other
    with load(river_bits=4, river_group=32, river_method="awq") as engine:
        assert engine.memory().other == reports[LAYERS].other + 2 * LAYERS * 64 * 4


def test_an_embedding_that_is_held_counts(llama: Engine) -> None:
    table = torch.ones(4, 8)
    kept, llama.model.embed = llama.model.embed, Embedding(table, mapped=False)
    try:
        report = llama.memory()
        assert report.embedding == table.nbytes
        assert report.total == report.backbone + report.head + report.other + report.kv + table.nbytes
        assert f" + embedding {gib(table.nbytes)} + " in str(report)
        assert "mapped" not in str(report)
    finally:
        llama.model.embed = kept


def test_small_weights_count_as_small(cache: Path) -> None:
    with load(dtype="bfloat16", river_bits=4, river_group=32, ctx_size=32) as engine:
        report, packed = engine.memory(), isinstance(engine.model.layers[0].qkv, PackedLinear)
        assert packed == packing_works(torch.bfloat16)
        assert report.backbone == LAYERS * LINEARS * 2
        head = engine.model.river_head
        assert report.head == 384 * 64 * 2 + (0 if head is None else head.weight_bytes)
        if packed:
            assert report.river == LAYERS * (LINEARS // 2 + LINEARS // 32 * 4)


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now, peak = measure(torch.device("cpu"))
    assert peak is not None
    assert 10 * 2**20 < peak < 2**40
    if sys.platform == "linux":
        assert now is not None
        assert now <= peak
    monkeypatch.setattr("riverinfer.memory_report._status", lambda _: None)
    without, other = measure(torch.device("cpu"))
    assert without is None
    assert other is not None
    assert other == pytest.approx(peak, rel=0.2)


def test_a_closed_engine_reports_nothing() -> None:
    engine = load(ctx_size=32)
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.memory()


FLAGS = ["--river-bits", "8", "--river-group", "0", "--device", "cpu", "--dtype", "float32", "-n", "3", "--ignore-eos"]
FLAGS += ["--mode", "river", "--backbone-layers", "2", "--generation-config", "none", "-c", "64"]


def test_the_command_line_shows_it(
    whole: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(ROOT / "llama")
    assert main(["generate", model, "-p", "Hi", "--json", "--stats", *FLAGS]) == 0
    captured = capsys.readouterr()
    memory = json.loads(captured.out)["memory"]
    assert memory["backbone"] == 2 * LINEARS * 4
    assert set(memory) >= {"river", "head", "other", "embedding", "embedding_mapped", "kv", "total", "measured", "peak"}
    line = captured.err.splitlines()[-1]
    assert line.startswith(f"memory {gib(memory['total'])}: backbone {gib(memory['backbone'])} + river ")
    assert "process" in line
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/stats\n"))
    assert main(["chat", model, *FLAGS]) == 0
    assert f"memory {gib(memory['total'])}: backbone {gib(memory['backbone'])} + river " in capsys.readouterr().err
    assert main(["generate", model, "-p", "x", *FLAGS, "--min-depth", "3"]) == 2
    assert capsys.readouterr().err == ("riverinfer: min_depth: is 3, but only 2 backbone layers are loaded; lower it\n")
    assert main(["generate", model, "-p", "x", "--mode", "exact", "--backbone-layers", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("riverinfer: --backbone-layers has no effect in exact mode; add --mode river")
    assert error.count("\n") == 1
