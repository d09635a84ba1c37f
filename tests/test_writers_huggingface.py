"""Packed Hugging Face directories: read back, written again, and byte for byte those of others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bitllm.checkpoint import Checkpoint, TernaryMatrix, WeightScales
from bitllm.errors import UnsupportedModelError
from bitllm.formats import open_checkpoint
from bitllm.formats.repack import repack_row_strided
from bitllm.formats.writers import write_directory
from bitllm.formats.writers.config import huggingface_config
from bitllm.formats.writers.differences import spec_differences
from bitllm.formats.writers.huggingface import plan_huggingface, stored_scale
from bitllm.formats.writers.layouts import row_strided
from bitllm.formats.writers.texts import ModelTexts, read_texts
from bitllm.ternary import pack
from model_directories import (
    SUB_NORMS,
    make_texts,
    make_tokenizer,
    published,
    same_weights,
    sized_spec,
    write_huggingface,
)
from synthetic import dense_tensor, random_checkpoint

BITNET = {**SUB_NORMS, "activation": "relu2"}
LLAMA = {"activation": "silu"}
KINDS: dict[str, dict[str, Any]] = {
    "bitnet": {**BITNET, "tied_head": True},
    "bitnet_untied_silu": {**SUB_NORMS, "activation": "silu"},
    "llama": LLAMA,
    "llama_llama3_rope": {
        **LLAMA,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "original_context": 64,
    },
    "llama_linear_rope": {**LLAMA, "rope_scaling": "linear", "rope_factor": 2.0},
    "llama_biases": {**LLAMA, "bias": True},
    "llama_linear_norms": {**LLAMA, "linear_norm_eps": 1e-6},
    "qwen3": {**LLAMA, "qk_norm": True, "head_dim": 32},
}


def rewrite(source: Path, target: Path, **options: Any) -> Path:
    plan = plan_huggingface(open_checkpoint(source), read_texts(source), **options)
    write_directory(target, plan.files)
    return target


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_published_packing() -> None:
    """The example of transformers' packer: 8 rows of one column."""
    codes = np.array([[1], [0], [-1], [-1], [0], [1], [1], [-1]], np.int8)
    assert np.concatenate([*row_strided(pack(codes), 1)]).tolist() == [[0x92], [0x21]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_the_reader_undoes_the_layout(rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, columns)).astype(np.int8)
    codes[0, 0] = 1
    packed = pack(codes)
    stored = np.concatenate([*row_strided(packed, columns)])
    assert stored.shape == (-(-rows // 4), columns)
    assert (repack_row_strided(stored, rows) == packed).all()


def test_bands_join_without_a_seam() -> None:
    codes = np.random.default_rng(1).integers(-1, 2, (2310, 2050)).astype(np.int8)
    packed = pack(codes)
    bands = [*row_strided(packed, 2050)]
    assert len(bands) > 1
    assert (repack_row_strided(np.concatenate(bands), 2310) == packed).all()


@pytest.mark.parametrize("convention", ["multiply", "divide"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_equal(kind: str, convention: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    spec = sized_spec(tokenizer.get_vocab_size(), **KINDS[kind])
    original = published(random_checkpoint(spec, 5), convention)
    plan = plan_huggingface(original, make_texts(tokenizer))
    assert plan.errors == {}
    write_directory(tmp_path / "model", plan.files)
    found = open_checkpoint(tmp_path / "model")
    assert spec_differences(spec, found.spec) == []
    same_weights(original, found)
    assert found.ternary("layers.0.q").source_convention == convention


@pytest.mark.parametrize("convention", ["multiply", "divide"])
@pytest.mark.parametrize("kind", KINDS)
def test_writing_again_gives_the_same_bytes(kind: str, convention: str, tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "one", convention, **KINDS[kind])
    assert contents(rewrite(source, tmp_path / "two")) == contents(source)


def test_a_file_of_the_safetensors_library_is_written_back_byte_for_byte(tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "one", **BITNET)
    config = json.loads((source / "config.json").read_text())
    config["some key"] = {"kept": ["ünï", 1e-05]}
    (source / "config.json").write_text(json.dumps(config, indent=4, sort_keys=True))
    weights = source / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.ones(256)  # several types in one file
    tensors["model.layers.1.input_layernorm.weight"] = torch.ones(256).half()
    save_file(tensors, weights, {"format": "pt"})
    assert contents(rewrite(source, tmp_path / "two")) == contents(source)


def test_shards_hold_all_tensors_and_their_index(tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "one", **BITNET)
    sharded = rewrite(source, tmp_path / "two", shard_bytes=100_000)
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    for name in names:
        largest = max(tensor.nbytes for tensor in load_file(sharded / name).values())
        size = sum(tensor.nbytes for tensor in load_file(sharded / name).values())
        assert size == largest or size <= 100_000
    same_weights(open_checkpoint(source), open_checkpoint(sharded))
    joined = rewrite(sharded, tmp_path / "three")
    assert contents(joined) == contents(source)


def test_the_other_convention_changes_scales_by_one_rounding(tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "one", "divide", **LLAMA)
    plan = plan_huggingface(open_checkpoint(source), read_texts(source), convention="multiply")
    write_directory(tmp_path / "two", plan.files)
    fields = json.loads((tmp_path / "two" / "config.json").read_text())
    assert fields["quantization_config"]["linear_class"] == "autobitlinear"
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "two")
    same_weights(before, after)  # float32 holds what division gave
    assert plan.errors == {}
    back = plan_huggingface(after, read_texts(tmp_path / "two"), convention="divide")
    write_directory(tmp_path / "three", back.files)
    assert "linear_class" not in (tmp_path / "three" / "config.json").read_text()
    assert back.errors == {}
    assert (
        contents(tmp_path / "three")["model.safetensors"] == contents(source)["model.safetensors"]
    )


def test_a_bias_that_no_product_with_the_scale_gives_is_told() -> None:
    """Multiplying by the scale after the bias was added: the format's own rule."""
    spec = sized_spec(64, **LLAMA, bias=True)
    plan = plan_huggingface(random_checkpoint(spec), ModelTexts(), convention="multiply")
    assert {name.split(".")[-1] for name in plan.errors} == {"bias"}
    assert 0 < plan.largest_error <= 2**-22
    exact = plan_huggingface(random_checkpoint(spec), ModelTexts(), convention="divide")
    assert not any(name.endswith("bias") for name in exact.errors)


@given(st.floats(2**-10, 2**10, width=32))
def test_a_divided_scale_is_off_by_a_rounding_at_most(scale: float) -> None:
    value = np.asarray(scale, np.float32)
    stored = stored_scale("x", WeightScales(value), "divide").to_float32()
    assert abs(np.float32(1) / stored - value) <= 2**-23 * value


def test_masters_become_packed(tmp_path: Path) -> None:
    """An `online` checkpoint: its quantised codes, and a configuration that says offline."""
    source = write_huggingface(tmp_path / "one", **BITNET)
    tensors = load_file(source / "model.safetensors")
    rng = np.random.default_rng(3)
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        del tensors[name]
        weight = name.replace("weight_scale", "weight")
        rows, columns = tensors[weight].shape
        tensors[weight] = torch.tensor(rng.standard_normal((4 * rows, columns), np.float32))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["quantization_mode"] = "online"
    (source / "config.json").write_text(json.dumps(config))
    target = rewrite(source, tmp_path / "two")
    same_weights(open_checkpoint(source), open_checkpoint(target))
    assert (
        load_file(target / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype
        == torch.uint8
    )
    fields = json.loads((target / "config.json").read_text())
    assert fields["quantization_config"]["quantization_mode"] == "offline"


def test_a_class_that_transformers_lacks_becomes_one_that_it_has(tmp_path: Path) -> None:
    """1bitLLM's configuration names BitnetForCausalLM behind model_type llama."""
    source = write_huggingface(tmp_path / "one", **{**SUB_NORMS, "activation": "silu"})
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["BitnetForCausalLM"], "model_type": "llama"}
    (source / "config.json").write_text(json.dumps(config))
    fields = json.loads((rewrite(source, tmp_path / "two") / "config.json").read_text())
    assert (fields["architectures"], fields["model_type"]) == (["BitNetForCausalLM"], "bitnet")
    assert fields["bos_token_id"] == config["bos_token_id"]
    same_weights(open_checkpoint(source), open_checkpoint(tmp_path / "two"))


def with_scales(checkpoint: Checkpoint, scales: np.ndarray) -> Checkpoint:
    """The checkpoint with other scales for its first matrix."""
    source: Any = checkpoint.source
    matrix = source.ternary_matrices["layers.0.q"]
    changed = TernaryMatrix(matrix.packed, matrix.in_features, scales)
    matrices = {**source.ternary_matrices, "layers.0.q": changed}
    return dataclasses.replace(
        checkpoint, source=dataclasses.replace(source, ternary_matrices=matrices)
    )


def test_row_scales_are_refused() -> None:
    spec = sized_spec(64, **BITNET)
    original = with_scales(random_checkpoint(spec), np.linspace(1, 2, 256, dtype=np.float32))
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.q has 256 different weight scales"
    ):
        plan_huggingface(original, ModelTexts())


def test_equal_row_scales_are_one_scale(tmp_path: Path) -> None:
    spec = sized_spec(64, **BITNET)
    original = with_scales(random_checkpoint(spec), np.full(256, 1.5, np.float32))
    write_directory(tmp_path / "model", plan_huggingface(original, ModelTexts()).files)
    assert open_checkpoint(tmp_path / "model").ternary("layers.0.q").scales == np.float32(1.5)


def test_vectors_take_the_dtype_of_the_embedding_where_it_holds_them() -> None:
    spec = sized_spec(64, **BITNET)
    original = random_checkpoint(spec)
    source: Any = original.source
    source.dense_tensors["final_norm"] = dense_tensor(np.full(256, 1.5, np.float32), "f32")
    source.dense_tensors["layers.0.attn_norm"] = dense_tensor(np.full(256, 1.1, np.float32), "f32")
    dtypes = {t.origin: t.dtype for t in plan_huggingface(original, ModelTexts()).tensors}
    assert dtypes["embed"] == "BF16"
    assert dtypes["final_norm"] == "BF16"
    assert dtypes["layers.0.attn_norm"] == "F32"


@pytest.mark.parametrize(
    ("switches", "what"),
    [
        ({"post_norms": True}, "post-norms"),
        ({"activation_bits": None}, "not int8"),
        ({"query_scale": 0.5}, "query scale"),
        ({"rope_scaling": "yarn", "rope_factor": 4.0}, "YaRN"),
        ({"hidden_size": 42, "ffn_size": 70}, "multiple of 4"),
    ],
)
def test_what_no_config_can_say_is_refused(switches: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=what):
        huggingface_config(sized_spec(64, **{**BITNET, **switches}))


def test_a_carried_configuration_must_say_the_architecture() -> None:
    """A config.json that is not the model's own is not written beside its weights."""
    spec = sized_spec(64, **BITNET)
    fields = {**huggingface_config(spec), "rms_norm_eps": 1e-3}
    texts = ModelTexts(fields, json.dumps(fields).encode())
    with pytest.raises(UnsupportedModelError, match="norm_eps"):
        plan_huggingface(random_checkpoint(spec), texts)
