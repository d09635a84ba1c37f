"""Loading into the native decoder, its memory, its threads, and the edge to native code."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from nanobind.stubgen import StubGen

from batches import Draw, Run, logits_of, make_batch, make_plan, prompt_ids
from bitllm import _native
from bitllm.backends.base import KV_BLOCK_SIZE, Batch, LoadOptions, OutputKind, SamplePlan
from bitllm.backends.cpu import CpuBackend, CpuDecoder
from bitllm.backends.sizes import kv_bytes_per_token, rounded_head_bytes, ternary_bytes
from bitllm.checkpoint import (
    Checkpoint,
    DenseTensor,
    MappedSource,
    StridedMatrix,
    TernaryMatrix,
)
from bitllm.errors import (
    ConfigError,
    FormatError,
    InsufficientMemoryError,
    QuantizationError,
    TensorShapeError,
    UnsupportedModelError,
)
from synthetic import MemorySource, random_checkpoint, tiny_spec


def load(checkpoint: Checkpoint, **options: object) -> CpuDecoder:
    return CpuBackend().load(checkpoint, LoadOptions(**options))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint(tiny_spec(), seed=3)


# Loading


def test_one_matrix_is_in_memory_at_a_time(checkpoint):
    alive: list[weakref.ref[np.ndarray]] = []

    class Source(MemorySource):
        def ternary(self, name: str) -> TernaryMatrix | None:
            gc.collect()
            assert not any(reference() is not None for reference in alive), name
            matrix = self.ternary_matrices[name]
            packed = matrix.packed.copy()
            alive.append(weakref.ref(packed))
            return replace(matrix, packed=packed)

    stored = checkpoint.source
    source = Source(stored.dense_tensors, stored.ternary_matrices)
    load(Checkpoint(checkpoint.spec, source, "counted"))
    assert len(alive) == 7 * len(checkpoint.spec.layers)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_embedding_and_head_are_read_where_they_lie(dtype):
    """A view of a file: read-only, not aligned, not copied, and kept alive by the decoder."""
    checkpoint = random_checkpoint(tiny_spec(), dtype=dtype)
    ids = prompt_ids(9, 101)
    expected = logits_of(load(checkpoint), ids)
    tensors, references = dict(checkpoint.source.dense_tensors), []
    for name in ("embed", "head"):
        values = tensors[name].data
        file = np.frombuffer(bytearray(b"?" + values.tobytes()), np.uint8)
        view = file[1:].view(values.dtype).reshape(values.shape)
        view.flags.writeable = False
        assert not view.flags.aligned
        references.append(weakref.ref(file))
        tensors[name] = DenseTensor(view, dtype)
    source = MemorySource(tensors, checkpoint.source.ternary_matrices)
    decoder = load(Checkpoint(checkpoint.spec, source, "a file"))
    del source, tensors, view, file
    gc.collect()
    assert all(reference() is not None for reference in references)
    np.testing.assert_array_equal(logits_of(decoder, ids), expected)
    decoder.close()
    gc.collect()
    assert all(reference() is None for reference in references)


def test_a_damaged_matrix_is_named(checkpoint):
    matrices = dict(checkpoint.source.ternary_matrices)
    packed = matrices["layers.1.up"].packed.copy()
    packed[5, 2] = 0xFF
    matrices["layers.1.up"] = replace(matrices["layers.1.up"], packed=packed)
    source = MemorySource(checkpoint.source.dense_tensors, matrices)
    with pytest.raises(QuantizationError, match=r"layers\.1\.up.*no ternary code"):
        load(Checkpoint(checkpoint.spec, source, "damaged"))


class StridedSource(MappedSource):
    """The matrices of another source in the layout of transformers, as if in a mapped file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.released = 0
        self.matrices = {
            name: self.stored(checkpoint.ternary(name))
            for name, _ in checkpoint.spec.linear_names()
        }

    @staticmethod
    def stored(matrix: TernaryMatrix) -> StridedMatrix:
        codes = (matrix.codes() + 1).view(np.uint8)
        rows = -(-len(codes) // 4)
        quarters = np.zeros((4 * rows, matrix.in_features), np.uint8)
        quarters[: len(codes)] = codes
        stored = np.zeros((rows, matrix.in_features), np.uint8)
        for place in range(4):
            stored |= quarters[place * rows : (place + 1) * rows] << np.uint8(2 * place)
        return StridedMatrix(stored, matrix.out_features, matrix.scales)

    def dense(self, name: str) -> DenseTensor | None:
        return self.checkpoint.source.dense(name)

    def ternary(self, name: str) -> TernaryMatrix | None:
        raise FormatError(f"{name}: said by the reader")

    def strided(self, name: str) -> StridedMatrix | None:
        return self.matrices.get(name)

    def release(self) -> None:
        self.released += 1


@pytest.mark.parametrize("packing", ["2bit", "base3"])
def test_matrices_are_packed_from_the_layout_of_the_file(packing):
    checkpoint = random_checkpoint(tiny_spec(hidden_size=330, ffn_size=513), seed=3)
    source = StridedSource(checkpoint)
    strided = load(replace(checkpoint, source=source), packing=packing)
    assert source.released == 7 * 2 + 1  # after each matrix, and after all
    ids = prompt_ids(9, 101)
    np.testing.assert_array_equal(logits_of(strided, ids), logits_of(load(checkpoint), ids))


@pytest.mark.parametrize("damage", ["code 3", "hole"])
def test_of_a_damaged_file_its_reader_says_what_is_wrong(checkpoint, damage):
    source = StridedSource(checkpoint)
    stored = source.matrices["layers.1.up"].stored
    stored[...] = 0 if damage == "hole" else stored | 0x0C
    with pytest.raises(FormatError, match=r"layers\.1\.up: said by the reader"):
        load(replace(checkpoint, source=source))
    source.ternary = checkpoint.source.ternary  # a reader that finds nothing
    with pytest.raises(QuantizationError, match=r"layers\.1\.up: (packed weights|all bytes)"):
        load(replace(checkpoint, source=source))


def test_a_matrix_of_zeros_is_warned_about(checkpoint):
    source = StridedSource(checkpoint)
    source.matrices["layers.1.up"].stored[...] = 0x55
    with pytest.warns(UserWarning, match=r"every weight of layers\.1\.up is zero"):
        load(replace(checkpoint, source=source))


def test_a_strided_matrix_of_another_shape_is_refused(checkpoint):
    source = StridedSource(checkpoint)
    source.matrices["layers.1.up"] = source.matrices["layers.1.down"]
    with pytest.raises(TensorShapeError, match=r"layers\.1\.up.*\[44, 70\]"):
        load(replace(checkpoint, source=source))


@pytest.mark.parametrize("name", ["final_norm", "layers.1.attn_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_norm_that_is_no_number_is_refused(checkpoint, name, value):
    tensors = dict(checkpoint.source.dense_tensors)
    gain = tensors[name].to_float32().copy()
    gain[2] = value
    tensors[name] = DenseTensor(gain, "f32")
    source = MemorySource(tensors, checkpoint.source.ternary_matrices)
    with pytest.raises(FormatError, match=f"{name} holds NaN or infinity"):
        load(Checkpoint(checkpoint.spec, source, "damaged"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_no_number_is_refused(checkpoint, value):
    matrices = dict(checkpoint.source.ternary_matrices)
    scales = np.full_like(matrices["layers.1.up"].scales, value)
    matrices["layers.1.up"] = replace(matrices["layers.1.up"], scales=scales)
    source = MemorySource(checkpoint.source.dense_tensors, matrices)
    with pytest.raises(QuantizationError, match=r"scale of layers\.1\.up is NaN or infinite"):
        load(Checkpoint(checkpoint.spec, source, "damaged"))


def test_threads_that_the_system_refuses(checkpoint, monkeypatch):
    def refuse(**_: object) -> None:
        raise RuntimeError("Resource temporarily unavailable")

    monkeypatch.setattr(_native, "Decoder", refuse)
    with pytest.raises(ConfigError, match="does not give 3 threads"):
        load(checkpoint, threads=3)


def test_more_columns_than_products_are_exact_for_are_refused():
    spec = tiny_spec(ffn_size=(1 << 24) // 127 + 1)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.down has 132105 columns"
    ) as caught:
        load(Checkpoint(spec, MemorySource({}, {}), "wide"))
    assert "reference" in str(caught.value)


def test_an_unknown_kernel_set_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="mmx") as caught:
        load(checkpoint, isa="mmx")
    assert "scalar" in str(caught.value)


# Memory


def test_the_info_says_what_was_taken(checkpoint):
    decoder = load(checkpoint, threads=2, kv_tokens=70, isa="scalar")
    assert decoder.kv_capacity == 3
    info = decoder.info
    assert (info.backend, info.kernel, info.threads) == ("cpu", "scalar", 2)
    assert (info.packing, info.head) == ("2bit", "full")
    weights = ternary_bytes(checkpoint.spec, "2bit")
    cache = 3 * KV_BLOCK_SIZE * kv_bytes_per_token(checkpoint.spec, "bf16")
    dense = sum(checkpoint.dense(name).nbytes for name in ("embed", "head"))
    assert weights + dense < info.weight_bytes < weights + dense + 8192
    assert cache == 3 * KV_BLOCK_SIZE * 2 * (2 * 2 * 10) * 2
    assert cache <= info.kv_bytes < cache + 8192
    assert info.scratch_bytes > 512 * 44 * 4
    assert load(checkpoint, kv_dtype="fp32", kv_tokens=70).info.kv_bytes >= 2 * cache


@pytest.mark.parametrize("head", ["full", "screened", "int8-screened", "int8", "auto"])
def test_the_sizes_are_those_of_the_native_code(checkpoint, head):
    decoder = load(checkpoint, head=head, packing="base3", kv_dtype="int8")
    assert decoder.rounded_head_bytes == rounded_head_bytes(checkpoint.spec, head, 2)
    assert sum(decoder.packed_bytes().values()) == ternary_bytes(checkpoint.spec, "base3")
    per_token = kv_bytes_per_token(checkpoint.spec, "int8")
    blocks = decoder.kv_capacity
    assert 0 <= decoder.info.kv_bytes - blocks * KV_BLOCK_SIZE * per_token < blocks * 64 * 9


def test_a_cache_beyond_the_free_memory_is_refused(checkpoint):
    with pytest.raises(InsufficientMemoryError, match="KV cache of 1000000000000 tokens") as caught:
        load(checkpoint, kv_tokens=10**12)
    assert "kv_tokens" in str(caught.value)


def test_weights_beyond_the_free_memory_are_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(_native, "available_memory", lambda: 1000)
    with pytest.raises(InsufficientMemoryError, match="synthetic model needs"):
        load(checkpoint)
    monkeypatch.setattr(_native, "available_memory", lambda: 0)  # unknown: tried
    load(checkpoint).close()


def test_memory_that_the_system_refuses_is_reported(checkpoint, monkeypatch):
    monkeypatch.setattr(_native, "available_memory", lambda: 0)
    with pytest.raises(InsufficientMemoryError, match="refused"):
        load(checkpoint, kv_tokens=10**14)


def test_closing_gives_the_memory_back(checkpoint):
    decoder = load(checkpoint, kv_tokens=1 << 17)
    block = decoder.read_blocks(np.array([0], np.int32))
    before = _native.resident_bytes()
    for index in range(decoder.kv_capacity):
        decoder.write_blocks(np.array([index], np.int32), block | 1)
    full = _native.resident_bytes()
    assert full - before > 0.9 * decoder.info.kv_bytes
    decoder.close()
    assert full - _native.resident_bytes() > 0.9 * decoder.info.kv_bytes


# Threads


def test_steps_of_several_threads_queue(checkpoint):
    decoder = load(checkpoint, threads=2, kv_tokens=8 * 96)
    prompts = [prompt_ids(80, 101, seed=seed) for seed in range(8)]
    expected = [logits_of(load(checkpoint, threads=1), ids) for ids in prompts]
    found: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        blocks = range(3 * index, 3 * index + 3)
        parts = [
            decoder.forward(make_batch([Run(prompts[index][start : start + 16], start, blocks)]))
            for start in range(0, 80, 16)
        ]
        found[index] = np.concatenate([part.logits for part in parts])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(8):
        np.testing.assert_array_equal(found[index], expected[index])


def test_closing_waits_for_the_step_under_way(checkpoint):
    decoder = load(checkpoint)
    ids = prompt_ids(200, 101)
    expected = logits_of(decoder, ids)
    found: list[np.ndarray] = []
    begun = threading.Event()

    def work() -> None:
        while True:
            try:
                found.append(logits_of(decoder, ids))
            except ConfigError:
                return
            finally:
                begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    decoder.close()
    thread.join()
    for logits in found:
        np.testing.assert_array_equal(logits, expected)
    with pytest.raises(ConfigError, match="closed"):
        logits_of(decoder, ids)


def test_the_child_of_a_fork_can_go_on():
    script = """
import os, sys
import numpy as np
from batches import logits_of, prompt_ids
from bitllm.backends.base import LoadOptions
from bitllm.backends.cpu import CpuBackend
from synthetic import random_checkpoint, tiny_spec
decoder = CpuBackend().load(random_checkpoint(tiny_spec()), LoadOptions(threads=2))
ids = prompt_ids(100, 101)
expected = logits_of(decoder, ids)
child = os.fork()
same = np.array_equal(logits_of(decoder, ids), expected)
if child == 0:
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not same)
"""
    tests = Path(__file__).parent
    subprocess.run([sys.executable, "-c", script], cwd=tests, timeout=60, check=True)


# The edge to native code


def sampling_batch() -> Batch:
    plan = make_plan([Draw(seed=1, seen={3: 1}, bias={4: 1.0}, allowed=frozenset(range(50)))], 101)
    return make_batch([Run(prompt_ids(5, 101))], OutputKind.SAMPLE, rows=[4], plan=plan)


def other_dtype(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64 if array.dtype == np.float32 else np.float32)


@pytest.mark.parametrize("name", [f.name for f in fields(Batch) if f.name != "plan"])
def test_an_array_of_another_dtype_is_refused(checkpoint, name):
    batch = sampling_batch()
    wrong = replace(batch, **{name: other_dtype(getattr(batch, name))})
    with pytest.raises(ConfigError, match=f"{name} must be a contiguous array of"):
        load(checkpoint).forward(wrong)


@pytest.mark.parametrize("name", [f.name for f in fields(SamplePlan)])
def test_an_array_of_a_plan_of_another_dtype_is_refused(checkpoint, name):
    batch = sampling_batch()
    plan = replace(batch.plan, **{name: other_dtype(getattr(batch.plan, name))})
    with pytest.raises(ConfigError, match=f"plan.{name} must be a contiguous array of"):
        load(checkpoint).forward(replace(batch, plan=plan))


def test_tables_that_are_slices_are_taken(checkpoint):
    batch = sampling_batch()
    wide = np.full((1, 16), -1, np.int32)
    wide[:, ::2] = batch.block_tables
    decoder = load(checkpoint)
    sliced = decoder.forward(replace(batch, block_tables=wide[:, ::2]))
    np.testing.assert_array_equal(sliced.sampled, decoder.forward(batch).sampled)
    strided = np.repeat(batch.token_ids, 2)[::2]
    with pytest.raises(ConfigError, match=r"token_ids must be .* strides \(8,\)"):
        decoder.forward(replace(batch, token_ids=strided))


def test_no_output_array_is_converted():
    """A converted copy would leave the caller's array as it was."""
    x, codes = np.ones((2, 8), np.float32), np.ones((2, 8), np.int8)
    packed = np.full((2, 2), 0x55, np.uint8)
    wrong = np.zeros((2, 8), np.int64)
    matrix = _native.PreparedMatrix(packed, 8, "2bit", "scalar")
    for call in (
        lambda: _native.quantize_activations(x, wrong, np.zeros(2, np.float32), "scalar"),
        lambda: _native.quantize_activations(x, codes, np.zeros(2, np.float64), "scalar"),
        lambda: _native.quantize_activations(x.astype(np.float64), codes, x[:, 0].copy(), "scalar"),
        lambda: _native.PreparedMatrix(packed.astype(np.int8), 8, "2bit", "scalar"),
        lambda: matrix.multiply(codes, np.zeros((2, 2), np.int64)),
        lambda: matrix.multiply(codes, np.zeros((2, 4), np.int32)[:, ::2]),
        lambda: _native.pack(codes, wrong),
        lambda: _native.unpack(packed, wrong),
        lambda: _native.unpack(packed, np.zeros((2, 16), np.int8)[:, ::2]),
        lambda: _native.exp_f32(x[0], np.zeros(8)),
    ):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            call()


def test_native_shapes_are_checked():
    codes, packed = np.ones((2, 8), np.int8), np.full((2, 2), 0x55, np.uint8)
    with pytest.raises(ValueError, match="fit x"):
        _native.quantize_activations(
            np.ones((2, 8), np.float32), codes, np.zeros(3, np.float32), "scalar"
        )
    matrix = _native.PreparedMatrix(packed, 8, "2bit", "scalar")
    for q, shape in [(codes, (2, 3)), (codes, (3, 2)), (codes[:, :7].copy(), (2, 2))]:
        with pytest.raises(ValueError, match="do not fit"):
            matrix.multiply(q, np.zeros(shape, np.int32))
    with pytest.raises(ValueError, match="packed must be"):
        _native.PreparedMatrix(packed, 9, "2bit", "scalar")
    for columns in (0, (1 << 24) // 127 + 1):
        wide = np.full((1, -(-columns // 4)), 0x55, np.uint8)
        with pytest.raises(ValueError, match="no columns or too many"):
            _native.PreparedMatrix(wide, columns, "2bit", "scalar")
    for call in (_native.pack, lambda a, b: _native.unpack(b, a)):
        with pytest.raises(ValueError, match="packed must be"):
            call(codes, np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="kernel set"):
        _native.PreparedMatrix(packed, 8, "2bit", "mmx")
    with pytest.raises(ValueError, match="packing"):
        _native.PreparedMatrix(packed, 8, "4bit", "scalar")


def test_kv_blocks_are_there_only_after_prepare():
    decoder = _native.Decoder(
        isa="scalar",
        vocab=4,
        hidden=4,
        norm_eps=1e-5,
        embedding_scale=1.0,
        kv_blocks=2,
        kv_dtype="bf16",
        threads=1,
        max_batch_tokens=1,
        packing="2bit",
    )
    block, data = np.zeros(1, np.int32), np.zeros((1, 0), np.uint8)
    for call in (
        lambda: decoder.copy_blocks(np.zeros((1, 2), np.int32)),
        lambda: decoder.read_blocks(block, data),
        lambda: decoder.write_blocks(block, data),
    ):
        with pytest.raises(ValueError, match=r"prepare\(\) was not called"):
            call()


def test_a_prepared_model_cannot_be_changed(checkpoint):
    native = load(checkpoint)._native
    ones = np.ones(4, np.float32)
    for call in (
        lambda: native.set_linear(
            0, "q", np.full((4, 1), 0x55, np.uint8), "canonical", 4, 4, ones[:1], 0
        ),
        lambda: native.set_linear_norm(0, "q", ones, 1e-5),
        lambda: native.set_linear_bias(0, "q", ones),
        lambda: native.set_vector(0, "attn_norm", ones),
        lambda: native.set_final_norm(ones),
        native.prepare,
    ):
        with pytest.raises(ValueError, match="the decoder is prepared"):
            call()


def test_the_machine_is_described():
    info = _native.cpu_info()
    assert info["name"]
    assert 1 <= info["physical_cores"] <= info["usable_cpus"]
    known = {"scalar", "avx2", "avxvnni", "avx512vnni", "neon-base", "neon", "neon-i8mm"}
    assert set(_native.kernel_names()) <= known
    assert ("avx2" in _native.kernel_names()) == (
        info["features"]["avx2"] and info["features"]["f16c"]
    )
    assert _native.resident_bytes() > _native.resident_file_bytes() >= 0
    assert _native.available_memory() >= 0
    assert _native.read_bandwidth(1, 1 << 20) > 0


def test_the_stub_is_the_generated_one():
    generator = StubGen(module=_native, quiet=True)
    generator.put(_native)
    path = Path(__file__).parents[1] / "src" / "bitllm" / "_native.pyi"
    assert path.read_text().strip() == generator.get().strip(), "run `make docs`"
