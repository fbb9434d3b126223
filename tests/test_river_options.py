"""What the options of river mode do: depths of prompts, limits, similarities on request, states that are no numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import ROOT, make_cache
from torch import Tensor

from riverinfer import Engine, SamplingParams
from riverinfer.cli import main
from riverinfer.decode import prefill, walk
from riverinfer.errors import InvalidRequestError, RiverinferWarning
from riverinfer.gates import FixedDepth, SimilarityGate
from riverinfer.loader import Embedding
from riverinfer.river import RiverOptions
from riverinfer.trace import Trace

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)
PROMPT = [9 + i * 7 % 200 for i in range(20)]
LAYERS = 5
POISON = 77  # a token whose embedding some tests make NaN


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIVERINFER_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def engine(cache: Path) -> Iterator[Engine]:
    with Engine.load(
        ROOT / "llama", device="cpu", dtype="float32", ctx_size=1024, mode="river", tau=0.6, river_group=32
    ) as loaded:
        yield loaded


# --- prompts and limits -----------------------------------------------------------------------------------------


def exact_similarities(engine: Engine, ids: list[int]) -> Tensor:
    """Float64 [layers, T] of a prompt in the backbone, from its states."""
    trace = Trace.full()
    with torch.inference_mode():
        walk(engine.model, torch.tensor(ids), 0, make_cache(engine.model, len(ids)), trace=trace)
    return cosines(trace)


def cosines(trace: Trace) -> Tensor:
    """Similarities from recorded states, by the definition: float64 [layers, T]."""
    assert trace.states is not None
    states = torch.stack(trace.states).double()
    a, b = states[:-1], states[1:]
    return (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()


@pytest.mark.parametrize("prefill_mode", ["last", "min"])
def test_a_prompt_exits_by_its_last_or_least_similar_token(engine: Engine, prefill_mode: str) -> None:
    depths = set()
    for length, min_depth in ((20, 2), (13, 1), (7, 1), (2, 1)):
        similarities = exact_similarities(engine, PROMPT[:length])
        decisive = similarities[:, -1] if prefill_mode == "last" else similarities.min(1).values
        for tau in (-1.0, 0.5, 0.7, 0.85, 0.95, 1.0):
            above = [layer for layer in range(min_depth - 1, LAYERS) if decisive[layer] > tau]
            options = RiverOptions(tau=tau, min_depth=min_depth, prefill=prefill_mode)
            output = engine.generate(PROMPT[:length], SamplingParams(max_tokens=1), river=options)
            assert output.exit_depths == [above[0] + 1 if above else LAYERS]
            depths.update(output.exit_depths)
    assert len(depths) > 3


def test_every_chunk_of_a_prompt_decides_for_itself(engine: Engine) -> None:
    model, cache, trace, want = engine.model, make_cache(engine.model, 20), Trace.full(), list[int]()
    ids = torch.randint(5, 300, (20,), generator=torch.Generator().manual_seed(1))
    for start in range(0, 20, 5):
        # In the backbone to see, and again to where that leads.
        with torch.inference_mode():
            walk(model, ids[start : start + 5], start, cache, trace=trace)
        above = [layer for layer, value in enumerate(cosines(trace)[:, -1]) if value > 0.7]
        want.append(above[0] + 1 if above else LAYERS)
        prefill(model, ids[start : start + 5].tolist(), start, cache, gate=FixedDepth(want[-1]))
    gate, depths = RiverOptions(tau=0.7, prefill="last").make_prefill_gate(), list[int]()
    note = Trace()
    prefill(
        model,
        ids.tolist(),
        0,
        make_cache(model, 20),
        chunk=5,
        gate=gate,
        trace=note,
        on_chunk=lambda _: depths.append(note.depth),
    )
    assert depths == want
    assert len(set(depths)) > 1


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        (RiverOptions(prefill="fixed", prefill_depth=3), 3),
        (RiverOptions(prefill="fixed", prefill_depth=0), 0),
        (RiverOptions(prefill="fixed", min_depth=2), 2),
        (RiverOptions(prefill="fixed", prefill_depth=4, max_depth=2), 2),
        (RiverOptions(prefill="last", gate="fixed", min_depth=4), 4),
        (RiverOptions(prefill="min", gate="always"), 0),
        (RiverOptions(prefill="last", gate="never", max_depth=3), 3),
        (RiverOptions(prefill="last", tau=1.0, max_depth=2), 2),
        (RiverOptions(prefill="exact", max_depth=2), LAYERS),
    ],
    ids=str,
)
def test_a_prompts_depth_and_with_it_its_first_token(engine: Engine, options: RiverOptions, depth: int) -> None:
    output = engine.generate(PROMPT, PARAMS, river=options)
    logits = prefill(engine.model, PROMPT, 0, make_cache(engine.model, 20), gate=FixedDepth(depth))
    assert output.exit_depths[0] == depth
    assert output.token_ids[0] == int(logits.argmax())
    assert output.logprobs[0] == pytest.approx(float(logits[0].log_softmax(0).max()), abs=1e-4)


def test_max_depth_forces_every_gate_open(engine: Engine) -> None:
    for gate, depths in (("similarity", {3}), ("never", {3}), ("always", {0}), ("fixed", {2})):
        options = RiverOptions(tau=1.0, min_depth=2, max_depth=3, gate=gate)
        assert set(engine.generate(PROMPT, PARAMS, river=options).exit_depths[1:]) == depths
    early = RiverOptions(tau=0.6, min_depth=0, max_depth=0)
    assert set(engine.generate(PROMPT, PARAMS, river=early).exit_depths[1:]) == {0}
    beyond = engine.generate(PROMPT, PARAMS, river=RiverOptions(tau=1.0, max_depth=99))
    assert set(beyond.exit_depths) == {LAYERS}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"scope": "garden"}, "scope"),
        ({"scope": "last"}, "scope"),
        ({"prefill": "batch"}, "prefill"),
        ({"prefill": "fixed", "prefill_depth": -1}, "prefill_depth"),
        ({"prefill": "fixed", "prefill_depth": 1.5}, "prefill_depth"),
        ({"max_depth": 0}, "max_depth"),
        ({"max_depth": -1, "min_depth": 0}, "max_depth"),
        ({"max_depth": "3"}, "max_depth"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: "):
        RiverOptions(**options)


@pytest.mark.parametrize("prefill_mode", ["exact", "last", "min"])
def test_a_depth_that_no_prompt_would_have_is_refused(prefill_mode: str) -> None:
    with pytest.raises(InvalidRequestError, match=r'prefill_depth: has no effect .* give prefill="fixed"'):
        RiverOptions(prefill=prefill_mode, prefill_depth=2)
    with pytest.raises(InvalidRequestError, match="prefill_depth: has no effect"):
        Engine.load(ROOT / "llama", device="cpu", mode="river", prefill=prefill_mode, prefill_depth=2)


def test_the_gates_own_scope_is_checked_too() -> None:
    with pytest.raises(InvalidRequestError, match="scope: is 'sequence'; use last or min"):
        SimilarityGate(scope="sequence")


def test_limits_of_a_model_and_of_what_is_loaded() -> None:
    options = RiverOptions(min_depth=2)
    assert options.limited(5, 5) is options
    with pytest.raises(InvalidRequestError, match="min_depth: is 2, the model has 1 layers; lower it"):
        options.limited(1, 1)
    with pytest.raises(InvalidRequestError, match="prefill_depth: is 3, but only 2 backbone layers are loaded; lower"):
        RiverOptions(prefill="fixed", prefill_depth=3).limited(5, 2)
    held = options.limited(5, 4)
    assert (held.max_depth, held.prefill, held.prefill_depth) == (4, "fixed", 4)
    assert held.limited(5, 4) == held
    assert (held.min_depth, held.tau, held.scope) == (options.min_depth, options.tau, options.scope)
    assert RiverOptions(max_depth=2).limited(5, 4).max_depth == 2
    assert RiverOptions(max_depth=9).limited(5, 4).max_depth == 4
    for prefill_mode, depth in (("last", None), ("min", None), ("fixed", None), ("fixed", 1)):
        limited = RiverOptions(prefill=prefill_mode, prefill_depth=depth).limited(5, 4)
        assert (limited.prefill, limited.prefill_depth) == (prefill_mode, depth)
    assert RiverOptions(min_depth=0).limited(5, 0).make_gate().start()


# --- similarities -----------------------------------------------------------------------------------------------


def replayed_similarities(engine: Engine, prompt: list[int], ids: list[int], depths: list[int]) -> list[list[float]]:
    """Those of every token's position, from the states of a walk of its own to the same depths."""
    kv, trace, found = make_cache(engine.model, len(prompt) + len(ids)), Trace.full(), []
    for step, depth in enumerate(depths):
        part, start = (prompt, 0) if step == 0 else (ids[step - 1 : step], len(prompt) + step - 1)
        with torch.inference_mode():
            walk(engine.model, torch.tensor(part), start, kv, gate=FixedDepth(depth), trace=trace)
        found.append(cosines(trace)[:, -1].tolist())
    return found


@pytest.mark.parametrize("prompt", [PROMPT, [7], [5 + i % 300 for i in range(600)]], ids=["20", "1", "600"])
def test_similarities_are_those_of_an_independent_walk(engine: Engine, prompt: list[int]) -> None:
    output = engine.generate(prompt, PARAMS, similarities=True)
    assert len(set(output.exit_depths)) > 1
    want = replayed_similarities(engine, prompt, output.token_ids, output.exit_depths)
    assert [len(values) for values in output.similarities] == [LAYERS] * 10
    assert torch.tensor(output.similarities).sub(torch.tensor(want)).abs().max() < 1e-4
    steps = list(engine.stream(prompt, PARAMS, similarities=True))
    assert [step.similarities for step in steps] == output.similarities
    plain = engine.generate(prompt, PARAMS)
    assert (plain.token_ids, plain.exit_depths) == (output.token_ids, output.exit_depths)
    assert plain.similarities == []
    assert all(step.similarities == () for step in engine.stream(prompt, PARAMS))


def test_a_chat_has_similarities_too_also_after_what_is_cached(engine: Engine) -> None:
    session, alone = engine.session(), engine.session()
    for text in ("Hello", "More"):
        steps = list(session.send(text, PARAMS, similarities=True))
        output = session.last_output
        assert output is not None
        assert [step.similarities for step in steps] == output.similarities
        assert [len(values) for values in output.similarities] == [LAYERS] * 10
        if text == "Hello":
            ids, depths = output.token_ids, output.exit_depths
            want = replayed_similarities(engine, output.prompt_token_ids, ids, depths)
            assert torch.tensor(output.similarities).sub(torch.tensor(want)).abs().max() < 1e-4
        else:
            assert output.stats.cached_tokens > 10  # what the river left is reused
        assert [step.token_id for step in alone.send(text, PARAMS)] == output.token_ids
    for chat in (session, alone):
        chat.close()


def test_exact_mode_has_no_similarities(engine: Engine, llama: Engine) -> None:
    session = engine.session()
    for call in (
        lambda: engine.generate(PROMPT, PARAMS, mode="exact", similarities=True),
        lambda: engine.stream(PROMPT, PARAMS, mode="exact", similarities=True),
        lambda: session.send("Hi", PARAMS, mode="exact", similarities=True),
        lambda: llama.generate(PROMPT, PARAMS, mode="exact", similarities=True),
    ):
        with pytest.raises(InvalidRequestError, match=r'similarities: .*; give mode="river" too'):
            call()
    assert session.messages == []


# --- states that are no numbers ---------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token ``POISON`` has a state that is no number."""
    look_up = Embedding.__call__

    def poisoned(self: Embedding, ids: Tensor) -> Tensor:
        return look_up(self, ids).masked_fill((ids == POISON)[:, None], float("nan"))

    monkeypatch.setattr(Embedding, "__call__", poisoned)


def test_a_token_without_numbers_stays_in_the_backbone_and_is_counted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up, calls = Embedding.__call__, []

    def later(self: Embedding, ids: Tensor) -> Tensor:
        calls.append(ids)
        return look_up(self, ids) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(Embedding, "__call__", later)
    with pytest.warns(RiverinferWarning, match="in 6 steps hidden states were no numbers; .* stayed in the backbone"):
        output = engine.generate(PROMPT, PARAMS, river=RiverOptions(tau=-1.0), similarities=True)
    # The prompt, three steps, and then its K and V spoil all that follow.
    assert output.exit_depths == [LAYERS] + [1] * 3 + [LAYERS] * 6
    assert output.stats.undefined_similarities == 6
    assert output.stats.as_dict()["undefined_similarities"] == 6
    assert [value != value for value in output.similarities[4]] == [True] * LAYERS
    assert not any(value != value for value in output.similarities[3])


def test_without_such_states_nothing_is_said(engine: Engine) -> None:
    output = engine.generate(PROMPT, PARAMS)
    assert output.stats.undefined_similarities == 0
    assert "undefined_similarities" not in output.stats.as_dict()


def test_max_depth_is_a_limit_also_without_numbers(engine: Engine, poison: None) -> None:
    with pytest.warns(RiverinferWarning, match="in 9 steps"):
        output = engine.generate([9, POISON], PARAMS, river=RiverOptions(tau=-1.0, max_depth=3))
    assert output.exit_depths == [LAYERS] + [3] * 9


@pytest.mark.parametrize("prefill_mode", ["last", "min"])
def test_prompts_without_numbers_count_too(engine: Engine, poison: None, prefill_mode: str) -> None:
    options = RiverOptions(tau=-1.0, prefill=prefill_mode)
    with pytest.warns(RiverinferWarning, match="in 10 steps"):
        output = engine.generate([9, POISON], PARAMS, river=options)
    assert set(output.exit_depths) == {LAYERS}
    assert output.stats.undefined_similarities == 10


def test_gates_that_look_at_no_states_are_not_bothered(engine: Engine, poison: None) -> None:
    output = engine.generate([9, POISON], PARAMS, river=RiverOptions(gate="fixed", min_depth=2))
    assert set(output.exit_depths[1:]) == {2}
    assert output.stats.undefined_similarities == 0


def test_a_neighbour_without_numbers_holds_back_only_those_who_exit_with_it(engine: Engine, poison: None) -> None:
    options = RiverOptions(tau=-1.0)
    alone = engine.generate([9, 10], PARAMS, river=options)
    with pytest.warns(RiverinferWarning, match="in 9 steps") as caught:
        well, ill = engine.generate_batch([[9, 10], [9, POISON]], PARAMS, river=options)
    assert len(caught) == 1
    assert (well.token_ids, well.exit_depths) == (alone.token_ids, alone.exit_depths)
    assert set(ill.exit_depths) == {LAYERS}
    assert [output.stats.undefined_similarities for output in (well, ill)] == [0, 9]
    with pytest.warns(RiverinferWarning, match="in 18 steps"):
        well, ill = engine.generate_batch([[9, 10], [9, POISON]], PARAMS, river=RiverOptions(tau=-1.0, scope="batch"))
    assert set(well.exit_depths) == set(ill.exit_depths) == {LAYERS}
    assert well.token_ids == engine.generate([9, 10], PARAMS, mode="exact").token_ids
    assert [output.stats.undefined_similarities for output in (well, ill)] == [9, 9]


# --- the command line -------------------------------------------------------------------------------------------

MODEL = str(ROOT / "llama")
FLAGS = ["-p", "Once upon a time", "--mode", "river", "--river-group", "32", "--device", "cpu", "--dtype", "float32"]
FLAGS += ["-n", "10", "--ignore-eos", "--generation-config", "none", "--no-chat-template"]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_flags_reach_the_engine(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def capture(_: Path, **options: Any) -> Engine:
        seen.update(options)
        raise InvalidRequestError("that is enough")

    monkeypatch.setattr(Engine, "load", capture)
    words = "--tau 0.7 --min-depth 2 --max-depth 4 --prefill fixed --prefill-depth 3 --backbone-layers 4"
    assert main([command, MODEL, *FLAGS, *words.split(), "--river-bits", "8", "--river-method", "awq"]) == 2
    assert {name: seen[name] for name in ("tau", "min_depth", "max_depth", "gate", "prefill", "prefill_depth")} == {
        "tau": 0.7,
        "min_depth": 2,
        "max_depth": 4,
        "gate": "similarity",
        "prefill": "fixed",
        "prefill_depth": 3,
    }
    assert [seen[name] for name in ("backbone_layers", "river_bits", "river_method")] == [4, 8, "awq"]
    assert main([command, MODEL, *FLAGS, "--gate", "fixed"]) == 2
    assert seen["gate"] == "fixed"


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--tau", "1", "--max-depth", "3"], RiverOptions(tau=1.0, max_depth=3)),
        (["--prefill", "fixed", "--prefill-depth", "2"], RiverOptions(prefill="fixed", prefill_depth=2)),
        (["--prefill", "last", "--tau", "0.7"], RiverOptions(prefill="last", tau=0.7)),
    ],
    ids=str,
)
def test_flags_do_what_the_options_do(
    engine: Engine, flags: list[str], options: RiverOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", MODEL, "--json", *FLAGS, *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    want = engine.generate("Once upon a time", PARAMS, river=options)
    assert (result["token_ids"], result["exit_depths"]) == (want.token_ids, want.exit_depths)


def test_the_method_of_the_copy_is_a_flag(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", MODEL, *FLAGS, "--river-method", "awq"]) == 0
    assert main(["river", "info", MODEL]) == 0
    assert "w4g32-awq" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-depth", "-1"], "max_depth: is -1; give an integer of at least 1"),
        (["--max-depth", "0"], "max_depth: is 0; give an integer of at least 1"),
        (["--min-depth", "4", "--max-depth", "3"], "max_depth: is 3; give an integer of at least 4"),
        (["--prefill", "fixed", "--prefill-depth", "-1"], "prefill_depth: is -1; give an integer of at least 0"),
        (["--prefill", "fixed", "--prefill-depth", "9"], "prefill_depth: is 9, the model has 5 layers; lower it"),
        (
            ["--prefill-depth", "2"],
            'prefill_depth: has no effect with prefill "exact"; give prefill="fixed" (--prefill fixed) too,'
            " or leave it out",
        ),
        (["--gate", "never", "--tau", "0.9"], "--tau has no effect with --gate never; leave one of them out"),
        (["--gate", "fixed", "--max-depth", "3"], "--max-depth has no effect with --gate fixed; leave one of them out"),
        (
            ["--gate", "always", "--max-depth", "3", "--prefill", "fixed", "--tau", "0.6"],
            "--tau has no effect with --gate always; leave one of them out",
        ),
        (["--backbone-layers", "6"], "backbone_layers: is 6; give an integer of at least 0 and at most 5"),
        (["--backbone-layers", "-2"], "backbone_layers: is -2; give an integer of at least 0 and at most 5"),
    ],
    ids=str,
)
def test_bad_values_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", MODEL, *FLAGS, *flags]) == 2
    assert capsys.readouterr().err == f"riverinfer: {message}\n"


@pytest.mark.parametrize(
    "flags",
    [["--prefill", "some"], ["--river-method", "gptq"], ["--max-depth", "x"], ["--backbone-layers", "1.5"]],
    ids=str,
)
def test_words_that_are_no_values_are_usage_errors(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", MODEL, *FLAGS, *flags])
    assert caught.value.code == 2
    assert f"argument {flags[0]}: invalid" in capsys.readouterr().err


def test_the_command_line_notes_states_without_numbers(
    engine: Engine, poison: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("test_river_options.POISON", engine.tokenizer.encode("Once upon a time")[-1])
    assert main(["generate", MODEL, "--json", *FLAGS]) == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "riverinfer: note: in 9 steps hidden states were no numbers; their tokens stayed in the backbone\n"
    )
    assert json.loads(captured.out)["stats"]["undefined_similarities"] == 9
