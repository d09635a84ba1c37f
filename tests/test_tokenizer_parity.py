"""Token ids equal to those of transformers, for each kind of tokenizer that models come with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre

from bitllm.tokenizer import StreamDetokenizer, load_tokenizer
from bitllm.tokenizer import Tokenizer as OurTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's 1234567 times they've said so. ",
    "naïve café, Größe, Ελληνικά, кириллица, עברית, العربية, हिन्दी, ไทย, ",
    "日本語のテキスト, 中文字符, 한국어",
    "😀 👩‍👩‍👧‍👦 🇩🇪 ✈️ e\u0301 \u00a0\t\r\n   spaces   ",
    "def f(x):\n    return x ** 2  # 1234567890\n\n\n",
]
TEXTS = [
    *CORPUS, "", " ", "\n\n", "<s>a</s><|eot_id|> b", "▁a ▁ ▁▁b", "a\u0300\u0301",
    "\ud7ff\U0010ffff",
]  # fmt: skip
# As tiktoken cuts text for Llama 3; digits in threes.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|eot_id|>"]


def byte_level(pattern: str | None) -> Tokenizer:
    """Byte-level BPE, as GPT-2 (TriLM) or as Llama 3 (2B-4T, Falcon) cuts words."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern is not None))
    byte = pre.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = [] if pattern is None else [pre.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre.Sequence([*cut, byte])
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, pre.ByteLevel.alphabet())
    return tokenizer


def sentence_piece(prefix: bool) -> Tokenizer:
    """SentencePiece's BPE with bytes for what has no token: Llama 2 (1bitLLM), Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    after: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    train(tokenizer, [], [f"<0x{byte:02X}>" for byte in range(256)])
    return tokenizer


def train(tokenizer: Tokenizer, alphabet: list[str], tokens: list[str] | None = None) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIAL, *(tokens or [])],
        initial_alphabet=alphabet,
        limit_alphabet=300,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )


def embedding() -> Tokenizer:
    """As Qwen3's embedding models: nothing before a text, the end token behind it."""
    tokenizer = byte_level(LLAMA3)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: byte_level(None),
    "llama3": lambda: byte_level(LLAMA3),
    "llama2": lambda: sentence_piece(prefix=True),
    "gemma": lambda: sentence_piece(prefix=False),
    "embedding": embedding,
}


@dataclass(frozen=True)
class Pair:
    """One tokenizer directory, read by transformers and by us."""

    theirs: Any
    ours: OurTokenizer


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("tokenizer")
    write(KINDS[request.param](), directory)
    return Pair(transformers.AutoTokenizer.from_pretrained(directory), load_tokenizer(directory))


def write(tokenizer: Tokenizer, directory: Path) -> None:
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(directory)


def assert_equal(pair: Pair, text: str) -> None:
    ids = pair.ours.encode(text)
    assert ids == pair.theirs(text)["input_ids"]
    bare = pair.theirs(text, add_special_tokens=False)["input_ids"]
    assert pair.ours.encode(text, add_bos=False) == bare
    assert pair.ours.decode(ids) == pair.theirs.decode(ids, skip_special_tokens=True)
    assert pair.ours.decode(ids, skip_special=False) == pair.theirs.decode(ids)
    stream = StreamDetokenizer(pair.ours)
    assert "".join([stream.push(id) for id in ids] + [stream.flush()]) == pair.ours.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_multilingual_text_and_emoji(pair: Pair, text: str) -> None:
    assert_equal(pair, text)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=40))
@example(b"\xff\xfe\x00<s>")
def test_random_bytes(pair: Pair, data: bytes) -> None:
    assert_equal(pair, data.decode("utf-8", "replace"))
    assert_equal(pair, data.decode("latin-1"))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_any_text(pair: Pair, text: str) -> None:
    assert_equal(pair, text)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 699), max_size=12))
def test_any_ids(pair: Pair, ids: list[int]) -> None:
    """Ids in an order that no text gives: broken characters and specials in the middle."""
    assert pair.ours.decode(ids, skip_special=False) == pair.theirs.decode(ids)
    assert pair.ours.decode(ids) == pair.theirs.decode(ids, skip_special_tokens=True)
