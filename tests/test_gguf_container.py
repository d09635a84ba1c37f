"""The GGUF container: what it holds, and one error for each way in which it can lie."""

from __future__ import annotations

import itertools
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitllm.errors import BitllmError, CheckpointError, FormatError, UnsupportedModelError
from bitllm.formats.gguf.container import GgufArray, GgufFile
from bitllm.formats.gguf.shards import find_gguf
from gguf_files import gguf_bytes, string, value, write_gguf

METADATA: dict[str, tuple[str, Any]] = {
    "general.architecture": ("str", "llama"),
    "a.number": ("u32", 7),
    "a.float": ("f32", 0.5),
    "a.switch": ("bool", True),
    "a.list": ("[i32]", [1, -2, 3]),
    "a.words": ("[str]", ["", "ein", "Wört", "❄"]),
}
TENSORS: dict[str, Any] = {
    "first": ("F32", (2, 3), np.arange(6, dtype="<f4").tobytes()),
    "second": ("F16", (5,), np.arange(5, dtype="<f2").tobytes()),
}


def opened(tmp_path: Path, data: bytes) -> GgufFile:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return GgufFile(path)


def test_values_and_tensors(tmp_path: Path) -> None:
    file = opened(tmp_path, gguf_bytes(METADATA, TENSORS))
    assert file.values("a.number") == 7
    assert file.values("a.float") == 0.5
    assert file.values("a.switch") is True
    assert isinstance(file.metadata["a.words"], GgufArray)
    assert file.values("a.words") == ["", "ein", "Wört", "❄"]
    assert file.values("a.list").tolist() == [1, -2, 3]
    assert file.values("missing") is None
    assert file.tensor("first").shape == (2, 3)
    assert file.bytes("second").view("<f2").tolist() == [0, 1, 2, 3, 4]
    file.release()
    assert file.bytes("first").view("<f4").tolist() == [0, 1, 2, 3, 4, 5]


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert not opened(tmp_path, gguf_bytes(METADATA, {})).tensors


def test_a_file_of_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_custom_alignment(64)
    writer.add_tensor("t", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("u", np.ones((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    assert file.values("llama.block_count") == 3
    assert file.values("tokenizer.ggml.tokens") == ["a", "b"]
    assert file.values("floats").tolist() == [0.5, 1.5]
    assert file.bytes("t").view("<f4").reshape(3, 4)[2, 3] == 11
    assert file.tensor("t").start % 64 == 0
    assert (file.tensor("u").type.name, file.tensor("u").shape) == ("Q8_0", (2, 32))


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    whole = gguf_bytes(METADATA, TENSORS)
    data_end = len(whole) - 32 + 10  # the second tensor has 10 bytes, the rest fills up
    for length in range(data_end):
        with pytest.raises(FormatError, match=r"x\.gguf"):
            opened(tmp_path, whole[:length])
    opened(tmp_path, whole[:data_end])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"first": ("F32", (2, 3), b"")}, "needs 24 bytes, 0 are there until the next tensor"),
        ({"first": ("F32", (0, 3), b"")}, "impossible shape"),
        ({"first": ("F32", (2**63, 2**63), b"")}, "impossible shape"),
        ({"first": ("F32", (2**40, 3), b"")}, "bytes, 0 are there"),
        ({"first": ("Q8_0", (2, 3), b"")}, "no blocks of 32"),
        ({"first": ("F32", (1, 1, 1, 1, 1), bytes(4))}, "5 dimensions"),
        ({"n" * 2000: ("F32", (1,), bytes(4))}, "2000 bytes long, more than 1024"),
    ],
)
def test_lies_about_tensors(tmp_path: Path, change: dict[str, Any], error: str) -> None:
    with pytest.raises(FormatError, match=error):
        opened(tmp_path, gguf_bytes(METADATA, {**change, **TENSORS, **change}))


def test_an_unknown_type_is_refused_by_its_number(tmp_path: Path) -> None:
    tensors = {"odd": (999, (32,), bytes(32))}
    with pytest.raises(UnsupportedModelError, match="'odd' has the type 999"):
        opened(tmp_path, gguf_bytes(METADATA, tensors))


def header(counts: tuple[int, int], rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + rest


TEXT = struct.pack("<I", 8)
WORDS = struct.pack("<II", 9, 8)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "0 bytes are no GGUF file"),
        (b"GGUG" + bytes(40), "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1", "not a GGUF file"),
        (header((2**63, 0)), "9223372036854775808 tensors are announced"),
        (header((0, 2**64 - 1)), "18446744073709551615 metadata keys are announced"),
        (header((0, 1), struct.pack("<Q", 2**63) + bytes(64)), "said to be 9223372036854775808"),
        (header((0, 1), string("k") + TEXT + struct.pack("<Q", 2**63) + bytes(8)), "bytes long"),
        (header((0, 1), string("k") + TEXT + struct.pack("<Q", 9) + bytes(8)), "needs 9 bytes"),
        (header((0, 1), string(b"\xff") + TEXT + string("v")), "no UTF-8"),
        (header((0, 1), string("k") + TEXT + string(b"\xff")), "no UTF-8"),
        (header((0, 1), string("k") + struct.pack("<I", 77) + bytes(8)), "unknown type 77"),
        (header((0, 2), 2 * (string("k") + value("u32", 1))), "name 'k' twice"),
        (header((0, 1), string("k") + WORDS + struct.pack("<Q", 2**62)), "strings of"),
        (header((0, 1), string("k") + WORDS + struct.pack("<QQ", 1, 2**63) + bytes(16)), "behind"),
        (header((0, 1), string("k") + WORDS + struct.pack("<QQQ", 2, 9, 0) + bytes(2)), "string 1"),
        (header((0, 1), string("k") + struct.pack("<IIQ", 9, 10, 2**61)), "needs"),
        (header((0, 1), string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(32)), "of arrays"),
        (header((0, 1), string("k") + struct.pack("<IIQ", 9, 77, 1) + bytes(32)), "type 77"),
    ],
)
def test_lies_about_counts_and_lengths(tmp_path: Path, data: bytes, error: str) -> None:
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(FormatError, match=error):
        opened(tmp_path, data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    assert time.monotonic() - start < 5
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("version", "error"), [(1, "version 1"), (4, "version 4"), (0x03000000, "big-endian")]
)
def test_other_versions_are_refused_by_name(tmp_path: Path, version: int, error: str) -> None:
    with pytest.raises(UnsupportedModelError, match=error):
        opened(tmp_path, gguf_bytes(METADATA, TENSORS, version=version))


def test_version_2_is_read(tmp_path: Path) -> None:
    assert len(opened(tmp_path, gguf_bytes(METADATA, TENSORS, version=2)).tensors) == 2


@pytest.mark.parametrize("alignment", [0, 1, 24, 2**31])
def test_impossible_alignments(tmp_path: Path, alignment: int) -> None:
    metadata = {"general.alignment": ("u32", alignment)}
    with pytest.raises(FormatError, match="power of two"):
        opened(tmp_path, gguf_bytes(metadata, TENSORS))


def raw_infos(*infos: tuple[str, int, int]) -> bytes:
    """F32 vectors as (name, length, offset), followed by 256 bytes of data."""
    text = b"".join(
        string(name) + struct.pack("<IQIQ", 1, length, 0, offset) for name, length, offset in infos
    )
    head = header((len(infos), 0), text)
    return head + bytes(-len(head) % 32) + bytes(256)


@pytest.mark.parametrize(
    ("infos", "error"),
    [
        ([("a", 8, 0), ("a", 8, 32)], "two tensors are called 'a'"),
        ([("a", 8, 0), ("b", 8, 0)], "needs 32 bytes, 0 are there"),
        ([("a", 9, 0), ("b", 8, 32)], "needs 36 bytes, 32 are there"),
        ([("a", 8, 4)], "no multiple of 32"),
        ([("a", 8, 2**63)], "begins behind the end of the file"),
        ([("a", 8, 2**64 - 32), ("b", 8, 0)], "begins behind the end of the file"),
        ([("a", 2**46, 0)], "are there until the next tensor or the end"),
    ],
)
def test_lies_about_places(tmp_path: Path, infos: Any, error: str) -> None:
    with pytest.raises(FormatError, match=error):
        opened(tmp_path, raw_infos(*infos))


def test_the_ids_that_forks_share_are_told_apart_by_size(tmp_path: Path) -> None:
    count = 4 * 512
    for size, wanted in (
        (count // 64 * 18, "Q2_0"),
        (count // 128 * 34, "Q2_0_G128"),
        (count // 256 * 42, "STQ1_0"),
        (count // 5, "TL2"),
    ):
        tensors = {"a": (42, (4, 512), bytes(size)), "b": ("F32", (1,), bytes(4))}
        assert opened(tmp_path, gguf_bytes({}, tensors)).tensor("a").type.name == wanted
    mxfp4 = {"a": (39, (4, 512), bytes(count // 32 * 17))}
    assert opened(tmp_path, gguf_bytes({}, mxfp4)).tensor("a").type.name == "MXFP4"
    iq = {"a": (36, (4, 512), bytes(count // 32 * 18))}
    assert opened(tmp_path, gguf_bytes({}, iq)).tensor("a").type.name == "IQ4_NL_4_4"


def test_a_cut_off_tensor_keeps_its_type(tmp_path: Path) -> None:
    tensors = {name: (42, (4, 512), bytes(32 * 18)) for name in ("a", "b")}
    with pytest.raises(FormatError, match=r"'b' of type Q2_0 .*needs 576 bytes, 64 are there"):
        opened(tmp_path, gguf_bytes({}, tensors)[:-512])


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    file = opened(tmp_path, gguf_bytes(METADATA, TENSORS))
    with file.path.open("r+b") as writable:
        writable.truncate(100)
    with pytest.raises(FormatError, match="has become shorter"):
        file.bytes("first")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        GgufFile(tmp_path / "x.gguf")


def test_safetensors_are_preferred_in_a_directory(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", METADATA, TENSORS)
    assert find_gguf(tmp_path) == find_gguf(path) == path
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(tmp_path) is None
    assert find_gguf(tmp_path / "nothing") is None


WHOLE = gguf_bytes(METADATA, TENSORS)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.sampled_from([0, 1, 8, 9, 127, 128, 255])),
        min_size=1,
        max_size=6,
    ),
    cut=st.integers(0, len(WHOLE)),
)
def test_damaged_files_are_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(WHOLE)
    for place, byte in changes:
        data[place] = byte
    try:
        file = opened(tmp_path, bytes(data[: cut or None]))
        for key in file.metadata:
            file.values(key)
        for name, tensor in file.tensors.items():
            assert len(file.bytes(name)) == tensor.stop - tensor.start
    except BitllmError as error:
        refusal = error.message
    else:
        return
    assert "x.gguf" in refusal


SCALAR_VALUES = st.one_of(
    st.tuples(st.just("u32"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("u64"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("i8"), st.integers(-128, 127)),
    st.tuples(st.just("bool"), st.booleans()),
    st.tuples(st.just("f32"), st.floats(width=32)),
    st.tuples(st.just("str"), st.text(max_size=8)),
    st.tuples(st.just("[str]"), st.lists(st.text(max_size=4), max_size=4)),
    st.tuples(st.just("[i32]"), st.lists(st.integers(-5, 5), max_size=4)),
)
SIZES = st.one_of(st.integers(0, 300), st.sampled_from([256, 2**31, 2**32, 2**62, 2**64 - 1]))
INFOS = st.lists(
    st.tuples(
        st.text(max_size=3),
        st.lists(SIZES, max_size=5),
        st.one_of(st.sampled_from([0, 1, 8, 34, 35, 36, 38, 39, 42, 134, 335]), SIZES),
        SIZES.map(lambda size: size // 32 * 32),
    ),
    max_size=5,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pairs=st.dictionaries(st.text(max_size=4), SCALAR_VALUES, max_size=4),
    infos=INFOS,
    extra=st.sampled_from([0, 0, 0, 1, 2**32, 2**63]),
    data=st.integers(0, 4096),
)
def test_any_structure_is_read_or_refused(
    tmp_path: Path, pairs: dict[str, Any], infos: list[Any], extra: int, data: int
) -> None:
    body = b"".join(string(key) + value(*entry) for key, entry in pairs.items())
    for name, dims, kind, offset in infos:
        shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        body += string(name) + shape + struct.pack("<IQ", kind & 0xFFFFFFFF, offset)
    head = header((len(infos) + extra, len(pairs)), body)
    try:
        file = opened(tmp_path, head + bytes(-len(head) % 32) + bytes(data))
    except BitllmError as error:
        refusal = error.message
    else:
        assert len(file.tensors) == len(infos) + extra  # zeros are an info too
        ends = sorted((tensor.start, tensor.stop) for tensor in file.tensors.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
        assert all(len(file.bytes(name)) == t.stop - t.start for name, t in file.tensors.items())
        return
    assert "x.gguf" in refusal
