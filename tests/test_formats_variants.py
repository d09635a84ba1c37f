"""Families of ternary models: what each file says of them, and what is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bitllm.checkpoint import DenseTensor
from bitllm.errors import (
    CheckpointError,
    FormatError,
    MissingTensorError,
    NotTernaryError,
    TensorShapeError,
    UnsupportedModelError,
)
from bitllm.formats.architecture import read_model_spec
from bitllm.formats.quantization import read_quantization
from bitllm.formats.refusals import refuse_known_models
from bitllm.formats.ternary_values import read_ternary_values
from bitllm.ternary import quantize_weights, unpack
from huggingface_model import BITNET, FFN, GATE, HIDDEN, MULTIPLY, SHAPES, Model, make_model

LAYER = "model.layers.0."


def values(model: Model, scale: float = 0.25) -> Model:
    """The model with its projections dequantised, and nothing in config.json about it."""
    del model.config["quantization_config"]
    for name, module in zip(model.codes, SHAPES, strict=True):
        del model.tensors[f"{LAYER}{module}.weight_scale"]
        weights = model.codes[name] * np.float32(scale)
        model.tensors[f"{LAYER}{module}.weight"] = weights.astype(np.float16)
    return model


class TestTernaryValues:
    @settings(max_examples=80, deadline=None)
    @given(
        st.integers(1, 9),
        st.sampled_from([16, 32, 96, 100, 128, 256, 384, 768]),
        st.sampled_from(["matrix", "row", "group", "row shards", "column shards"]),
        st.integers(0, 2**32),
    )
    def test_scales_are_found_whatever_shares_them(
        self, rows: int, width: int, sharing: str, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        rows, shards = 3 * rows, 3 if width % 3 == 0 else 2
        shape = {
            "matrix": (1, 1),
            "row": (rows, 1),
            "group": (rows, width // 32 if width % 32 == 0 else 1),
            "row shards": (3, 1),
            "column shards": (1, shards if width // shards >= 16 else 1),
        }[sharing]
        scales = rng.uniform(0.5, 2, shape).astype(np.float32)
        whole = np.repeat(scales, rows // shape[0], axis=0)
        whole = np.repeat(whole, width // shape[1], axis=1)
        weights = rng.integers(-1, 2, (rows, width)) * whole
        weights[:, 0] = whole[:, 0]  # no row is all zero
        found = read_ternary_values(DenseTensor(weights.astype(np.float32), "f32"), shards)
        assert found is not None
        again = found.scales
        if again.ndim == 1:
            again = again[:, None]
        elif again.ndim == 2:
            again = np.repeat(again, found.group_size, axis=1)
        assert (unpack(found.packed, width) * again == weights.astype(np.float32)).all()

    @pytest.mark.parametrize("width", [16, 32, 96, 128, 512])
    @pytest.mark.parametrize("shards", [1, 2, 4])
    def test_dense_weights_are_not_ternary(self, width: int, shards: int) -> None:
        weights = np.random.default_rng(0).standard_normal((6, width)).astype(np.float32)
        assert read_ternary_values(DenseTensor(weights, "f32"), shards) is None
        weights = np.sign(weights)
        weights[-1, -1] = 0.5
        assert read_ternary_values(DenseTensor(weights, "f32"), shards) is None

    def test_groups_of_a_size_that_nobody_uses(self) -> None:
        """8 columns are what the sizes that are tried have in common, and no size themselves."""
        weights = np.repeat(np.linspace(1, 2, 12, dtype=np.float32), 8)[None, :]
        assert read_ternary_values(DenseTensor(weights, "f32"), shards=4) is None

    def test_zeros_take_the_scale_of_their_row_or_of_the_matrix(self) -> None:
        weights = np.full((3, 64), 0.5, np.float32)
        weights[0, 32:], weights[1] = 0.25, 0
        weights[2, :32] = 0
        found = read_ternary_values(DenseTensor(weights, "f32"))
        assert found is not None
        assert found.group_size == 32
        assert found.scales.tolist() == [[0.5, 0.25], [0.5, 0.5], [0.5, 0.5]]

    def test_nothing_but_zeros(self) -> None:
        found = read_ternary_values(DenseTensor(np.zeros((4, 64), np.float32), "f32"))
        assert found is not None
        assert found.scales == 1
        assert not unpack(found.packed, 64).any()

    def test_matrices_of_many_bands(self) -> None:
        rng = np.random.default_rng(0)
        codes = rng.integers(-1, 2, (2100, 1024)).astype(np.float16)
        scales = rng.uniform(0.5, 1, (2100, 8)).astype(np.float16)
        weights = codes * np.repeat(scales, 128, axis=1)
        found = read_ternary_values(DenseTensor(weights, "f16"))
        assert found is not None
        assert found.group_size == 128
        assert (found.scales == scales.astype(np.float32)).all()


class TestQuantization:
    def test_values_without_a_word_in_the_configuration(self, tmp_path: Path) -> None:
        model = values(make_model("LlamaForCausalLM"))
        checkpoint = model.open(tmp_path)
        matrix = checkpoint.ternary("layers.0.gate")
        assert (matrix.codes() == model.codes["gate"]).all()
        assert matrix.scales == np.float32(0.25)
        assert checkpoint.spec.layers[0].gate.activation_bits is None

    def test_values_that_are_said_to_be_a_bitnet(self, tmp_path: Path) -> None:
        model = values(make_model("LlamaForCausalLM"))
        model.config["quantization_config"] = BITNET
        checkpoint = model.open(tmp_path)
        assert checkpoint.ternary("layers.0.gate").scales == np.float32(0.25)
        assert checkpoint.spec.layers[0].gate.activation_bits == 8

    def test_one_dense_matrix_among_ternary_ones(self, tmp_path: Path) -> None:
        model = values(make_model("LlamaForCausalLM"))
        model.tensors[GATE] = np.random.default_rng(0).standard_normal((FFN, HIDDEN))
        model.tensors[GATE] = model.tensors[GATE].astype(np.float16)
        with pytest.raises(NotTernaryError, match="gate_proj"):
            model.open(tmp_path).ternary("layers.0.gate")

    def test_a_projection_of_zeros_is_reported(self, tmp_path: Path) -> None:
        model = values(make_model("LlamaForCausalLM"))
        model.tensors[GATE] = np.zeros((FFN, HIDDEN), np.float16)
        with pytest.warns(UserWarning, match="every weight of .*gate_proj"):
            assert not model.open(tmp_path).ternary("layers.0.gate").codes().any()

    def test_zeros_do_not_make_a_dense_model_ternary(self, tmp_path: Path) -> None:
        model = make_model("LlamaForCausalLM", masters=True)
        del model.config["quantization_config"]
        model.tensors[GATE] = np.zeros((FFN, HIDDEN), np.float32)
        with pytest.raises(NotTernaryError, match="not a ternary network"):
            model.open(tmp_path)

    def test_a_scale_beside_weights_of_several_sizes(self, tmp_path: Path) -> None:
        model = make_model()
        rows = np.linspace(1, 2, FFN, dtype=np.float32)[:, None]
        model.tensors[GATE] = model.codes["gate"] * rows
        with pytest.raises(NotTernaryError, match="gate_proj"):
            model.open(tmp_path).ternary("layers.0.gate")

    def test_trilm(self, tmp_path: Path) -> None:
        model = values(make_model("LlamaForCausalLM"))
        model.config["pretraining_model_parallel"] = 2
        rows = np.repeat(np.array([0.5, 0.125], np.float16), FFN // 2)
        model.tensors[GATE] = model.codes["gate"].astype(np.float16) * rows[:, None]
        checkpoint = model.open(tmp_path)
        matrix = checkpoint.ternary("layers.0.gate")
        assert (matrix.codes() == model.codes["gate"]).all()
        assert (matrix.scales == rows).all()
        assert checkpoint.spec.layers[0].gate.activation_bits is None

    def test_embedding_models_are_masters_with_norms(self, tmp_path: Path) -> None:
        model = make_model("LlamaForCausalLM", masters=True, rms_norm_eps=1e-4)
        del model.config["quantization_config"]
        for module, shape in SHAPES.items():
            model.tensors[f"{LAYER}{module}.norm.weight"] = np.full(shape[1], 2, np.float32)
        checkpoint = model.open(tmp_path)
        codes, _ = quantize_weights(model.tensors[GATE])
        assert (checkpoint.ternary("layers.0.gate").codes() == codes).all()
        assert checkpoint.spec.layers[0].gate.norm_eps == 1e-4
        assert checkpoint.dense("layers.0.down.norm").to_float32().sum() == 2 * FFN
        del model.tensors[f"{LAYER}mlp.up_proj.norm.weight"]
        with pytest.raises(MissingTensorError, match=r"up_proj\.(rms_)?norm"):
            model.open(tmp_path)

    def test_norms_of_gemma_are_plain_gains(self, tmp_path: Path) -> None:
        """Stored less one, but for those that precede a projection."""
        model = gemma()
        checkpoint = model.open(tmp_path)
        stored = model.tensors
        for name, module in [
            ("layers.0.attn_norm", "layers.0.input_layernorm"),
            ("layers.0.post_attn_norm", "layers.0.post_attention_layernorm"),
            ("layers.0.ffn_norm", "layers.0.pre_feedforward_layernorm"),
            ("layers.0.post_ffn_norm", "layers.0.post_feedforward_layernorm"),
            ("layers.0.q_norm", "layers.0.self_attn.q_norm"),
            ("layers.0.k_norm", "layers.0.self_attn.k_norm"),
            ("final_norm", "norm"),
        ]:
            plain = stored[f"model.{module}.weight"] + np.float32(1)
            assert (checkpoint.dense(name).to_float32() == plain).all(), name
        own = stored[f"{LAYER}mlp.gate_proj.norm.weight"]
        assert (checkpoint.dense("layers.0.gate.norm").to_float32() == own).all()
        assert checkpoint.spec.embedding_scale == 4.0
        assert checkpoint.spec.layers[0].query_scale == 1 / 16
        assert checkpoint.spec.layers[0].activation == "gelu_tanh"
        assert checkpoint.spec.tied_head
        del stored[f"{LAYER}pre_feedforward_layernorm.weight"]
        with pytest.raises(MissingTensorError, match="pre_feedforward_layernorm"):
            model.open(tmp_path)

    @pytest.mark.parametrize("scale", [20.0, 1 / 20])
    @pytest.mark.parametrize("read", ["ternary", "strided"])
    def test_scales_that_look_inverted_are_told_once(
        self, tmp_path: Path, scale: float, read: str
    ) -> None:
        model = make_model(quantization=MULTIPLY if scale > 1 else BITNET)
        for name in model.tensors:
            if name.endswith("weight_scale"):
                model.tensors[name] = np.array([scale], np.float32)
        checkpoint = model.open(tmp_path)
        verb = "multiplies" if scale > 1 else "divides"
        with pytest.warns(UserWarning, match=f"q_proj.* 20, which looks inverted.*{verb}"):
            getattr(checkpoint, read)("layers.0.q")
        getattr(checkpoint, read)("layers.0.k")  # a second warning would be an error here


def gemma() -> Model:
    """A Gemma 3 as embedding models are: masters, with a norm before each projection."""
    rng = np.random.default_rng(1)
    model = make_model(
        "Gemma3TextModel", masters=True, tie_word_embeddings=True, sliding_window=8, head_dim=4
    )
    del model.config["quantization_config"]
    extra = {"pre_feedforward_layernorm": HIDDEN, "post_feedforward_layernorm": HIDDEN}
    extra |= {"self_attn.q_norm": 4, "self_attn.k_norm": 4}
    extra |= {f"{module}.norm": shape[1] for module, shape in SHAPES.items()}
    for name, size in extra.items():
        model.tensors[f"{LAYER}{name}.weight"] = rng.standard_normal(size).astype(np.float32)
    return model


def test_rope_of_kinds_of_layers_in_any_architecture() -> None:
    kinds = {"full_attention": {"rope_type": "default", "rope_theta": 77.0}}
    model = make_model("LlamaForCausalLM", rope_parameters=kinds)
    path = Path("config.json")
    quantization = read_quantization(path, model.config)
    spec = read_model_spec(path, model.config, quantization, model.tensors)
    assert spec.layers[0].rope.theta == 77.0


@pytest.mark.parametrize("section", [None, MULTIPLY, BITNET])
def test_packed_matrices_that_mlx_left_as_they_were(
    tmp_path: Path, section: dict[str, Any] | None
) -> None:
    model = make_model("LlamaForCausalLM", quantization=section)
    model.config["quantization"] = {"bits": 4, "group_size": 64}
    model.config["quantization_config"] = section or model.config["quantization"]
    if section is None:
        with pytest.raises(UnsupportedModelError, match="multiplies or divides"):
            model.open(tmp_path)
        return
    checkpoint = model.open(tmp_path)
    matrix = checkpoint.ternary("layers.0.gate")
    assert matrix.source_convention == ("multiply" if section is MULTIPLY else "divide")
    assert checkpoint.spec.layers[0].gate.activation_bits == 8


class TestPooling:
    def test_an_embedding_model_needs_no_head(self, tmp_path: Path) -> None:
        model = gemma()
        model.config["tie_word_embeddings"] = False
        assert model.open(tmp_path).spec.tied_head
        self.write(tmp_path, {"pooling_mode_lasttoken": True})
        model = make_model("LlamaForCausalLM", tie_word_embeddings=False)
        del model.tensors["lm_head.weight"]
        assert model.open(tmp_path).spec.tied_head

    def write(self, directory: Path, fields: dict[str, Any]) -> None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling/config.json").write_text(json.dumps(fields))

    def test_a_model_without_a_head_pools_the_last_token(self, tmp_path: Path) -> None:
        assert gemma().open(tmp_path).spec.pooling == "last"

    def test_a_model_with_a_head_does_not_pool(self, tmp_path: Path) -> None:
        assert make_model().open(tmp_path).spec.pooling == "none"

    @pytest.mark.parametrize(
        "fields",
        [
            {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False},
            {"pooling_mode": "lasttoken", "word_embedding_dimension": 16},
        ],
    )
    def test_the_last_token_by_name(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        self.write(tmp_path, fields)
        assert make_model().open(tmp_path).spec.pooling == "last"

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"pooling_mode_mean_tokens": True}, "mean_tokens"),
            ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": True}, "cls_token"),
            ({"pooling_mode": "mean"}, "mean"),
            ({}, "nothing"),
        ],
    )
    def test_other_pooling(self, tmp_path: Path, fields: dict[str, Any], named: str) -> None:
        self.write(tmp_path, fields)
        with pytest.raises(UnsupportedModelError, match=f"1_Pooling.*{named}"):
            make_model().open(tmp_path)

    def test_layers_behind_it(self, tmp_path: Path) -> None:
        (tmp_path / "2_Dense").mkdir()
        with pytest.raises(UnsupportedModelError, match="2_Dense"):
            gemma().open(tmp_path)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"architectures": ["HGRNBitForCausalLM"], "model_type": "hgrn_bit"}, "MMfreeLM"),
            ({"architectures": ["RwkvForCausalLM"]}, "recurrent"),
            ({"architectures": ["FalconH1ForCausalLM"]}, "recurrent"),
            ({"architectures": ["Qwen3MoeForCausalLM"]}, "mixture of experts"),
            ({"num_local_experts": 8}, "mixture of experts"),
            (
                {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5"},
                "linear attention",
            ),
            ({"layer_types": ["linear_attention", "full_attention"]}, "linear attention"),
            ({"architectures": ["MiniCPMForCausalLM"], "auto_map": {}}, "MiniCPM"),
            ({"architectures": ["HunYuanDenseV1ForCausalLM"]}, "Hunyuan"),
            ({"architectures": ["Gemma3ForConditionalGeneration"]}, "images"),
            ({"model_type": "qwen2_vl"}, "images"),
            ({"vision_config": {"hidden_size": 3}}, "images"),
            ({"is_encoder_decoder": True}, "encoder"),
            ({"architectures": ["BitnetV2ForCausalLM"]}, "BitNet v2"),
            ({"_name_or_path": "prism-ml/Ternary-Bonsai-2-4B-unpacked"}, "rotated"),
            ({"quantization_config": {**MULTIPLY, "hadamard_block": 128}}, "rotated"),
            ({"weight_rotation": "walsh"}, "rotated"),
        ],
    )
    def test_by_name(self, tmp_path: Path, change: dict[str, Any], named: str) -> None:
        model = make_model()
        model.config.update(change)
        with pytest.raises(UnsupportedModelError, match=named) as caught:
            model.open(tmp_path)
        assert "config.json" in caught.value.message
        assert caught.value.hint

    def test_rotated_by_its_tensors(self, tmp_path: Path) -> None:
        model = make_model()
        model.tensors[f"{LAYER}mlp.down_proj.hadamard_signs"] = np.ones(FFN, np.float32)
        with pytest.raises(UnsupportedModelError, match="rotated"):
            model.open(tmp_path)

    @pytest.mark.parametrize(
        "fields",
        [
            {"_name_or_path": "prism-ml/Ternary-Bonsai-27B"},
            {"_name_or_path": "prism-ml/Ternary-Bonsai-1.7B"},
            {"partial_rotary_factor": 1.0, "rotary_pct": 1.0, "rotary_emb_base": 10_000},
            {"num_experts": 0, "num_local_experts": 1, "vision_config": None},
            {"quantization_config": {"rotate_activations": False}},
            {"architectures": [3], "model_type": None, "layer_types": "x"},
        ],
    )
    def test_what_only_looks_alike(self, fields: dict[str, Any]) -> None:
        refuse_known_models(Path("config.json"), fields, ["model.norm.weight", "design.weight"])

    def test_code_that_comes_with_a_model(self, tmp_path: Path) -> None:
        model = make_model()
        model.config |= {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModel": "own.Own"}}
        with pytest.raises(UnsupportedModelError, match="code that comes with the model"):
            model.open(tmp_path)

    @pytest.mark.parametrize(
        "method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "hqq", ""]
    )
    def test_other_quantisations(self, tmp_path: Path, method: str) -> None:
        model = make_model()
        model.config["quantization_config"] = {"quant_method": method, "bits": 4}
        with pytest.raises(NotTernaryError, match=repr(method)) as caught:
            model.open(tmp_path)
        assert "GPTQ" in str(caught.value.hint)

    @pytest.mark.parametrize("bits", [4, None, 1.58])
    def test_one_bit_models_with_other_activations(self, tmp_path: Path, bits: Any) -> None:
        model = make_model(weight_bits=1, input_bits=bits)
        del model.config["quantization_config"]
        with pytest.raises(UnsupportedModelError, match="activations of"):
            model.open(tmp_path)

    @pytest.mark.parametrize(
        ("yarn", "error", "named"),
        [
            ({"mscale": 1.0, "mscale_all_dim": 1.0}, UnsupportedModelError, "mscale"),
            ({"truncate": False}, UnsupportedModelError, "truncate"),
            ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor"),
            ({"beta_fast": 1.0}, FormatError, "beta_slow"),
            ({"rope_theta": 1.0}, FormatError, "base above 1"),
            ({"original_max_position_embeddings": 0}, FormatError, "original_max"),
            ({"attention_factor": "x"}, FormatError, "attention_factor"),
        ],
    )
    def test_yarn(
        self, tmp_path: Path, yarn: dict[str, Any], error: type[CheckpointError], named: str
    ) -> None:
        scaling = {"type": "yarn", "factor": 4.0, "rope_theta": 1e4, **yarn}
        model = make_model("LlamaForCausalLM", rope_scaling=scaling)
        with pytest.raises(error, match=named) as caught:
            model.open(tmp_path)
        assert "config.json" in caught.value.message

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("attn_logit_softcapping", 50.0),
            ("final_logit_softcapping", 30.0),
            ("use_bidirectional_attention", True),
        ],
    )
    def test_features_of_gemma(self, tmp_path: Path, key: str, value: Any) -> None:
        model = gemma()
        model.config[key] = value
        with pytest.raises(UnsupportedModelError, match=key):
            model.open(tmp_path)


Change = Callable[[Model], Any]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.tensors.pop(f"{LAYER}self_attn.k_norm.weight"), MissingTensorError, "k_norm"),
        (
            lambda m: m.tensors.update({f"{LAYER}self_attn.k_norm.weight": np.ones(5, "f4")}),
            TensorShapeError,
            "k_norm",
        ),
        (lambda m: m.tensors.update({GATE: np.ones((FFN, 16), "i4")}), TensorShapeError, "gate"),
        (lambda m: m.config.update(layer_types=["sliding"]), FormatError, "layer_types"),
        (lambda m: m.config.update(layer_types=["full_attention"] * 2), FormatError, "layer_types"),
        (lambda m: m.config.update(sliding_window=0), FormatError, "sliding_window"),
        (lambda m: m.config.update(query_pre_attn_scalar=-1), FormatError, "query_pre_attn"),
        (lambda m: m.config.update(rope_parameters=3), FormatError, "rope_parameters"),
        (
            lambda m: m.config.update(rope_parameters={"sliding_attention": 3}),
            FormatError,
            "sliding_attention",
        ),
        (lambda m: m.config.update(rope_local_base_freq="x"), FormatError, "rope_local_base_freq"),
    ],
)
def test_what_can_be_wrong_with_a_gemma(
    tmp_path: Path, change: Change, error: type[CheckpointError], message: str
) -> None:
    model = gemma()
    change(model)
    with pytest.raises(error, match=message) as caught:
        model.open(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


KEYS = [
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "hidden_act",
    "hidden_activation", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "sliding_window",
    "sliding_window_pattern", "layer_types", "use_sliding_window", "max_window_layers",
    "query_pre_attn_scalar", "attention_bias", "mlp_bias", "partial_rotary_factor",
    "quantization_config", "quantization", "weight_bits", "input_bits", "is_bitnet_config",
    "pretraining_model_parallel", "auto_map", "num_experts", "vision_config", "_name_or_path",
    "attn_logit_softcapping", "is_encoder_decoder",
]  # fmt: skip
SECTION_KEYS = [
    "quant_method", "linear_class", "quantization_mode", "use_rms_norm", "rms_norm_eps",
    "modules_to_not_convert", "bits", "group_size", "mode", "model.layers.0.mlp.gate_proj",
    "rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "full_attention", "sliding_attention",
]  # fmt: skip
NAMES = ["bitnet", "autobitlinear", "online", "linear", "llama3", "affine", "Gemma3TextModel"]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([1, 2, 4, 8, 16, 32, 64, 2**31, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(NAMES)
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(SECTION_KEYS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["BitNetForCausalLM", "LlamaForCausalLM", "Qwen3Model", "Gemma3TextModel"]),
    st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=5),
)
@example("Gemma3TextModel", {"num_hidden_layers": 10_000, "sliding_window_pattern": 1})
def test_any_configuration_is_read_or_refused(architecture: str, changes: dict[str, Any]) -> None:
    model = make_model(architecture)
    fields = model.config | changes
    path = Path("config.json")
    try:
        refuse_known_models(path, fields, model.tensors)
        quantization = read_quantization(path, fields, model.tensors)
        spec = read_model_spec(path, fields, quantization, model.tensors)
    except CheckpointError as error:
        message = error.message
    else:
        message = ""
        assert len(spec.layers) <= 10_000
    assert "config.json" in message or not message
    assert len(message) < 500
