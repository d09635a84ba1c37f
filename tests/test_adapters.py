"""Adapters behind the seam: native and reference give the same bits, and rows do not mix."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batches import Run, logits_of, make_batch, prompt_ids
from bitllm import _native
from bitllm.adapter import Adapter, LowRankUpdate
from bitllm.backends import get_backend
from bitllm.backends.base import Decoder, LoadOptions
from bitllm.backends.cpu import decoder as cpu_decoder
from bitllm.checkpoint import LINEAR_NAMES, Checkpoint
from bitllm.errors import ConfigError, InsufficientMemoryError, QuantizationError, TensorShapeError
from synthetic import SWITCHES, random_adapter, random_checkpoint, tiny_spec

ISAS = _native.kernel_names()
DEVICES = ["reference", "cpu", "mlx"]


def load(device: str, checkpoint: Checkpoint, **options: object) -> Decoder:
    return get_backend(device).load(checkpoint, LoadOptions(**options))


def assert_same_bits(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


def assert_near(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch(switch, isa):
    spec = tiny_spec(**SWITCHES[switch])
    checkpoint, ids = random_checkpoint(spec, seed=5), prompt_ids(40, spec.vocab_size)
    adapter = random_adapter(spec, rank=5)
    reference = load("reference", checkpoint)
    plain = logits_of(reference, ids)
    expected = logits_of(reference, ids, adapter=reference.load_adapter(adapter))
    assert (expected != plain).all(axis=1).any()
    native = load("cpu", checkpoint, isa=isa, threads=2)
    assert_same_bits(logits_of(native, ids, [36, 37], native.load_adapter(adapter)), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("rank", [1, 2, 16, 33, 64, 97])
def test_every_rank_and_dtype(rank, dtype, isa):
    """Rows of no multiple of a tile, and more than one tile of them."""
    spec = tiny_spec(hidden_size=140, ffn_size=197)
    checkpoint, ids = random_checkpoint(spec), prompt_ids(9, 101)
    adapter = random_adapter(spec, rank=rank, dtype=dtype)
    reference = load("reference", checkpoint)
    expected = logits_of(reference, ids, adapter=reference.load_adapter(adapter))
    native = load("cpu", checkpoint, isa=isa, threads=2)
    assert_same_bits(logits_of(native, ids, [7, 8], native.load_adapter(adapter)), expected)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_batches_that_mix_adapters_and_none(data):
    """Each sequence has the logits that it has alone, on both devices."""
    spec = tiny_spec(
        hidden_size=data.draw(st.sampled_from([44, 90])), bias=data.draw(st.booleans())
    )
    checkpoint = random_checkpoint(spec)
    subsets = st.sets(st.sampled_from(LINEAR_NAMES), min_size=1)
    adapters = [
        random_adapter(
            spec,
            seed,
            rank=data.draw(st.integers(1, 20)),
            dtype=data.draw(st.sampled_from(["f32", "bf16"])),
            linears=data.draw(subsets),
            layers=data.draw(st.sets(st.integers(0, 1), min_size=1)),
        )
        for seed in range(data.draw(st.integers(1, 3)))
    ]
    threads = data.draw(st.integers(1, 3))
    reference, native = load("reference", checkpoint), load("cpu", checkpoint, threads=threads)
    for adapter in adapters:
        assert reference.load_adapter(adapter) == native.load_adapter(adapter)
    slots = data.draw(st.lists(st.integers(-1, len(adapters) - 1), min_size=1, max_size=4))
    lengths = [data.draw(st.integers(1, 12)) for _ in slots]
    texts = [prompt_ids(length, 101, seed) for seed, length in enumerate(lengths)]
    runs = [Run(ids, 0, [n], slot) for n, (ids, slot) in enumerate(zip(texts, slots, strict=True))]
    together = native.forward(make_batch(runs)).logits
    assert_same_bits(together, reference.forward(make_batch(runs)).logits)
    for (start, end), ids, slot in zip(
        pairwise(np.cumsum([0, *lengths])), texts, slots, strict=True
    ):
        assert_same_bits(together[start:end], logits_of(reference, ids, adapter=slot))


@pytest.mark.parametrize("isa", ISAS)
def test_threads_and_pieces_change_no_bit(isa):
    spec = tiny_spec(hidden_size=340, ffn_size=517)  # wide enough to be shared by threads
    checkpoint, ids = random_checkpoint(spec), prompt_ids(75, 101)
    adapter = random_adapter(spec, rank=3)
    expected = None
    for threads in (1, 2, 3, 5):
        for cuts in ([], [1, 2, 3], [31, 64]):
            native = load("cpu", checkpoint, isa=isa, threads=threads, packing="base3")
            logits = logits_of(native, ids, cuts, native.load_adapter(adapter))
            expected = logits if expected is None else expected
            assert_same_bits(logits, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_without_adapter_are_those_of_the_model_itself(device):
    checkpoint, ids = random_checkpoint(tiny_spec()), prompt_ids(20, 101)
    decoder = load(device, checkpoint)
    plain = logits_of(decoder, ids)
    slot = decoder.load_adapter(random_adapter(decoder.spec))
    assert_same_bits(logits_of(decoder, ids), plain)
    runs = [Run(ids, 0, [3], slot), Run(ids, 0, [0], -1), Run(ids, 0, [5], slot)]
    mixed = decoder.forward(make_batch(runs)).logits
    # MLX chooses the order of float sums by the number of rows.
    same = assert_near if device == "mlx" else assert_same_bits
    same(mixed[20:40], plain)
    same(mixed[40:], mixed[:20])
    assert (mixed[:20] != plain).any()


@pytest.mark.parametrize("device", DEVICES)
def test_the_sum_is_what_is_added(device):
    """An adapter of one linear against the same linear with what it adds as a bias."""
    spec = tiny_spec(bias=True, num_layers=1)
    checkpoint, ids = random_checkpoint(spec), [17]
    adapter = random_adapter(spec, linears=("q", "v"), rank=2)
    source, added = checkpoint.source, {}
    for name, update in adapter.updates.items():
        # For the one token of this text, what is added to the first layer is known: a bias.
        gain = source.dense("layers.0.attn_norm").to_float32().astype(np.float64)
        h = source.dense("embed").to_float32()[17].astype(np.float64)
        x = h / np.sqrt((h * h).mean() + spec.norm_eps) * gain
        a, b = (m.to_float32().astype(np.float64) for m in (update.a, update.b))
        bias = source.dense(f"{name}.bias")
        total = bias.to_float32() + (b @ (a @ x)) * update.scale
        added[f"{name}.bias"] = replace(bias, data=total.astype(np.float32))
    changed = replace(source, dense_tensors=source.dense_tensors | added)
    decoder = load(device, checkpoint, kv_dtype="fp32")
    got = logits_of(decoder, ids, adapter=decoder.load_adapter(adapter))
    expected = logits_of(load(device, replace(checkpoint, source=changed), kv_dtype="fp32"), ids)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3)
    assert np.abs(got - logits_of(decoder, ids)).max() > 0.05


@pytest.mark.parametrize("device", DEVICES)
def test_slots_are_used_again(device):
    decoder = load(device, random_checkpoint(tiny_spec()))
    ids = prompt_ids(5, 101)
    adapters = [random_adapter(decoder.spec, seed, rank=seed + 1) for seed in range(4)]
    assert [decoder.load_adapter(adapter) for adapter in adapters[:3]] == [0, 1, 2]
    second = logits_of(decoder, ids, adapter=2)
    decoder.unload_adapter(1)
    with pytest.raises(ConfigError, match="slot 1"):
        logits_of(decoder, ids, adapter=1)
    assert decoder.load_adapter(adapters[3]) == 1
    assert (logits_of(decoder, ids, adapter=1) != second).any()
    assert_same_bits(logits_of(decoder, ids, adapter=2), second)
    for slot in (7, -1):
        with pytest.raises(ConfigError, match=f"slot {slot}"):
            decoder.unload_adapter(slot)
    for slot in range(3):
        decoder.unload_adapter(slot)
    with pytest.raises(ConfigError, match="slot 2"):
        logits_of(decoder, ids, adapter=2)
    assert decoder.load_adapter(adapters[2]) == 0
    assert_same_bits(logits_of(decoder, ids, adapter=0), second)


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_of_no_linear_adds_nothing(device):
    decoder, ids = load(device, random_checkpoint(tiny_spec())), prompt_ids(5, 101)
    slot = decoder.load_adapter(Adapter("nothing", {}))
    assert_same_bits(logits_of(decoder, ids, adapter=slot), logits_of(decoder, ids))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("other", [{"num_layers": 3}, {"ffn_size": 71}, {"hidden_size": 45}])
def test_an_adapter_of_another_model_is_refused(device, other):
    decoder = load(device, random_checkpoint(tiny_spec()))
    with pytest.raises(TensorShapeError, match="made for another model"):
        decoder.load_adapter(random_adapter(tiny_spec(**other)))
    assert decoder.load_adapter(random_adapter(tiny_spec())) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_sums_that_leave_float32_are_refused(device):
    decoder = load(device, random_checkpoint(tiny_spec()))
    adapter = random_adapter(decoder.spec, scale=3e38)
    slot = decoder.load_adapter(adapter)
    with pytest.raises(QuantizationError):
        logits_of(decoder, prompt_ids(5, 101), adapter=slot)
    assert np.isfinite(logits_of(decoder, prompt_ids(5, 101))).all()


def test_memory_is_known_before_it_is_taken(monkeypatch):
    decoder = load("cpu", random_checkpoint(tiny_spec()), max_batch_tokens=7)
    one, wider = (random_adapter(decoder.spec, rank=rank) for rank in (4, 6))
    inputs, low = 7 * 70 * 4, 7 * 3 * 4 * 4
    scratch = -(-inputs // 64) * 64 + -(-low // 64) * 64
    matrices = sum(
        -(-matrix.nbytes // 64) * 64 for each in one.updates.values() for matrix in (each.a, each.b)
    )
    assert decoder.adapter_bytes(one) == matrices + scratch
    monkeypatch.setattr(
        cpu_decoder._native, "available_memory", lambda: decoder.adapter_bytes(one) - 1
    )
    with pytest.raises(InsufficientMemoryError, match="adapter of seed 0"):
        decoder.load_adapter(one)
    monkeypatch.undo()
    assert decoder.load_adapter(one) == 0
    assert decoder.adapter_bytes(one) == matrices
    more = -(-7 * 3 * 6 * 4 // 64) * 64 - -(-low // 64) * 64
    assert decoder.adapter_bytes(wider) == more + sum(
        -(-matrix.nbytes // 64) * 64
        for each in wider.updates.values()
        for matrix in (each.a, each.b)
    )


def test_matrices_that_no_adapter_has_are_refused_by_native_code():
    adapter = _native.Adapter(1, 256)
    a, b = np.zeros((1, 16), np.uint8), np.zeros((4, 4), np.uint8)
    for layer, second in ((1, b), (0, b[:, :3].copy()), (0, np.zeros((0, 4), np.uint8))):
        with pytest.raises(ValueError, match="shape"):
            adapter.set(layer, "q", a, "f32", second, "f32", 1.0)
    adapter.set(0, "q", a, "f32", b, "f32", 1.0)
    with pytest.raises(ValueError, match="more than"):
        adapter.set(0, "k", np.zeros((1, 260), np.uint8), "f32", b, "f32", 1.0)


def test_an_adapter_says_how_large_it_is():
    spec = tiny_spec(num_layers=1)
    adapter = random_adapter(spec, rank=3, dtype="bf16", linears=("q",))
    assert (adapter.rank, adapter.nbytes) == (3, 2 * 3 * (44 + 40))
    assert (Adapter("nothing", {}).rank, Adapter("nothing", {}).nbytes) == (0, 0)
    update = adapter.updates["layers.0.q"]
    assert isinstance(update, LowRankUpdate)
    with pytest.raises(TensorShapeError, match="changes layers"):
        Adapter("odd", {"layers.0.norm": update}).check(spec)
