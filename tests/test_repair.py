"""River mode with repair: the backbone rewrites K and V every few tokens, and the text goes on from there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forced_drafts import distance_from_exact, random_ids, relative
from golden_models import NAMES, ROOT, copy_model, edit_json, make_cache
from torch import Tensor

from riverinfer import Engine, Output, SamplingParams
from riverinfer.cli import main
from riverinfer.decode import decode_one, prefill
from riverinfer.errors import InvalidRequestError
from riverinfer.river import RiverOptions
from riverinfer.sequence import TokenSequence

PARAMS = SamplingParams(max_tokens=34, ignore_eos=True, seed=1)
EVERY = 8


def load(name: str | Path, **options: Any) -> Engine:
    whole_rows = Path(name).name in ("phi3", "qwen2")
    river = {"river_bits": 8, "river_group": 0} if whole_rows else {"river_group": 32}
    common = {"device": "cpu", "dtype": "float32", "ctx_size": 256, "max_sequences": 2, "river_method": "rtn"}
    return Engine.load(ROOT / name, mode="river", gate="always", **(common | river | options))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load("llama", repair=EVERY) as loaded:
        yield loaded


def watch(patch: pytest.MonkeyPatch) -> list[tuple[int, int, float, float]]:
    """(first, end, distance from exact before, and after) of every repair to come."""
    seen: list[tuple[int, int, float, float]] = []
    original = TokenSequence.repair

    def watched(sequence: TokenSequence, following: int) -> tuple[int, int]:
        first, before = sequence.exact, distance_from_exact(sequence)
        result = original(sequence, following)
        assert sequence.exact == len(sequence.tokens)
        seen.append((first, len(sequence.tokens), before, distance_from_exact(sequence)))
        return result

    patch.setattr(TokenSequence, "repair", watched)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_repaired_positions_have_the_exact_prefills_k_and_v(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    with load(name, repair=EVERY) as engine:
        for length in (5, 50):  # phi3 crosses the border of its long frequencies after 50
            prompt = random_ids(length, length)
            seen.clear()
            output = engine.generate(prompt, PARAMS)
            assert max(after for *_, after in seen) < 1e-5
            assert max(before for _, _, before, _ in seen) > 1e-3
            assert output.stats.repaired == sum(end - first for first, end, *_ in seen)
            if name != "phi3":  # there, crossing makes everything exact in between
                assert [(first, end) for first, end, *_ in seen] == [
                    (length + i * EVERY, length + (i + 1) * EVERY) for i in range(4)
                ]


def replay(engine: Engine, output: Output, every: int) -> tuple[list[int], int, int]:
    """The same generation written out: tokens, repaired positions, disagreements."""
    model, ids = engine.model, list(output.prompt_token_ids)
    cache = make_cache(model, 256)
    logits, said, repaired, others = prefill(model, ids, 0, cache), list[int](), 0, 0
    gate, exact = RiverOptions(gate="always").make_gate(), len(ids)
    while True:
        said.append(int(logits[0].argmax()))
        if len(said) == len(output.token_ids):
            return said, repaired, others
        computed = len(ids) + len(said) - 1
        if every and computed - exact >= every:
            whole = ids + said
            rows = prefill(model, whole[exact:computed], exact, cache, all_logits=True)
            repaired += computed - exact
            others += sum(int(row.argmax()) != whole[exact + i + 1] for i, row in enumerate(rows))
            exact = computed
        logits = decode_one(model, said[-1], computed, cache, gate=gate)


@pytest.mark.parametrize("every", [1, 5, 8, 40])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_counts_and_text_are_those_of_the_procedure_written_out(engine: Engine, every: int, seed: int) -> None:
    options = RiverOptions(gate="always", repair=every)
    output = engine.generate(random_ids(9, seed), PARAMS, river=options)
    said, repaired, others = replay(engine, output, every)
    assert output.token_ids == said
    assert (output.stats.repaired, output.stats.repair_disagreements) == (repaired, others)
    assert (output.stats.repair_s > 0) == (every < 40)
    assert output.stats.repair_s <= output.stats.decode_s


def test_up_to_the_first_repair_the_text_is_that_of_river_mode(engine: Engine) -> None:
    parted = 0
    for seed in range(6):
        prompt = random_ids(9, seed)
        plain = engine.generate(prompt, PARAMS, river=RiverOptions(gate="always"))
        mended = engine.generate(prompt, PARAMS)
        # The first token is exact; the next EVERY are said before anything is rewritten.
        assert mended.token_ids[: EVERY + 1] == plain.token_ids[: EVERY + 1]
        parted += mended.token_ids != plain.token_ids
    assert parted > 0
    assert plain.stats.repaired == plain.stats.repair_disagreements == 0


def test_a_gate_that_never_opens_leaves_nothing_to_repair(engine: Engine) -> None:
    output = engine.generate(random_ids(9, 1), PARAMS, river=RiverOptions(gate="never", repair=1))
    assert output.stats.repaired == 0
    assert "repaired" not in output.stats.as_dict()


def test_lengths_that_turn_k_are_kept(tmp_path: Path) -> None:
    """Dynamic rope: K of each position stays as long as the sequence was at its step."""
    folder = copy_model("llama", tmp_path / "llama")
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    edit_json(folder / "config.json", rope_scaling=scaling, max_position_embeddings=32)
    with load(folder, ctx_size=120, repair=EVERY) as engine:
        model = engine.model
        for length in (10, 50):
            prompt = random_ids(length, length)
            output = Output()
            held: list[TokenSequence] = []
            with pytest.MonkeyPatch.context() as patch:
                original = TokenSequence.repair

                def repair(  # type: ignore[no-untyped-def]
                    sequence: TokenSequence, following: int, held=held, original=original, length=length
                ) -> tuple[int, int]:
                    held[:] = [sequence]
                    result = original(sequence, following)
                    wanted = one_by_one(engine, sequence.tokens, length)
                    for have, want in zip(sequence._kv, wanted, strict=True):
                        for a, b in zip(have, want, strict=True):
                            assert relative(a[:, : len(sequence.tokens)], b[:, : len(sequence.tokens)]) < 1e-5
                    return result

                patch.setattr(TokenSequence, "repair", repair)
                for _ in engine.stream(prompt, PARAMS, output=output):
                    pass
            assert held
            assert output.stats.repaired == 32
        assert model.rope.scaled_by_length(83)


def one_by_one(engine: Engine, tokens: list[int], prompt: int) -> list[tuple[Tensor, Tensor]]:
    """The cache of exact mode: the prompt at once, then token by token."""
    cache = make_cache(engine.model, 120)
    prefill(engine.model, tokens[:prompt], 0, cache)
    for position in range(prompt, len(tokens)):
        decode_one(engine.model, tokens[position], position, cache)
    for k, v in cache:
        k[:, len(tokens) :] = v[:, len(tokens) :] = 0
    return cache


def test_an_interrupt_in_a_repair_loses_no_token(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = engine.session()
    original = TokenSequence.repair
    lengths: list[int] = []

    def interrupted(sequence: TokenSequence, following: int) -> tuple[int, int]:
        lengths.append(len(sequence.tokens))
        with monkeypatch.context() as patch:
            patch.setattr("riverinfer.decode._walk", broken)
            return original(sequence, following)

    def broken(*_: object, **__: object) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenSequence, "repair", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(session.send("Hello", PARAMS))
    assert session.cached_tokens() == lengths[0]
    assert session._sequence.exact == lengths[0] - EVERY
    # An exact turn takes what is exact, and computes the rest again.
    list(session.send("More", PARAMS, mode="exact"))
    output = session.last_output
    assert output is not None
    assert output.token_ids == engine.generate(output.prompt_token_ids, PARAMS, mode="exact").token_ids
    session.close()


def test_an_exact_turn_reuses_what_was_repaired(engine: Engine) -> None:
    session = engine.session()
    list(session.send("Hello", PARAMS))
    assert session.last_output is not None
    first = len(session.last_output.prompt_token_ids)
    list(session.send("More", PARAMS, mode="exact"))
    output = session.last_output
    # The 32 that were repaired, unless the template or the tokenizer reads the end of the answer another way.
    assert first + 24 <= output.stats.cached_tokens <= first + 32
    assert output.token_ids == engine.generate(output.prompt_token_ids, PARAMS, mode="exact").token_ids
    session.close()


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_in_a_batch_each_is_repaired_when_it_is_due(name: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different lengths: phi3 computes one of them anew, in the backbone, at the border of its long frequencies."""
    prompts = [random_ids(length, length) for length in (5, 50)]
    params = [replace(PARAMS, max_tokens=count) for count in (20, 34)]
    with load(name, repair=EVERY) as engine:
        options = None if scope == "sequence" else RiverOptions(gate="always", repair=EVERY, scope=scope)
        alone = [engine.generate(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        seen = watch(monkeypatch)
        together = engine.generate_batch(prompts, params, river=options)
    assert max(after for *_, after in seen) < 1e-5
    assert max(before for _, _, before, _ in seen) > 1e-3
    assert sum(output.stats.repaired for output in together) == sum(end - first for first, end, *_ in seen)
    for got, want in zip(together, alone, strict=True):
        assert got.token_ids == want.token_ids
        assert got.stats.repaired == want.stats.repaired > 0
        assert got.stats.repair_disagreements == want.stats.repair_disagreements
        assert 0 < got.stats.repair_s <= got.stats.decode_s


def test_it_needs_the_whole_backbone() -> None:
    with pytest.raises(InvalidRequestError, match="repair: needs the whole backbone, 3 layers of 5 are loaded"):
        load("llama", repair=4, backbone_layers=3)
    with pytest.raises(InvalidRequestError, match="repair: is -1"):
        RiverOptions(repair=-1)


def test_the_command_line_counts_them(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--mode", "river", "--gate", "always", "--repair", str(EVERY), "--river-group", "32", "-n", "34"]
    flags += ["--river-method", "rtn", "--device", "cpu", "--dtype", "float32", "--ignore-eos"]
    flags += ["--generation-config", "none", "--no-chat-template", "-p", "Once upon a time"]
    assert main(["generate", str(ROOT / "llama"), "--json", *flags]) == 0
    stats = json.loads(capsys.readouterr().out)["stats"]
    want = engine.generate("Once upon a time", PARAMS).stats
    assert (stats["repaired"], stats["repair_disagreements"]) == (32, want.repair_disagreements)
    assert 0 < stats["repair_s"] < stats["decode_s"]
    assert main(["generate", str(ROOT / "llama"), "--stats", *flags]) == 0
    assert f"repaired 32 positions, {want.repair_disagreements} said otherwise" in capsys.readouterr().err


def test_repair_wants_exact_prompts() -> None:
    with pytest.raises(InvalidRequestError, match="repair: needs exact prompts"):
        RiverOptions(prefill="fixed", repair=EVERY)
