"""GGUF files from end to end: the library, the command line, and what is planned for them."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitllm
from bitllm.cli.app import app
from bitllm.config import EngineOptions
from bitllm.engine.loading import open_tokenizer
from bitllm.engine.memory_plan import plan_memory
from bitllm.errors import ConfigError
from bitllm.formats import open_checkpoint, resolve_model
from gguf_model import HIDDEN, VOCAB, byte_tokenizer_metadata, write_twins


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without the embedding of its end token, so that it goes on writing."""
    tokenizer = byte_tokenizer_metadata(VOCAB - 2, VOCAB - 1)
    return write_twins(tmp_path_factory.mktemp("gguf"), metadata=tokenizer)[1]


def test_a_file_is_a_model_reference(model: Path) -> None:
    files = resolve_model(model)
    assert (files.path, files.name) == (model, "tiny-I2_S")
    with pytest.raises(ConfigError, match="no revision"):
        resolve_model(model, revision="main")


def test_loading_and_writing(model: Path) -> None:
    with bitllm.load(model, threads=1) as llm:
        text = llm.generate("Hello", max_tokens=8, seed=1)
        assert llm.tokenizer.encode("Hi")[0] == VOCAB - 2
    with bitllm.load(model, device="reference") as llm:
        assert str(llm.generate("Hello", max_tokens=8, seed=1)) == str(text)


def test_the_commands(model: Path) -> None:
    ran = CliRunner().invoke(app, ["run", "-m", str(model), "--max-tokens", "4", "Hello"])
    assert ran.exit_code == 0, ran.output
    told = CliRunner().invoke(app, ["info", str(model), "--json", "--tensors"])
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    assert facts["architecture"]["name"] == "bitnet-b1.58"
    assert facts["text"]["tokens"] == VOCAB
    assert facts["text"]["stop_ids"] == [VOCAB - 1]
    assert facts["types"]["I2_S"]["tensors"] == 14
    assert [file["name"] for file in facts["files"]] == [model.name]
    plain = CliRunner().invoke(app, ["info", str(model)])
    assert "I2_S" in plain.output


def test_what_has_to_be_decoded_counts_as_memory(tmp_path: Path) -> None:
    q8 = {"token_embd.weight": ("Q8_0", (VOCAB, HIDDEN), bytes(VOCAB * HIDDEN // 32 * 34))}
    mapped = open_checkpoint(write_twins(tmp_path / "a")[1])
    decoded = open_checkpoint(write_twins(tmp_path / "b", tensors=q8)[1])
    options = EngineOptions(head="int8-screened")
    plans = [
        plan_memory(checkpoint, options, available=1 << 40) for checkpoint in (mapped, decoded)
    ]
    assert plans[1].weights - plans[0].weights == 4 * VOCAB * HIDDEN


def test_a_plan_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q8 = {"token_embd.weight": ("Q8_0", (VOCAB, HIDDEN), bytes(VOCAB * HIDDEN // 32 * 34))}
    checkpoint = open_checkpoint(write_twins(tmp_path, tensors=q8)[1])
    monkeypatch.setattr("bitllm.formats.gguf.checkpoint.decode_quantized", None)
    plan_memory(checkpoint, EngineOptions(), available=1 << 40)
    with pytest.raises(TypeError):
        checkpoint.dense("embed")


def test_a_large_vocabulary_opens_quickly_and_undecoded(tmp_path: Path) -> None:
    import time

    words = [f"token-{id}" for id in range(128_256)]
    merges = [f"{a} {a}" for a in words] * 2
    tokenizer = byte_tokenizer_metadata(0, 1) | {
        "tokenizer.ggml.tokens": ("[str]", words),
        "tokenizer.ggml.merges": ("[str]", merges),
    }
    _, path = write_twins(tmp_path, metadata=tokenizer)
    start = time.process_time()
    checkpoint = open_checkpoint(path)
    assert time.process_time() - start < 2
    assert np.isfinite(checkpoint.dense("final_norm").to_float32()).all()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 4095), st.sampled_from([0, 1, 2, 36, 64, 127, 255])),
        min_size=1,
        max_size=4,
    )
)
def test_damaged_headers_end_in_a_model_or_an_error(
    model: Path, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(model.read_bytes())
    for place, byte in changes:
        data[place] = byte
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with warnings.catch_warnings(), contextlib.suppress(bitllm.BitllmError):
        warnings.simplefilter("ignore")
        open_tokenizer(path)
        checkpoint = open_checkpoint(path)
        for name in checkpoint.spec.dense_shapes():
            checkpoint.dense(name)
        for name, _ in checkpoint.spec.linear_names():
            checkpoint.ternary(name)
