"""The memory plan: counted before loading, and close to what loading takes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitllm.backends import cpu, get_backend
from bitllm.backends.base import LoadOptions
from bitllm.backends.mlx import device as mlx_device
from bitllm.checkpoint import Checkpoint, DenseTensor, ModelSpec, TernaryMatrix
from bitllm.config import EngineOptions
from bitllm.engine import memory_plan
from bitllm.engine.memory_plan import MemoryPlan, format_bytes, plan_memory
from bitllm.errors import ConfigError, InsufficientMemoryError
from synthetic import random_checkpoint, tiny_spec

GIB = 2**30


class Shapes:
    """A source that has the shapes of a model and refuses to give ternary weights."""

    def __init__(self, spec: ModelSpec) -> None:
        self._shapes = spec.dense_shapes()

    def dense(self, name: str) -> DenseTensor | None:
        one = np.zeros((), np.uint16)
        return DenseTensor(np.broadcast_to(one, self._shapes[name]), "bf16")

    def ternary(self, name: str) -> TernaryMatrix | None:
        raise AssertionError("the plan must not read weights")


def shapes_of_2b() -> Checkpoint:
    spec = tiny_spec(
        num_layers=30,
        vocab_size=128256,
        hidden_size=2560,
        ffn_size=6912,
        num_heads=20,
        num_kv_heads=5,
        head_dim=128,
        attn_sub_norm=True,
        ffn_sub_norm=True,
        tied_head=True,
        max_context=4096,
    )
    return Checkpoint(spec, Shapes(spec), "2B-4T")


def plan(available: int | None = 8 * GIB, **options: Any) -> MemoryPlan:
    return plan_memory(shapes_of_2b(), EngineOptions(**options), available=available)


def test_the_plan_of_a_2b_model() -> None:
    found = plan()
    head = 128256 * 2560 * 2
    norms = (30 * (3 * 2560 + 6912) + 2560) * 2
    ternary = 30 * (2 * 2560 * 2560 + 2 * 640 * 2560 + 3 * 6912 * 2560) // 4
    screen = 128256 * 40 * 34 + 128256 * 4
    assert found.weights == norms + ternary + screen
    assert plan(head="full").weights == norms + ternary + head
    assert found.kv_bytes_per_token == 30 * 2 * 640 * 2
    assert found.kv == 4096 * found.kv_bytes_per_token
    assert found.total == found.weights + found.kv + found.scratch + found.process
    assert found.context == found.kv_tokens == 4096
    assert found.fits


def test_fp32_keys_and_values_take_twice_the_room() -> None:
    assert plan(kv_dtype="fp32").kv == 2 * plan().kv


def test_int8_keys_and_values_have_a_scale_for_each_head() -> None:
    assert plan(kv_dtype="int8").kv_bytes_per_token == 30 * 2 * 5 * (128 + 4)


def test_base3_takes_64_bytes_for_320_weights() -> None:
    saved = 30 * 64 * (2 * 2560 + 2 * 640 + 2 * 6912) * (10 - 8) + 30 * 64 * 2560 * (27 - 22)
    assert plan(packing="2bit").weights - plan(packing="base3").weights == saved
    assert plan(packing="auto").weights == plan(packing="2bit").weights


def test_a_rounded_head_counts_instead_of_the_stored_one() -> None:
    others = plan(head="full").weights - 128256 * 2560 * 2  # the stored head stays in its file
    assert plan(head="screened").weights - others == 128256 * (40 * 34 + 4)
    assert plan(head="int8").weights - others == 128256 * (2560 + 8)
    assert plan(head="int8-screened").weights == plan(head="int8").weights
    assert plan(head="auto").weights == plan(head="screened").weights


def test_context_and_kv_tokens() -> None:
    assert plan(context=100).kv_tokens == 128
    assert plan(context=100).context == 100
    assert plan(context=100, kv_tokens=1000).kv_tokens == 1024
    with pytest.raises(ConfigError, match="context is 5000, but the model was made for 4096"):
        plan(context=5000)
    with pytest.raises(ConfigError, match="kv_tokens is 99, but one sequence may have 100"):
        plan(context=100, kv_tokens=99)
    with pytest.raises(ConfigError, match="may have 4096"):
        plan(kv_tokens=4000)


def test_what_does_not_fit_is_refused_with_the_table() -> None:
    tight = plan(available=1_000_000_000)
    assert not tight.fits
    with pytest.raises(InsufficientMemoryError) as caught:
        tight.check("2B-4T")
    message = str(caught.value)
    assert message.startswith("2B-4T does not fit into the memory available:")
    for line in tight.table().splitlines():
        assert line in message
    assert "hint: context=" in message
    tokens = int(str(caught.value.hint).split("=")[1].split()[0])
    assert plan(available=1_000_000_000, context=tokens).fits
    assert not plan(available=1_000_000_000, context=tokens + 32).fits


def test_the_users_limit_counts_too() -> None:
    limited = plan(memory_limit=2 * 10**9)
    assert limited.allowed == 2 * 10**9
    limited.check("2B-4T")
    with pytest.raises(InsufficientMemoryError, match="does not fit into memory_limit") as caught:
        plan(memory_limit=5 * 10**8).check("2B-4T")
    assert "smaller model" in str(caught.value.hint)
    assert "memory_limit" in str(caught.value)


def test_where_nothing_is_known_everything_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "available_memory", lambda device: None)
    unknown = plan(available=None)
    assert unknown.allowed is None
    assert unknown.fits
    assert "available" not in unknown.table()


def test_the_table_is_aligned() -> None:
    lines = plan(memory_limit=GIB).table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("  ")[1] for line in lines] == [
        "weights",
        "KV cache, 4096 tokens",
        "step scratch",
        "process and tokenizer",
        "total",
        "available",
        "memory_limit",
    ]


def norm_bytes(spec: ModelSpec) -> int:
    """Bytes of the norms in float32, which `DecoderInfo.weight_bytes` leaves out."""
    shapes = spec.dense_shapes().values()
    return 4 * sum(shape[0] for shape in shapes if len(shape) == 1)


def test_metal_recommends_no_more_than_its_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = mlx_device.DeviceFacts("0", "M", True, 16 * GIB, 3000, 1000)
    monkeypatch.setattr(mlx_device, "device_facts", lambda: facts)
    assert memory_plan.available_memory("mlx") == 2000
    assert plan(available=None, device="mlx").available == 2000
    assert plan(available=None, device="reference").available != 2000
    monkeypatch.setattr(mlx_device, "device_facts", lambda: replace(facts, active=5000))
    assert memory_plan.available_memory("mlx") == 0
    monkeypatch.setitem(sys.modules, "bitllm.backends.mlx.device", None)
    assert memory_plan.available_memory("mlx") == memory_plan.available_memory("reference")


@pytest.mark.parametrize(
    ("device", "rows", "options"),
    [
        ("cpu", 1, {}),
        ("cpu", 512, {}),
        ("cpu", 512, {"packing": "base3", "head": "screened", "kv_dtype": "int8"}),
        ("cpu", 512, {"packing": "2bit", "head": "int8", "kv_dtype": "fp32"}),
        ("reference", 1, {}),
        ("reference", 512, {}),
        ("mlx", 512, {"kv_dtype": "int8"}),
    ],
)
def test_the_plan_covers_what_a_decoder_takes(
    device: str, rows: int, options: dict[str, Any]
) -> None:
    spec = tiny_spec(hidden_size=512, ffn_size=1024, num_heads=8, num_kv_heads=2, head_dim=64)
    checkpoint = random_checkpoint(spec)
    wanted = plan_memory(
        checkpoint,
        EngineOptions(device=device, threads=2, max_batch_tokens=rows, **options),
        available=GIB,
    )
    decoder = get_backend(device).load(
        checkpoint,
        LoadOptions(threads=2, max_batch_tokens=rows, kv_tokens=wanted.kv_tokens, **options),
    )
    taken = decoder.info
    decoder.close()
    assert taken.kv_bytes == wanted.kv
    if device == "mlx":
        assert taken.weight_bytes == wanted.weights - norm_bytes(checkpoint.spec)
    left = 0 if "head" not in options else checkpoint.dense("embed").nbytes * 2  # in the file
    assert 0.8 * wanted.weights < taken.weight_bytes - left < 1.2 * wanted.weights
    if device == "cpu":
        assert taken.scratch_bytes == wanted.scratch
    else:
        assert taken.scratch_bytes <= wanted.scratch


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide feed-forward": {"hidden_size": 300, "ffn_size": 1700},
    "wide attention": {"num_heads": 12, "num_kv_heads": 3, "head_dim": 34, "rope_dim": 6},
    "own norms": {"linear_norm_eps": 1e-6},
    "float activations": {"activation_bits": None},
    "float activations, own norms": {"activation_bits": None, "linear_norm_eps": 1e-6},
    "tied head": {"tied_head": True, "vocab_size": 5003},
}


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("rows", [1, 13, 300])
@pytest.mark.parametrize("head", ["full", "screened", "int8-screened", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scratch_is_planned_to_the_byte(shape: str, head: str, rows: int, threads: int) -> None:
    checkpoint = random_checkpoint(tiny_spec(max_context=700, **SHAPES[shape]))
    options: dict[str, Any] = {"threads": threads, "head": head, "max_batch_tokens": rows}
    wanted = plan_memory(checkpoint, EngineOptions(device="cpu", **options), available=GIB)
    decoder = get_backend("cpu").load(
        checkpoint, LoadOptions(kv_tokens=wanted.kv_tokens, **options)
    )
    assert decoder.info.scratch_bytes == wanted.scratch


def test_scratch_of_layers_that_differ() -> None:
    spec = tiny_spec(rope_theta=500.0)
    other = tiny_spec(ffn_size=900, activation_bits=None).layers[0]
    checkpoint = random_checkpoint(replace(spec, layers=(other, *spec.layers)))
    options: dict[str, Any] = {"threads": 2, "max_batch_tokens": 64}
    wanted = plan_memory(checkpoint, EngineOptions(device="cpu", **options), available=GIB)
    decoder = get_backend("cpu").load(checkpoint, LoadOptions(**options))
    assert decoder.info.scratch_bytes == wanted.scratch


def test_absurd_sizes_do_not_wrap_around() -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens"):
        plan(device="cpu", max_batch_tokens=2**61)
    for absurd in ({"max_batch_tokens": 2**31 - 1}, {"kv_tokens": 2**62}, {"kv_tokens": 2**75}):
        found = plan(device="cpu", **absurd)
        assert found.scratch > 10**12
        assert not found.fits


def test_planning_starts_no_threads() -> None:
    before = len(list(Path("/proc/self/task").iterdir()))
    found = plan(device="cpu", threads=61)
    assert len(list(Path("/proc/self/task").iterdir())) == before
    assert found.scratch > plan(device="cpu", threads=1).scratch


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_available_memory_of_this_machine(device: str) -> None:
    found = memory_plan.available_memory(device)
    assert found is not None
    assert 10**7 < found < 10**14


def test_the_cpu_plans_with_what_its_native_code_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 12345)
    assert plan(available=None, device="cpu").available == 12345
    assert memory_plan.available_memory("cpu") == 12345
    assert plan(available=None, device="reference").available != 12345
    monkeypatch.setattr(cpu, "available_memory", lambda: 0)  # unknown to it
    monkeypatch.setattr(memory_plan, "_system_available", lambda: 678)
    assert memory_plan.available_memory("cpu") == 678


def test_without_the_native_module_the_plan_asks_the_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitllm.backends.cpu", None)
    assert memory_plan.available_memory("cpu") is not None


def test_a_control_group_counts_idle_file_pages_as_free(tmp_path: Path) -> None:
    assert memory_plan._group_available(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\n")
    assert memory_plan._group_available(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory_plan._group_available(tmp_path) == 650
    (tmp_path / "memory.max").write_text("100\n")
    assert memory_plan._group_available(tmp_path) == 0


def test_without_meminfo_the_physical_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if "SIZE" in name else 1000)
    assert memory_plan.available_memory("reference") == 4096 * 1000

    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr("os.sysconf", unknown)
    assert memory_plan.available_memory("reference") is None


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (38_100, "38.1 kB"),
        (812_345_678, "812 MB"),
        (1_184_000_000, "1.18 GB"),
        (22_900_000_000, "22.9 GB"),
    ],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text
