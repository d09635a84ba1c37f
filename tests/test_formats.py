"""Hugging Face directories: what is read, and one refusal per thing that can be wrong with them."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from bitllm.checkpoint import DenseTensor, RopeSpec
from bitllm.errors import (
    CheckpointError,
    FormatError,
    MissingTensorError,
    NotTernaryError,
    QuantizationError,
    TensorShapeError,
    UnsupportedModelError,
)
from bitllm.formats import open_checkpoint, read_generation_config
from bitllm.formats.architecture import read_model_spec
from bitllm.formats.quantization import read_quantization
from bitllm.formats.repack import quantize_masters, repack_row_strided
from bitllm.formats.ternary_values import read_one_size, read_ternary_values
from bitllm.ternary import dequantize, pack, quantize_weights
from huggingface_model import (
    BITNET,
    FFN,
    GATE,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    MULTIPLY,
    NAMES,
    ONLINE,
    SHAPES,
    VOCAB,
    Model,
    make_model,
    row_strided,
)


class TestRepacking:
    def test_published_vector(self) -> None:
        codes = np.array([[1], [0], [-1], [-1], [0], [1], [1], [-1]], np.int8)
        stored = np.array([[0x92], [0x21]], np.uint8)
        assert (row_strided(codes) == stored).all()
        assert (repack_row_strided(stored, 8) == pack(codes)).all()

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32))
    def test_row_strided(self, out: int, width: int, seed: int) -> None:
        codes = np.random.default_rng(seed).integers(-1, 2, (out, width)).astype(np.int8)
        assert (repack_row_strided(row_strided(codes), out) == pack(codes)).all()

    @pytest.mark.parametrize("shape", [(9, 7), (1031, 1100)])
    def test_code_three_is_found_wherever_it_is(self, shape: tuple[int, int]) -> None:
        codes = np.zeros(shape, np.int8)
        codes[-1, -1] = 2
        with pytest.raises(FormatError, match=f"row {shape[0] - 1} holds the code 3"):
            repack_row_strided(row_strided(codes), shape[0])

    def test_a_hole_in_the_file_is_found(self) -> None:
        with pytest.raises(FormatError, match="all bytes are zero"):
            repack_row_strided(np.zeros((16, 64), np.uint8), 64)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.floats(1e-9, 1e9))
    def test_masters(self, out: int, width: int, seed: int, size: float) -> None:
        weights = np.random.default_rng(seed).standard_normal((out, width)) * size
        weights = weights.astype(np.float32)
        codes, scale = quantize_weights(weights)
        found = quantize_masters(DenseTensor(weights, "f32"))
        assert (found.packed == pack(codes)).all()
        assert found.scales == scale

    def test_masters_of_many_bands(self) -> None:
        weights = np.random.default_rng(3).standard_normal((2500, 1003)).astype(np.float32)
        codes, scale = quantize_weights(weights)
        found = quantize_masters(DenseTensor(weights, "f32"))
        assert (found.packed == pack(codes)).all()
        assert found.scales == scale

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_masters_that_are_no_numbers(self, bad: float) -> None:
        weights = np.ones((2000, 1000), np.float32)
        weights[1999, 3] = bad
        for read in (quantize_masters, read_ternary_values, read_one_size):
            with pytest.raises(QuantizationError, match="row 1999, column 3"):
                read(DenseTensor(weights, "f32"))

    @pytest.mark.parametrize("scale", [1.0, 0.3, 1e-40, 3e38])
    def test_values_that_are_ternary_keep_their_size(self, scale: float) -> None:
        codes = np.random.default_rng(1).integers(-1, 2, (1500, 1000)).astype(np.int8)
        weights = dequantize(codes, np.asarray(scale, np.float32))
        for read in (read_one_size, read_ternary_values):
            found = read(DenseTensor(weights, "f32"))
            assert found is not None
            assert found.scales.shape == ()
            assert found.scales == np.float32(scale)
            assert (found.packed == pack(codes)).all()

    def test_values_of_two_sizes_are_not_of_one(self) -> None:
        weights = np.ones((1500, 1000), np.float32)
        weights[1048:] = 2  # the first band of rows is all ones, the second all twos
        assert read_one_size(DenseTensor(weights, "f32")) is None
        weights[0] = np.where(np.arange(1000) % 2, 1, 2)
        assert read_one_size(DenseTensor(weights, "f32")) is None

    def test_memory_of_a_conversion(self) -> None:
        stored = np.full((1728, 2560), 0b01010101, np.uint8)
        tracemalloc.start()
        repack_row_strided(stored, 6912)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < stored.nbytes + (16 << 20)


def _resident(file: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()[0]
        if not word.endswith(":"):
            inside = line.endswith(str(file))
        elif word == "Rss:" and inside:
            found += int(line.split()[1]) * 1024
    return found


class TestWeights:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    @pytest.mark.parametrize(
        "quantization", [MULTIPLY, BITNET, {**BITNET, "linear_class": "bitlinear"}]
    )
    def test_packed(self, tmp_path: Path, dtype: type, quantization: dict[str, Any]) -> None:
        model = make_model(quantization=quantization, dtype=dtype)
        checkpoint = model.open(tmp_path)
        for name, module in NAMES.items():
            matrix = checkpoint.ternary(f"layers.0.{name}")
            stored = np.float32(model.tensors[f"model.layers.0.{module}.weight_scale"][0])
            assert (matrix.codes() == model.codes[name]).all()
            assert matrix.scales.shape == ()
            divides = quantization is not MULTIPLY
            assert matrix.scales == (np.float32(1) / stored if divides else stored)
            assert matrix.source_scales is not None
            assert matrix.source_scales.to_float32() == stored
            assert matrix.source_convention == ("divide" if divides else "multiply")

    @pytest.mark.parametrize("quantization", [MULTIPLY, BITNET])
    def test_packed_matrices_can_be_had_as_they_are_mapped(
        self, tmp_path: Path, quantization: dict[str, Any]
    ) -> None:
        model = make_model(quantization=quantization)
        del model.tensors[GATE + "_scale"]
        model.tensors[GATE] = model.codes["gate"] * np.float32(0.3)  # one that is not packed
        checkpoint = model.open(tmp_path)
        assert checkpoint.strided("layers.0.gate") is None
        for name, module in NAMES.items():
            if name == "gate":
                continue
            matrix = checkpoint.strided(f"layers.0.{name}")
            assert matrix is not None
            assert (matrix.stored == model.tensors[f"model.layers.0.{module}.weight"]).all()
            assert not matrix.stored.flags.owndata
            converted = checkpoint.ternary(f"layers.0.{name}")
            assert matrix.shape == converted.shape
            assert matrix.scales == converted.scales
            checkpoint.release()
            assert (matrix.stored == model.tensors[f"model.layers.0.{module}.weight"]).all()

    @pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
    def test_what_was_read_of_a_file_is_dropped(self, tmp_path: Path) -> None:
        model = make_model(vocab_size=200_000, tie_word_embeddings=True)
        model.tensors["model.embed_tokens.weight"] = np.ones((200_000, HIDDEN), np.float32)
        checkpoint = model.open(tmp_path)
        embed = checkpoint.dense("embed").data
        assert embed.sum() == embed.size
        assert _resident(tmp_path / "model.safetensors") >= embed.nbytes
        checkpoint.release()
        assert _resident(tmp_path / "model.safetensors") == 0
        assert embed.sum() == embed.size

    def test_dense_tensors_are_views_as_stored(self, tmp_path: Path) -> None:
        model = make_model(dtype=np.float16)
        checkpoint = model.open(tmp_path)
        for name, stored in [
            ("embed", "model.embed_tokens.weight"),
            ("head", "lm_head.weight"),
            ("final_norm", "model.norm.weight"),
            ("layers.0.attn_norm", "model.layers.0.input_layernorm.weight"),
            ("layers.0.ffn_norm", "model.layers.0.post_attention_layernorm.weight"),
            ("layers.0.attn_sub_norm", "model.layers.0.self_attn.attn_sub_norm.weight"),
            ("layers.0.ffn_sub_norm", "model.layers.0.mlp.ffn_sub_norm.weight"),
        ]:
            tensor = checkpoint.dense(name)
            assert tensor.dtype == "f16"
            assert (tensor.data == model.tensors[stored]).all()
            assert not tensor.data.flags.owndata

    def test_masters(self, tmp_path: Path) -> None:
        model = make_model(quantization=ONLINE, masters=True)
        matrix = model.open(tmp_path).ternary("layers.0.gate")
        codes, scale = quantize_weights(model.tensors[GATE])
        assert (matrix.codes() == codes).all()
        assert matrix.scales == scale
        assert matrix.source_scales is None

    def test_masters_that_are_ternary_already_keep_their_scale(self, tmp_path: Path) -> None:
        model = make_model(quantization=ONLINE, masters=True)
        codes = np.random.default_rng(0).integers(-1, 2, (22, 16)).astype(np.float32)
        model.tensors[GATE] = codes * np.float32(0.75)
        matrix = model.open(tmp_path).ternary("layers.0.gate")
        assert (matrix.codes() == codes).all()
        assert matrix.scales == np.float32(0.75)

    def test_an_unpacked_weight_among_packed_ones(self, tmp_path: Path) -> None:
        model = make_model()
        model.tensors[GATE] = model.codes["gate"].astype(np.float16)
        matrix = model.open(tmp_path).ternary("layers.0.gate")
        assert (matrix.codes() == model.codes["gate"]).all()
        assert matrix.scales == np.float32(1.0)

    def test_a_dequantised_weight_of_an_offline_model(self, tmp_path: Path) -> None:
        model = make_model()
        model.tensors[GATE] = model.codes["gate"] * np.float32(0.3)
        del model.tensors[GATE + "_scale"]
        matrix = model.open(tmp_path).ternary("layers.0.gate")
        assert (matrix.codes() == model.codes["gate"]).all()
        assert matrix.scales == np.float32(0.3)

    def test_weights_that_are_not_ternary_though_said_to_be(self, tmp_path: Path) -> None:
        model = make_model()
        model.tensors[GATE] = np.random.default_rng(0).standard_normal((22, 16)).astype(np.float32)
        with pytest.raises(NotTernaryError, match="gate_proj") as caught:
            model.open(tmp_path).ternary("layers.0.gate")
        assert "online" in str(caught.value.hint)

    def test_an_all_zero_projection_is_reported(self, tmp_path: Path) -> None:
        model = make_model()
        model.tensors[GATE] = row_strided(np.zeros((22, 16), np.int8))
        with pytest.warns(UserWarning, match="every weight of .*gate_proj"):
            model.open(tmp_path).ternary("layers.0.gate")

    def test_code_three(self, tmp_path: Path) -> None:
        model = make_model()
        model.tensors[GATE][0, 0] = 0xFF
        with pytest.raises(FormatError, match=r"gate_proj.*code 3"):
            model.open(tmp_path).ternary("layers.0.gate")

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("quantization", [MULTIPLY, BITNET])
    def test_impossible_scales(
        self, tmp_path: Path, scale: float, quantization: dict[str, Any]
    ) -> None:
        model = make_model(quantization=quantization)
        model.tensors[GATE + "_scale"] = np.array([scale], np.float32)
        with pytest.raises(FormatError, match=r"gate_proj.*scale"):
            model.open(tmp_path).ternary("layers.0.gate")

    def test_an_impossible_scale_of_a_mapped_matrix(self, tmp_path: Path) -> None:
        model = make_model()
        model.tensors[GATE + "_scale"] = np.array([math.nan], np.float32)
        with pytest.raises(FormatError, match=r"gate_proj.*scale"):
            model.open(tmp_path).strided("layers.0.gate")

    def test_unknown_names_are_none(self, tmp_path: Path) -> None:
        checkpoint = make_model().open(tmp_path)
        assert checkpoint.source.dense("layers.9.attn_norm") is None
        assert checkpoint.source.ternary("layers.9.q") is None
        assert checkpoint.strided("layers.9.q") is None
        with pytest.raises(MissingTensorError):
            checkpoint.ternary("layers.9.q")


Change = Callable[[Model], Any]


class TestTensors:
    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight",
            "model.norm.weight",
            "lm_head.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.mlp.ffn_sub_norm.weight",
            GATE,
            GATE + "_scale",
        ],
    )
    def test_missing(self, tmp_path: Path, name: str) -> None:
        model = make_model(tie_word_embeddings=False)
        del model.tensors[name]
        with pytest.raises(MissingTensorError) as caught:
            model.open(tmp_path)
        assert repr(name) in caught.value.message or name == "model.embed_tokens.weight"

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            ("model.embed_tokens.weight", np.zeros((VOCAB, HIDDEN + 1), np.float32)),
            ("model.norm.weight", np.zeros((HIDDEN, 1), np.float32)),
            ("model.norm.weight", np.zeros(HIDDEN, np.float64)),
            ("model.norm.weight", np.zeros(HIDDEN, np.int8)),
            (GATE, np.zeros((5, 16), np.uint8)),
            (GATE, np.zeros((6, 17), np.uint8)),
            (GATE, np.zeros((6, 16), np.int8)),
            (GATE, np.zeros((22, 16), np.uint8)),
            (GATE, np.zeros((16, 22), np.float32)),
            (GATE + "_scale", np.ones(22, np.float32)),
            (GATE + "_scale", np.ones(1, np.int32)),
        ],
    )
    def test_wrong_shape_or_dtype(self, tmp_path: Path, name: str, tensor: np.ndarray) -> None:
        model = make_model()
        model.tensors[name] = tensor
        with pytest.raises(TensorShapeError) as caught:
            model.open(tmp_path)
        assert repr(name) in caught.value.message

    def test_a_tensor_without_a_place_is_not_ignored(self, tmp_path: Path) -> None:
        model = make_model("LlamaForCausalLM")
        model.tensors["model.layers.0.mlp.router.weight"] = np.zeros(3, np.float32)
        with pytest.raises(UnsupportedModelError, match=r"mlp\.router"):
            model.open(tmp_path)

    def test_more_layers_than_the_configuration_says(self, tmp_path: Path) -> None:
        model = make_model()
        extra = {
            name.replace("layers.0", "layers.1"): tensor for name, tensor in model.tensors.items()
        }
        model.tensors.update(extra)
        with pytest.raises(UnsupportedModelError, match="fewer layers"):
            model.open(tmp_path)

    def test_tables_that_can_be_computed_are_ignored(self, tmp_path: Path) -> None:
        model = make_model()
        model.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
        model.open(tmp_path)

    def test_names_without_the_model_prefix(self, tmp_path: Path) -> None:
        model = make_model()
        model.tensors = {
            name.removeprefix("model."): tensor for name, tensor in model.tensors.items()
        }
        assert model.open(tmp_path).ternary("layers.0.gate").shape == (22, 16)


class TestConfig:
    def test_defaults_of_the_class(self, tmp_path: Path) -> None:
        spec = make_model().open(tmp_path).spec
        layer = spec.layers[0]
        assert layer.activation == "relu2"
        assert spec.norm_eps == layer.norm_eps == 1e-5
        assert layer.rope == RopeSpec(500_000.0, HEAD_DIM)
        assert layer.attn_sub_norm
        assert layer.ffn_sub_norm
        assert not spec.tied_head
        assert layer.query_scale == 1 / math.sqrt(layer.head_dim)

    @pytest.mark.parametrize(
        ("config", "wanted"),
        [
            ({"rope_theta": 1e6}, RopeSpec(1e6, 4)),
            ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, RopeSpec(7.0, 4)),
            ({"rope_scaling": None, "rope_theta": 9}, RopeSpec(9.0, 4)),
            (
                {"rope_scaling": {"type": "linear", "factor": 2.0}},
                RopeSpec(10_000.0, 4, "linear", 2.0),
            ),
            (
                {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 3.0}},
                RopeSpec(3.0, 4, "linear", 2.0),
            ),
            (
                {
                    "rope_theta": 5e5,
                    "rope_scaling": {
                        "rope_type": "llama3",
                        "factor": 32.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 8192,
                    },
                },
                RopeSpec(5e5, 4, "llama3", 32.0, 1.0, 4.0, 8192),
            ),
            ({"partial_rotary_factor": 0.5}, RopeSpec(10_000.0, 2)),
        ],
    )
    def test_rope(self, tmp_path: Path, config: dict[str, Any], wanted: RopeSpec) -> None:
        model = make_model("LlamaForCausalLM", **config)
        assert model.open(tmp_path).spec.layers[0].rope == wanted

    def test_head_dim_is_read_and_not_computed(self, tmp_path: Path) -> None:
        model = make_model("LlamaForCausalLM", head_dim=8, num_attention_heads=2)
        model.config["num_key_value_heads"] = 1
        assert model.open(tmp_path).spec.layers[0].head_dim == 8

    def test_qwen3_has_a_head_dim_of_its_own(self) -> None:
        model = make_model("Qwen3ForCausalLM")
        quantization = read_quantization(Path("config.json"), model.config)
        spec = read_model_spec(Path("config.json"), model.config, quantization, model.tensors)
        assert spec.layers[0].head_dim == 128
        assert spec.layers[0].qk_norm
        assert spec.layers[0].q.out_features == 128 * HEADS

    @pytest.mark.parametrize("said", [None, True, False])
    @pytest.mark.parametrize("stored", [True, False])
    def test_head(self, tmp_path: Path, said: bool | None, stored: bool) -> None:
        model = make_model()
        if said is not None:
            model.config["tie_word_embeddings"] = said
        if not stored:
            del model.tensors["lm_head.weight"]
        if said is False and not stored:
            with pytest.raises(MissingTensorError, match="lm_head"):
                model.open(tmp_path)
            return
        tied = (not stored) if said is None else said
        checkpoint = model.open(tmp_path)
        assert checkpoint.spec.tied_head is tied
        assert (checkpoint.source.dense("head") is None) is tied

    def test_1bitllm(self, tmp_path: Path) -> None:
        model = make_model("BitnetForCausalLM", masters=True, weight_bits=1, input_bits=8)
        del model.config["quantization_config"]
        prefix = "model.layers.0."
        model.tensors[prefix + "self_attn.inner_attn_ln.weight"] = np.ones(HIDDEN, np.float32)
        model.tensors[prefix + "mlp.ffn_layernorm.weight"] = np.full(FFN, 2, np.float32)
        checkpoint = model.open(tmp_path)
        assert checkpoint.spec.layers[0].activation == "silu"
        assert checkpoint.dense("layers.0.attn_sub_norm").to_float32().sum() == HIDDEN
        assert checkpoint.dense("layers.0.ffn_sub_norm").to_float32().sum() == 2 * FFN
        codes, _ = quantize_weights(model.tensors[GATE])
        assert (checkpoint.ternary("layers.0.gate").codes() == codes).all()

    def test_per_linear_norms(self, tmp_path: Path) -> None:
        quantization = {**BITNET, "use_rms_norm": True, "rms_norm_eps": 1e-4}
        model = make_model("LlamaForCausalLM", quantization=quantization)
        for module, shape in SHAPES.items():
            gains = np.arange(shape[1], dtype=np.float32)
            model.tensors[f"model.layers.0.{module}.rms_norm.weight"] = gains
        checkpoint = model.open(tmp_path)
        assert checkpoint.spec.layers[0].down.norm_eps == 1e-4
        assert checkpoint.dense("layers.0.down.norm").to_float32()[-1] == FFN - 1
        del model.tensors["model.layers.0.mlp.up_proj.rms_norm.weight"]
        with pytest.raises(MissingTensorError, match=r"up_proj\.rms_norm"):
            model.open(tmp_path)

    def test_sliding_windows(self, tmp_path: Path) -> None:
        model = make_model("MistralForCausalLM", sliding_window=5)
        assert model.open(tmp_path).spec.layers[0].sliding_window == 5
        model = make_model("MistralForCausalLM", sliding_window=64)
        assert model.open(tmp_path).spec.layers[0].sliding_window is None

    def test_duplicate_keys_last_one_counts(self, tmp_path: Path) -> None:
        model = make_model()
        model.write(tmp_path)
        text = json.dumps({**model.config, "quantization_config": BITNET})
        text = text[:-1] + f', "quantization_config": {json.dumps(MULTIPLY)}}}'
        (tmp_path / "config.json").write_text(text)
        matrix = open_checkpoint(tmp_path).ternary("layers.0.q")
        assert matrix.source_convention == "multiply"

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"quantization_config": None}, UnsupportedModelError, "is packed, but config.json"),
            ({"quantization_config": {"quant_method": "gptq"}}, NotTernaryError, "'gptq'"),
            ({"quantization_config": 3}, FormatError, "quantization_config"),
            (
                {"quantization_config": {**BITNET, "linear_class": "x"}},
                UnsupportedModelError,
                "linear_class 'x'",
            ),
            (
                {"quantization_config": {**MULTIPLY, "quantization_mode": "x"}},
                UnsupportedModelError,
                "quantization_mode 'x'",
            ),
            ({"architectures": ["MambaForCausalLM"]}, UnsupportedModelError, "recurrent"),
            ({"architectures": None, "model_type": "t5"}, UnsupportedModelError, "'t5'"),
            ({"hidden_act": "gelu"}, UnsupportedModelError, "'gelu'"),
            ({"rope_scaling": {"type": "longrope"}}, UnsupportedModelError, "'longrope'"),
            ({"hidden_size": None}, FormatError, "hidden_size is missing"),
            ({"hidden_size": "12"}, FormatError, "hidden_size"),
            ({"hidden_size": 0}, FormatError, "hidden_size"),
            ({"hidden_size": True}, FormatError, "hidden_size"),
            ({"vocab_size": -1}, FormatError, "vocab_size"),
            ({"num_hidden_layers": 10**9}, FormatError, "num_hidden_layers"),
            ({"hidden_size": 10**40}, FormatError, "hidden_size"),
            ({"num_key_value_heads": 3}, FormatError, "3 KV heads"),
            ({"rms_norm_eps": 0}, FormatError, "rms_norm_eps"),
            ({"rms_norm_eps": math.nan}, FormatError, "rms_norm_eps"),
            ({"rms_norm_eps": 1e-60}, FormatError, r"config.json: norm_eps"),
            (
                {
                    "quantization_config": {**BITNET, "use_rms_norm": True, "rms_norm_eps": 1e-60},
                },
                FormatError,
                r"config.json: norm_eps",
            ),
            ({"rope_theta": 1e200}, FormatError, r"config.json: rope_theta"),
            (
                {"rope_scaling": {"type": "linear", "factor": 1e60}},
                FormatError,
                r"config.json: the RoPE factor",
            ),
            ({"rope_theta": math.inf}, FormatError, "rope_theta"),
            ({"rope_theta": 10**400}, FormatError, "rope_theta"),
            ({"head_dim": 5}, FormatError, "even"),
            ({"tie_word_embeddings": "yes"}, FormatError, "tie_word_embeddings"),
            (
                {"quantization_config": None, "quantization": {"bits": 3, "group_size": 64}},
                UnsupportedModelError,
                "MLX",
            ),
            ({"quantization": {"bits": 2}}, FormatError, "group_size is missing"),
            (
                {"quantization_config": None, "pretraining_model_parallel": 0},
                FormatError,
                "pretraining_model_parallel",
            ),
            (
                {
                    "quantization_config": {
                        **MULTIPLY,
                        "modules_to_not_convert": ["down_proj", "lm_head"],
                    }
                },
                UnsupportedModelError,
                "down_proj",
            ),
            (
                {"quantization_config": {**MULTIPLY, "modules_to_not_convert": []}},
                UnsupportedModelError,
                "lm_head",
            ),
            (
                {"quantization_config": {**MULTIPLY, "modules_to_not_convert": "x"}},
                FormatError,
                "modules_to_not_convert",
            ),
        ],
    )
    def test_refusals(
        self, tmp_path: Path, change: dict[str, Any], error: type[CheckpointError], message: str
    ) -> None:
        model = make_model(head_dim=4)
        model.config.update(change)
        with pytest.raises(error, match=message) as caught:
            model.open(tmp_path)
        assert "config.json" in caught.value.message or str(tmp_path) in caught.value.message

    def test_unknown_architecture_lists_what_is_supported(self, tmp_path: Path) -> None:
        model = make_model()
        model.config["architectures"] = ["GemmaForCausalLM"]
        with pytest.raises(UnsupportedModelError) as caught:
            model.open(tmp_path)
        assert "BitNetForCausalLM" in str(caught.value.hint)

    @pytest.mark.parametrize("keep", [["lm_head"], ["lm_head.*"], ["lm_head", "model.norm", "("]])
    def test_skipping_the_head_is_usual(self, tmp_path: Path, keep: list[str]) -> None:
        quantization = {**MULTIPLY, "modules_to_not_convert": keep}
        make_model(quantization=quantization).open(tmp_path)

    @pytest.mark.parametrize("pattern", ["(([a-z_.0-9])+)+X", "(a|b)*X", ".*.*.*.*X"])
    def test_a_pattern_that_could_match_for_ever(self, tmp_path: Path, pattern: str) -> None:
        quantization = {**MULTIPLY, "modules_to_not_convert": ["lm_head", pattern]}
        with pytest.raises(UnsupportedModelError, match="intricate pattern"):
            make_model(quantization=quantization).open(tmp_path)

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
    )
    def test_broken_json(self, tmp_path: Path, content: bytes) -> None:
        make_model().write(tmp_path)
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(FormatError, match=r"config\.json"):
            open_checkpoint(tmp_path)


class TestFiles:
    def write_shards(self, directory: Path, model: Model) -> dict[str, str]:
        names = sorted(model.tensors)
        weight_map = {
            name: f"model-0000{1 + (index % 2)}-of-00002.safetensors"
            for index, name in enumerate(names)
        }
        for shard in set(weight_map.values()):
            held = {name: model.tensors[name] for name in names if weight_map[name] == shard}
            save_file(held, directory / shard)
        (directory / "config.json").write_text(json.dumps(model.config))
        self.write_index(directory, weight_map)
        return weight_map

    def write_index(self, directory: Path, weight_map: Any) -> None:
        index = {"metadata": {"total_size": 3}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    def test_shards(self, tmp_path: Path) -> None:
        model = make_model()
        self.write_shards(tmp_path, model)
        checkpoint = open_checkpoint(tmp_path)
        for name, codes in model.codes.items():
            assert (checkpoint.ternary(f"layers.0.{name}").codes() == codes).all()

    def test_missing_shard(self, tmp_path: Path) -> None:
        self.write_shards(tmp_path, make_model())
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match="model-00002-of-00002"):
            open_checkpoint(tmp_path)

    def test_index_that_lies(self, tmp_path: Path) -> None:
        weight_map = self.write_shards(tmp_path, make_model())
        weight_map[GATE] = next(s for s in weight_map.values() if s != weight_map[GATE])
        self.write_index(tmp_path, weight_map)
        with pytest.raises(MissingTensorError, match="gate_proj"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "", 3, "a/b", ".."])
    def test_index_that_leads_elsewhere(self, tmp_path: Path, shard: Any) -> None:
        weight_map: dict[str, Any] = self.write_shards(tmp_path, make_model())
        self.write_index(tmp_path, {**weight_map, GATE: shard})
        with pytest.raises(FormatError, match="is no file name"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize("weight_map", [None, {}, [1]])
    def test_index_without_a_map(self, tmp_path: Path, weight_map: Any) -> None:
        self.write_shards(tmp_path, make_model())
        self.write_index(tmp_path, weight_map)
        with pytest.raises(FormatError, match="weight_map"):
            open_checkpoint(tmp_path)

    def test_truncated_weights(self, tmp_path: Path) -> None:
        file = make_model().write(tmp_path) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(FormatError, match="its header describes"):
            open_checkpoint(tmp_path)

    def test_no_weights(self, tmp_path: Path) -> None:
        (make_model().write(tmp_path) / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
            open_checkpoint(tmp_path)

    def test_weights_of_another_format(self, tmp_path: Path) -> None:
        (make_model().write(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
        with pytest.raises(FormatError, match=r"pytorch_model\.bin: no file of torch"):
            open_checkpoint(tmp_path)
        (tmp_path / "pytorch_model.bin").rename(tmp_path / "weights.npz")
        with pytest.raises(UnsupportedModelError, match=r"weights\.npz"):
            open_checkpoint(tmp_path)

    def test_no_model_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such directory"):
            open_checkpoint(tmp_path / "none")
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            open_checkpoint(tmp_path)
        (tmp_path / "model.gguf").touch()
        with pytest.raises(FormatError, match="no GGUF file"):
            open_checkpoint(tmp_path)


class TestGenerationConfig:
    def test_read(self, tmp_path: Path) -> None:
        values = {
            "do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 1, "min_p": 0.05,
            "typical_p": 0.8,
            "repetition_penalty": 1.1, "max_new_tokens": 9, "bos_token_id": 1,
            "eos_token_id": [2, 3], "transformers_version": "5",
        }  # fmt: skip
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        found = read_generation_config(tmp_path)
        assert (found.do_sample, found.temperature, found.top_k) == (True, 0.6, 50)
        assert (found.top_p, found.min_p, found.repetition_penalty) == (1.0, 0.05, 1.1)
        assert (found.max_new_tokens, found.bos_token_id, found.typical_p) == (9, 1, 0.8)
        assert found.eos_token_ids == (2, 3)

    def test_absent(self, tmp_path: Path) -> None:
        found = read_generation_config(tmp_path)
        assert found.temperature is None
        assert found.eos_token_ids == ()

    @pytest.mark.parametrize(
        "values",
        [
            {"temperature": "hot"},
            {"temperature": True},
            {"temperature": math.nan},
            {"temperature": 10**400},
            {"top_k": 3.5},
            {"do_sample": 1},
            {"eos_token_id": "x"},
            {"eos_token_id": [1, None]},
        ],
    )
    def test_wrong_types(self, tmp_path: Path, values: dict[str, Any]) -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        with pytest.raises(FormatError, match=next(iter(values))):
            read_generation_config(tmp_path)
