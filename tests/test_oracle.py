"""Families and options beyond the golden folders, against ``transformers`` on random models made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from golden_models import greedy, make_cache, open_model
from safetensors.torch import load_file, save_file

from riverinfer.decode import prefill

SIZES = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases everywhere": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied, head_dim 12": ("Llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2, yarn": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama, yarn without truncation": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 1.3,
                "truncate": False,
            }
        },
    ),
    "mistral, window on every layer": ("Mistral", {"sliding_window": 7}),
    "ministral, alternating windows": (
        "Ministral",
        {"head_dim": 8, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "llama_4_scaling_beta": 0.2,
            },
        },
    ),
    "qwen2, window from layer 2 on": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3, biases, window": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
    "phi3, window, whole rotation": ("Phi3", {"sliding_window": 10}),
    "phi3, longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 20}),
    "smollm3, NoPE layers, window": (
        "SmolLM3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8, "attention_bias": True},
    ),
}


def make_model(case: str, folder: Path) -> Any:
    """A random transformers model saved to ``folder``; larger weights than the default, so that options matter."""
    family, options = CASES[case]
    torch.manual_seed(sum(case.encode()))
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.6 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.2
            parameter.normal_(0, scale * (3 if parameter.dim() == 2 else 1)).add_(parameter.dim() == 1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens(case: str, tmp_path: Path) -> None:
    reference = make_model(case, tmp_path)
    model = open_model(tmp_path)
    # dynamic scaling acts beyond the trained length, the others well below it
    length = 90 if "dynamic" in case else 40
    ids = torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(5)).tolist()
    with torch.no_grad():
        want = reference(torch.tensor([ids])).logits[0]
    for chunk in (512, 7):
        got = prefill(model, ids, 0, make_cache(model), chunk=chunk, all_logits=True)
        assert float((got - want).abs().max() / want.abs().max()) < 1e-4, chunk
    with torch.no_grad():
        continued = reference.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert greedy(model, ids, 12) == continued[0, length:].tolist()


def test_options_of_these_cases_matter(tmp_path: Path) -> None:
    """If the oracle's options changed nothing, agreeing with it would prove nothing."""
    import shutil

    ids = list(range(3, 43))
    for case in CASES:
        reference = make_model(case, tmp_path / case)
        if not CASES[case][1].keys() & {"rope_parameters", "sliding_window"}:
            continue
        plain = tmp_path / f"{case} plain"
        shutil.copytree(tmp_path / case, plain)
        config = json.loads((plain / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
        config["sliding_window"] = None
        (plain / "config.json").write_text(json.dumps(config))
        long = ids * 3 if "dynamic" in case else ids
        with torch.no_grad():
            want = reference(torch.tensor([long])).logits[0]
        got = prefill(open_model(plain), long, 0, make_cache(open_model(plain)), all_logits=True)
        assert float((got - want).abs().max() / want.abs().max()) > 1e-2, case


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_multimodal_checkpoint(layout: str, tmp_path: Path) -> None:
    reference = make_model("ministral3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "text_config": config}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name == "lm_head.weight":
            name = ("language_model." if layout.startswith("language") else "") + name
        else:
            name = layout + name.removeprefix("model.")
        tensors[name] = tensor
    tensors["vision_tower.patch_conv.weight"] = torch.zeros(3, 3)
    tensors["multi_modal_projector.norm.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"2 tensors skipped \(multi_modal_projector, vision_tower\)"):
        model = open_model(tmp_path)
    ids = list(range(3, 40))
    with torch.no_grad():
        want = reference(torch.tensor([ids])).logits[0]
    got = prefill(model, ids, 0, make_cache(model), all_logits=True)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-4
