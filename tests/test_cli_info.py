"""`bitllm info`: every figure against a count made here, by hand or from the files."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from bitllm import formats
from bitllm.cli.app import app
from bitllm.cli.info import count_parameters, describe_architecture
from bitllm.cli.terminal import format_count
from bitllm.formats import inspection
from cli_model import CONTEXT, FFN, HEADS, HIDDEN, KV_HEADS, LAYERS, write_model
from synthetic import tiny_spec

VOCABULARY = 258
TERNARY = LAYERS * (
    HIDDEN * HIDDEN * 2 + 2 * HIDDEN * HIDDEN * KV_HEADS // HEADS + 3 * HIDDEN * FFN
)
DENSE = VOCABULARY * HIDDEN + HIDDEN + LAYERS * (3 * HIDDEN + FFN)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BITLLM_"):
            monkeypatch.delenv(name)


def info(*arguments: object, **settings: Any) -> Result:
    command = ["info", *map(str, arguments)]
    return CliRunner().invoke(app, command, prog_name="bitllm", **settings)


def facts(*arguments: object) -> dict[str, Any]:
    result = info(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_the_architecture_and_its_parameters(model: Path) -> None:
    found = facts(model)
    assert found["model"] == {"name": "tiny", "path": str(model), "origin": str(model)}
    architecture = found["architecture"]
    assert architecture["name"] == "BitNetForCausalLM"
    assert architecture["layers"] == LAYERS
    assert architecture["hidden_size"] == HIDDEN
    assert architecture["vocab_size"] == VOCABULARY
    assert architecture["tied_head"] is True
    assert found["parameters"] == {"ternary": TERNARY, "dense": DENSE, "total": TERNARY + DENSE}


def test_files_and_types_are_those_on_disk(model: Path) -> None:
    found = facts(model)
    assert found["files"] == [
        {"name": name, "bytes": (model / name).stat().st_size}
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    stored = load_file(model / "model.safetensors")
    for dtype, name in (("F32", "float32"), ("U8", "uint8")):
        arrays = [array for array in stored.values() if array.dtype == name]
        assert found["types"][dtype] == {
            "tensors": len(arrays),
            "bytes": sum(array.nbytes for array in arrays),
        }
    assert set(found["types"]) == {"F32", "U8"}
    assert "tensors" not in found


def test_tensors_lists_every_one(model: Path) -> None:
    listed = facts(model, "--tensors")["tensors"]
    stored = load_file(model / "model.safetensors")
    assert {tensor["name"]: tuple(tensor["shape"]) for tensor in listed} == {
        name: array.shape for name, array in stored.items()
    }
    text = info(model, "--tensors").stdout
    assert all(name in text for name in stored)
    assert "model.layers.0.mlp.down_proj.weight" not in info(model).stdout


def test_the_memory_plan_follows_the_context(model: Path) -> None:
    whole, part = facts(model)["memory"], facts(model, "--context", "1024")["memory"]
    per_token = LAYERS * 2 * KV_HEADS * (HIDDEN // HEADS) * 2
    assert whole["context"] == CONTEXT
    assert whole["kv"] == CONTEXT * per_token
    assert part["kv"] == 1024 * per_token
    for plan in (whole, part):
        parts = ("weights", "kv", "scratch", "process")
        assert plan["total"] == sum(plan[name] for name in parts)
        assert plan["fits"] is True


def test_a_context_that_the_model_has_not(model: Path) -> None:
    result = info(model, "--context", "100000")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: context is 100000")


def test_nothing_is_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitllm.formats.huggingface import _HuggingFaceSource

    def refuse(*_: object) -> None:
        raise AssertionError("info read a weight matrix")

    monkeypatch.setattr(_HuggingFaceSource, "ternary", refuse)
    assert info(model).exit_code == 0


def test_the_device_and_why(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts(model)["device"]["name"] == "cpu"
    assert facts(model, "--device", "reference")["device"]["name"] == "reference"
    monkeypatch.setenv("BITLLM_DEVICE", "reference")
    assert facts(model)["device"]["name"] == "reference"
    assert info(model, "--device", "abacus").exit_code == 1


def test_the_text_names_what_matters(model: Path) -> None:
    text = info(model).stdout
    for line in (
        f"model         tiny ({model})",
        "architecture  BitNetForCausalLM, 2 layers",
        f"parameters    {format_count(TERNARY + DENSE)}: {format_count(TERNARY)} ternary",
        "tokenizer     258 tokens, chat template, start 256, stop 257",
        "generation    temperature=0",
        "memory for a context of 8192 tokens: fits",
    ):
        assert line in text
    assert "attention sub-norm, feed-forward sub-norm" in text


def test_a_model_without_tokenizer_is_still_described(tmp_path: Path) -> None:
    model = write_model(tmp_path / "mute")
    (model / "tokenizer.json").unlink()
    result = info(model)
    assert result.exit_code == 0
    assert "tokenizer     error: " in result.stdout
    assert "tokenizer.json" in facts(model)["text"]["error"]


def test_a_broken_model_is_an_error(tmp_path: Path) -> None:
    model = write_model(tmp_path / "broken")
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-100])
    result = info(model)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "model.safetensors" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_model_can_come_from_the_environment(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLLM_MODEL", str(model))
    assert facts()["model"]["name"] == "tiny"


def test_layers_that_differ_are_told_apart() -> None:
    plain, windowed = tiny_spec().layers[0], tiny_spec(sliding_window=7).layers[0]
    spec = tiny_spec(num_layers=4)
    object.__setattr__(spec, "layers", (plain, plain, windowed, plain))
    groups = describe_architecture(spec)["layer_groups"]
    assert [(group["first"], group["last"]) for group in groups] == [(0, 1), (2, 2), (3, 3)]
    assert [group["layer"]["sliding_window"] for group in groups] == [None, 7, None]


def test_counting_parameters_of_an_untied_model() -> None:
    spec = tiny_spec(num_layers=1, vocab_size=10, hidden_size=6, ffn_size=4, num_heads=2,
                     num_kv_heads=1, head_dim=2)  # fmt: skip
    ternary = 4 * 6 + 2 * 6 + 2 * 6 + 6 * 4 + 4 * 6 + 4 * 6 + 6 * 4
    dense = 10 * 6 + 10 * 6 + 6 + 6 + 6
    assert count_parameters(spec) == {"ternary": ternary, "dense": dense, "total": ternary + dense}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (950, "950"), (999_600, "1 M"), (3_150_000, "3.15 M"), (2_412_820_480, "2.41 B")],
)
def test_counts_have_three_figures(count: int, text: str) -> None:
    assert format_count(count) == text


PROJECTION = "model.layers.1.mlp.down_proj.weight"


def altered(directory: Path, name: str, change: Any) -> Path:
    """Write the model with one tensor changed."""
    model = write_model(directory)
    tensors = dict(load_file(model / "model.safetensors"))
    tensors[name] = change(tensors[name].copy())
    save_file(tensors, model / "model.safetensors")
    return model


def packed(byte: int, place: tuple[Any, ...] = (Ellipsis,)) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array[place] = byte
        return array

    return change


def test_nothing_is_unusual_about_a_sound_model(model: Path) -> None:
    assert facts(model)["oddities"] == []
    assert facts(model, "--check")["oddities"] == []
    assert "unusual" not in info(model).stdout


def test_an_all_zero_projection(tmp_path: Path) -> None:
    model = altered(tmp_path / "m", PROJECTION, packed(0b01010101))
    assert facts(model)["oddities"] == ["layers.1.down: every weight is zero"]
    assert "unusual: layers.1.down: every weight is zero" in info(model).stdout
    assert facts(model, "--check")["oddities"] == ["layers.1.down: every weight is zero"]


def test_code_three_in_the_sample(tmp_path: Path) -> None:
    model = altered(tmp_path / "m", PROJECTION, packed(0b11, (0, 5)))
    assert "code 3" in facts(model)["oddities"][0]


def test_code_three_elsewhere_is_found_by_check(tmp_path: Path) -> None:
    # down_proj has 8 rows of bytes, of which all are sampled; the up projection has 12.
    name = "model.layers.0.mlp.up_proj.weight"
    skipped = sorted({*range(12)} - {*np.linspace(0, 11, 8).astype(int).tolist()})[0]
    model = altered(tmp_path / "m", name, packed(0b11, (skipped, 0)))
    assert facts(model)["oddities"] == []
    (told,) = facts(model, "--check")["oddities"]
    assert "code 3" in told
    assert "up_proj" in told or "layers.0.up" in told


def test_scales_that_look_inverted(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    tensors = dict(load_file(model / "model.safetensors"))
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = np.full(1, 1 / 0.02, np.float32)
    save_file(tensors, model / "model.safetensors")
    (told,) = facts(model)["oddities"]
    assert told.startswith(f"{7 * LAYERS} of {7 * LAYERS} weight scales look inverted")
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]["linear_class"]  # now they divide
    (model / "config.json").write_text(json.dumps(config))
    assert facts(model)["oddities"] == []


def test_a_scale_that_is_no_scale_is_told(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    model = altered(tmp_path / "m", name, lambda array: array * 0)
    assert "scale" in facts(model)["oddities"][0]


def test_the_scales_of_the_2b_model() -> None:
    spec = tiny_spec(attn_sub_norm=True, ffn_sub_norm=True, num_layers=30, hidden_size=2560,
                     ffn_size=6912)  # fmt: skip
    assert inspection._is_2b(spec)
    assert not inspection._is_2b(tiny_spec())


def test_no_pre_tokenizer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    fields = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps({**fields, "pre_tokenizer": None}))
    assert "no pre-tokenizer" in facts(model)["oddities"][0]


def test_ends_of_text_that_disagree(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    (told,) = facts(model)["oddities"]
    assert "at 7 only" in told
    assert "at 257 too" in told
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": [257, 9999]}))
    assert facts(model)["oddities"] == ["the end-of-text token 9999 is not in the vocabulary"]


def test_no_end_of_text(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", chat=False)
    for name, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        fields = json.loads((model / name).read_text())
        del fields[key]
        (model / name).write_text(json.dumps(fields))
    assert facts(model)["oddities"] == [
        "no token ends a text: an answer goes on until it is as long as allowed"
    ]


def test_the_memory_plan_follows_the_batch(model: Path) -> None:
    one, many = (facts(model, "--context", "1000", "--batch", n)["memory"] for n in (1, 5))
    assert many["kv"] == 5 * one["kv"]
    assert many["context"] == 1000
    text = info(model, "--context", "1000", "--batch", "5").stdout
    assert "memory for 5 sequences with a context of 1000 tokens: fits" in text


def test_the_batch_and_the_tokens_of_the_cache_say_the_same_thing(model: Path) -> None:
    result = info(model, "--batch", "2", "--kv-tokens", "100")
    assert result.exit_code == 2
    assert "give one of them" in result.stderr
    assert facts(model, "--context", "64", "--kv-tokens", "640")["memory"]["kv_tokens"] == 640


def test_a_model_is_named_by_option_as_well(model: Path) -> None:
    assert facts("-m", str(model)) == facts(str(model))


def test_what_a_reader_warns_of_is_unusual(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(path: Path) -> Any:
        warnings.warn("its pre-tokenizer is missing", stacklevel=2)
        return opened(path)

    opened = formats.open_checkpoint
    monkeypatch.setattr(formats, "open_checkpoint", warn)
    assert facts(model)["oddities"] == ["its pre-tokenizer is missing"]
    assert info(model).stderr == ""
