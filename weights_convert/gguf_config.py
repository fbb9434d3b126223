"""config.json from GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from riverinfer.errors import ConversionError, UnsupportedModelError
from riverinfer.weights_convert.gguf_file import GgufFile
from riverinfer.weights_convert.gguf_rope import rope_fields

# GGUF architecture -> (model_type, architectures[0]).
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
    "mistral3": ("ministral3", "Ministral3ForCausalLM"),
}
# llama.cpp rotates consecutive pairs in these and stores query and key rows in that order.
_INTERLEAVED_ROPE = frozenset({"llama", "smollm3", "mistral3"})
# llama.cpp has this number in its code, not in the file.
_SMOLLM3_NOPE_INTERVAL = 4


@dataclass(frozen=True)
class GgufModel:
    """What the metadata say about the model. ``config`` is the content of config.json without its dtype."""

    arch: str
    config: dict[str, Any]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def interleaved_rope(self) -> bool:
        """Whether rows of query and key projections are stored as rotation pairs side by side."""
        return self.arch in _INTERLEAVED_ROPE


def read_model(gguf: GgufFile) -> GgufModel:
    """Derive the model's configuration from the metadata and tensor shapes of ``gguf``.

    Raises ``UnsupportedModelError`` for architectures and features that riverinfer does not run, and
    ``ConversionError`` for metadata that are missing or contradict each other.
    """
    arch = gguf.value("general.architecture", str)
    if arch is None:
        raise ConversionError("is missing", file=gguf.path, field="general.architecture")
    if arch not in _ARCHITECTURES or gguf.value("general.type", str) not in (None, "model"):
        what = arch if arch not in _ARCHITECTURES else f"{arch} {gguf.fields['general.type']}"
        raise UnsupportedModelError(
            f"GGUF architecture {what!r} is not supported",
            file=gguf.path,
            field="general.architecture",
            remedy=f"supported: {', '.join(_ARCHITECTURES)}",
        )
    if (gguf.value(f"{arch}.expert_count", int) or 0) > 0:
        raise UnsupportedModelError(
            "mixture-of-experts models are not supported", file=gguf.path, field=f"{arch}.expert_count"
        )
    sizes = _read_sizes(gguf, arch)
    config = _base_config(gguf, arch, sizes)
    config.update(rope_fields(gguf, arch, head_dim=sizes["head_dim"], context=config["max_position_embeddings"]))
    _add_family_fields(gguf, arch, config, sizes)
    return GgufModel(
        arch=arch,
        config=config,
        hidden=sizes["hidden"],
        intermediate=sizes["intermediate"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        vocab=sizes["vocab"],
        tied=config["tie_word_embeddings"],
        attention_bias=arch in ("llama", "smollm3") and config["attention_bias"],
        mlp_bias=arch in ("llama", "smollm3") and config["mlp_bias"],
    )


def _read_sizes(gguf: GgufFile, arch: str) -> dict[str, int]:
    hidden = _size(gguf, f"{arch}.embedding_length")
    heads = _size(gguf, f"{arch}.attention.head_count")
    kv_heads = _size(gguf, f"{arch}.attention.head_count_kv", default=heads)
    key_length = gguf.value(f"{arch}.attention.key_length", int)
    if key_length is None and hidden % heads:
        raise ConversionError(
            f"{hidden} is no multiple of {heads} heads", file=gguf.path, field=f"{arch}.embedding_length"
        )
    head_dim = key_length or hidden // heads
    value_length = gguf.value(f"{arch}.attention.value_length", int) or head_dim
    if value_length != head_dim:
        raise UnsupportedModelError(
            f"{value_length} differs from the key length {head_dim}",
            file=gguf.path,
            field=f"{arch}.attention.value_length",
        )
    if head_dim % 2 or heads % kv_heads:
        raise ConversionError(
            f"head size {head_dim} is odd, or {heads} heads do not divide among {kv_heads} key/value heads",
            file=gguf.path,
            field=f"{arch}.attention.head_count",
        )
    layers = _size(gguf, f"{arch}.block_count")
    if layers > len(gguf.tensors):
        raise ConversionError(
            f"{layers} layers, but only {len(gguf.tensors)} tensors", file=gguf.path, field=f"{arch}.block_count"
        )
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConversionError("is missing or not a matrix", file=gguf.path, field="token_embd.weight")
    return {
        "hidden": hidden,
        "intermediate": _size(gguf, f"{arch}.feed_forward_length"),
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": embedding.shape[0],
    }


def _size(gguf: GgufFile, key: str, default: int | None = None) -> int:
    value = gguf.value(key, int, list)
    if isinstance(value, list):
        if len(set(value)) != 1 or not isinstance(value[0], int):
            raise UnsupportedModelError("layers differ from each other", file=gguf.path, field=key)
        value = value[0]
    if value is None:
        value = default
    if value is None:
        raise ConversionError("is missing", file=gguf.path, field=key)
    if value <= 0:
        raise ConversionError(f"is {value}", file=gguf.path, field=key)
    return int(value)


def _base_config(gguf: GgufFile, arch: str, sizes: dict[str, int]) -> dict[str, Any]:
    model_type, architecture = _ARCHITECTURES[arch]
    epsilon = gguf.float_value(f"{arch}.attention.layer_norm_rms_epsilon", None)
    if epsilon is None:
        raise ConversionError("is missing", file=gguf.path, field=f"{arch}.attention.layer_norm_rms_epsilon")
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["intermediate"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"],
        "max_position_embeddings": _size(gguf, f"{arch}.context_length"),
        "rms_norm_eps": epsilon,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": sizes["vocab"],
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    for name in ("bos", "eos"):
        token = gguf.value(f"tokenizer.ggml.{name}_token_id", int)
        config[f"{name}_token_id"] = token if token is not None and 0 <= token < sizes["vocab"] else None
    padding = gguf.value("tokenizer.ggml.padding_token_id", int)
    config["pad_token_id"] = padding if padding is not None and 0 <= padding < sizes["vocab"] else None
    return config


def _add_family_fields(gguf: GgufFile, arch: str, config: dict[str, Any], sizes: dict[str, int]) -> None:
    window = gguf.value(f"{arch}.attention.sliding_window", int) or None
    if arch == "llama" and window is not None:
        # Plain llama has no window; Mistral is the same model with one.
        config.update(model_type="mistral", architectures=["MistralForCausalLM"])
    if arch in ("llama", "smollm3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in gguf.tensors
        if config["model_type"] == "mistral" and (config["attention_bias"] or config["mlp_bias"]):
            raise UnsupportedModelError("a sliding window together with biases", file=gguf.path)
    if arch == "qwen3":
        config["attention_bias"] = False
    if arch in ("qwen2", "qwen3", "smollm3"):
        config["use_sliding_window"] = window is not None
        config["sliding_window"] = window
        if window is not None:
            config["max_window_layers"] = 0
            config["layer_types"] = ["sliding_attention"] * sizes["layers"]
        else:
            config["max_window_layers"] = sizes["layers"]
    elif config["model_type"] in ("mistral", "phi3", "ministral3"):
        config["sliding_window"] = window
    if arch == "phi3":
        config.update(embd_pdrop=0.0, resid_pdrop=0.0, attention_bias=False)
    if arch == "smollm3":
        interval = _SMOLLM3_NOPE_INTERVAL
        config["no_rope_layer_interval"] = interval
        config["no_rope_layers"] = [int((layer + 1) % interval != 0) for layer in range(sizes["layers"])]
