"""The adapter for lm-evaluation-harness, on a stand-in for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from evaluated import MODEL, load, score_of
from golden_models import copy_model
from test_calibrate import certify

from riverinfer import Engine
from riverinfer.errors import InvalidRequestError, RiverinferWarning
from riverinfer.river import RiverOptions
from riverinfer.sampling import SamplingParams


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load() as loaded:
        yield loaded


# Without lm-eval and its 655 MB: what of it the adapter stands on, as thin as it goes. That real lm-eval fits, and that
# its own back end says the same, is for tests/oracle/lm_eval_golden.py and lm_eval_agreement.py.


class TemplateLM:
    """lm-eval's base class: ``cached`` is what was handed to its cache of answers."""

    def __init__(self) -> None:
        self.cached: list[tuple[str, Any, Any]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *each: self.cached.append(each))


def _windows(
    token_list: list[int], prefix_token: int, max_seq_len: int, context_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    assert context_len == 1
    read = [prefix_token, *token_list]
    for at in range(0, len(token_list), max_seq_len):
        said = token_list[at : at + max_seq_len]
        yield read[at : at + len(said)], said


@pytest.fixture(scope="module")
def adapter() -> Iterator[Any]:
    """``lm_eval_model`` over the stand-in, which registers classes in ``adapter.models``."""
    models: dict[str, type] = {}
    parts: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.models": {},
        "lm_eval.api": {},
        "lm_eval.api.instance": {"Instance": SimpleNamespace},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: models.setdefault(name, cls)},
        "lm_eval.utils": {
            "get_rolling_token_windows": _windows,
            "make_disjoint_window": lambda pair: (pair[0][:1], pair[1]),
        },
    }
    name = "riverinfer.evidence.lm_eval_model"
    with pytest.MonkeyPatch.context() as patch:
        for part, content in parts.items():
            module = ModuleType(part)
            vars(module).update(content)
            patch.setitem(sys.modules, part, module)
        patch.delitem(sys.modules, name, raising=False)
        module = import_module(name)
        yield SimpleNamespace(models=models, **vars(module))
        del sys.modules[name], sys.modules["riverinfer.evidence"].lm_eval_model


ADAPTERS: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "exact, decode": {"mode": "exact", "scoring": "decode"},
    "lossless": {},
    "lossless, decode": {"scoring": "decode"},
    "river, prefill": {"mode": "river", "gate": "always", "scoring": "prefill"},
    "full river": {"mode": "river", "gate": "always"},
    "depth 2": {"mode": "river", "depth": 2},
}
EXACT = ["exact", "exact, decode", "lossless", "lossless, decode"]


@pytest.fixture(scope="module")
def lms(adapter: Any) -> Iterator[dict[str, Any]]:
    place = {"dtype": "float32", "device": "cuda:0", "ctx_size": 128, "river_group": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        found = {name: adapter.RiverinferLM(MODEL, **place, **arguments) for name, arguments in ADAPTERS.items()}
    yield found
    for model in found.values():
        model.engine.close()


def test_lm_eval_arguments(adapter: Any) -> None:
    assert adapter.models == {"riverinfer": adapter.RiverinferLM}
    params = adapter.sampling_params({"until": ["\n", ""], "max_new_tokens": 5, "do_sample": False, "temperature": 0.7})
    assert (params.stop, params.max_tokens, params.temperature) == (("\n",), 5, 0.0)
    assert adapter.sampling_params({"until": "a"}).stop == ("a",)
    assert adapter.sampling_params({"do_sample": True}).temperature == 1.0
    assert adapter.sampling_params({"temperature": 0.5, "top_p": 0.9}).top_p == 0.9
    assert (adapter.sampling_params({}).temperature, adapter.sampling_params({}).max_tokens) == (0.0, 256)
    with pytest.raises(InvalidRequestError, match="num_beams"):
        adapter.sampling_params({"num_beams": 4})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "pretrained: name one model folder"),
        ({"pretrained": MODEL, "model_dir": MODEL}, "pretrained: name one model folder"),
        ({"pretrained": MODEL, "tau": 0.5}, "tau: has no effect in lossless mode"),
        ({"pretrained": MODEL, "mode": "exact", "depth": 2}, "depth: has no effect in exact mode"),
        ({"pretrained": MODEL, "mode": "river", "tau": 0.5, "depth": 2}, "tau: does not go with depth"),
        ({"pretrained": MODEL, "scoring": "guess"}, "scoring: is 'guess'"),
        ({"pretrained": MODEL, "tau": "auto"}, "tau: has no effect in lossless mode"),
        ({"pretrained": MODEL, "min_depth": 1}, "min_depth: has no effect in lossless mode"),
        ({"pretrained": MODEL, "mode": "exact", "max_depth": 2}, "max_depth: has no effect in exact mode"),
        ({"pretrained": MODEL, "repair": 4}, "repair: has no effect in lossless mode"),
        ({"pretrained": MODEL, "mode": "exact", "river_head": "exact"}, "river_head: has no effect in exact mode"),
        ({"pretrained": MODEL, "mode": "river", "min_depth": 2, "depth": 2}, "min_depth: does not go with depth"),
        ({"pretrained": MODEL, "mode": "river", "max_depth": 2, "depth": 0}, "max_depth: does not go with depth"),
        ({"pretrained": MODEL, "mode": "river", "gate": "always", "depth": 0}, "gate: does not go with depth"),
        ({"pretrained": MODEL, "mode": "river", "tau": 0.9, "gate": "never"}, 'tau: has no effect with gate "never"'),
        ({"pretrained": MODEL, "mode": "river", "tau": "some"}, "tau: is 'some'; give a number, or \"auto\""),
        ({"pretrained": MODEL, "mode": "river", "river_head": "none"}, "river_head: is 'none'"),
        ({"pretrained": MODEL, "mode": "rivers", "tau": 0.5}, "mode: unknown mode 'rivers'"),
    ],
)
def test_lm_eval_arguments_that_do_not_go_together(adapter: Any, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        adapter.RiverinferLM(**arguments)


def test_lm_eval_river_options(adapter: Any) -> None:
    place = {"dtype": "float32", "device": "cpu", "ctx_size": 128, "river_group": 32, "mode": "river"}
    given = {"tau": -1, "min_depth": 2, "max_depth": 3, "repair": 4, "river_head": "exact", "river_method": "rtn"}
    model = adapter.RiverinferLM(MODEL, **place, **given)
    try:
        assert model.engine.river_options == RiverOptions(-1, 2, 3, repair=4)
        assert (model.engine.model.river_head, str(model.engine.river_settings)) == (None, "w4g32-rtn")
        model._loglikelihood_tokens([(None, [5, 9], [3, 4])], disable_tqdm=True)
        assert model.scorer.depths == {2: 2}
    finally:
        model.engine.close()


def test_lm_eval_takes_the_certified_tau(adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIVERINFER_CACHE", str(tmp_path / "cache"))
    folder = copy_model("llama", tmp_path / "llama")
    arguments = {"dtype": "float32", "device": "cpu", "ctx_size": 128, "river_group": 32, "river_method": "rtn"}
    arguments |= {"mode": "river", "tau": "auto"}
    certify(folder, 0.01)
    model = adapter.RiverinferLM(folder, **arguments)
    assert (model.engine.mode, model.engine.river_options.tau) == ("river", 0.7)
    model.engine.close()
    with pytest.raises(InvalidRequestError, match=r"these differ: max_depth \(None there, 3 here\)"):
        adapter.RiverinferLM(folder, **arguments, max_depth=3)
    certify(folder, 0.5)  # nothing is certified: exact mode
    with pytest.warns(RiverinferWarning, match="could certify no tau"):
        model = adapter.RiverinferLM(folder, **arguments)
    model._loglikelihood_tokens([(None, [5, 9], [3, 4])], disable_tqdm=True)
    info = model.get_model_info()
    assert (info["mode"], info["scoring"], model.scorer.depths) == ("exact", "decode", {5: 2})
    model.engine.close()


def test_lm_eval_log_likelihoods(lms: dict[str, Any], engine: Engine) -> None:
    context = [5, 9, 31, 77, 12]
    likely = [int(engine.logits(context)[-1].argmax())]
    long = [3 + i % 90 for i in range(200)]
    first_wrong = [3, int(engine.logits([*context, 3])[-1].argmax())]
    # In no order of their tokens; the last is cut from the left: ctx_size + 1 tokens are left.
    pairs = [([9, 8], [7]), (context, likely), (context, first_wrong), (context, [*likely, 3]), ([7], [8] * 60)]
    expected = [score_of(engine, *pair) for pair in pairs]
    pairs.append((long, [4, 5]))
    expected.append(score_of(engine, long[-127:], [4, 5]))
    assert [greedy for _, greedy in expected].count(True) == 1
    requests = [(("a", str(i)) if i % 2 else None, *pair) for i, pair in enumerate(pairs)]
    for name, model in lms.items():
        model.cached.clear()
        got = model._loglikelihood_tokens(requests, disable_tqdm=True)
        apart = max(abs(score - want) for (score, _), (want, _) in zip(got, expected, strict=True))
        if name in (*EXACT, "river, prefill"):
            assert apart < 1e-3, name
            assert [greedy for _, greedy in got] == [greedy for _, greedy in expected], name
        else:
            assert apart > 0.01, "exits are exercised"
        cached = {key[1]: value for _, key, value in model.cached}
        assert cached == {str(i): got[i] for i in (1, 3, 5)}
    depths = {name: model.get_model_info()["mean_depth_scored"] for name, model in lms.items()}
    assert depths == {
        "exact": None,
        "exact, decode": 5.0,
        "lossless": None,
        "lossless, decode": 5.0,
        "river, prefill": None,
        "full river": 0.0,
        "depth 2": 2.0,
    }


def test_lm_eval_log_likelihoods_of_whole_texts(lms: dict[str, Any], engine: Engine) -> None:
    texts = ["Once upon a time", "many words " * 30, ""]
    wanted = []
    for text in texts:
        ids = lms["exact"].tok_encode(text)
        total, before = 0.0, lms["exact"].prefix_token_id
        for at in range(0, len(ids), 128):
            total += score_of(engine, [before], ids[at : at + 128])[0]
            before = ids[at : at + 128][-1]
        wanted.append(total)
    assert 128 < len(lms["exact"].tok_encode(texts[1])) <= 256, "two windows"
    requests = [SimpleNamespace(args=(text,)) for text in texts]
    for name in EXACT:
        lms[name].cached.clear()
        assert lms[name].loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(wanted, abs=2e-3), name
        assert [(kind, key) for kind, key, _ in lms[name].cached] == [
            ("loglikelihood_rolling", (text,)) for text in texts
        ]
    early = lms["full river"].loglikelihood_rolling(requests, disable_tqdm=True)
    assert abs(early[0] - wanted[0]) > 0.01


def test_lm_eval_answers(lms: dict[str, Any], engine: Engine) -> None:
    kwargs: dict[str, Any] = {"max_gen_toks": 12, "do_sample": False}
    contexts = ["Once upon a time", "word " * 300, "Hello", ""]

    def ask(name: str, **more: Any) -> list[str]:
        requests = [SimpleNamespace(args=(context, kwargs | more)) for context in contexts]
        lms[name].cached.clear()
        said: list[str] = lms[name].generate_until(requests, disable_tqdm=True)
        assert lms[name].cached == [
            ("generate_until", request.args, text) for request, text in zip(requests, said, strict=True)
        ]
        return said

    params = SamplingParams(max_tokens=12)
    ids = [lms["exact"].tok_encode(context)[-116:] for context in contexts]  # the last tokens that leave room
    free = [engine.generate(each, params, mode="exact").text for each in ids]
    assert ask("exact") == ask("lossless") == free
    assert ask("full river") != free
    stop = free[0][len(free[0]) // 2]
    cut = [text.split(stop)[0] for text in free]
    assert cut[0] != free[0]
    short = [engine.generate(each, SamplingParams(max_tokens=3), mode="exact").text for each in ids]
    for name in ("exact", "lossless"):
        assert ask(name, until=[stop]) == ask(name, until=["\0", stop]) == cut
        assert ask(name, max_gen_toks=3) == short != free
    with pytest.raises(InvalidRequestError, match=r"max_gen_toks: 128 new tokens leave no room in a context of 128"):
        ask("exact", max_gen_toks=128)
    with pytest.MonkeyPatch.context() as patch:  # a tokenizer that puts no BOS
        patch.setattr(lms["exact"], "tok_encode", lambda _: [])
        assert ask("exact") == [engine.generate([lms["exact"].prefix_token_id], params, mode="exact").text] * 4


def test_lm_eval_chats_as_the_template_says(lms: dict[str, Any]) -> None:
    model = lms["exact"]
    chat = [{"role": "user", "content": "hello"}]
    shown = model.apply_chat_template(chat)
    assert shown == model.engine.session().prompt_text(chat)
    assert model.tok_encode(shown) == model.engine.tokenizer.encode(shown, add_special_tokens=False)
    assert model.tok_encode("hello") == model.engine.tokenizer.encode("hello")
    assert model.chat_template(False) is None
    assert model.chat_template(True)
    half = model.apply_chat_template([*chat, {"role": "assistant", "content": "So"}], add_generation_prompt=False)
    assert half.endswith("So")
