"""The splitting rules of byte-level BPE tokenizers by llama.cpp's name for them (``tokenizer.ggml.pre``)."""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SLASHED_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

LLAMA3_REGEX = "|".join((_CONTRACTIONS, _WORD, r"\p{N}{1,3}", _PUNCTUATION, _TAIL))
QWEN2_REGEX = "|".join((_CONTRACTIONS, _WORD, r"\p{N}", _PUNCTUATION, _TAIL))
QWEN35_REGEX = "|".join((_CONTRACTIONS, _LEAD + r"[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _TAIL))
TEKKEN_REGEX = "|".join(
    (f"{_LEAD}{_UPPER}*{_LOWER}+", f"{_LEAD}{_UPPER}+{_LOWER}*", r"\p{N}", _SLASHED_PUNCTUATION, _TAIL)
)
O200K_REGEX = "|".join(
    (
        f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
        f"{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        _SLASHED_PUNCTUATION,
        _TAIL,
    )
)


@dataclass(frozen=True)
class BpeRules:
    """How a tokenizer splits text before merging. ``regex`` None means GPT-2's own splitting; ``add_bos`` is
    llama.cpp's default where the file does not say."""

    regex: str | None
    split_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = BpeRules(None)
_SMOLLM = BpeRules(None, split_digits=True)
_LLAMA3 = BpeRules(LLAMA3_REGEX, ignore_merges=True, add_bos=True)
_LLAMA3_MERGING = BpeRules(LLAMA3_REGEX)
_QWEN2 = BpeRules(QWEN2_REGEX, nfc=True)

BPE_RULES = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "codeshell": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3_MERGING,
    "dbrx": _LLAMA3_MERGING,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": BpeRules(QWEN35_REGEX, nfc=True),
    "gpt-4o": BpeRules(O200K_REGEX),
    "llama4": BpeRules(O200K_REGEX),
    "tekken": BpeRules(TEKKEN_REGEX, ignore_merges=True, add_bos=True),
}
