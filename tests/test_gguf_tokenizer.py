"""Tokenizers of GGUF files: the same ids as the tokenizer.json that the metadata were made from."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from bitllm.engine.loading import open_tokenizer
from bitllm.errors import TokenizerError
from bitllm.tokenizer import gguf_tokenizer
from bitllm.tokenizer.gguf_repairs import REPAIRS
from gguf_files import write_gguf

# The splits of Llama 3 and Qwen 2, as their tokenizer.json files have them.
PATTERNS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CORPUS = [
    "The list of the things that the people of the town did not want to know about.",
    "It's 2024, and they're 12345 apples away; we'll see: don't!!!\n\nNew paragraph\r\n\ttabbed",
    "Größe, Übermut und Straßenbahn; l'élève à l'école, señor, São Paulo, Ελληνικά, русский текст",
    "日本語のテキストと中文文本 한국어 텍스트 العربية עברית हिन्दी ไทย",
    "def f(x):\n    return x ** 2  # comment\n" * 3,
    "🙂🙃 👩‍👩‍👧‍👦 🇩🇪 ❄️ e\u0301 é ﬁ ½ ①",
] * 3
TEXTS = [
    *CORPUS,
    "",
    " ",
    "   leading and trailing   ",
    "a<|eot_id|>b <|user|>c<|eot_id|>",
    "\x00\x01\x7f\u200b\ufeff\u2028",
    "1 12 123 1234 12345678 ½ ٣٤",
    "I'M he'LL 'tis CAN'T",
    "\n\n\n \n  \r\n\r\n",
]


def random_texts() -> list[str]:
    """Random bytes read as text in two ways, and random characters of all planes."""
    source = random.Random(7)
    texts = [source.randbytes(200).decode(how) for how in ("latin-1",) for _ in range(20)]
    texts += [source.randbytes(200).decode("utf-8", "replace") for _ in range(20)]
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    return texts + ["".join(map(chr, source.choices(points, k=60))) for _ in range(20)]


def trained(pre: str) -> Tokenizer:
    """A small byte-level BPE as a model of this pre-tokenizer has it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if pre in PATTERNS:
        split = pre_tokenizers.Split(Regex(PATTERNS[pre]), "isolated")
        level = ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    else:
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    tokenizer.add_tokens([AddedToken("<|user|>", normalized=False)])
    return tokenizer


def metadata_of(tokenizer: Tokenizer, pre: str | None) -> dict[str, Any]:
    """The metadata that a converter writes for a byte-level BPE."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    added = tokenizer.get_added_tokens_decoder()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    fields = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            (3 if added[id].special else 4) if id in added else 1 for id in range(len(tokens))
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": vocab["<|begin_of_text|>"],
        "tokenizer.ggml.eos_token_id": vocab["<|eot_id|>"],
        "tokenizer.chat_template": "{{ messages[0].content }}<|eot_id|>",
    }
    return {key: value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2"])
def test_byte_level_ids_are_those_of_the_library(pre: str) -> None:
    original = trained(pre)
    found = gguf_tokenizer(metadata_of(original, pre), "x.gguf")
    assert found.vocab_size == original.get_vocab_size(with_added_tokens=True)
    assert found.is_byte_level
    for text in TEXTS + random_texts():
        wanted = original.encode(text, add_special_tokens=False).ids
        assert found.encode(text, add_bos=False) == wanted
        assert found.decode(wanted) == original.decode(wanted, skip_special_tokens=True)


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    original = trained("llama-bpe")
    original.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|begin_of_text|>"
    )
    found = gguf_tokenizer(metadata_of(original, "llama-bpe"), "x.gguf")
    for text in TEXTS + random_texts():
        assert found.encode(text, add_bos=False) == theirs.encode(text, add_special_tokens=False)


def test_the_rules_around_the_text() -> None:
    original = trained("llama-bpe")
    fields = metadata_of(original, "llama-bpe")
    found = gguf_tokenizer(fields, "x.gguf")
    bos, eot = (original.token_to_id(token) for token in ("<|begin_of_text|>", "<|eot_id|>"))
    assert found.bos_id == bos
    assert found.encode("a")[0] == bos
    assert found.stop_ids == {eot}
    assert found.special_ids == {bos, eot}
    assert found.encode_chat([{"role": "user", "content": "a"}])[-1] == eot
    without = gguf_tokenizer({**fields, "tokenizer.ggml.add_bos_token": False}, "x.gguf")
    assert without.encode("a")[0] != bos
    assert gguf_tokenizer(metadata_of(trained("qwen2"), "qwen2"), "x").encode("a")[0] != bos


def test_whole_pieces_need_no_merges() -> None:
    fields = metadata_of(trained("llama-bpe"), "llama-bpe")
    fields["tokenizer.ggml.tokens"].append("Ġwonderful")
    fields["tokenizer.ggml.token_type"].append(1)
    whole = len(fields["tokenizer.ggml.tokens"]) - 1
    assert gguf_tokenizer(fields, "x.gguf").encode(" wonderful", add_bos=False) == [whole]
    cut = gguf_tokenizer({**fields, "tokenizer.ggml.pre": "qwen2"}, "x.gguf")
    assert whole not in cut.encode(" wonderful", add_bos=False)


def sentencepiece() -> tuple[dict[str, Any], Tokenizer]:
    """A vocabulary with scores and byte tokens, and the tokenizer that transformers makes of it."""
    words = ["▁the", "▁of", "▁list", "ing", "▁th", "he", "th", "▁t", "▁l", "is", "st", "ist"]
    words += ["▁o", "in", "ng", "Ü", "日", "本", "日本", "▁▁"]
    pieces = [*words, *sorted({char for word in words for char in word} | set("abcdefgz ,."))]
    pieces = list(dict.fromkeys(piece for piece in pieces if piece != " "))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    vocab = {token: id for id, token in enumerate(tokens)}
    ranked = [
        (left + right, left, right) for left in pieces for right in pieces if left + right in vocab
    ]
    ranked.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]], vocab[pair[2]]))
    model = models.BPE(
        vocab, [pair[1:] for pair in ranked], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    original = Tokenizer(model)
    original.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    original.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    original.add_special_tokens(["<unk>", "<s>", "</s>"])
    fields = {
        "general.architecture": "bitnet",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return fields, original


def test_sentencepiece_ids_are_those_of_the_library() -> None:
    fields, original = sentencepiece()
    found = gguf_tokenizer(fields, "x.gguf")
    for text in TEXTS + random_texts() + ["the listing of the list", "this  is", "日本, Ü"]:
        wanted = original.encode(text, add_special_tokens=False).ids
        assert found.encode(text, add_bos=False) == wanted
        assert found.decode(wanted) == original.decode(wanted)
    assert found.encode("the list")[0] == 1
    assert [found.token(id) for id in found.encode("the list", add_bos=False)] == ["▁the", "▁list"]
    assert found.stop_ids == {2}


def bitnet_2b(**changes: Any) -> dict[str, Any]:
    """Metadata with the size and marks of the published 2B-4T file, which is wrong in places."""
    fields = metadata_of(trained("llama-bpe"), None)
    tokens = fields["tokenizer.ggml.tokens"][:-3]
    tokens += [f"<|unused_{id}|>" for id in range(len(tokens), 128_256)]
    types = [1] * 128_000 + [3] * 256
    for id, token in ((128_000, "<|begin_of_text|>"), (128_001, "<|end_of_text|>")):
        tokens[id] = token
    tokens[128_009] = "<|eot_id|>"
    return fields | {
        "general.architecture": "bitnet-b1.58",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 128_000,
        "tokenizer.ggml.eos_token_id": 128_001,
        "tokenizer.chat_template": "Human: {{ messages[0].content }}\n\nBITNETAssistant: ",
        **changes,
    }


def test_the_published_file_of_2b_4t_is_repaired() -> None:
    with pytest.warns(UserWarning, match="x.gguf: the") as caught:
        found = gguf_tokenizer(bitnet_2b(), "x.gguf")
    said = [str(entry.message) for entry in caught]
    assert any("names no pre-tokenizer" in text and "'llama-bpe' is used" in text for text in said)
    assert any("chat template of the file is a placeholder" in text for text in said)
    assert found.stop_ids == {128_001, 128_009}
    # Runs of digits are cut in threes, as Llama 3 does and the default of other programs does not.
    assert found.encode("1234567") == [128_000, *found.encode("1234567", add_bos=False)]
    messages = [
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "x"},
    ]
    assert found.apply_chat_template(messages) == (
        "User: hi<|eot_id|>Assistant: ho<|eot_id|>User: x<|eot_id|>Assistant: "
    )
    assert found.encode_chat(messages)[0] == 128_000


def test_a_right_file_of_2b_4t_is_left_alone() -> None:
    template = "{{ messages[0].content }}<|eot_id|>"
    fields = bitnet_2b(**{"tokenizer.ggml.pre": "llama-bpe", "tokenizer.chat_template": template})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gguf_tokenizer(fields, "x.gguf")
    assert found.chat_template == template


def test_an_unknown_pre_tokenizer_is_warned_of() -> None:
    for pre, said in (("frobnicate", "'frobnicate', which bitllm does not know"), (None, "no pre")):
        with pytest.warns(UserWarning, match=said):
            gguf_tokenizer(metadata_of(trained("gpt-2"), pre), "x.gguf")


def test_known_models_name_known_pre_tokenizers() -> None:
    from bitllm.tokenizer.pre_tokenizers import PRE_TOKENIZERS

    assert {known.pre for known in REPAIRS} <= set(PRE_TOKENIZERS)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tokens": None}, "holds no tokenizer"),
        ({"tokens": 3}, "tokens of the tokenizer should be"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "two ids stand for the token 'a'"),
        ({"token_type": [1]}, "a list of 5"),
        ({"merges": ["ab"]}, "no merge of two tokens"),
        ({"merges": ["zz yy"]}, "cannot be built"),
        ({"model": "rwkv"}, "'rwkv' is not read"),
        ({"model": "llama"}, "scores of the tokenizer should be"),
        ({"pre": 7}, "pre of the tokenizer should be text"),
        ({"eos_token_id": "x"}, "eos_token_id of the tokenizer should be"),
    ],
)
def test_broken_metadata_are_refused(changes: dict[str, Any], error: str) -> None:
    fields = metadata_of(trained("gpt-2"), "gpt-2")
    fields |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(TokenizerError, match=error):
        gguf_tokenizer(fields, "x.gguf")


def test_ids_that_no_token_has_are_no_ids() -> None:
    fields = metadata_of(trained("gpt-2"), "gpt-2")
    found = gguf_tokenizer({**fields, "tokenizer.ggml.eos_token_id": 2**32 - 1}, "x.gguf")
    assert found.stop_ids == {fields["tokenizer.ggml.eos_token_id"]}  # by the chat template


def write_with_tokenizer(directory: Path, fields: dict[str, Any]) -> Path:
    kinds = {str: "str", int: "u32", bool: "bool", list: "[str]"}
    pairs = {key: (kinds[type(value)], value) for key, value in fields.items()}
    pairs["tokenizer.ggml.token_type"] = ("[i32]", fields["tokenizer.ggml.token_type"])
    return write_gguf(directory / "x.gguf", pairs, {})


def test_a_tokenizer_json_beside_the_file_wins(tmp_path: Path) -> None:
    original = trained("gpt-2")
    fields = metadata_of(original, "llama-bpe")  # wrong: cuts digits in threes
    path = write_with_tokenizer(tmp_path, fields)
    text = "12345 apples"
    right = original.encode(text, add_special_tokens=False).ids
    assert open_tokenizer(path).encode(text, add_bos=False) != right
    original.save(str(tmp_path / "tokenizer.json"))
    found = open_tokenizer(path)
    assert found.encode(text, add_bos=False) == right
    assert found.has_chat_template
    settings = {"chat_template": "other", "add_bos_token": True, "bos_token": "<|begin_of_text|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_tokenizer(path).chat_template == "other"


def test_a_tokenizer_json_of_another_model_does_not(tmp_path: Path) -> None:
    path = write_with_tokenizer(tmp_path, metadata_of(trained("gpt-2"), "gpt-2"))
    sentencepiece()[1].save(str(tmp_path / "tokenizer.json"))
    with pytest.warns(UserWarning, match=r"another vocabulary than x\.gguf"):
        found = open_tokenizer(path)
    assert found.is_byte_level
