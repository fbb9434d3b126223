"""Every number of the golden models against the stored outputs of ``transformers``."""

from __future__ import annotations

import pytest
import torch
from golden_models import NAMES, Golden, greedy, make_cache, open_model
from torch import Tensor

from riverinfer.decode import prefill, walk
from riverinfer.model import Model
from riverinfer.trace import Trace


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


@pytest.fixture(scope="module")
def model(golden: Golden) -> Model:
    return open_model(golden.folder)


def run(model: Model, ids: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """(logits [T, V], residual stream [L + 1, T, H], cache) of one pass."""
    cache, trace = make_cache(model, len(ids)), Trace.full()
    with torch.inference_mode():
        logits = model.logits(walk(model, ids, 0, cache, trace=trace))
    assert trace.states is not None
    return logits, torch.stack(trace.states), cache


def relative(got: Tensor, want: Tensor) -> float:
    """Largest absolute error over the scale of the reference."""
    return float((got - want).abs().max() / want.abs().max())


def test_logits(golden: Golden, model: Model) -> None:
    t = golden.tensors
    logits, _, _ = run(model, t["prompt2.input_ids"])
    assert relative(logits, t["f32.prompt2.logits"]) < 1e-4
    for prompt in [key.split(".")[0] for key in t if key.endswith("input_ids")]:
        last = prefill(model, t[f"{prompt}.input_ids"].tolist(), 0, make_cache(model))
        assert relative(last[0], t[f"f32.{prompt}.last_logits"]) < 1e-4, prompt


def test_hidden_states(golden: Golden, model: Model) -> None:
    want = golden.tensors["f32.prompt2.hidden_states"]
    _, states, _ = run(model, golden.tensors["prompt2.input_ids"])
    assert states.shape == want.shape
    for layer in range(len(want)):
        assert relative(states[layer], want[layer]) < 1e-4, layer


def test_kv_cache_of_first_and_last_layer(golden: Golden, model: Model) -> None:
    _, _, cache = run(model, golden.tensors["prompt2.input_ids"])
    for layer in (0, model.config.num_layers - 1):
        for kind, got in zip("kv", cache[layer], strict=True):
            assert relative(got, golden.tensors[f"f32.prompt2.{kind}_cache.layer{layer}"]) < 1e-4, (layer, kind)


def test_greedy_tokens(golden: Golden, model: Model) -> None:
    for key, want in golden.tensors.items():
        if key.endswith("greedy_ids"):
            ids = golden.tensors[f"{key.split('.')[1]}.input_ids"].tolist()
            assert greedy(model, ids, len(want)) == want.tolist(), key


def test_bfloat16_is_within_the_references_own_error(golden: Golden) -> None:
    t = golden.tensors
    logits, states, _ = run(open_model(golden.folder, torch.bfloat16), t["prompt2.input_ids"])

    def rms(error: Tensor) -> float:
        return float(error.pow(2).mean().sqrt())

    for got, name in ((logits, "logits"), (states, "hidden_states")):
        exact, reference = t[f"f32.prompt2.{name}"], t[f"bf16.prompt2.{name}"].float()
        assert rms(got - exact) <= rms(reference - exact), name


def test_bfloat16_leaves_the_greedy_path_only_where_the_choice_is_within_its_error(golden: Golden) -> None:
    model, t = open_model(golden.folder, torch.bfloat16), golden.tensors
    error = golden.info["bf16_vs_f32_prompt2"]["max_abs_logit_diff"]
    for key, want in t.items():
        if key.endswith("greedy_ids"):
            prompt = key.split(".")[1]
            got = greedy(model, t[f"{prompt}.input_ids"].tolist(), len(want))
            margins = t[f"f32.{prompt}.greedy_margins"]
            first = next((i for i, (a, b) in enumerate(zip(got, want.tolist(), strict=True)) if a != b), None)
            assert first is None or margins[first] < 2 * error, (key, first, float(margins[first]))


def test_one_token_at_a_time_equals_one_pass(golden: Golden, model: Model) -> None:
    ids = golden.tensors["prompt2.input_ids"].tolist()
    cache = make_cache(model)
    rows = [prefill(model, [token], position, cache) for position, token in enumerate(ids)]
    assert relative(torch.cat(rows), golden.tensors["f32.prompt2.logits"]) < 1e-4
