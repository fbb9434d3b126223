"""``config.json`` of a model folder, read into one description that a single decoder layer can follow.

Model families differ only in the fields below. Old (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and new
(``rope_parameters``, ``dtype``) spellings give the same ``ModelConfig``. What is not implemented is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from riverinfer.errors import ModelNotFoundError
from riverinfer.json_fields import JsonFields, read_json

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class _Family:
    """What a ``model_type`` implies where ``config.json`` is silent, and how its tensors look."""

    qkv_bias: bool | None = False  # None: follow attention_bias
    o_bias: bool | None = False
    mlp_bias: bool | None = False  # None: follow the field mlp_bias
    qk_norm: bool = False
    fused: bool = False  # qkv_proj and gate_up_proj stored fused
    window: str = "never"  # never | always | opt-in (use_sliding_window) | layer_types
    default_window: int | None = None  # class default when the key is absent
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    head_dim: int | None = None  # class default when the key is absent
    nope: bool = False
    tie: bool = False


FAMILIES: dict[str, _Family] = {
    "llama": _Family(qkv_bias=None, o_bias=None, mlp_bias=None),
    "mistral": _Family(window="always", default_window=4096),
    "ministral": _Family(window="layer_types", default_window=4096),
    "ministral3": _Family(window="always", rms_norm_eps=1e-5, head_dim=128),
    "qwen2": _Family(qkv_bias=True, window="opt-in", default_window=4096),
    "qwen3": _Family(qkv_bias=None, o_bias=None, qk_norm=True, window="opt-in", default_window=4096, head_dim=128),
    "phi3": _Family(fused=True, window="always", rms_norm_eps=1e-5),
    "smollm3": _Family(qkv_bias=None, o_bias=None, mlp_bias=None, window="opt-in", rope_theta=2e6, nope=True, tie=True),
}
# Multimodal wrappers whose text part is one of the families above.
WRAPPERS = ("mistral3",)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: ``rotary_dim`` leading dimensions of each head are rotated. See ``riverinfer.rope``."""

    rope_type: str
    theta: float
    rotary_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class QueryScaling:
    """Llama-4 style query scale: the query at position p is multiplied by 1 + beta * ln(1 + floor(p / period))."""

    beta: float
    period: int


@dataclass(frozen=True)
class ModelConfig:
    """Everything the runtime needs to know about a checkpoint's architecture.

    Sizes are counts of elements; ``windows[i]`` is the number of positions layer i sees (itself included) or None;
    ``rope_layers[i]`` says whether layer i has a rotary embedding. ``tie_word_embeddings`` is None when the files
    do not say: then the head is tied exactly if no ``lm_head.weight`` is stored.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    rope_layers: tuple[bool, ...]
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool | None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_checkpoint: bool = False
    nested: bool = False  # the text part of a multimodal checkpoint
    query_scaling: QueryScaling | None = None
    stored_dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qkv_size(self) -> int:
        """Rows of the fused q, k, v projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def context_limit(self) -> int:
        """Most positions a sequence may have: the configured ones, or those a rope scaling extends them to."""
        rope = self.rope
        extended = 0.0
        if rope.rope_type in ("linear", "dynamic", "yarn") and rope.factor:
            extended = rope.original_max_position_embeddings * rope.factor
        return max(self.max_position_embeddings, int(extended))

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of K and V that one position takes over all layers, at ``itemsize`` bytes an element."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


def load_config(model_dir: Path) -> ModelConfig:
    """Read ``config.json`` of a model folder.

    Raises ModelNotFoundError (no folder, no config), ConfigError (broken or contradictory), UnsupportedModelError.
    """
    if not model_dir.exists():
        raise ModelNotFoundError(
            "no such folder", file=model_dir, remedy="give the path of a model folder with a config.json"
        )
    if not model_dir.is_dir():
        gguf = model_dir.suffix.lower() == ".gguf"
        remedy = (
            f"convert it first: riverinfer convert {model_dir} MODEL_DIR"
            if gguf
            else "give the folder that holds config.json"
        )
        raise ModelNotFoundError("is a file, not a model folder", file=model_dir, remedy=remedy)
    path = model_dir / "config.json"
    if not path.is_file():
        convertible = sorted(p.name for p in model_dir.glob("*.gguf"))
        remedy = (
            f"convert {convertible[0]} with riverinfer convert"
            if convertible
            else "download the whole model folder, config.json included"
        )
        raise ModelNotFoundError("no config.json in this folder", file=model_dir, remedy=remedy)
    return parse_config(read_json(path), path)


def parse_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """``config.json`` as a mapping to a ``ModelConfig``; ``path`` is used in messages only."""
    outer = JsonFields(raw, path)
    model_type = raw.get("model_type")
    nested = isinstance(raw.get("text_config"), dict)
    if nested and model_type in WRAPPERS:
        text = dict(raw["text_config"])
        text.setdefault("model_type", "mistral")
        tie = raw.get("tie_word_embeddings", text.get("tie_word_embeddings"))
        text.setdefault("dtype", raw.get("dtype") or raw.get("torch_dtype"))
        for key in ("quantization_config", "eos_token_id", "bos_token_id"):
            if raw.get(key) is not None:
                text.setdefault(key, raw[key])
        fields = JsonFields(text, path, "text_config.")
    else:
        nested, fields = False, outer
        tie = raw.get("tie_word_embeddings")
    if not isinstance(model_type, str):
        raise outer.error("model_type", "is missing or not a string")
    if model_type in WRAPPERS and not nested:
        raise outer.error("text_config", f"is missing in a {model_type} checkpoint")
    family_name = fields.raw.get("model_type")
    if not isinstance(family_name, str):
        raise fields.error("model_type", f"must be a string, not {family_name!r}")
    supported = ", ".join([*FAMILIES, *WRAPPERS])
    if (model_type not in FAMILIES and not nested) or family_name not in FAMILIES:
        raise fields.unsupported(
            "model_type", f"{family_name!r} is not supported", f"supported model types: {supported}"
        )
    family = FAMILIES[family_name]
    _refuse_features(fields)

    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads ({heads})")
    head_dim = fields.raw.get("head_dim")
    if head_dim is None and "head_dim" not in fields.raw:
        head_dim = family.head_dim
    if head_dim is None:
        if hidden % heads:
            raise fields.error("hidden_size", f"{hidden} is no multiple of num_attention_heads ({heads})")
        head_dim = hidden // heads
    else:
        head_dim = fields.integer("head_dim")
    if head_dim % 2:
        raise fields.error("head_dim", f"must be even for rotary embeddings, not {head_dim}")

    attention_bias = fields.flag("attention_bias", False)
    rope, rope_raw = _parse_rope(fields, family_name, family, head_dim)
    if tie is not None and not isinstance(tie, bool):
        raise fields.error("tie_word_embeddings", f"must be true or false, not {tie!r}")
    return ModelConfig(
        family=family_name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", family.rms_norm_eps),
        max_position_embeddings=rope.max_position_embeddings,
        rope=rope,
        rope_layers=_rope_layers(fields, family, layers),
        windows=_windows(fields, family, layers),
        tie_word_embeddings=tie if tie is not None or nested else family.tie,
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=fields.flag("mlp_bias", False) if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        fused_checkpoint=family.fused,
        nested=nested,
        query_scaling=_query_scaling(fields, rope_raw, rope),
        stored_dtype=_stored_dtype(fields),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _refuse_features(fields: JsonFields) -> None:
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if fields.raw.get(name):
            raise fields.unsupported(
                name, "mixture-of-experts models are not supported", "use a dense model of the family"
            )
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if fields.raw.get(name) is not None:
            raise fields.unsupported(name, "logit soft-capping is not supported", "use another model")
    quantization = fields.raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise fields.unsupported(
            "quantization_config",
            f"checkpoints quantized with {method!r} are not supported",
            "use the 16-bit checkpoint, or a GGUF through riverinfer convert",
        )
    activation = fields.raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.unsupported("hidden_act", f"activation {activation!r} is not supported", "supported: silu (swish)")


def _parse_rope(
    fields: JsonFields, family_name: str, family: _Family, head_dim: int
) -> tuple[RopeConfig, Mapping[str, Any]]:
    where = "rope_parameters" if fields.raw.get("rope_parameters") else "rope_scaling"
    raw = fields.raw.get(where) or {}
    if not isinstance(raw, dict):
        raise fields.error(where, f"must be an object, not {raw!r}")
    if raw and all(value is None or isinstance(value, dict) for value in raw.values()):
        kinds = list(raw.values())
        if any(kind != kinds[0] for kind in kinds) or kinds[0] is None:
            raise fields.unsupported(where, "a rotary embedding per layer type is not supported", "use another model")
        raw = kinds[0]
    if family_name == "ministral3" and not raw:
        raw = {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    rope = JsonFields(raw, fields.path, f"{fields.prefix}{where}.")
    rope_type = raw.get("rope_type") or raw.get("type") or "default"
    if family_name == "phi3" and rope_type in ("su", "yarn"):
        rope_type = "longrope"
    if rope_type not in ROPE_TYPES:
        raise rope.unsupported(
            "rope_type", f"{rope_type!r} is not supported", f"supported rope types: {', '.join(ROPE_TYPES)}"
        )
    theta = rope.number("rope_theta", fields.number("rope_theta", family.rope_theta))
    partial = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if rope_type == "default" and family_name != "phi3":
        partial = 1.0  # the other families' plain rotary embedding has no such option
    rotary_dim = int(head_dim * partial)
    if partial > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise rope.error("partial_rotary_factor", f"{partial} gives {rotary_dim} rotated dimensions of {head_dim}")
    max_positions = fields.integer("max_position_embeddings", 2048 if family_name == "llama" else 4096)
    # The top-level field has priority over the one inside the rope object (Phi-3 keeps it there).
    original = fields.raw.get("original_max_position_embeddings")
    if original is None and rope_type == "longrope" and family_name == "phi3":
        original = raw.get("original_max_position_embeddings", 4096)
    elif original is None:
        original = raw.get("original_max_position_embeddings", max_positions)
    else:
        original = fields.integer("original_max_position_embeddings")
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        raise rope.error("original_max_position_embeddings", f"must be a positive integer, not {original!r}")

    factor = rope.optional_number("factor")
    if rope_type in ("linear", "dynamic", "llama3") and factor is None:
        raise rope.error("factor", f"is missing for rope type {rope_type}")
    if factor is not None and factor < 1.0:
        raise rope.error("factor", f"must be at least 1, not {factor}")
    if rope_type == "dynamic" and rotary_dim < 4:
        raise rope.error("partial_rotary_factor", "dynamic scaling needs at least 4 rotated dimensions")
    longrope = rope_type == "longrope"
    return (
        RopeConfig(
            rope_type=rope_type,
            theta=theta,
            rotary_dim=rotary_dim,
            max_position_embeddings=max_positions,
            original_max_position_embeddings=original,
            factor=factor,
            attention_factor=rope.optional_number("attention_factor"),
            low_freq_factor=rope.number("low_freq_factor", None if rope_type == "llama3" else 1.0),
            high_freq_factor=rope.number("high_freq_factor", None if rope_type == "llama3" else 4.0),
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            mscale=rope.optional_number("mscale"),
            mscale_all_dim=rope.optional_number("mscale_all_dim"),
            truncate=rope.flag("truncate", True),
            short_factor=rope.number_list("short_factor", rotary_dim // 2) if longrope else (),
            long_factor=rope.number_list("long_factor", rotary_dim // 2) if longrope else (),
        ),
        raw,
    )


def _query_scaling(fields: JsonFields, rope_raw: Mapping[str, Any], rope: RopeConfig) -> QueryScaling | None:
    beta = rope_raw.get("llama_4_scaling_beta")
    if beta is None:
        return None
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not math.isfinite(beta):
        raise fields.error("llama_4_scaling_beta", f"must be a number, not {beta!r}")
    return QueryScaling(float(beta), rope.original_max_position_embeddings)


def _rope_layers(fields: JsonFields, family: _Family, layers: int) -> tuple[bool, ...]:
    if not family.nope:
        return (True,) * layers
    listed = fields.raw.get("no_rope_layers")
    if listed is None:
        interval = fields.integer("no_rope_layer_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(listed, list) or len(listed) < layers or any(x not in (0, 1) for x in listed):
        raise fields.error("no_rope_layers", f"must be a list of at least {layers} zeros and ones")
    return tuple(bool(x) for x in listed[:layers])


def _windows(fields: JsonFields, family: _Family, layers: int) -> tuple[int | None, ...]:
    if "sliding_window" in fields.raw:
        window = None if fields.raw["sliding_window"] is None else fields.integer("sliding_window")
    else:
        window = family.default_window
    if family.window == "opt-in" and not fields.flag("use_sliding_window", False):
        window = None
    if window is None or family.window == "never":
        return (None,) * layers
    kinds = fields.raw.get("layer_types")
    if family.window == "always" or (kinds is None and family.window == "layer_types"):
        return (window,) * layers
    if kinds is None:
        if family.nope:
            return tuple(None if has_rope else window for has_rope in _rope_layers(fields, family, layers))
        first = fields.integer("max_window_layers", 28, minimum=0)
        return tuple(window if i >= first else None for i in range(layers))
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) < layers or not all(isinstance(kind, str) for kind in kinds):
        raise fields.error("layer_types", f"must be a list of {layers} layer types")
    unknown = sorted({str(kind) for kind in kinds if kind not in known})
    if unknown:
        raise fields.unsupported(
            "layer_types", f"{', '.join(unknown)} is not supported", f"supported: {', '.join(known)}"
        )
    return tuple(known[kind] for kind in kinds[:layers])


def _stored_dtype(fields: JsonFields) -> str | None:
    value = fields.raw.get("dtype") or fields.raw.get("torch_dtype")
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    return name if name in DTYPES else None
