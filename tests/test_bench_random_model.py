"""The benchmark checkpoint: the published format, at sizes that run here in a moment."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from bitllm.bench import random_model

TINY = random_model.Shape(hidden=32, ffn=64, layers=2, heads=2, kv_heads=1, head_dim=16, vocab=640)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    random_model.write_checkpoint(path, TINY, seed=3, zero_rows=0.25)
    return path


def test_the_2b_shape_is_that_of_the_published_file() -> None:
    entries = list(random_model.tensors(random_model.SHAPES["2b"], np.random.default_rng(0), 0.0))
    shapes = {entry.name: entry.shape for entry in entries}
    assert shapes["model.embed_tokens.weight"] == (128256, 2560)
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == (160, 2560)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (640, 6912)
    codes = sum(4 * math.prod(entry.shape) for entry in entries if entry.dtype == "U8")
    dense = sum(
        math.prod(entry.shape)
        for entry in entries
        if entry.dtype == "BF16" and not entry.name.endswith("weight_scale")
    )
    assert codes + dense == 2_412_820_480
    # The published file has 1,178,623,988 bytes, its header included.
    assert 0 < 1_178_623_988 - sum(entry.nbytes for entry in entries) < 64_000


def test_the_safetensors_library_reads_what_was_written(directory: Path) -> None:
    with safe_open(directory / "model.safetensors", "numpy") as file:
        packed = file.get_tensor("model.layers.1.mlp.up_proj.weight")
        names = set(file.keys())
    assert names == {entry.name for entry in random_model.tensors(TINY, np.random.default_rng(), 0)}
    codes = np.concatenate([packed >> 2 * slot & 3 for slot in range(4)])
    assert set(np.unique(codes)) == {0, 1, 2}
    assert (codes == 1).all(axis=1).sum() == TINY.ffn // 4


def test_the_same_seed_writes_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    random_model.write_checkpoint(tmp_path, TINY, seed=3, zero_rows=0.25)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_the_tokenizer_fills_the_vocabulary_and_round_trips_any_text(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == TINY.vocab
    encoding = tokenizer.encode("bana über 🐦\n\x00")
    assert encoding.ids[0] == json.loads((directory / "config.json").read_text())["bos_token_id"]
    assert "ba" in encoding.tokens
    assert tokenizer.decode(encoding.ids) == "bana über 🐦\n\x00"


def test_bf16_rounds_half_to_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5], np.float32)
    assert random_model.bf16(values).tolist() == [0x3F80, 0x3F80, 0x3F82, 0xC020]
