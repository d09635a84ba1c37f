"""GGUF files read into checkpoints: the same weights, architecture and logits as their HF twins."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batches import logits_of, prompt_ids
from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.checkpoint import Checkpoint
from bitllm.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    MissingTensorError,
    ModelNotFoundError,
    NotTernaryError,
    TensorShapeError,
    UnsupportedModelError,
)
from bitllm.formats import open_checkpoint
from gguf_files import encode, write_gguf
from gguf_model import (
    FFN,
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    SHAPES,
    VOCAB,
    codes_of,
    gguf_metadata,
    scale_of,
    write_twins,
)


def full_logits(checkpoint: Checkpoint, device: str) -> np.ndarray:
    decoder = get_backend(device).load(checkpoint, LoadOptions(kv_tokens=64))
    return logits_of(decoder, prompt_ids(24, VOCAB))


KINDS = ("I2_S", "TQ1_0", "TQ2_0", "IQ1_BN", "IQ2_BN", "IQ2_BN_R4")
WEIGHT_ONLY_KINDS = ("Q2_0", "Q2_0_G128", "PTQ1_0")


def same_spec(a: Checkpoint, b: Checkpoint) -> bool:
    return a.spec.layers == b.spec.layers and (a.spec.norm_eps, a.spec.tied_head) == (
        b.spec.norm_eps,
        b.spec.tied_head,
    )


def same_weights(a: Checkpoint, b: Checkpoint) -> bool:
    dense = all(
        (a.dense(name).to_float32() == b.dense(name).to_float32()).all()
        for name in a.spec.dense_shapes()
    )
    pairs = [(a.ternary(name), b.ternary(name)) for name, _ in a.spec.linear_names()]
    ternary = all(
        (x.packed == y.packed).all() and x.scales.shape == () and x.scales == y.scales
        for x, y in pairs
    )
    return dense and ternary


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["bitnet-b1.58", "bitnet", "llama", "qwen3"])
def test_codes_scales_and_switches_are_those_of_the_twin(
    tmp_path: Path, kind: str, architecture: str
) -> None:
    hf, path = write_twins(tmp_path, kind, architecture, tied=architecture == "bitnet-b1.58")
    twin, found = open_checkpoint(hf), open_checkpoint(path)
    assert same_spec(twin, found)
    assert same_weights(twin, found)
    assert found.spec.max_context == 128


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize(("kind", "architecture"), [("I2_S", "bitnet-b1.58"), ("TQ1_0", "llama")])
def test_logits_are_those_of_the_twin_to_the_bit(
    tmp_path: Path, kind: str, architecture: str, device: str
) -> None:
    hf, path = write_twins(tmp_path, kind, architecture)
    twin, found = (full_logits(open_checkpoint(model), device) for model in (hf, path))
    assert np.isfinite(found).all()
    assert (twin == found).all()


@pytest.mark.parametrize("kind", WEIGHT_ONLY_KINDS)
def test_group_types_have_float_activations(tmp_path: Path, kind: str) -> None:
    _, path = write_twins(tmp_path, kind, "qwen3")
    found = open_checkpoint(path)
    assert {linear.activation_bits for _, linear in found.spec.linear_names()} == {None}
    matrix = found.ternary("layers.1.down")
    assert (matrix.codes() == codes_of(1, "down")).all()
    assert matrix.scales == scale_of(1, "down")


def test_activations_may_be_stated(tmp_path: Path) -> None:
    for stated, wanted in ((0, None), (8, 8)):
        _, path = write_twins(
            tmp_path, "TQ2_0", metadata={"bitllm.activation_bits": ("u32", stated)}
        )
        assert open_checkpoint(path).spec.layers[0].q.activation_bits == wanted
    _, path = write_twins(tmp_path, metadata={"bitllm.activation_bits": ("u32", 4)})
    with pytest.raises(UnsupportedModelError, match="4 bits"):
        open_checkpoint(path)


def test_trilm_has_float_activations(tmp_path: Path) -> None:
    name = {"general.name": ("str", "TriLM_99M_Unpacked")}
    _, path = write_twins(tmp_path, "TQ2_0", "llama", metadata=name)
    assert open_checkpoint(path).spec.layers[0].q.activation_bits is None


@pytest.mark.parametrize("layout", ["arm_64", "row4"])
def test_other_layouts_of_i2_s_by_argument_and_environment(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, path = write_twins(tmp_path, layout=layout)
    twin = open_checkpoint(hf)
    assert same_weights(twin, open_checkpoint(path, i2s_layout=layout))
    assert not same_weights(twin, open_checkpoint(path))
    monkeypatch.setenv("BITLLM_I2S_LAYOUT", layout)
    assert same_weights(twin, open_checkpoint(path))
    with pytest.raises(ConfigError, match="no I2_S layout 'x86'"):
        open_checkpoint(path, i2s_layout="x86")


def uneven_neurons(layout: str) -> dict[str, Any]:
    """up and down of the first layer, in which some neurons use fewer weights than others."""
    random = np.random.default_rng(0)
    share = random.uniform(0.05, 0.95, FFN)
    up = codes_of(0, "up") * (random.random((FFN, HIDDEN)) < share[:, None])
    down = codes_of(0, "down") * (random.random((HIDDEN, FFN)) < share)
    return {
        f"blk.0.ffn_{name}.weight": ("I2_S", SHAPES[name], encode("I2_S", codes, 0.125, layout))
        for name, codes in (("up", up.astype(np.int8)), ("down", down.astype(np.int8)))
    }


@pytest.mark.parametrize("layout", ["arm_64", "row4"])
def test_a_file_in_another_layout_is_warned_of(tmp_path: Path, layout: str) -> None:
    _, path = write_twins(tmp_path, layout=layout, tensors=uneven_neurons(layout))
    with pytest.warns(UserWarning, match=f"BITLLM_I2S_LAYOUT={layout}"):
        open_checkpoint(path)


def test_the_usual_layout_is_not_warned_of(tmp_path: Path) -> None:
    _, path = write_twins(tmp_path, tensors=uneven_neurons("x86_128"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(path)


def test_the_rope_scaling_of_llama_3_is_found_again(tmp_path: Path) -> None:
    hf, path = write_twins(tmp_path, "TQ2_0", "llama", llama3_rope=True)
    twin, found = open_checkpoint(hf).spec.layers[0].rope, open_checkpoint(path).spec.layers[0].rope
    assert found.scaling == "llama3"
    assert (found.inverse_frequencies() == twin.inverse_frequencies()).all()


@pytest.mark.parametrize(
    ("table", "error"),
    [
        (np.linspace(1, 9, HEAD_DIM // 2), "not the RoPE scaling of Llama 3"),
        (np.zeros(HEAD_DIM // 2), "no positive numbers"),
        (np.ones(7), "should be F32"),
    ],
)
def test_other_tables_of_rope_are_refused(tmp_path: Path, table: np.ndarray, error: str) -> None:
    content = ("F32", table.shape, table.astype(np.float32).tobytes())
    _, path = write_twins(tmp_path, tensors={"rope_freqs.weight": content})
    with pytest.raises(CheckpointError, match=error):
        open_checkpoint(path)


def test_linear_rope(tmp_path: Path) -> None:
    scaling = {
        "llama.rope.scaling.type": ("str", "linear"),
        "llama.rope.scaling.factor": ("f32", 4.0),
    }
    _, path = write_twins(tmp_path, "I2_S", "llama", metadata=scaling)
    rope = open_checkpoint(path).spec.layers[0].rope
    assert (rope.scaling, rope.factor) == ("linear", 4.0)
    _, path = write_twins(
        tmp_path,
        "I2_S",
        "llama",
        metadata={
            "llama.rope.scaling.type": ("str", "yarn"),
            "llama.rope.scaling.factor": ("f32", 4.0),
        },
    )
    with pytest.raises(UnsupportedModelError, match="yarn"):
        open_checkpoint(path)


def test_scale_tensors_multiply(tmp_path: Path) -> None:
    factor = {"blk.0.attn_q.scale": ("F32", (1,), struct.pack("<f", 2.5))}
    _, path = write_twins(tmp_path, "TQ2_0", tensors=factor)
    found = open_checkpoint(path)
    assert found.ternary("layers.0.q").scales == scale_of(0, "q") * np.float32(2.5)
    assert found.ternary("layers.1.q").scales == scale_of(1, "q")
    factor = {"blk.0.attn_q.scale": ("F32", (1,), struct.pack("<f", -2.5))}
    _, path = write_twins(tmp_path, "TQ2_0", tensors=factor)
    with pytest.raises(FormatError, match="no positive weight scale"):
        open_checkpoint(path).ternary("layers.0.q")


def test_row_scales_of_permuted_rows_go_with_them(tmp_path: Path) -> None:
    rows = SHAPES["q"][0]
    scales = np.arange(1, rows + 1, dtype=np.float32) / 64
    stored = scales.reshape(-1, 2, HEAD_DIM // 2).swapaxes(1, 2).ravel()
    data = b"".join(encode("IQ2_BN", codes_of(0, "q")[:1], float(scale)) for scale in stored)
    tensors = {"blk.0.attn_q.weight": ("IQ2_BN", SHAPES["q"], data)}
    _, path = write_twins(tmp_path, "IQ2_BN", "llama", tensors=tensors)
    assert (open_checkpoint(path).ternary("layers.0.q").scales == scales).all()


def test_quantised_embeddings_are_decoded(tmp_path: Path) -> None:
    import gguf
    from gguf.quants import dequantize, quantize

    values = np.random.default_rng(1).standard_normal((VOCAB, HIDDEN)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = quantize(values, kind)
    tensors = {"token_embd.weight": ("Q8_0", values.shape, stored.tobytes())}
    _, path = write_twins(tmp_path, tensors=tensors)
    found = open_checkpoint(path)
    assert found.dense_dtype("embed") == "f32"
    assert not found.is_mapped("embed")
    assert found.is_mapped("final_norm")
    embed = found.dense("embed")
    assert (embed.to_float32() == dequantize(stored, kind)).all()
    assert found.dense("embed").data is embed.data
    assert np.isfinite(full_logits(found, "cpu")).all()


def test_a_ternary_embedding_is_decoded(tmp_path: Path) -> None:
    codes = np.random.default_rng(2).integers(-1, 2, (VOCAB, HIDDEN), np.int8)
    tensors = {"token_embd.weight": ("TQ2_0", codes.shape, encode("TQ2_0", codes, 0.75))}
    _, path = write_twins(tmp_path, tensors=tensors)
    assert (open_checkpoint(path).dense("embed").to_float32() == codes * np.float32(0.75)).all()


def test_projections_in_floats_are_read_if_they_are_ternary(tmp_path: Path) -> None:
    values = codes_of(0, "up").astype(np.float16) * np.float16(0.5)
    tensors = {"blk.0.ffn_up.weight": ("F16", SHAPES["up"], values.tobytes())}
    _, path = write_twins(tmp_path, tensors=tensors)
    found = open_checkpoint(path).ternary("layers.0.up")
    assert (found.codes() == codes_of(0, "up")).all()
    assert found.scales == np.float32(0.5)
    values[0, 0] = 0.25
    tensors = {"blk.0.ffn_up.weight": ("F16", SHAPES["up"], values.tobytes())}
    _, path = write_twins(tmp_path, tensors=tensors)
    with pytest.raises(NotTernaryError, match=r"ffn_up.*several sizes"):
        open_checkpoint(path).ternary("layers.0.up")


def test_a_matrix_of_zeros_is_warned_of(tmp_path: Path) -> None:
    codes = np.zeros(SHAPES["up"], np.int8)
    tensors = {"blk.0.ffn_up.weight": ("TQ2_0", codes.shape, encode("TQ2_0", codes, 0.0))}
    _, path = write_twins(tmp_path, "TQ2_0", tensors=tensors)
    with pytest.warns(UserWarning, match="every weight of 'blk.0.ffn_up.weight' is zero"):
        found = open_checkpoint(path).ternary("layers.0.up")
    assert found.scales == 1


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"general.architecture": ("str", "hgrn_bit")}, "recurrent network"),
        ({"general.architecture": ("str", "qwen3moe")}, "mixture of experts"),
        ({"general.architecture": ("str", "clip")}, "architecture 'clip' is not supported"),
        ({"bitnet-b1.58.expert_count": ("u32", 8)}, "mixture of experts"),
        ({"bitnet-b1.58.attention.value_length": ("u32", 32)}, "another head size"),
    ],
)
def test_what_is_not_run_is_refused_by_name(
    tmp_path: Path, metadata: dict[str, Any], error: str
) -> None:
    _, path = write_twins(tmp_path, metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=error):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"general.architecture": ("u32", 3)}, "lack general.architecture"),
        ({"bitnet-b1.58.block_count": ("u32", 0)}, "block_count should be a whole number"),
        ({"bitnet-b1.58.embedding_length": ("str", "x")}, "embedding_length should be"),
        ({"bitnet-b1.58.attention.head_count": ("u32", 3)}, "cannot share"),
        ({"bitnet-b1.58.rope.freq_base": ("f32", -1.0)}, "freq_base should be a positive"),
    ],
)
def test_impossible_metadata_are_refused(
    tmp_path: Path, metadata: dict[str, Any], error: str
) -> None:
    _, path = write_twins(tmp_path, metadata=metadata)
    with pytest.raises(FormatError, match=error):
        open_checkpoint(path)


def test_tensors_have_to_be_those_of_the_architecture(tmp_path: Path) -> None:
    one = ("F32", (1,), bytes(4))
    _, path = write_twins(tmp_path, tensors={"blk.0.ffn_gate_exps.weight": one})
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        open_checkpoint(path)
    _, path = write_twins(tmp_path, tensors={"blk.7.attn_q.weight": one})
    with pytest.raises(UnsupportedModelError, match=r"1 tensors have no place.*blk\.7\.attn_q"):
        open_checkpoint(path)
    _, path = write_twins(tmp_path, tensors={"blk.1.attn_q.weight": one})
    with pytest.raises(TensorShapeError, match=r"blk\.1\.attn_q\.weight' should be \[256, 256\]"):
        open_checkpoint(path)
    more = {"bitnet-b1.58.block_count": ("u32", LAYERS + 1)}
    _, path = write_twins(tmp_path, metadata=more)
    with pytest.raises(MissingTensorError, match=r"blk\.2\."):
        open_checkpoint(path)


def test_dense_and_unreadable_types_are_refused_by_name(tmp_path: Path) -> None:
    size = SHAPES["up"][0] * SHAPES["up"][1]
    q8 = {"blk.0.ffn_up.weight": ("Q8_0", SHAPES["up"], bytes(size // 32 * 34))}
    _, path = write_twins(tmp_path, tensors=q8)
    with pytest.raises(NotTernaryError, match="Q8_0, so these are the weights of a dense model"):
        open_checkpoint(path)
    for type_id, length, name in ((38, size // 4 + 32, "TL1"), (39, size // 5, "TL2")):
        tl = {"blk.0.ffn_up.weight": (type_id, SHAPES["up"], bytes(length))}
        _, path = write_twins(tmp_path, tensors=tl)
        with pytest.raises(UnsupportedModelError, match=f"is of type {name}") as caught:
            open_checkpoint(path)
        assert "I2_S" in str(caught.value.hint)
    stq = {"blk.0.ffn_up.weight": (42, SHAPES["up"], bytes(size // 256 * 42))}
    _, path = write_twins(tmp_path, tensors=stq)
    with pytest.raises(UnsupportedModelError, match="STQ1_0"):
        open_checkpoint(path)


def test_a_directory_with_one_model(tmp_path: Path) -> None:
    _, path = write_twins(tmp_path)
    (tmp_path / "model").mkdir()
    path.rename(tmp_path / "model" / path.name)
    assert open_checkpoint(tmp_path / "model").spec.vocab_size == VOCAB
    _, path = write_twins(tmp_path, "TQ2_0")
    path.rename(tmp_path / "model" / path.name)
    with pytest.raises(ModelNotFoundError, match=r"several GGUF files: tiny-I2_S\.gguf, tiny-TQ2"):
        open_checkpoint(tmp_path / "model")


def split(tmp_path: Path) -> list[Path]:
    """A model in two files: the tensors of the second layer are in the second."""
    _, path = write_twins(tmp_path)
    from bitllm.formats.gguf import GgufModel

    whole = GgufModel(path)
    parts: list[dict[str, Any]] = [{}, {}]
    for name, tensor in whole.tensors.items():
        content = (tensor.type.name, tensor.shape, whole.bytes(name).tobytes())
        parts[name.startswith("blk.1.")][name] = content
    counts = {"split.count": ("u32", 2)}
    paths = [tmp_path / f"split-0000{number}-of-00002.gguf" for number in (1, 2)]
    write_gguf(paths[0], {**gguf_metadata("bitnet-b1.58"), **counts}, parts[0])
    write_gguf(paths[1], counts, parts[1])
    return paths


def test_a_model_in_two_files(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    whole = open_checkpoint(tmp_path / "hf")
    assert same_weights(whole, open_checkpoint(first))
    assert same_weights(whole, open_checkpoint(second))
    renamed = first.rename(tmp_path / "first.gguf")
    with pytest.raises(FormatError, match="the first of 2 files"):
        open_checkpoint(renamed)
    renamed.rename(first)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"1 of the model's 2 files are missing.*00002-of"):
        open_checkpoint(first)


def test_partial_rope_is_refused_where_rows_are_reordered(tmp_path: Path) -> None:
    for architecture in ("llama", "qwen3"):
        partial = {f"{architecture}.rope.dimension_count": ("u32", HEAD_DIM // 2)}
        _, path = write_twins(tmp_path, "TQ2_0", architecture, metadata=partial)
        if architecture == "llama":
            with pytest.raises(UnsupportedModelError, match="RoPE over 32 of 64"):
                open_checkpoint(path)
        else:
            assert open_checkpoint(path).spec.layers[0].rope.dim == HEAD_DIM // 2


def test_norms_before_projections_and_pooling(tmp_path: Path) -> None:
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    names |= {name: f"ffn_{name}" for name in ("gate", "up", "down")}
    gains = {
        f"blk.{layer}.{stored}_norm_in.weight": (
            "F16",
            (SHAPES[name][1],),
            np.full(SHAPES[name][1], 1.5, np.float16).tobytes(),
        )
        for layer in range(LAYERS)
        for name, stored in names.items()
    }
    mean = {"qwen3.pooling_type": ("u32", 1)}
    _, path = write_twins(tmp_path, "I2_S", "qwen3", tensors=gains, metadata=mean)
    found = open_checkpoint(path)
    assert found.spec.layers[1].down.norm_eps == 1e-5
    assert (found.dense("layers.1.down.norm").to_float32() == 1.5).all()
    assert found.spec.pooling == "last"
    _, path = write_twins(tmp_path, "I2_S", "qwen3", metadata=mean)
    with pytest.raises(UnsupportedModelError, match="pooling of type 1"):
        open_checkpoint(path)
    last = {"qwen3.pooling_type": ("u32", 3)}
    _, path = write_twins(tmp_path, "I2_S", "qwen3", metadata=last)
    assert open_checkpoint(path).spec.pooling == "last"


def test_biases_of_reordered_rows_go_with_them(tmp_path: Path) -> None:
    bias = np.arange(SHAPES["q"][0], dtype=np.float32)
    stored = bias.reshape(-1, 2, HEAD_DIM // 2).swapaxes(1, 2).ravel()
    tensors = {"blk.0.attn_q.bias": ("F32", bias.shape, stored.tobytes())}
    _, path = write_twins(tmp_path, "I2_S", "llama", tensors=tensors)
    found = open_checkpoint(path)
    assert (found.dense("layers.0.q.bias").to_float32() == bias).all()
    assert [layer.q.bias for layer in found.spec.layers] == [True, False]


def test_inverted_scales_of_the_published_size_are_warned_of(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from bitllm.formats.gguf.plausibility import warn_of_scales

    hf, path = write_twins(tmp_path)
    del hf
    from bitllm.formats.gguf import GgufModel

    model = GgufModel(path)
    layers = open_checkpoint(path).spec.layers
    spec = SimpleNamespace(architecture="bitnet-b1.58", hidden_size=2560, layers=layers)
    data = {name: model.bytes(name).copy() for name in model.tensors if "attn_q." in name}
    for scale, warned in ((0.64, True), (1.56, False)):
        for content in data.values():
            size = SHAPES["q"][0] * SHAPES["q"][1] // 4
            content[size : size + 4] = np.frombuffer(struct.pack("<f", scale), np.uint8)
        fake = SimpleNamespace(path=path, tensors=model.tensors, bytes=data.__getitem__)
        if warned:
            with pytest.warns(UserWarning, match="about 0.64"):
                warn_of_scales(fake, spec)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warn_of_scales(fake, spec)
