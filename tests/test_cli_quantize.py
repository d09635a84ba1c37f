"""`bitllm quantize`: its figures against a count made here, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from bitllm.cli.app import app
from model_directories import SUB_NORMS, write_huggingface

SHAPES = {"self_attn.q_proj": (24, 16), "mlp.down_proj": (16, 40)}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    directory = tmp_path / "dense"
    directory.mkdir()
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    rng = np.random.default_rng(5)
    tensors = {
        f"model.layers.{layer}.{module}.weight": rng.standard_normal(shape).astype(np.float32)
        for layer in (10, 2)
        for module, shape in SHAPES.items()
    }
    tensors["model.embed_tokens.weight"] = np.ones((5, 16), np.float32)
    tensors["lm_head.weight"] = np.ones((5, 16), np.float32)
    tensors["model.layers.2.input_layernorm.weight"] = np.ones(16, np.float32)
    save_file(tensors, directory / "model.safetensors")
    return directory


def quantize(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)], prog_name="bitllm")


def report(*arguments: object) -> Any:
    result = quantize(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def weights_of(directory: Path, name: str) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")[name].astype(np.float64)


def test_matrices_in_the_order_of_layers_for_each_number_of_bits(dense: Path) -> None:
    found = report(dense)
    names = [row["name"] for row in found["matrices"] if row["bits"] == "4"]
    assert names == [
        f"model.layers.{layer}.{module}.weight"
        for layer in (2, 10)
        for module in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert [row["bits"] for row in found["whole"]] == ["1", "1.58", "2", "4", "8"]
    assert len(found["matrices"]) == 20


def test_figures_are_those_of_the_definition(dense: Path) -> None:
    found = report(dense, "--bits", "1.58,1.58,8")
    row = next(
        row
        for row in found["matrices"]
        if row["bits"] == "1.58" and row["name"] == "model.layers.10.mlp.down_proj.weight"
    )
    weights = weights_of(dense, row["name"])
    scale = np.abs(weights).mean()
    rounded = np.clip(np.rint(weights / scale), -1, 1) * scale
    noise = ((weights - rounded) ** 2).sum()
    assert row["scale"] == pytest.approx(scale, rel=1e-6)
    assert row["mse"] == pytest.approx(noise / weights.size, rel=1e-5)
    assert row["sqnr_db"] == pytest.approx(10 * math.log10((weights**2).sum() / noise), rel=1e-5)
    assert row["zero_fraction"] == (rounded == 0).mean()
    assert row["shape"] == [16, 40]
    whole = next(row for row in found["whole"] if row["bits"] == "8")
    squares = 0.0
    for name in {row["name"] for row in found["matrices"]}:
        weights = weights_of(dense, name)
        step = np.abs(weights).max() / 127
        squares += ((weights - np.rint(weights / step) * step) ** 2).sum()
    assert whole["mse"] == pytest.approx(squares / (2 * (24 * 16 + 16 * 40)), rel=1e-4)


def test_groups_are_nearer_than_one_scale(dense: Path) -> None:
    tensor, groups = report(dense, "--bits", "4"), report(dense, "--bits", "4", "--group-size", 8)
    assert groups["granularity"] == "group"
    assert groups["whole"][0]["sqnr_db"] > tensor["whole"][0]["sqnr_db"] + 2


def test_the_table_and_the_verdict(dense: Path) -> None:
    result = quantize(dense, "--granularity", "row")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "model   dense, 4 matrices"
    assert lines[1] == "scales  one a row"
    assert sum(line.startswith("model.layers.2.mlp.down_proj.weight ") for line in lines) == 5
    assert "does not give a usable model" in result.stderr
    assert "does not give a usable model" in report(dense)["verdict"]


def test_weights_that_lose_nothing_have_no_noise(tmp_path: Path, dense: Path) -> None:
    weights = np.arange(-127, 128, dtype=np.float32).reshape(5, 51)
    save_file({"layers.0.q_proj.weight": weights}, dense / "model.safetensors")
    assert report(dense, "--bits", "8")["whole"][0]["sqnr_db"] is None
    assert "inf" in quantize(dense, "--bits", "8").stdout


def test_a_picture(dense: Path, tmp_path: Path) -> None:
    result = quantize(dense, "--plot", tmp_path / "study.png")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"
    refused = quantize(dense, "--plot", tmp_path / "study.docx")
    assert refused.exit_code == 1
    assert "no picture can be written" in refused.stderr


def test_models_that_are_not_dense_are_refused(tmp_path: Path, dense: Path) -> None:
    packed = write_huggingface(tmp_path / "packed", **SUB_NORMS, activation="relu2")
    result = quantize(packed)
    assert result.exit_code == 1
    assert "not dense" in result.stderr
    ternary = np.tile(np.array([1.5, 0, -1.5, 0], np.float32), (16, 8))
    save_file({"layers.0.q_proj.weight": ternary}, dense / "model.safetensors")
    assert "ternary already" in quantize(dense).stderr
    save_file({"norm.weight": ternary}, dense / "model.safetensors")
    assert "not dense" in quantize(dense).stderr


def test_bad_values_name_their_tensor(dense: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((4, 20)).astype(np.float32)
    weights[3, 3] = np.nan
    save_file({"layers.0.q_proj.weight": weights}, dense / "model.safetensors")
    result = quantize(dense)
    assert result.exit_code == 1
    assert "layers.0.q_proj.weight" in result.stderr
    assert "nan" in result.stderr


@pytest.mark.parametrize("arguments", [["--bits", "3"], ["--bits", ""], ["--group-size", "0"]])
def test_a_wrong_command_line(arguments: list[str], dense: Path) -> None:
    assert quantize(dense, *arguments).exit_code == 2


def test_a_contradiction_is_refused(dense: Path) -> None:
    result = quantize(dense, "--granularity", "row", "--group-size", "4")
    assert result.exit_code == 1
    assert "does not go with group_size" in result.stderr


def test_a_gguf_file_is_refused_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.gguf").write_bytes(b"GGUF")
    for source in (tmp_path / "x.gguf", tmp_path / "d"):
        result = quantize(source)
        assert result.exit_code == 1
        assert "GGUF file" in result.stderr
        assert "needs the safetensors files" in result.stderr
