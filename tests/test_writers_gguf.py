"""GGUF files: bytes of the format's own examples, and what the `gguf` package reads from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import Split

from bitllm.checkpoint import Checkpoint, RopeSpec, TernaryMatrix
from bitllm.errors import TokenizerError, UnsupportedModelError
from bitllm.formats.gguf.checkpoint import neighbour_order
from bitllm.formats.writers import write_file
from bitllm.formats.writers.gguf import plan_gguf
from bitllm.formats.writers.gguf_tokenizer import (
    EMBEDDED_TOKENIZER,
    PRE_TOKENIZERS,
    TokenizerFacts,
    tokenizer_metadata,
)
from bitllm.formats.writers.layouts import i2_s, tq1_0, tq2_0
from bitllm.ternary import dequantize as dequantize_codes
from bitllm.ternary import pack
from model_directories import SUB_NORMS, TEMPLATE, make_texts, make_tokenizer, sized_spec
from synthetic import MemorySource, random_checkpoint

BITNET = {**SUB_NORMS, "activation": "relu2", "tied_head": True}
LLAMA = {"activation": "silu"}


def random_codes(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (rows, columns)).astype(np.int8)


def write(path: Path, checkpoint: Checkpoint, kind: Any, **options: Any) -> GGUFReader:
    plan = plan_gguf(checkpoint, "tiny", kind, **options)
    write_file(path, plan.files[0])
    assert path.stat().st_size == plan.nbytes
    return GGUFReader(path)


def value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def test_i2_s_of_the_published_example() -> None:
    """Codes 2, 1, 0, 2 at g, g + 32, g + 64 and g + 96 are the byte 0x92."""
    codes = np.zeros((1, 128), np.int8)
    codes[0, [5, 37, 69, 101]] = [1, 0, -1, 1]
    stored = np.concatenate([*i2_s(pack(codes), 128)])
    assert stored[0, 5] == 0x92
    assert set(np.delete(stored[0], 5).tolist()) == {0b01010101}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_i2_s_by_its_formula(rows: int, blocks: int, seed: int) -> None:
    codes = random_codes(rows, 128 * blocks, seed)
    stored = np.concatenate([*i2_s(pack(codes), 128 * blocks)]).reshape(-1)
    flat = codes.reshape(-1) + 1
    for element in range(0, flat.size, 7):
        block, inside = divmod(element, 128)
        byte = stored[32 * block + inside % 32]
        assert byte >> (6 - 2 * (inside // 32)) & 3 == flat[element]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from(["tq1_0", "tq2_0"]),
    st.sampled_from(["tensor", "row", "block"]),
    st.integers(0, 2**32 - 1),
)
def test_tq_types_are_read_by_the_gguf_package(
    rows: int, blocks: int, kind: str, shared: str, seed: int
) -> None:
    codes = random_codes(rows, 256 * blocks, seed)
    shape = {"tensor": (1, 1), "row": (rows, 1), "block": (rows, blocks)}[shared]
    drawn = np.random.default_rng(seed).uniform(0.01, 3, shape).astype(np.float16)
    scales = np.broadcast_to(drawn, (rows, blocks))
    encode = {"tq1_0": tq1_0, "tq2_0": tq2_0}[kind]
    stored = np.concatenate([*encode(pack(codes), 256 * blocks, scales)]).reshape(rows, -1)
    wanted = dequantize_codes(codes, scales.astype(np.float32), 256)
    kind_id = GGMLQuantizationType[kind.upper()]
    assert (dequantize(stored, kind_id) == wanted).all()
    if (np.abs(codes.reshape(rows, blocks, 256)).max(axis=2) == 1).all():
        assert (quantize(wanted, kind_id) == stored).all()


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
@pytest.mark.parametrize("switches", [BITNET, {**SUB_NORMS, "activation": "silu"}, LLAMA])
def test_tensors_of_a_model_in_the_gguf_package(
    kind: str, switches: dict[str, Any], tmp_path: Path
) -> None:
    original = random_checkpoint(sized_spec(101, **switches), 2)
    reader = write(tmp_path / "m.gguf", original, kind)
    found = {tensor.name: tensor for tensor in reader.tensors}
    spec = original.spec
    assert len(found) == len(spec.dense_shapes()) + 7 * len(spec.layers)
    heads = {"attn_q": 4, "attn_k": 2} if "attn_sub_norm" not in switches else {}
    names = dict(zip(("q", "k", "v", "o", "gate", "up", "down"), PARTS, strict=True))
    for layer in range(len(spec.layers)):
        for canonical, part in names.items():
            matrix = original.ternary(f"layers.{layer}.{canonical}")
            scale = np.float32(np.float16(matrix.scales))
            weights = matrix.codes().astype(np.float32) * scale
            if part in heads:
                weights = weights[neighbour_order(heads[part], 64)]
            tensor = found[f"blk.{layer}.{part}.weight"]
            assert (dequantize(tensor.data, tensor.tensor_type) == weights).all()
            assert [*tensor.shape] == [*matrix.shape[::-1]]
    assert found["token_embd.weight"].tensor_type == GGMLQuantizationType.BF16
    embed = dequantize(found["token_embd.weight"].data, GGMLQuantizationType.BF16)
    assert (embed == original.dense("embed").to_float32()).all()
    assert ("output.weight" in found) == (not spec.tied_head)
    norm = found["blk.1.ffn_norm.weight"]
    assert norm.tensor_type == GGMLQuantizationType.F32
    assert (norm.data == original.dense("layers.1.ffn_norm").to_float32()).all()


PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.mark.parametrize(
    ("switches", "name"),
    [
        (BITNET, "bitnet-b1.58"),
        ({**SUB_NORMS, "activation": "silu"}, "bitnet"),
        (LLAMA, "llama"),
        ({**LLAMA, "qk_norm": True}, "qwen3"),
    ],
)
def test_the_architecture_in_the_metadata(
    switches: dict[str, Any], name: str, tmp_path: Path
) -> None:
    spec = sized_spec(101, max_context=77, norm_eps=3e-6, rope_theta=5e5, **switches)
    reader = write(tmp_path / "m.gguf", random_checkpoint(spec), "tq2_0")
    assert value(reader, "general.architecture") == name
    assert value(reader, "general.file_type") == 37
    wanted = {
        "block_count": 2,
        "context_length": 77,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "vocab_size": 101,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "rope.dimension_count": 64,
        "rope.freq_base": 5e5,
    }
    for key, number in wanted.items():
        assert value(reader, f"{name}.{key}") == number, key
    eps = value(reader, f"{name}.attention.layer_norm_rms_epsilon")
    assert np.float32(eps) == np.float32(3e-6)


def test_rotating_neighbours_is_rotating_halves_of_the_other_order() -> None:
    """What the order is for: the same angles turn the same pairs."""
    heads, dim = 3, 10
    rng = np.random.default_rng(0)
    rows, angles = rng.standard_normal(heads * dim), rng.standard_normal(dim // 2)
    halves = rows.reshape(heads, 2, dim // 2)
    turned = np.empty_like(halves)
    turned[:, 0] = halves[:, 0] * np.cos(angles) - halves[:, 1] * np.sin(angles)
    turned[:, 1] = halves[:, 1] * np.cos(angles) + halves[:, 0] * np.sin(angles)
    order = neighbour_order(heads, dim)
    pairs = rows[order].reshape(heads, dim // 2, 2)
    beside = np.empty_like(pairs)
    beside[..., 0] = pairs[..., 0] * np.cos(angles) - pairs[..., 1] * np.sin(angles)
    beside[..., 1] = pairs[..., 1] * np.cos(angles) + pairs[..., 0] * np.sin(angles)
    assert (beside.reshape(-1) == turned.reshape(-1)[order]).all()


def test_llama3_rope_becomes_a_tensor_of_factors(tmp_path: Path) -> None:
    scaling = {"rope_scaling": "llama3", "rope_factor": 8.0, "original_context": 64}
    spec = sized_spec(101, **LLAMA, **scaling)
    reader = write(tmp_path / "m.gguf", random_checkpoint(spec), "tq2_0")
    factors = next(t.data for t in reader.tensors if t.name == "rope_freqs.weight")
    rope = spec.layers[0].rope
    plain = RopeSpec(rope.theta, rope.dim).inverse_frequencies()
    assert factors.min() == 1
    assert factors.max() == 8
    assert len(np.unique(factors)) > 2
    np.testing.assert_allclose(plain / factors, rope.inverse_frequencies(), rtol=2e-7)


def test_linear_rope_becomes_keys(tmp_path: Path) -> None:
    spec = sized_spec(101, **LLAMA, rope_scaling="linear", rope_factor=4.0)
    reader = write(tmp_path / "m.gguf", random_checkpoint(spec), "tq2_0")
    assert value(reader, "llama.rope.scaling.type") == "linear"
    assert value(reader, "llama.rope.scaling.factor") == 4


def test_the_error_of_float16_scales_is_told() -> None:
    spec = sized_spec(101, **BITNET)
    original = random_checkpoint(spec)
    plan = plan_gguf(original, "tiny", "tq2_0")
    wanted = max(
        abs(float(np.float16(s)) - float(s)) / float(s)
        for s in (original.ternary(name).scales for name, _ in spec.linear_names())
    )
    assert plan.largest_error == pytest.approx(wanted, rel=1e-12)
    assert 0 < wanted < 2**-11
    assert plan_gguf(original, "tiny", "i2_s").errors == {}


def with_matrix(checkpoint: Checkpoint, scales: np.ndarray, group: int | None = None) -> Checkpoint:
    source: Any = checkpoint.source
    old = source.ternary_matrices["layers.1.gate"]
    changed = TernaryMatrix(old.packed, old.in_features, scales.astype(np.float32), group)
    matrices = {**source.ternary_matrices, "layers.1.gate": changed}
    return dataclasses.replace(checkpoint, source=MemorySource(source.dense_tensors, matrices))


def test_scales_that_a_type_cannot_hold_are_refused() -> None:
    original = random_checkpoint(sized_spec(101, **BITNET))
    rows = with_matrix(original, np.linspace(1, 2, 512))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.gate has 512 different"):
        plan_gguf(rows, "tiny", "i2_s")
    assert plan_gguf(rows, "tiny", "tq1_0").largest_error < 2**-11
    groups = with_matrix(original, np.linspace(1, 2, 1024).reshape(512, 2), 128)
    with pytest.raises(UnsupportedModelError, match="for each 128 weights"):
        plan_gguf(groups, "tiny", "tq2_0")
    for scale in (1e6, 1e-9):
        with pytest.raises(UnsupportedModelError, match="outside of float16"):
            plan_gguf(with_matrix(original, np.full((), scale)), "tiny", "tq2_0")


@pytest.mark.parametrize(
    ("kind", "hidden", "message"),
    [
        ("i2_s", 320, "rows of 320 weights; I2_S holds blocks of 128"),
        ("tq1_0", 128, "rows of 128 weights; TQ1_0 holds blocks of 256"),
        ("tq2_0", 384, "rows of 384 weights; TQ2_0 holds blocks of 256"),
    ],
)
def test_rows_that_are_no_blocks_are_refused(kind: Any, hidden: int, message: str) -> None:
    spec = sized_spec(101, **BITNET, hidden_size=hidden)
    with pytest.raises(UnsupportedModelError, match=message):
        plan_gguf(random_checkpoint(spec), "tiny", kind)


@pytest.mark.parametrize(
    ("switches", "what"),
    [
        ({"activation": "gelu_tanh"}, "gelu"),
        ({"activation": "relu2"}, "relu2 without sub-norms"),
        ({"attn_sub_norm": True, "activation": "silu"}, "missing norms"),
        ({**LLAMA, "linear_norm_eps": 1e-6}, "own input"),
        ({**LLAMA, "post_norms": True}, "post-norms"),
        ({**LLAMA, "rope_dim": 32}, "part of the head"),
        ({**LLAMA, "rope_scaling": "yarn", "rope_factor": 4.0}, "YaRN"),
        ({**LLAMA, "query_scale": 0.5}, "query scale"),
        ({**LLAMA, "sliding_window": 8}, "sliding window"),
        ({**LLAMA, "embedding_scale": 2.0}, "embedding scale"),
        ({**BITNET, "bias": True}, "biases beside"),
        ({**BITNET, "rope_scaling": "linear", "rope_factor": 2.0}, "scaled RoPE"),
    ],
)
def test_what_no_architecture_has_is_refused(switches: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=what):
        plan_gguf(random_checkpoint(sized_spec(101, **switches)), "tiny", "i2_s")


def metadata_of(tokenizer: Tokenizer, size: int, facts: Any = None) -> tuple[dict[str, Any], Any]:
    found, notes = tokenizer_metadata(tokenizer.to_str().encode(), facts or TokenizerFacts(), size)
    return {key: entry for key, (_, entry) in found.items()}, notes


def test_a_byte_level_tokenizer_in_the_gguf_package(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    size = tokenizer.get_vocab_size()
    text = make_texts(tokenizer).files["tokenizer.json"]
    facts = TokenizerFacts(size - 4, size - 3, size - 2, True, TEMPLATE)
    tokens, notes = tokenizer_metadata(text, facts, size + 3)
    spec = sized_spec(size + 3, **BITNET)
    reader = write(tmp_path / "m.gguf", random_checkpoint(spec), "tq2_0", tokenizer=tokens)
    assert notes == ()
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    listed = value(reader, "tokenizer.ggml.tokens")
    assert listed == [
        *(tokenizer.id_to_token(index) for index in range(size)),
        *(f"[PAD{index}]" for index in range(size, size + 3)),
    ]
    types = value(reader, "tokenizer.ggml.token_type")
    assert types == [1] * (size - 4) + [3, 3, 3, 4] + [5] * 3
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert value(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert len(merges) > 20
    assert value(reader, "tokenizer.ggml.bos_token_id") == size - 4
    assert value(reader, "tokenizer.ggml.eos_token_id") == size - 3
    assert value(reader, "tokenizer.ggml.eot_token_id") == size - 2
    assert "tokenizer.ggml.padding_token_id" not in reader.fields
    assert value(reader, "tokenizer.ggml.add_bos_token") is True
    assert value(reader, "tokenizer.chat_template") == TEMPLATE
    assert Tokenizer.from_str(value(reader, EMBEDDED_TOKENIZER)).to_str() == tokenizer.to_str()


@pytest.mark.parametrize(("pattern", "name"), PRE_TOKENIZERS.items())
def test_known_ways_to_split_text_have_their_name(pattern: str, name: str) -> None:
    """The expression is one that the tokenizers library can run, and not only a string."""
    from tokenizers import Regex

    tokenizer = make_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345\n ok")
    digits = {"llama-bpe": ["123", "45"], "qwen2": ["1", "2", "3", "4", "5"]}[name]
    assert [text for text, _ in pieces] == ["It", "'s", "Ġ", *digits, "Ċ", "Ġok"]
    found, notes = metadata_of(tokenizer, tokenizer.get_vocab_size())
    assert (found["tokenizer.ggml.pre"], notes) == (name, ())


def test_an_unknown_way_to_split_text_is_told() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    found, notes = metadata_of(tokenizer, tokenizer.get_vocab_size())
    assert found["tokenizer.ggml.pre"] == "default"
    assert "splits text" in notes[0]


def test_sentencepiece_gets_scores_in_the_order_of_its_merges() -> None:
    vocab = {"<unk>": 0, "<s>": 1, "<0x41>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6, "▁ab": 7}
    backend = models.BPE(
        vocab=vocab, merges=[("a", "b"), ("▁", "ab")], byte_fallback=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(backend)
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    found, _ = metadata_of(tokenizer, 8)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.tokens"] == [*vocab]
    assert found["tokenizer.ggml.token_type"] == [2, 3, 6, 1, 1, 1, 1, 1]
    assert found["tokenizer.ggml.scores"] == [-2, -2, -2, -2, -2, -2, 0, -1]
    assert found["tokenizer.ggml.add_space_prefix"] is False


def test_tokenizers_that_do_not_fit_are_refused() -> None:
    tokenizer = make_tokenizer()
    size = tokenizer.get_vocab_size()
    with pytest.raises(TokenizerError, match=f"has the id {size - 1}, the model has {size - 1}"):
        metadata_of(tokenizer, size - 1)
    with pytest.raises(TokenizerError, match="type 'Unigram'"):
        metadata_of(Tokenizer(models.Unigram([("a", 0.0)], 0, False)), 10)
    with pytest.raises(TokenizerError, match="JSON"):
        tokenizer_metadata(b"{", TokenizerFacts(), 4)
