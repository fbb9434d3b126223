"""Tokenizer files from the ``tokenizer.*`` metadata of a GGUF file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from riverinfer.errors import TokenizerError
from riverinfer.weights_convert.bpe_tokenizer import build_bpe
from riverinfer.weights_convert.gguf_file import GgufFile
from riverinfer.weights_convert.pre_tokenizers import BPE_RULES
from riverinfer.weights_convert.sentencepiece_model import sentencepiece_model

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# llama.cpp fills ids that the original vocabulary lacks with these.
_FILLER = re.compile(r"\[PAD-?\d+\]")
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_\-]{1,64}")
# Control tokens that llama.cpp knows by their text to end a turn, whether or not the metadata name them.
_END_TEXTS = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|endoftext|>"})
_NAMED_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclass(frozen=True)
class Vocabulary:
    """The token list of a GGUF file; ``types`` has one of the constants of this module per token."""

    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    named: dict[str, int]

    def named_token(self, name: str) -> str | None:
        """Text of the ``bos``, ``eos``, ``unk`` or ``pad`` token, or None."""
        index = self.named.get(name)
        return None if index is None else self.tokens[index]


def write_tokenizer(gguf: GgufFile, folder: Path, *, vocab_rows: int, context: int) -> list[str]:
    """Write tokenizer.json or tokenizer.model, tokenizer_config.json and chat templates into ``folder``.

    Returns notes for the user. Raises ``TokenizerError`` for tokenizer kinds that are not supported and for
    token lists that contradict themselves or have more entries than the ``vocab_rows`` of the embedding.
    """
    kind = gguf.value("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            "is missing" if kind is None else f"tokenizer kind {kind!r} is not supported",
            file=gguf.path,
            field="tokenizer.ggml.model",
            remedy="supported: gpt2 (byte-level BPE) and llama (SentencePiece)",
        )
    vocabulary = _read_vocabulary(gguf, vocab_rows)
    config: dict[str, Any] = {f"{name}_token": vocabulary.named_token(name) for name in _NAMED_TOKENS}
    config.update(clean_up_tokenization_spaces=False, model_max_length=context)
    notes = []
    if kind == "gpt2":
        if gguf.value("tokenizer.ggml.pre", str) in (None, "default"):
            notes.append("the file does not name its pre-tokenizer: GPT-2's is assumed, which may be wrong")
        _write_bpe(gguf, folder, vocabulary, config)
    else:
        _write_sentencepiece(gguf, folder, vocabulary, config)
    _write_json(folder / "tokenizer_config.json", config)
    return notes + _write_templates(gguf, folder)


def end_of_text_ids(gguf: GgufFile, vocab_rows: int) -> list[int]:
    """The ids that end a turn, each once: eos, eot, then control tokens with the text of such a token."""
    named = [gguf.value(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot")]
    tokens = gguf.value("tokenizer.ggml.tokens", list) or []
    types = gguf.value("tokenizer.ggml.token_type", list) or []
    # The lists may differ in length here: write_tokenizer refuses that.
    pairs = enumerate(zip(tokens, types, strict=False))
    found = [index for index, (text, kind) in pairs if kind == CONTROL and text in _END_TEXTS]
    return list(dict.fromkeys(i for i in (*named, *found) if i is not None and 0 <= i < vocab_rows))


def _read_vocabulary(gguf: GgufFile, vocab_rows: int) -> Vocabulary:
    tokens = gguf.value("tokenizer.ggml.tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise TokenizerError("is missing or empty", file=gguf.path, field="tokenizer.ggml.tokens")
    # llama.cpp's name for them; nothing can be spelled with an empty token.
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if len(tokens) > vocab_rows:
        raise TokenizerError(
            f"{len(tokens)} tokens, but the embedding has {vocab_rows} rows",
            file=gguf.path,
            field="tokenizer.ggml.tokens",
        )
    types = gguf.value("tokenizer.ggml.token_type", list)
    if types is None:
        types = [NORMAL] * len(tokens)
    scores = gguf.value("tokenizer.ggml.scores", list)
    for field, values in (("token_type", types), ("scores", scores)):
        if values is not None and len(values) != len(tokens):
            raise TokenizerError(
                f"{len(values)} entries for {len(tokens)} tokens",
                file=gguf.path,
                field=f"tokenizer.ggml.{field}",
            )
    if any(not isinstance(kind, int) or not 0 <= kind <= BYTE for kind in types):
        raise TokenizerError("has unknown token types", file=gguf.path, field="tokenizer.ggml.token_type")
    if scores is not None and not all(isinstance(score, (int, float)) and abs(score) < 1e38 for score in scores):
        raise TokenizerError("has scores that are not finite numbers", file=gguf.path, field="tokenizer.ggml.scores")
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        first = seen.setdefault(token, index)
        if first != index:
            raise TokenizerError(
                f"token {token!r} is there twice (ids {first}, {index})",
                file=gguf.path,
                field="tokenizer.ggml.tokens",
            )
    named = {}
    for name, key in _NAMED_TOKENS.items():
        index = gguf.value(f"tokenizer.ggml.{key}_token_id", int)
        if index is not None and 0 <= index < len(tokens):
            named[name] = index
    return Vocabulary(tokens, [kind or NORMAL for kind in types], scores, named)


def _write_bpe(gguf: GgufFile, folder: Path, vocabulary: Vocabulary, config: dict[str, Any]) -> None:
    pre = gguf.value("tokenizer.ggml.pre", str) or "default"
    rules = BPE_RULES.get(pre)
    if rules is None:
        raise TokenizerError(
            f"unknown pre-tokenizer {pre!r}",
            file=gguf.path,
            field="tokenizer.ggml.pre",
            remedy=f"known: {', '.join(BPE_RULES)}",
        )
    merges = gguf.value("tokenizer.ggml.merges", list)
    if merges is None:
        raise TokenizerError("is missing", file=gguf.path, field="tokenizer.ggml.merges")
    entries = [
        (token, index, kind)
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if not (kind == UNUSED and _FILLER.fullmatch(token))
    ]
    add_bos = gguf.value("tokenizer.ggml.add_bos_token", bool)
    tokenizer = build_bpe(
        gguf.path,
        {token: index for token, index, _ in entries},
        merges,
        rules,
        special=[(token, index) for token, index, kind in entries if kind in (CONTROL, UNKNOWN)],
        added=[(token, index) for token, index, kind in entries if kind == USER_DEFINED],
        bos=vocabulary.named_token("bos") if (rules.add_bos if add_bos is None else add_bos) else None,
        eos=vocabulary.named_token("eos") if gguf.value("tokenizer.ggml.add_eos_token", bool) else None,
    )
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["added_tokens_decoder"] = _added_tokens(vocabulary)


def _write_sentencepiece(gguf: GgufFile, folder: Path, vocabulary: Vocabulary, config: dict[str, Any]) -> None:
    if vocabulary.scores is None:
        raise TokenizerError("is missing", file=gguf.path, field="tokenizer.ggml.scores")
    types = list(vocabulary.types)
    if UNKNOWN not in types and "unk" in vocabulary.named:
        types[vocabulary.named["unk"]] = UNKNOWN
    if types.count(UNKNOWN) != 1:
        raise TokenizerError(
            f"{types.count(UNKNOWN)} tokens are marked unknown, SentencePiece needs one",
            file=gguf.path,
            field="tokenizer.ggml.token_type",
        )
    prefix = gguf.value("tokenizer.ggml.add_space_prefix", bool)
    add_prefix = True if prefix is None else prefix
    add_bos = gguf.value("tokenizer.ggml.add_bos_token", bool)
    model = sentencepiece_model(
        vocabulary.tokens,
        vocabulary.scores,
        types,
        named={**vocabulary.named, "unk": types.index(UNKNOWN)},
        add_dummy_prefix=add_prefix,
        remove_extra_whitespaces=gguf.value("tokenizer.ggml.remove_extra_whitespaces", bool) or False,
    )
    (folder / "tokenizer.model").write_bytes(model)
    config.update(
        tokenizer_class="LlamaTokenizer",
        add_bos_token=True if add_bos is None else add_bos,
        add_eos_token=gguf.value("tokenizer.ggml.add_eos_token", bool) or False,
        add_prefix_space=add_prefix,
        legacy=False,
        unk_token=vocabulary.tokens[types.index(UNKNOWN)],
        sp_model_kwargs={},
        added_tokens_decoder=_added_tokens(vocabulary),
    )


def _added_tokens(vocabulary: Vocabulary) -> dict[str, Any]:
    """``added_tokens_decoder`` of tokenizer_config.json."""
    return {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": kind != USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }


def _write_templates(gguf: GgufFile, folder: Path) -> list[str]:
    notes = []
    prefix = "tokenizer.chat_template"
    default = gguf.value(prefix, str)
    if default:
        (folder / "chat_template.jinja").write_text(default, encoding="utf-8", newline="")
    for key in gguf.fields:
        name = key.removeprefix(f"{prefix}.")
        template = gguf.fields[key]
        if not key.startswith(f"{prefix}.") or not isinstance(template, str):
            continue
        if not _TEMPLATE_NAME.fullmatch(name):
            notes.append(f"the chat template named {name!r} was left out: not a safe file name")
            continue
        extra = folder / "additional_chat_templates"
        extra.mkdir(exist_ok=True)
        (extra / f"{name}.jinja").write_text(template, encoding="utf-8", newline="")
    if not default:
        notes.append("the file has no chat template: chatting needs one from elsewhere")
    return notes


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
