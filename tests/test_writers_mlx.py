"""MLX directories: what MLX itself makes of the words, scales and biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from bitllm.checkpoint import Checkpoint, TernaryMatrix
from bitllm.errors import UnsupportedModelError
from bitllm.formats.writers import write_directory
from bitllm.formats.writers.layouts import affine_2bit
from bitllm.formats.writers.mlx import plan_mlx
from bitllm.formats.writers.texts import ModelTexts, read_texts
from bitllm.ternary import dequantize, pack
from model_directories import SUB_NORMS, published, sized_spec, write_huggingface
from synthetic import MemorySource, random_checkpoint

mx = pytest.importorskip("mlx.core", reason="MLX runs on Linux and on Apple's machines")

BITNET = {**SUB_NORMS, "activation": "relu2", "tied_head": True}
MODULES = {name: f"self_attn.{name}_proj" for name in "qkvo"}
MODULES |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def dequantized(tensors: Any, module: str, group: int) -> np.ndarray:
    weight, scales, biases = (
        tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases")
    )
    values = mx.dequantize(weight, scales, biases, group_size=group, bits=2)
    return np.array(values.astype(mx.float32))


def check(directory: Path, original: Checkpoint) -> tuple[int, Any]:
    tensors = mx.load(str(directory / "model.safetensors"))
    group = json.loads((directory / "config.json").read_text())["quantization"]["group_size"]
    for name, _ in original.spec.linear_names():
        _, layer, part = name.split(".")
        matrix = original.ternary(name)
        wanted = dequantize(matrix.codes(), matrix.scales, matrix.group_size)
        found = dequantized(tensors, f"model.layers.{layer}.{MODULES[part]}", group)
        assert (found == wanted).all(), name
    return group, tensors


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 4), st.sampled_from([32, 64, 128]), st.integers(0, 2**32 - 1)
)
def test_words_are_dequantised_by_mlx(rows: int, groups: int, group: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 2, (rows, groups * group)).astype(np.int8)
    scales = rng.uniform(0.1, 3, (rows, groups)).astype(np.float32)
    words = np.concatenate([*affine_2bit(pack(codes), groups * group)])
    found = mx.dequantize(
        mx.array(words), mx.array(scales), mx.array(-scales), group_size=group, bits=2
    )
    assert (np.array(found) == dequantize(codes, scales, group)).all()


@pytest.mark.parametrize("switches", [BITNET, {"activation": "silu"}])
def test_a_model_in_mlx(switches: dict[str, Any], tmp_path: Path) -> None:
    original = published(random_checkpoint(sized_spec(101, **switches), 4))
    plan = plan_mlx(original, ModelTexts(token_ids={"eos_token_id": 3}))
    write_directory(tmp_path / "model", plan.files)
    group, tensors = check(tmp_path / "model", original)
    assert group == 128
    assert tensors["model.layers.0.mlp.up_proj.scales"].dtype == mx.bfloat16
    embed = np.array(tensors["model.embed_tokens.weight"].astype(mx.float32))
    assert (embed == original.dense("embed").to_float32()).all()
    with safe_open(tmp_path / "model" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx"}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 128, "bits": 2}
    assert "quantization_config" not in config
    assert config["eos_token_id"] == 3
    assert config["input_bits"] == 8


def test_scales_that_the_dtype_of_the_model_cannot_hold_are_float32(tmp_path: Path) -> None:
    original = random_checkpoint(sized_spec(101, **BITNET), 4)
    write_directory(tmp_path / "model", plan_mlx(original, ModelTexts()).files)
    _, tensors = check(tmp_path / "model", original)
    assert tensors["model.layers.0.mlp.up_proj.biases"].dtype == mx.float32


@pytest.mark.parametrize(("hidden", "group"), [(320, 64), (288, 32)])
def test_the_largest_group_that_divides_every_row(hidden: int, group: int, tmp_path: Path) -> None:
    original = published(random_checkpoint(sized_spec(101, **BITNET, hidden_size=hidden)))
    write_directory(tmp_path / "model", plan_mlx(original, ModelTexts()).files)
    assert check(tmp_path / "model", original)[0] == group


@pytest.mark.parametrize("group", [None, 64, 192, 256, 384])
def test_row_and_group_scales(group: int | None, tmp_path: Path) -> None:
    original = random_checkpoint(
        sized_spec(101, **BITNET), granularity="row" if group is None else "group", group_size=group
    )
    write_directory(tmp_path / "model", plan_mlx(original, ModelTexts()).files)
    assert check(tmp_path / "model", original)[0] == (64 if group in (64, 192) else 128)


def test_a_matrix_is_read_for_its_scales_and_for_its_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not again for each tensor of MLX that repeats the scales."""
    original = random_checkpoint(sized_spec(101, **BITNET), 4)
    read: list[str] = []
    ternary = MemorySource.ternary

    def counted(self: MemorySource, name: str) -> TernaryMatrix | None:
        read.append(name)
        return ternary(self, name)

    monkeypatch.setattr(MemorySource, "ternary", counted)
    write_directory(tmp_path / "model", plan_mlx(original, ModelTexts()).files)
    assert read.count("layers.0.q") == 2


def test_the_files_of_the_source_are_carried_over(tmp_path: Path) -> None:
    from bitllm.formats import open_checkpoint

    source = write_huggingface(tmp_path / "one", **BITNET)
    plan = plan_mlx(open_checkpoint(source), read_texts(source))
    write_directory(tmp_path / "two", plan.files)
    check(tmp_path / "two", open_checkpoint(source))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (source / name).read_bytes()
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "two" / "config.json").read_text())
    del before["quantization_config"]
    assert {key: after[key] for key in before} == before


def test_what_mlx_has_not_is_refused() -> None:
    wide = random_checkpoint(sized_spec(101, **BITNET, hidden_size=272))
    with pytest.raises(UnsupportedModelError, match="groups of 128, 64, 32 that divide all"):
        plan_mlx(wide, ModelTexts())
    norms = random_checkpoint(sized_spec(101, activation="silu", linear_norm_eps=1e-6))
    with pytest.raises(UnsupportedModelError, match="own input"):
        plan_mlx(norms, ModelTexts())


def test_mlx_cannot_make_these_words_itself() -> None:
    """Why they are packed by hand: its quantiser halves one of the two sizes."""
    codes = np.tile(np.array([[1, 0, -1, 1]], np.int8), (4, 8))
    values = mx.array(dequantize(codes, np.full((), 1.25, np.float32)))
    words, scales, biases = mx.quantize(values, group_size=32, bits=2)
    found = np.array(mx.dequantize(words, scales, biases, group_size=32, bits=2))
    assert (found != np.array(values)).any()
    matrix = TernaryMatrix.from_codes(codes, np.full((), 1.25, np.float32))
    by_hand = mx.array(np.concatenate([*affine_2bit(matrix.packed, 32)]))
    exact = mx.dequantize(
        by_hand, mx.full((4, 1), 1.25), mx.full((4, 1), -1.25), group_size=32, bits=2
    )
    assert (np.array(exact) == np.array(values)).all()
