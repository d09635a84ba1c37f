"""Models made to do harm, or damaged anywhere: one clear error, soon, and nothing else."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bitllm.errors import BitllmError, CheckpointError, FormatError
from bitllm.formats import open_checkpoint, read_generation_config
from bitllm.formats.inspection import oddities
from bitllm.formats.safetensors import SafetensorsFile
from bitllm.tokenizer import load_tokenizer
from cli_model import write_model
from fuzz.targets import TARGETS, attempt

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
DEEP = {
    "lists": b"[" * 200_000 + b"]" * 200_000,
    "objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "unfinished": b'{"a":[' * 200_000,
}
HUGE = {
    "digits": "9" * 5_000,
    "exponent": "1e999999999",
    "negative": "-9" + "0" * 400,
    "infinity": "Infinity",
    "not a number": "NaN",
    "2^63": str(2**63),
    "2^64": str(2**64),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sound") / "m")


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "m"))


def use(path: Path) -> None:
    """Read everything that loading reads, except for the backend."""
    checkpoint = open_checkpoint(path)
    oddities(checkpoint, thorough=True)
    read_generation_config(path)
    tokenizer = load_tokenizer(path)
    tokenizer.encode("some text")
    if tokenizer.has_chat_template:
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])


def boundaries(size: int, step: int) -> Iterator[int]:
    yield from range(min(size, 600))
    yield from range(600, size, step)


@pytest.mark.parametrize("name", FILES)
def test_truncated_anywhere(model: Path, name: str) -> None:
    whole = (model / name).read_bytes()
    for length in boundaries(len(whole), max(1, len(whole) // 40)):
        (model / name).write_bytes(whole[:length])
        with pytest.raises(BitllmError) as caught:
            use(model)
        assert name in caught.value.message, (length, caught.value.message)
    (model / name).write_bytes(whole)
    use(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", DEEP)
def test_nested_without_end(model: Path, name: str, kind: str) -> None:
    (model / name).write_bytes(DEEP[kind])
    start = time.monotonic()
    with pytest.raises(BitllmError, match=name):
        use(model)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_half_of_a_surrogate_pair(model: Path, name: str) -> None:
    fields = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps({**fields, "eos_token": "\ud83d\ude42"}))
    use(model)
    (model / name).write_text(json.dumps({**fields, "eos_token": "\ud83d"}))
    with pytest.raises(BitllmError, match=rf"{name}: .*surrogates"):
        use(model)


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize(
    "key",
    ["hidden_size", "num_hidden_layers", "vocab_size", "head_dim", "rope_theta", "rms_norm_eps",
     "max_position_embeddings", "num_attention_heads", "eos_token_id"],
)  # fmt: skip
def test_numbers_beyond_reason(model: Path, key: str, number: str) -> None:
    config = json.loads((model / "config.json").read_text())
    text = json.dumps({**config, key: "HERE"}).replace('"HERE"', HUGE[number])
    (model / "config.json").write_text(text)
    start = time.monotonic()
    message = ""
    try:
        use(model)
    except BitllmError as error:
        message = error.message
    assert len(message) < 1000
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "shard",
    [
        "../m/x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "x\0y",
        "..\\x",
        7,
        None,
        [],
    ],
)
def test_an_index_that_leads_elsewhere(model: Path, shard: Any) -> None:
    (model / "model.safetensors").rename(model / "x.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(model / "x.safetensors"), shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        open_checkpoint(model)


def test_an_index_of_very_many_shards(model: Path) -> None:
    names = {f"t{i}": f"s{i}.safetensors" for i in range(200_000)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(model)
    assert time.monotonic() - start < 5


def test_a_shard_that_is_a_link_to_itself(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_directory_instead_of_a_file(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).mkdir()
    with pytest.raises(BitllmError):
        use(model)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_instead_of_a_file_is_not_waited_for(model: Path, name: str) -> None:
    import os

    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(BitllmError):
        use(model)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_chat_template_that_is_no_template(
    model: Path, template: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**fields, "chat_template": template}))
    start = time.monotonic()
    with pytest.raises(BitllmError):
        use(model)
    assert time.monotonic() - start < 20
    assert not (tmp_path / "owned").exists()


def test_names_that_mean_other_tensors(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "../../x": tensors["model.norm.weight"]}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="no place"):
        open_checkpoint(model)


@pytest.mark.parametrize("header", ["[]", '{"x":{"dtype":"F32"}}', '{"x":1,"x":1}'])
def test_what_is_damaged_has_a_way_out(header: str, model: Path) -> None:
    content = len(header).to_bytes(8, "little") + header.encode()
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError) as caught:
        open_checkpoint(model)
    assert "fetch it again" in str(caught.value.hint)


# Headers that are right in most things: hypothesis chooses where they lie.
EXTENTS = st.sampled_from([0, 1, 2, 3, 4, 8, 2**31, 2**32, 2**47, 2**63, 2**64, 2**200, -1])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "C64", "F33", "", 3]),
        "shape": st.lists(EXTENTS, max_size=40),
        "data_offsets": st.lists(EXTENTS, min_size=1, max_size=3),
    }
)
HEADERS = st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), ENTRIES, max_size=4)


@settings(max_examples=300, deadline=2000)
@given(header=HEADERS, length=st.integers(0, 64), said=st.none() | st.integers(0, 2**64 - 1))
def test_safetensors_headers(header: dict[str, Any], length: int, said: int | None) -> None:
    text = json.dumps(header).encode()
    size = len(text) if said is None else said
    attempt(TARGETS["safetensors"], size.to_bytes(8, "little") + text + bytes(length))


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_files_of_a_model_with_bytes_changed(data: st.DataObject, model: Path, sound: Path) -> None:
    name = data.draw(st.sampled_from(FILES[:3]))
    content = bytearray((sound / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (model / name).write_bytes(content)
    try:
        use(model)
    except BitllmError:
        pass
    finally:
        shutil.copy(sound / name, model / name)


def test_a_header_of_many_tensors_is_read_in_time(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"t{index}": entry for index in range(100_000)}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    start = time.monotonic()
    assert len(SafetensorsFile(path).entries) == 100_000
    assert time.monotonic() - start < 10


def test_a_name_that_is_there_many_times_is_refused_in_time(tmp_path: Path) -> None:
    # Finding the second one must not take quadratic time.
    names = ",".join(f'"t{index}":1' for index in range(100_000))
    text = ("{" + names + ',"t99999":1}').encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    start = time.monotonic()
    with pytest.raises(FormatError, match="'t99999' twice"):
        SafetensorsFile(path)
    assert time.monotonic() - start < 5
