"""Certified taus: what a calibration measures, certificates that hold or are refused, tau="auto", the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import ROOT, copy_model, edit_json
from safetensors.torch import load_file, save_file

from riverinfer import Engine, SamplingParams
from riverinfer.cli import main
from riverinfer.errors import ContextLengthError, InvalidRequestError, RiverinferWarning
from riverinfer.evidence import prompts as evidence_prompts
from riverinfer.evidence import tau_calibration
from riverinfer.evidence.certificate import (
    Certificate,
    Setting,
    certificate_path,
    identities,
    read_certificate,
    store_certificate,
)
from riverinfer.evidence.forced import Text, Walked, exact_texts, walk_forced
from riverinfer.evidence.learn_then_test import betting_p_value, drawn_order
from riverinfer.evidence.prompts import prompt_ids, read_prompts
from riverinfer.evidence.tau_calibration import GRID, calibrate_tau
from riverinfer.gates import Gate
from riverinfer.river import RiverOptions
from riverinfer.weights_convert.river_artifact import RiverSettings, remove_rivers, river_path

DELTA = 0.05
PROMPTS = ["Once upon a time", "Hello", "One two three", "The river", "A lamp", "Good morning"]
FLAGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "ctx_size": 128, "max_sequences": 1, "mode": "river"}
FLAGS |= {"river_group": 32, "river_method": "rtn"}
LOOSE: dict[str, Any] = {"epsilon": 0.9, "delta": DELTA, "horizon": 8}


@pytest.fixture(scope="module")
def engine() -> Any:
    with Engine.load(ROOT / "llama", **FLAGS) as loaded:
        yield loaded


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "cache"))
    return copy_model("llama", tmp_path / "llama")


@pytest.fixture
def certified(model: Path) -> Path:
    """The model's certificate for tau 0.7."""
    return certify(model, 0.01)


def certify(model: Path, p_value: float, **changes: Any) -> Path:
    """A certificate as a calibration would leave it, without one."""
    from riverinfer.checkpoint import Checkpoint

    with Engine.load(model, **FLAGS | changes) as engine:
        checkpoint, settings = Checkpoint.open(model), engine.river_settings
        assert settings is not None
        certificate = Certificate(
            tau=0.7 if p_value <= DELTA else None,
            epsilon=0.02,
            delta=DELTA,
            prompts=200,
            horizon=64,
            grid=(0.7, 0.6),
            tested=(Setting(0.7, 2.0, 0.01, p_value),),
            prompts_hash="0",
            conditions=engine.river_conditions,
            date="2026-01-01",
            **identities(checkpoint, settings),
        )
    path = certificate_path(river_path(checkpoint, settings))
    store_certificate(certificate, path)
    assert read_certificate(path) == certificate
    return path


def test_losses_are_disagreements_with_exact(engine: Engine) -> None:
    none = calibrate_tau(engine, PROMPTS, grid=(1.0,), **LOOSE).tested[0]
    assert (none.mean_loss, none.mean_depth) == (0, engine.config.num_layers)
    found = calibrate_tau(engine, PROMPTS, grid=(-1.0,), **LOOSE)
    # The same by hand, from the cut answers, one token at a time.
    losses = []
    order, prompts_hash = drawn_order(PROMPTS)
    assert found.prompts_hash == prompts_hash
    assert order != PROMPTS
    for (text,) in ([text] for text in exact_texts(engine, prompt_ids(engine, order), LOOSE["horizon"] + 1)):
        ends = [i for i, token in enumerate(text.answer) if token in engine.generation_config.eos_token_ids]
        answer = text.answer[: ends[0] + 1] if ends else text.answer
        wrong = 0
        options = replace(engine.river_options, tau=-1.0)
        from riverinfer.sequence import TokenSequence

        sequence = TokenSequence(engine.model, engine.ctx_size)
        engine.slots.acquire(sequence)
        engine.extend(sequence, text.prompt)
        for token, following in pairwise(answer):
            wrong += int(engine.extend(sequence, [token], gate=options.make_gate())[0].argmax()) != following
        engine.slots.release(sequence, keep=False)
        losses.append(wrong / max(1, len(answer) - 1))
    assert found.tested[0].mean_loss == pytest.approx(np.mean(losses))
    assert 0 < found.tested[0].mean_loss < 1
    assert found.tested[0].mean_depth == 1
    assert len({*losses}) > 1
    assert found.tested[0].p_value == float(betting_p_value(losses, LOOSE["epsilon"], DELTA))


def test_a_shuffled_file_gives_the_same_certificate(engine: Engine) -> None:
    first, *others = (
        calibrate_tau(engine, listed, grid=(-1.0,), **LOOSE) for listed in (PROMPTS, PROMPTS[::-1], sorted(PROMPTS))
    )
    assert all(replace(each, date=first.date) == first for each in others)
    assert calibrate_tau(engine, PROMPTS[1:], grid=(-1.0,), **LOOSE).prompts_hash != first.prompts_hash


def test_looser_settings_are_not_walked_once_one_fails(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that few prompts do: the mean loss stands for the p-value.
    monkeypatch.setattr(tau_calibration, "betting_p_value", lambda losses, epsilon, delta: np.mean(losses))
    seen: list[tuple[str, int, int, str]] = []
    found = calibrate_tau(engine, PROMPTS, grid=(1.0, 0.7, 0.6, -1.0), progress=lambda *x: seen.append(x), **LOOSE)
    assert found.tau == 1.0
    assert [each.tau for each in found.tested] == [1.0, 0.7]
    assert found.tested[1].mean_loss > DELTA
    steps = ("Exact answers", "tau 1", "tau 0.7")
    assert seen == [(label, number, 6, "prompts") for label in steps for number in range(1, 7)]


def test_walks_end_with_the_answer_and_repair_as_in_use(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = exact_texts(engine, prompt_ids(engine, PROMPTS), 9)
    text = next(text for text in texts if len({*text.answer}) > 1)
    last = next(i for i, token in enumerate(text.answer) if token != text.answer[0])
    walked: list[tuple[tuple[int, ...], int]] = []

    def walk(engine: Engine, text: Text, gate: Gate, *, repair: int) -> Walked:
        walked.append((text.answer, repair))
        return walk_forced(engine, text, gate, repair=repair)

    monkeypatch.setattr(tau_calibration, "walk_forced", walk)
    ends = replace(engine.generation_config, eos_token_ids=(text.answer[last],))
    monkeypatch.setattr(engine, "generation_config", ends)
    monkeypatch.setattr(engine, "river_options", replace(engine.river_options, repair=3))
    calibrate_tau(engine, [text.name], grid=(1.0,), **LOOSE)
    assert walked == [(text.answer[: last + 1], 3)]
    ends = replace(ends, eos_token_ids=text.answer[:1])  # nothing is left that the river says
    monkeypatch.setattr(engine, "generation_config", ends)
    empty = calibrate_tau(engine, [text.name], grid=(1.0,), **LOOSE).tested[0]
    assert (len(walked), empty.mean_loss, empty.mean_depth) == (1, 0, engine.config.num_layers)


def test_few_prompts_certify_nothing(engine: Engine) -> None:
    nothing = calibrate_tau(engine, PROMPTS, epsilon=0.02, delta=DELTA, horizon=8)
    assert nothing.tau is None
    assert [each.tau for each in nothing.tested] == [GRID[0]]


def test_bad_values_and_engines_are_refused(engine: Engine, llama: Engine) -> None:
    for change in ({"epsilon": 0.0}, {"delta": 1.0}, {"delta": 1e-13}, {"horizon": 0}, {"grid": (0.5, 0.9)}):
        with pytest.raises(InvalidRequestError, match=next(iter(change))):
            calibrate_tau(engine, PROMPTS, **LOOSE | change)
    with pytest.raises(InvalidRequestError, match="grid"):
        calibrate_tau(engine, PROMPTS, grid=(), **LOOSE)
    with pytest.raises(InvalidRequestError, match=r'needs river mode .*load with mode="river"'):
        calibrate_tau(llama, PROMPTS, **LOOSE)
    with pytest.raises(ContextLengthError, match=r"begins 'Hello Hello .*' has .*lower --horizon"):
        calibrate_tau(engine, ["Hello", "Hello " * 18], **LOOSE)


@pytest.mark.parametrize("templates", [True, False])
def test_a_prompt_that_is_too_long_by_itself_is_named(
    engine: Engine, templates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not templates:
        monkeypatch.setattr(evidence_prompts, "load_templates", lambda _: {})
    match = r"begins 'Hello Hello .*' has \d+ tokens, more than the context \(128\); leave it out, or raise --ctx-size"
    with pytest.raises(ContextLengthError, match=match):
        prompt_ids(engine, ["Hello", "Hello " * 90])
    assert len(prompt_ids(engine, ["Hello"])[0][1]) > 0
    if not templates:
        with pytest.raises(InvalidRequestError, match="the prompt has no tokens"):
            prompt_ids(engine, [""])


def test_a_repeated_prompt_counts_once(engine: Engine) -> None:
    once = calibrate_tau(engine, PROMPTS, grid=(0.5,), **LOOSE)
    with pytest.warns(RiverinferWarning, match="15 of 21 prompts repeat others: each counts once, 6 in all"):
        found = calibrate_tau(engine, [*PROMPTS, *PROMPTS[::-1], *PROMPTS[:1] * 9], grid=(0.5,), **LOOSE)
    assert replace(found, date=once.date) == once
    assert once.prompts == 6
    # A single prompt, however often it is asked, certifies no more than one draw can.
    with pytest.warns(RiverinferWarning, match="each counts once, 1 in all"):
        assert calibrate_tau(engine, ["Hello"] * 200, grid=(1.0,), **LOOSE).tau is None


# --- tau="auto" -----------------------------------------------------------------------------------------------------


def test_auto_takes_the_certified_tau(certified: Path, model: Path) -> None:
    with Engine.load(model, tau="auto", **FLAGS) as auto, Engine.load(model, tau=0.7, **FLAGS) as named:
        assert (auto.mode, auto.river_options) == ("river", named.river_options)
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        assert auto.generate("Hello", params).exit_depths == named.generate("Hello", params).exit_depths


def test_auto_where_nothing_is_certified_is_exact(model: Path) -> None:
    certify(model, 0.5)
    with pytest.warns(RiverinferWarning, match="could certify no tau .*running exact mode"):
        engine = Engine.load(model, tau="auto", **FLAGS)
    with engine:
        assert (engine.mode, engine.model.river) == ("exact", [])


def test_auto_without_a_certificate_is_refused(model: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no tau is certified for this river; run: riverinfer calibrate"):
        Engine.load(model, tau="auto", **FLAGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "lossless"}, 'tau: "auto" has no effect in lossless mode'),
        ({"gate": "always"}, 'tau: "auto" has no effect with gate "always"'),
        ({"prefill": "last"}, 'tau: "auto" needs exact prompts'),
        ({"backbone_layers": 2}, "and the whole backbone"),
        ({"tau": "some"}, "tau: is 'some'; give a number, or \"auto\""),
    ],
)
def test_auto_where_it_means_nothing(certified: Path, model: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Engine.load(model, **{**FLAGS, "tau": "auto", **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_depth": 2}, r"min_depth \(1 there, 2 here\)"),
        ({"max_depth": 3}, r"max_depth \(None there, 3 here\)"),
        ({"repair": 4}, r"repair \(0 there, 4 here\)"),
        ({"river_head": "exact"}, r"river_head \(quantized there, exact here\)"),
        ({"dtype": "bfloat16"}, r"dtype \(float32 there, bfloat16 here\)"),
    ],
)
def test_other_settings_are_refused_by_name(certified: Path, model: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"these differ: {message}; calibrate again"):
        Engine.load(model, tau="auto", **{**FLAGS, **change})


def test_every_condition_counts(certified: Path, model: Path) -> None:
    stored = json.loads(certified.read_text())["conditions"]
    options = {field.name for field in fields(RiverOptions)} - {"tau"}
    assert stored.keys() == options | {"river_settings", "river_head", "dtype", "device", "fused", "riverinfer"}
    for name, value in stored.items():
        edit_json(certified, conditions=stored | {name: "other"})
        with pytest.raises(InvalidRequestError, match=rf"these differ: {name} \(other there, {value} here\);"):
            Engine.load(model, tau="auto", **FLAGS)


def other_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def template_file(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def named_template(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages[0]['content'] }}")


def other_weights(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def other_river(model: Path) -> None:
    from riverinfer.weights_convert.river_artifact import list_rivers

    data = bytearray(list_rivers()[0].path.read_bytes())
    data[-1] ^= 1
    list_rivers()[0].path.write_bytes(data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda model: edit_json(model / "config.json", rms_norm_eps=0.5), "config.json; calibrate again"),
        (
            lambda model: edit_json(model / "generation_config.json", eos_token_id=5),
            "the end of text in generation_config.json; calibrate again",
        ),
        (
            lambda model: edit_json(model / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}"),
            "the tokenizer or chat template; calibrate again",
        ),
        (template_file, "the tokenizer or chat template; calibrate again"),
        (named_template, "the tokenizer or chat template; calibrate again"),
        (
            lambda model: other_text(model / "tokenizer.json", "{", "{ "),
            "the tokenizer or chat template; calibrate again",
        ),
        (other_river, "the river's file; calibrate again"),
        (other_weights, r"the river \(was made from other weights"),
    ],
    ids=["config", "end", "template", "template file", "named template", "tokenizer", "river", "weights"],
)
def test_another_model_or_river_is_refused_by_name(
    certified: Path, model: Path, edit: Callable[[Path], None], message: str
) -> None:
    edit(model)
    with pytest.raises(InvalidRequestError, match=f"these differ: {message}"):
        Engine.load(model, tau="auto", **FLAGS)


def test_every_file_of_a_tokenizer_counts_and_no_other(certified: Path, model: Path) -> None:
    from riverinfer.checkpoint import Checkpoint

    settings = RiverSettings(group=32, method="rtn")
    seen = [identities(Checkpoint.open(model), settings)]
    old = ("tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
    for name in (*old, "chat_template.json"):
        (model / name).write_text("{}")
        seen.append(identities(Checkpoint.open(model), settings))
    assert len({each["tokenizer"] for each in seen}) == len(seen)
    (model / "README.md").write_text("{}")
    edit_json(model / "generation_config.json", temperature=0.5)  # a certificate is about greedy answers
    assert identities(Checkpoint.open(model), settings) == seen[-1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", "0", "these differ: the model's weights;"),
        ("version", 99, "version: is 99"),
        ("version", 1, "version: is 1, not 2; run: riverinfer calibrate"),
        ("tau", 0.6, "is damaged .*not the last that was certified"),
        ("tested", [{"tau": "x"}], "is damaged"),
        ("conditions", {"riverinfer": "0.0"}, r"riverinfer \(0.0 there"),
    ],
)
def test_other_and_damaged_files_are_refused(certified: Path, model: Path, name: str, value: Any, message: str) -> None:
    edit_json(certified, **{name: value})
    with pytest.raises(InvalidRequestError, match=message):
        Engine.load(model, tau="auto", **FLAGS)


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", "[" * 100_000])
def test_a_file_that_is_no_certificate(certified: Path, content: str) -> None:
    certified.write_text(content)
    with pytest.raises(InvalidRequestError, match=r"is damaged .*riverinfer calibrate"):
        read_certificate(certified)


def test_rivers_take_their_certificate_along(certified: Path, model: Path) -> None:
    remove_rivers(None)
    assert list(certified.parent.iterdir()) == []


# --- the command ----------------------------------------------------------------------------------------------------

ARGS = ["--dtype", "float32", "-c", "128", "--river-group", "32", "--river-method", "rtn", "--device", "cpu"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def test_the_command_end_to_end(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["calibrate", str(model), "--prompts", str(prompts), "--max-disagreement", "0.9", "--horizon", "6", *ARGS]
    assert main(wanted) == 0
    printed = capsys.readouterr()
    assert "Certified: tau" in printed.out
    assert "of an answer's first 6 tokens, after the one that the exact prompt predicts (" in printed.out
    path = Path(printed.out.rsplit("certificate: ", 1)[1].strip())
    found = read_certificate(path)
    assert (found.prompts, found.horizon, found.epsilon, found.delta) == (6, 6, 0.9, 0.05)
    assert [f"{each.tau:g}" for each in found.tested] == [
        line.split()[0] for line in printed.out.splitlines() if line.endswith(" certified")
    ]
    assert main(["river", "info", str(model)]) == 0
    assert f"certified: tau {found.tau:g}, disagreement of at most 0.9" in capsys.readouterr().out
    with Engine.load(model, tau="auto", **FLAGS) as engine:
        assert engine.river_options.tau == found.tau
    shown = path.parent / "depths.json"
    trace = ["river", "trace", str(model), "-o", str(shown), "--tau", "auto", "-p", "Hello", "-n", "4", *ARGS]
    assert main(trace) == 0
    assert json.loads(shown.read_text())["tau"] == found.tau


def test_the_command_that_certifies_nothing(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts.write_text("\n".join([*PROMPTS, *PROMPTS[:2]]))
    wanted = ["calibrate", str(model), "--prompts", str(prompts), "--horizon", "4", *ARGS]
    assert main([*wanted, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tau"] is None
    assert "2 of 8 prompts repeat others: each counts once, 6 in all" in printed.err
    assert "6 different prompts cannot certify 0.02 whatever they show, it takes 150 at least" in printed.err
    prompts.write_text("Hello\nHello\n")
    assert main(wanted) == 0
    printed = capsys.readouterr()
    assert "1 of 2 prompts repeat others: each counts once, 1 in all" in printed.err
    assert "note: 1 prompt cannot certify 0.02 whatever it shows, it takes 150" in printed.err
    assert "Nothing could be certified: 1 prompt does not show, with" in printed.out
    assert "was seen; it could show 100.00% at best)" in printed.out
    prompts.write_text("\n".join(PROMPTS))
    assert main(wanted) == 0
    assert "Nothing could be certified: 6 prompts do not show" in capsys.readouterr().out
    assert main(["generate", str(model), "--mode", "river", "--tau", "auto", "-p", "Hi", "-n", "2", *ARGS]) == 0
    assert "could certify no tau" in capsys.readouterr().err
    for flags in (["--no-chat-template"], ["--chat-template-kwargs", '{"a": 1}'], ["--chat-template-name", "x"]):
        assert main(["generate", str(model), "--mode", "river", "--tau", "auto", "-p", "Hi", *flags, *ARGS]) == 2
        assert f"{flags[0]} does not go with --tau auto" in capsys.readouterr().err
    assert main(["river", "trace", str(model), "-o", "x.json", "--tau", "auto", "-p", "Hi", *ARGS]) == 2
    assert "no tau is certified, no token would exit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-disagreement", "0"], "--max-disagreement: is 0"),
        (["--max-disagreement", "nan"], "--max-disagreement: is nan"),
        (["--max-disagreement", "1e-320"], "--max-disagreement: is 1e-320; give a number from 1e-12"),
        (["--confidence", "1"], "--confidence: is 1"),
        (["--confidence", "0.9999999999999"], "--confidence: is 0.9999999999999; give a number from 1e-12 to 0.9"),
        (["--confidence", "1e-14"], "--confidence: is 1e-14; give a number from 1e-12 to 0.999999999999\n"),
        (["--horizon", "0"], "riverinfer: --horizon: is 0"),
        (["--prompts", "missing.txt"], "missing.txt: cannot be read"),
    ],
)
def test_bad_flags_are_refused_in_a_line(
    model: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(model), *flags, *ARGS]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (model.parent / "cache").exists()


def test_jsonl_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = ["one\u2028two", "a\u0085b", "d\u2029"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert read_prompts(path) == texts
    plain = tmp_path / "prompts.txt"
    plain.write_bytes("\ufeffone\u2028two\r\n\nthree\n".encode())
    assert read_prompts(plain) == ["one\u2028two", "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"a"\n' + b"[" * 100_000, "prompts.jsonl: line 2 is nested too deeply; one object a line"),
        (b"\xff\xfe", "prompts.jsonl: is not UTF-8 text; give a text or JSONL file"),
        (b'"a"\n\n{', "prompts.jsonl: line 3 is not JSON"),
        (b'"a"\n{"prompt": "b\\ud800"}', "prompts.jsonl: line 2 has half of a surrogate pair, '\\ud800'; remove it,"),
    ],
)
def test_prompt_files_that_are_refused_in_a_line(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert main(["calibrate", str(ROOT / "llama"), "--prompts", str(path), *ARGS]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_list_is_no_file_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('[\n"one",\n"two"\n]')
    with pytest.raises(
        InvalidRequestError, match=r"prompts.json: is one JSON value; give .jsonl, a prompt on each line"
    ):
        read_prompts(path)
    path = path.rename(tmp_path / "prompts.jsonl")
    path.write_text('{"prompt": null, "text": "one"}')
    assert read_prompts(path) == ["one"]


def test_an_interrupted_write_leaves_the_old_certificate(
    certified: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from riverinfer.errors import ConversionError

    before = certified.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConversionError, match=r"cannot be written .*RIVERINFER_CACHE"):
        store_certificate(read_certificate(certified), certified)
    assert certified.read_bytes() == before
    assert sorted(path.name for path in certified.parent.iterdir() if path.name.startswith(".")) == []
