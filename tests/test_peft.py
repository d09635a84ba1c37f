"""Reading adapters of PEFT: what they say, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitllm.errors import (
    BitllmError,
    CheckpointError,
    FormatError,
    MissingTensorError,
    ModelNotFoundError,
    TensorShapeError,
    UnsupportedModelError,
)
from bitllm.formats import open_adapter
from peft_adapter import PeftAdapter, make_adapter, module_of
from synthetic import random_adapter, tiny_spec

SPEC = tiny_spec()
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q.replace("lora_A", "lora_B")


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_matrices_are_those_of_the_file(tmp_path, dtype):
    expected = random_adapter(SPEC, rank=4, dtype=dtype)
    found = open_adapter(make_adapter(SPEC, dtype=dtype).write(tmp_path / "mine"))
    assert found.origin == str(tmp_path / "mine")
    assert found.updates.keys() == expected.updates.keys()
    for name, update in found.updates.items():
        assert (update.a.dtype, update.scale) == (dtype, 1.5)
        np.testing.assert_array_equal(update.a.data, expected.updates[name].a.data)
        np.testing.assert_array_equal(update.b.data, expected.updates[name].b.data)
    found.check(SPEC)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_stands_for_its_directory(tmp_path, name):
    directory = make_adapter(SPEC).write(tmp_path)
    assert open_adapter(str(directory / name)).origin == str(directory)


def test_a_model_without_head_has_shorter_names(tmp_path):
    adapter = make_adapter(SPEC)
    adapter.tensors = {n.replace(".model.model.", ".model."): t for n, t in adapter.tensors.items()}
    assert (
        open_adapter(adapter.write(tmp_path)).updates.keys() == random_adapter(SPEC).updates.keys()
    )


def test_scales_of_all_kinds(tmp_path):
    adapter = make_adapter(SPEC, rank=4, alpha=6.0)
    wide = random_adapter(SPEC, rank=9).updates["layers.1.down"]
    for part, matrix in (("A", wide.a), ("B", wide.b)):
        name = f"base_model.model.{module_of('layers.1.down')}.lora_{part}.weight"
        adapter.tensors[name] = matrix.data
    adapter.config["rank_pattern"] = {"layers.1.mlp.down_proj": 9, "own_proj": 5}
    adapter.config["alpha_pattern"] = {"^model.layers.0.self_attn.q_proj": 2, "q_proj": 3.0}
    scales = {
        name: each.scale for name, each in open_adapter(adapter.write(tmp_path)).updates.items()
    }
    named = {"layers.0.q": 2 / 4, "layers.1.q": 3 / 4, "layers.1.down": 6 / 9}
    assert scales == dict.fromkeys(scales, 6 / 4) | named
    adapter.config["use_rslora"] = True
    scales = {
        name: each.scale for name, each in open_adapter(adapter.write(tmp_path)).updates.items()
    }
    assert scales == dict.fromkeys(scales, 3.0) | {
        "layers.0.q": 1.0, "layers.1.q": 1.5, "layers.1.down": 2.0
    }  # fmt: skip


UNSUPPORTED = {
    "type": {"peft_type": "IA3"},
    "no type": {"peft_type": None},
    "dora": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "biases of lora": {"lora_bias": True},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "transposed": {"fan_in_fan_out": True},
    "activated": {"alora_invocation_tokens": [1, 2]},
    "token rows": {"trainable_token_indices": [5]},
    "parameters": {"target_parameters": ["experts"]},
    "replicated": {"layer_replication": [[0, 2]]},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "OLoRA"},
    "regular expression": {"alpha_pattern": {"(.*)*q_proj": 3}},
    "alternatives": {"rank_pattern": {"(a|a)(a|a)": 3}},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_run_is_refused_by_name(tmp_path, name):
    adapter = make_adapter(SPEC)
    adapter.config |= UNSUPPORTED[name]
    with pytest.raises(UnsupportedModelError) as caught:
        open_adapter(adapter.write(tmp_path))
    assert "adapter_config.json" in str(caught.value)
    assert next(iter(UNSUPPORTED[name].values())) is None or caught.value.hint


BROKEN_CONFIG: dict[str, tuple[dict[str, Any], type[BitllmError]]] = {
    "no rank": ({"r": 0}, FormatError),
    "rank no number": ({"r": "8"}, FormatError),
    "huge rank": ({"r": 10**12}, FormatError),
    "another rank": ({"r": 5}, TensorShapeError),
    "alpha of none": ({"lora_alpha": -1}, FormatError),
    "alpha true": ({"lora_alpha": True}, FormatError),
    "alpha beyond float32": ({"lora_alpha": 1e299}, FormatError),
    "alpha that vanishes": ({"lora_alpha": 1e-40}, FormatError),
    "bias no text": ({"bias": 3}, FormatError),
    "rslora no switch": ({"use_rslora": "no"}, FormatError),
    "pattern no object": ({"rank_pattern": [1]}, FormatError),
    "pattern of no rank": ({"rank_pattern": {"q_proj": "x"}}, FormatError),
    "pattern of half a rank": ({"rank_pattern": {"q_proj": 3.5}}, TensorShapeError),
    "targets no list": ({"target_modules": {"q_proj": 1}}, FormatError),
    "targets no names": ({"target_modules": [1]}, FormatError),
}


@pytest.mark.parametrize("name", BROKEN_CONFIG)
def test_a_broken_configuration_is_refused(tmp_path, name):
    fields, error = BROKEN_CONFIG[name]
    adapter = make_adapter(SPEC)
    adapter.config |= fields
    with pytest.raises(error, match=r"adapter_(config|model)"):
        open_adapter(adapter.write(tmp_path))


def change(name: str, values: Any) -> Callable[[PeftAdapter], None]:
    def apply(adapter: PeftAdapter) -> None:
        adapter.tensors[name] = np.ascontiguousarray(values, getattr(values, "dtype", np.float32))

    return apply


def rename(old: str, new: str) -> Callable[[PeftAdapter], None]:
    def apply(adapter: PeftAdapter) -> None:
        adapter.tensors[new] = adapter.tensors.pop(old)

    return apply


NOT_FINITE = np.zeros((4, 44), np.float32)
NOT_FINITE[2, 3] = np.nan
BROKEN_TENSORS: dict[str, tuple[Callable[[PeftAdapter], None], type[BitllmError]]] = {
    "B missing": (lambda adapter: adapter.tensors.pop(Q_B), MissingTensorError),
    "A missing": (lambda adapter: adapter.tensors.pop(Q), MissingTensorError),
    "NaN": (change(Q, NOT_FINITE), FormatError),
    "infinite": (change(Q, np.full((4, 44), np.inf, np.float32)), FormatError),
    "integers": (change(Q, np.zeros((4, 44), np.int32)), TensorShapeError),
    "three dimensions": (change(Q, np.zeros((4, 44, 1))), TensorShapeError),
    "a vector": (change(Q, np.zeros(4)), TensorShapeError),
    "empty": (change(Q, np.zeros((4, 0))), TensorShapeError),
    "ranks differ": (change(Q, np.zeros((3, 44))), TensorShapeError),
    "head": (rename(Q, "base_model.model.lm_head.lora_A.weight"), UnsupportedModelError),
    "embedding": (
        rename(Q, "base_model.model.model.embed_tokens.lora_embedding_A"),
        UnsupportedModelError,
    ),
    "magnitudes": (
        rename(Q, Q.replace("lora_A.weight", "lora_magnitude_vector")),
        UnsupportedModelError,
    ),
    "unknown module": (rename(Q, Q.replace("q_proj", "x_proj")), UnsupportedModelError),
    "router": (rename(Q, Q.replace("self_attn.q_proj", "mlp.router")), UnsupportedModelError),
    "layer of many digits": (rename(Q, Q.replace(".0.", f".{10**9}.")), UnsupportedModelError),
    "twice": (change(Q.replace(".0.", ".00."), np.zeros((4, 44))), FormatError),
    "nothing": (lambda adapter: adapter.tensors.clear(), FormatError),
}


@pytest.mark.parametrize("name", BROKEN_TENSORS)
def test_broken_matrices_are_refused(tmp_path, name):
    spoil, error = BROKEN_TENSORS[name]
    adapter = make_adapter(SPEC)
    spoil(adapter)
    with pytest.raises(error, match="adapter_model"):
        open_adapter(adapter.write(tmp_path))


def test_a_target_without_matrices_is_missing(tmp_path):
    adapter = make_adapter(SPEC, linears=("q", "v"))
    adapter.config["target_modules"] = ["q_proj", "v_proj", "up_proj"]
    with pytest.raises(MissingTensorError, match="up_proj"):
        open_adapter(adapter.write(tmp_path))
    adapter.config["target_modules"] = "all-linear"
    assert len(open_adapter(adapter.write(tmp_path)).updates) == 4


def test_each_truncation_is_refused(tmp_path):
    weights = make_adapter(SPEC, linears=("q",)).write(tmp_path) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for length in [*range(0, 600, 41), len(whole) // 2, len(whole) - 1]:
        weights.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_adapter(tmp_path)


def test_a_directory_without_adapter(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", "", "\0", "~nobody-of-that-name/x", "x" * 5000):
        with pytest.raises(ModelNotFoundError) as caught:
            open_adapter(path)
        assert caught.value.hint
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing"):
        open_adapter(tmp_path)


def test_patterns_take_no_time(tmp_path: Path) -> None:
    adapter = make_adapter(SPEC)
    adapter.config["alpha_pattern"] = {".model" * 4000: 1, "." * 4000: 2}
    assert open_adapter(adapter.write(tmp_path)).updates["layers.0.q"].scale == 1.5
