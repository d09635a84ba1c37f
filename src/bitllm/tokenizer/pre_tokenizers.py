"""How text is cut before byte pairs are merged, by the name that GGUF files give to it.

The patterns are those of the models' own tokenizer.json files: a name stands for a pattern that
thousands of files rely on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "build_pre_tokenizer"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A way to cut text.

    Attributes:
        pattern: what a piece is; None = the pattern of GPT-2, which byte-level BPE has built in.
        whole_pieces: a piece that is a token is not built from merges.
        adds_bos: a text begins with the start token unless the file says otherwise.
        nfc: text is normalised to composed characters first.
        falcon: punctuation and runs of three digits are cut off too.
    """

    pattern: str | None = None
    whole_pieces: bool = False
    adds_bos: bool = False
    nfc: bool = False
    falcon: bool = False


_LLAMA3 = PreTokenizer(
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole_pieces=True, adds_bos=True
)
_QWEN2 = PreTokenizer(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", nfc=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "falcon_e": _LLAMA3,
    "qwen2": _QWEN2,
    "qwen35": _QWEN2,
    "gpt-2": PreTokenizer(),
    "gpt2": PreTokenizer(),
    "olmo": PreTokenizer(),
    "falcon": PreTokenizer(falcon=True),
}
"""The pre-tokenizers that are known, by `tokenizer.ggml.pre`."""


def build_pre_tokenizer(kind: PreTokenizer) -> tokenizers.pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer for the library; pieces come out in the byte-level alphabet."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

    if kind.falcon:
        digits = Split(Regex("[0-9][0-9][0-9]"), "isolated")
        return Sequence([Punctuation("contiguous"), ByteLevel(False), Digits(False), digits])
    if kind.pattern is None:
        return ByteLevel(add_prefix_space=False)
    pieces = Split(Regex(kind.pattern), "isolated")
    return Sequence([pieces, ByteLevel(add_prefix_space=False, use_regex=False)])
