"""Our safetensors reader: equal to the library on good files, a refusal per way to lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from bitllm.errors import BitllmError, CheckpointError, FormatError, TensorShapeError
from bitllm.errors import MissingTensorError as Missing
from bitllm.formats.safetensors import SafetensorsFile


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any, shape: list[Any], start: Any, stop: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    assert str(path) in caught.value.message
    return caught.value.message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_equal_to_the_library(file: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.integers(0, 255, (7,)).astype(np.uint8),
        "half": rng.standard_normal((1, 2, 3)).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.asarray(2.5, np.float32),
        "odd name é/..": rng.integers(-9, 9, (2, 2)).astype(np.int64),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    read = SafetensorsFile(file)
    assert dict(read.metadata) == {"format": "pt"}
    assert set(read.entries) == set(tensors)
    for name, values in tensors.items():
        found = read.array(name)
        assert found.dtype == values.dtype
        assert found.shape == values.shape
        assert (found == values).all()


def test_views_share_the_mapping_and_are_read_only(file: Path) -> None:
    save_file({"a": np.arange(4096, dtype=np.float32)}, file)
    read = SafetensorsFile(file)
    one, two = read.array("a"), read.array("a")
    assert np.shares_memory(one, two)
    assert not one.flags.writeable
    read.release("a")
    del read
    assert (one == np.arange(4096)).all()


def test_bf16_comes_as_its_bits(file: Path) -> None:
    write(file, {"x": entry("BF16", [2], 0, 4)}, bytes([0x80, 0x3F, 0x00, 0xC0]))
    tensor = SafetensorsFile(file).dense("x")
    assert tensor.dtype == "bf16"
    assert tensor.data.dtype == np.uint16
    assert tensor.to_float32().tolist() == [1.0, -2.0]


def test_header_may_be_padded_with_spaces(file: Path) -> None:
    header = json.dumps({"x": entry("U8", [1], 0, 1)}).encode() + b"   "
    write(file, header, b"\x07")
    assert SafetensorsFile(file).array("x").tolist() == [7]


def test_tensors_it_cannot_give(file: Path) -> None:
    write(file, {"x": entry("F8_E4M3", [2], 0, 2), "y": entry("U8", [1], 2, 3)}, b"abc")
    read = SafetensorsFile(file)
    with pytest.raises(Missing, match="'z'"):
        read.array("z")
    with pytest.raises(TensorShapeError, match="F8_E4M3"):
        read.array("x")
    with pytest.raises(TensorShapeError, match="'y' should be F32"):
        read.dense("y")


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x00" * 7])
def test_too_short_for_a_header_length(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert "no safetensors file" in refusal(file)


@pytest.mark.parametrize("length", [3, 1 << 20, 100_000_001, (1 << 64) - 1])
def test_header_length_lies(file: Path, length: int) -> None:
    write(file, {}, b"", length)
    message = refusal(file)
    assert "is said to be" in message or "not a JSON object" in message


def test_a_git_lfs_pointer_is_recognised(file: Path) -> None:
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(FormatError, match="git lfs pull"):
        SafetensorsFile(file)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(tmp_path / "none")
    with pytest.raises(CheckpointError, match="directory"):
        SafetensorsFile(tmp_path)


GOOD = entry("U8", [4], 0, 4)
LIES: dict[str, tuple[Any, str]] = {
    "not json": (b"{nonsense}", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', "not valid JSON"),
    "no object": (b"[1, 2]", "not a JSON object"),
    "text behind the object": (b"{} {}", "not valid JSON"),
    "nested without end": (b'{"a":' * 100_000, "nested too deeply"),
    "a number of 5000 digits": (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "infinity": (b'{"x": Infinity}', "the number Infinity"),
    "not a number": (b'{"x": NaN}', "the number NaN"),
    "a name twice": (
        b'{"x": {"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"x": {"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        "'x' twice",
    ),
    "a key twice": (b'{"x": {"dtype":"U8","dtype":"U8"}}', "'dtype' twice"),
    "metadata that is no object": ({"__metadata__": 3, "x": GOOD}, "__metadata__"),
    "metadata with numbers": ({"__metadata__": {"a": 3}, "x": GOOD}, "__metadata__"),
    "an entry that is no object": ({"x": [1]}, "needs dtype, shape"),
    "no offsets": ({"x": {"dtype": "U8", "shape": [4]}}, "needs dtype, shape"),
    "a further key": ({"x": {**GOOD, "y": 1}}, "needs dtype, shape"),
    "an unknown dtype": ({"x": entry("U7", [4], 0, 4)}, "unknown dtype"),
    "a dtype that is no text": ({"x": entry(["U8"], [4], 0, 4)}, "unknown dtype"),
    "a negative extent": ({"x": entry("U8", [-4], 0, 4)}, "impossible shape"),
    "a fractional extent": ({"x": entry("U8", [4.0], 0, 4)}, "impossible shape"),
    "a boolean extent": ({"x": entry("U8", [True, 4], 0, 4)}, "impossible shape"),
    "an enormous extent": ({"x": entry("U8", [0, 1 << 60], 0, 0)}, "impossible shape"),
    "too many dimensions": ({"x": entry("U8", [1] * 40 + [4], 0, 4)}, "impossible shape"),
    "offsets backwards": ({"x": entry("U8", [4], 4, 0)}, "impossible data_offsets"),
    "negative offsets": ({"x": entry("U8", [4], -4, 0)}, "impossible data_offsets"),
    "three offsets": ({"x": {**GOOD, "data_offsets": [0, 2, 4]}}, "impossible data_offsets"),
    "fractional offsets": ({"x": entry("U8", [4], 0, 4.0)}, "impossible data_offsets"),
    "too few bytes for the shape": ({"x": entry("F32", [4], 0, 4)}, "needs 16 bytes"),
    "half bytes": ({"x": entry("F4", [3], 0, 2)}, "needs 1.5 bytes"),
    "overlap": ({"x": entry("U8", [3], 0, 3), "y": entry("U8", [2], 2, 4)}, "overlaps with 'x'"),
    "the same bytes twice": ({"x": GOOD, "y": GOOD}, "overlaps with 'x'"),
    "a hole": ({"x": entry("U8", [1], 0, 1), "y": entry("U8", [2], 2, 4)}, "a hole behind 'x'"),
    "a hole at the start": ({"x": entry("U8", [3], 1, 4)}, "a hole behind the header"),
    "beyond the end": ({"x": entry("U8", [5], 0, 5)}, "its header describes"),
    "far beyond the end": ({"x": entry("U8", [1 << 45], 0, 1 << 45)}, "its header describes"),
    "bytes of no tensor": ({"x": entry("U8", [3], 0, 3)}, "belong to no tensor"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(file: Path, lie: str) -> None:
    header, message = LIES[lie]
    write(file, header, b"\x00" * 4)
    assert message in refusal(file)


def test_a_long_name_does_not_flood_the_message(file: Path) -> None:
    write(file, {"x" * 10_000: 3})
    assert len(refusal(file)) < 600


def test_a_file_that_became_shorter_is_refused_and_not_read(file: Path) -> None:
    save_file({"a": np.zeros(5_000, np.float32), "b": np.ones(50_000, np.float32)}, file)
    read = SafetensorsFile(file)
    os.truncate(file, 25_000)
    assert read.array("a").sum() == 0
    with pytest.raises(FormatError, match="shorter"):
        read.array("b")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_stays_in_bounds(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save_file({"a": np.ones((3, 5), np.float32), "b": np.ones(7, np.uint8)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read = SafetensorsFile(file)
        for name, found in read.entries.items():
            assert 8 < found.start <= found.stop <= len(content)
            read.array(name)
    except BitllmError:
        pass
