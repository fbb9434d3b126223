"""tokenizer.json of a byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from riverinfer.errors import TokenizerError
from riverinfer.weights_convert.pre_tokenizers import BpeRules


def build_bpe(
    file: str | PathLike[str],
    vocab: dict[str, int],
    merges: Sequence[str],
    rules: BpeRules,
    *,
    special: Sequence[tuple[str, int]],
    added: Sequence[tuple[str, int]],
    bos: str | None,
    eos: str | None,
) -> str:
    """The content of tokenizer.json.

    ``vocab`` has all tokens, also the ``special`` and ``added`` ones; ``merges`` are "left right" lines;
    ``bos`` and ``eos`` are tokens to put around every text. ``file`` is named in errors. Raises
    ``TokenizerError`` if a merge is not two tokens of the vocabulary or makes one that is not there.
    """
    pairs = [_split_merge(file, line) for line in merges]
    try:
        model = BPE(vocab=vocab, merges=pairs, fuse_unk=False, ignore_merges=rules.ignore_merges)
    except Exception as error:
        raise TokenizerError(str(error), file=file, field="tokenizer.ggml.merges") from error
    tokenizer = Tokenizer(model)
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(rules)
    tokenizer.decoder = decoders.ByteLevel()
    # In id order, so that a reader that numbers added tokens by position agrees.
    marked = sorted([(index, token, True) for token, index in special] + [(i, token, False) for token, i in added])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=flag) for _, token, flag in marked])
    tokenizer.post_processor = _post_processor(vocab, bos, eos)
    return tokenizer.to_str(pretty=False)


def _split_merge(file: str | PathLike[str], line: object) -> tuple[str, str]:
    # A token of a byte-level vocabulary has no space in it, but a merge may be of added tokens that have.
    left, _, right = str(line).partition(" ")
    if not left or not right:
        raise TokenizerError(f"{line!r} is not two tokens", file=file, field="tokenizer.ggml.merges")
    return left, right


def _pre_tokenizer(rules: BpeRules) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.regex is None)
    if rules.split_digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if rules.regex is None:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rules.regex), "isolated"), byte_level])


def _post_processor(vocab: dict[str, int], bos: str | None, eos: str | None) -> processors.PostProcessor:
    byte_level = processors.ByteLevel(trim_offsets=False)
    if bos is None and eos is None:
        return byte_level

    def around(sequence: str) -> list[str]:
        return [token for token in (bos, sequence, eos) if token is not None]

    template = processors.TemplateProcessing(
        single=around("$A"),
        pair=around("$A") + around("$B"),
        special_tokens=[(token, vocab[token]) for token in sorted({bos, eos} - {None}, key=str) if token],
    )
    return processors.Sequence([byte_level, template])
