"""GGUF files and PyTorch folders made from the golden models, as llama.cpp and old transformers write them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, quants
from gguf.constants import GGMLQuantizationType as Ggml
from gguf.constants import RopeScalingType
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
GGUF_ARCH = {
    "llama": "llama",
    "llama-untied": "llama",
    "llama-spm": "llama",
    "mistral": "llama",
    "ministral3": "mistral3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "smollm3": "smollm3",
}
PRE = {
    "llama": "llama-bpe",
    "llama-untied": "smollm",
    "mistral": "tekken",
    "ministral3": "tekken",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "phi3": "gpt-4o",
    "smollm3": "smaug-bpe",
}
ADDS_BOS = {"llama", "llama-spm", "mistral", "ministral3"}
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def golden_tensors(name: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted((GOLDEN / name).glob("model*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def written_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def gguf_name(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, *middle, kind = name.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(middle)]}.{kind}"


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp does to query and key projections."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def encode(tensor: torch.Tensor, kind: Ggml) -> np.ndarray:
    """Bytes of ``tensor`` in the block format ``kind``: uint8 [..., row bytes]."""
    plain = {Ggml.F32: torch.float32, Ggml.F16: torch.float16, Ggml.BF16: torch.bfloat16}
    if kind in plain:
        return tensor.to(plain[kind]).contiguous().view(torch.uint8).numpy()
    return quants.quantize(tensor.float().numpy(), kind)


def write_golden_gguf(path: Path, name: str, kind: Ggml = Ggml.F32, **changes: Any) -> dict[str, np.ndarray]:
    """Write the golden model ``name`` with matrices of type ``kind``. ``changes``: ``drop`` and ``extra`` tensor
    names, ``metadata`` (a function on the writer), ``pre``, ``add_bos`` (None leaves the key out).

    Returns the written bytes by GGUF name.
    """
    folder = GOLDEN / name
    config = read_json(folder / "config.json")
    writer = GGUFWriter(path, GGUF_ARCH[name])
    _add_sizes(writer, name, config)
    extra = _add_rope(writer, name, config)
    if name == "llama-spm":
        add_sentencepiece(writer, folder)
    else:
        add_bpe(writer, folder, changes.get("pre", PRE[name]))
    add_special_ids(writer, name, folder, changes.get("add_bos", name in ADDS_BOS))
    if "metadata" in changes:
        changes["metadata"](writer)
    written: dict[str, np.ndarray] = {}
    tensors = {gguf_name(key): (key, value) for key, value in golden_tensors(name).items()}
    for target, (source, tensor) in tensors.items():
        if target in changes.get("drop", ()):
            continue
        if GGUF_ARCH[name] in ("llama", "smollm3", "mistral3") and "attn_q." in target:
            tensor = interleave(tensor, config["num_attention_heads"])
        if GGUF_ARCH[name] in ("llama", "smollm3", "mistral3") and "attn_k." in target:
            tensor = interleave(tensor, config["num_key_value_heads"])
        stored = kind if tensor.dim() > 1 else Ggml.F32
        written[target] = encode(tensor, stored)
        writer.add_tensor(target, written[target], raw_dtype=stored)
        assert source
    for target, vector in {**extra, **changes.get("extra", {})}.items():
        writer.add_tensor(target, np.asarray(vector, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _add_sizes(writer: GGUFWriter, name: str, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if head_dim != config["hidden_size"] // heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if name in ("mistral", "phi3"):
        writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_dimension_count(int(head_dim * config.get("partial_rotary_factor", 1.0)))


def _add_rope(writer: GGUFWriter, name: str, config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    if name == "llama":
        return {"rope_freqs.weight": llama3_factors(config["rope_scaling"], rope["rope_theta"], config["head_dim"])}
    if name == "phi3":
        original = config["original_max_position_embeddings"]
        ratio = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(ratio) / math.log(original)))
        scaling = config["rope_scaling"]
        return {f"rope_factors_{kind}.weight": scaling[f"{kind}_factor"] for kind in ("long", "short")}
    if name == "ministral3":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    return {}


def llama3_factors(scaling: dict[str, Any], theta: float, dim: int) -> list[float]:
    """``rope_freqs.weight`` for Llama 3.1 scaling parameters."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    factors = []
    for freq in 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim):
        wavelength = 2 * math.pi / float(freq)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def add_bpe(writer: GGUFWriter, folder: Path, pre: str | None) -> None:
    content = read_json(folder / "tokenizer.json")
    vocab = dict(content["model"]["vocab"])
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    vocab.update({token["content"]: token["id"] for token in content["added_tokens"]})
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([{None: 1, True: 3, False: 4}[special.get(token)] for token in tokens])
    writer.add_token_merges(merges)


def add_sentencepiece(writer: GGUFWriter, folder: Path, control: tuple[int, ...] = ()) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = range(model.vocab_size())
    types = []
    for index in ids:
        if index in control or model.is_control(index):
            types.append(3)
        elif model.is_unknown(index):
            types.append(2)
        elif model.is_byte(index):
            types.append(6)
        else:
            types.append(4 if model.id_to_piece(index).startswith("<|") else 1)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.id_to_piece(index) for index in ids])
    writer.add_token_scores([model.get_score(index) for index in ids])
    writer.add_token_types(types)


def add_special_ids(writer: GGUFWriter, name: str, folder: Path, add_bos: bool | None) -> None:
    generation = read_json(folder / "generation_config.json")
    config = read_json(folder / "config.json")
    eos = config["eos_token_id"]
    writer.add_bos_token_id(generation["bos_token_id"])
    writer.add_eos_token_id(eos)
    writer.add_eot_token_id(next(token for token in generation["eos_token_id"] if token != eos))
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template(read_json(folder / "tokenizer_config.json")["chat_template"])


def write_pytorch_folder(folder: Path, name: str, state: Any = None, file: str = "pytorch_model.bin") -> None:
    """A folder with the golden model's config and tokenizer, and ``state`` (default: its tensors) in ``file``."""
    folder.mkdir()
    for source in (GOLDEN / name).iterdir():
        if not source.name.startswith(("golden", "model")):
            (folder / source.name).write_bytes(source.read_bytes())
    if state is None:
        state = golden_tensors(name)
    torch.save(state, folder / file)
