"""The arithmetic of `bitllm bench` with made-up durations, and a tiny model from end to end.

How fast anything is, is not judged here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitllm import ops
from bitllm.backends.base import Batch, LoadOptions, OutputKind, StepOutput, check_batch
from bitllm.backends.cpu import CpuBackend, CpuDecoder
from bitllm.backends.mlx import MlxDecoder
from bitllm.backends.mlx import device as mlx_device
from bitllm.bench import BenchSettings, gate, machine, operations, run_bench
from bitllm.bench.model import HeadUse, SpeedRow, StageRow, Timed, TimedStage, Workbench
from bitllm.bench.needs import Need, Needs, nominal_bytes
from bitllm.bench.random_model import SHAPES, Shape, write_checkpoint
from bitllm.bench.report import report_lines, table
from bitllm.bench.roofline import TOLERANCE, Limits, Rates
from bitllm.bench.run import BenchResult
from bitllm.bench.steps import Sequences
from bitllm.bench.timing import Spread, repeat
from bitllm.config import EngineOptions
from bitllm.errors import ConfigError, MeasurementError
from bitllm.formats import open_checkpoint
from synthetic import tiny_spec

TINY = Shape(hidden=32, ffn=64, layers=2, heads=2, kv_heads=1, head_dim=16, vocab=640, context=96)
SETTINGS = BenchSettings(
    prompts=(20, 40),
    generate=3,
    depths=(0, 33),
    batches=(1, 3),
    repeats=2,
    profile=True,
    small=False,
    engine=EngineOptions(threads=2, max_batch_tokens=32),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, TINY)
    return path


@pytest.fixture(scope="module")
def result(model: Path) -> BenchResult:
    return run_bench(str(model), SETTINGS)


class RecordingDecoder:
    """Remembers the batches it is given; draws the position of each row."""

    def __init__(self) -> None:
        self.spec = tiny_spec(vocab_size=101)
        self.batches: list[Batch] = []
        self.pairs: list[list[int]] = []

    def forward(self, batch: Batch) -> StepOutput:
        check_batch(batch, self.spec, kv_capacity=12, max_batch_tokens=32)
        self.batches.append(batch)
        none = np.zeros((0, 0), np.float32)
        drawn = batch.positions[batch.output_rows]
        return StepOutput(none, none, drawn, none[0:0, 0:0].ravel(), none.astype(np.int32), none)

    def copy_blocks(self, pairs: np.ndarray) -> None:
        self.pairs += pairs.tolist()


# Durations


def test_the_spread_is_that_of_the_extremes_over_the_median() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0)
    assert Spread.of([4.0]) == Spread(4.0, 0.0)


def test_the_first_run_is_not_counted() -> None:
    calls: list[int] = []
    assert repeat(lambda: calls.append(1), 3).median >= 0
    assert len(calls) == 4


# Work


def runs_of(batch: Batch) -> list[tuple[int, int]]:
    """First position and length of each run."""
    pairs = zip(batch.run_offsets[:-1], batch.run_offsets[1:], strict=True)
    return [(int(batch.positions[first]), int(last - first)) for first, last in pairs]


def test_prompts_fill_steps_and_draw_once() -> None:
    decoder: Any = RecordingDecoder()
    sequences = Sequences(decoder, 3, 40, 32)
    sequences.prefill(40)
    assert [runs_of(batch) for batch in decoder.batches] == [
        [(0, 32)],
        [(32, 8)],
        [(0, 32)],
        [(32, 8)],
        [(0, 32)],
        [(32, 8)],
    ]
    assert [len(batch.output_rows) for batch in decoder.batches] == [0, 1, 0, 1, 0, 1]
    assert sequences.prefill_steps(40) == 6


def test_short_prompts_share_a_step() -> None:
    decoder: Any = RecordingDecoder()
    Sequences(decoder, 4, 40, 32).prefill(10)
    assert [runs_of(batch) for batch in decoder.batches] == [[(0, 10)] * 3, [(0, 10)]]
    assert decoder.batches[0].output_rows.tolist() == [9, 19, 29]
    assert decoder.batches[0].block_tables.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_each_token_is_the_next_input() -> None:
    decoder: Any = RecordingDecoder()
    Sequences(decoder, 2, 40, 32).decode(33, 3)
    assert [batch.positions.tolist() for batch in decoder.batches] == [[33, 33], [34, 34], [35, 35]]
    assert [batch.token_ids.tolist() for batch in decoder.batches] == [[3, 3], [33, 33], [34, 34]]


def test_the_prompt_of_the_first_sequence_is_shared() -> None:
    decoder: Any = RecordingDecoder()
    Sequences(decoder, 3, 40, 32).share_prompt()
    assert decoder.pairs == [[0, 2], [1, 3], [0, 4], [1, 5]]


# Needs


def needs_of_tiny(packing: str = "2bit", kv_dtype: str = "bf16", **switches: Any) -> Needs:
    spec = tiny_spec(
        num_layers=2,
        vocab_size=100,
        hidden_size=320,
        ffn_size=260,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        **switches,
    )
    return Needs(spec, packing, nominal_bytes(spec, packing), 64_000, kv_dtype)


def test_rows_are_whole_blocks_of_their_packing() -> None:
    assert needs_of_tiny().packed == {
        "q": 2 * 40 * 128,
        "k": 2 * 20 * 128,
        "v": 2 * 20 * 128,
        "o": 2 * 320 * 64,
        "gate": 2 * 260 * 128,
        "up": 2 * 260 * 128,
        "down": 2 * 320 * 128,
    }
    assert needs_of_tiny("base3").packed["q"] == 2 * 40 * 64


def test_the_needs_of_a_step_by_hand() -> None:
    stages = needs_of_tiny().step([(7, 1)], 1)
    assert stages["qkv"] == Need(2 * 80 * 128, ternary=2 * 80 * 320)
    assert stages["gate_up"] == Need(2 * 520 * 128, ternary=2 * 520 * 320)
    # Eight keys and eight values of two heads of ten, in two bytes; four heads look at them.
    assert stages["attention"] == Need(2 * 8 * 2 * 2 * 10 * 2, dense=2 * 2 * 8 * 4 * 10)
    assert stages["head"] == Need(64_000, dense=100 * 320)


def test_weights_are_read_once_for_all_tokens() -> None:
    needs = needs_of_tiny()
    one, many = needs.step([(0, 1)], 1), needs.step([(0, 5), (3, 2)], 2)
    for stage in ("qkv", "o", "gate_up", "down"):
        assert many[stage].nbytes == one[stage].nbytes
        assert many[stage].ternary == 7 * one[stage].ternary
    assert many["head"] == Need(64_000, dense=2 * 100 * 320)
    assert needs.step([(0, 5)], 0)["head"] == Need()
    # Each run reads what its last token sees: 5 positions, and 5.
    assert many["attention"].nbytes == 10 * one["attention"].nbytes
    assert many["attention"].dense == (1 + 2 + 3 + 4 + 5 + 4 + 5) * one["attention"].dense


def test_a_window_bounds_what_is_read() -> None:
    needs = needs_of_tiny(sliding_window=4)
    whole, far = needs.step([(0, 1)], 0)["attention"], needs.step([(50, 2)], 0)["attention"]
    assert far.nbytes == 5 * whole.nbytes
    assert far.dense == 8 * whole.dense


def test_int8_keys_and_values_have_scales() -> None:
    read = needs_of_tiny(kv_dtype="int8").step([(0, 1)], 0)["attention"].nbytes
    assert read == 2 * 2 * 2 * (10 + 4)


def test_rows_that_are_left_out_are_neither_read_nor_multiplied() -> None:
    needs = needs_of_tiny()
    half = dataclasses.replace(needs, packed={**needs.packed, "up": needs.packed["up"] // 2})
    full, less = needs.step([(0, 1)], 0)["gate_up"], half.step([(0, 1)], 0)["gate_up"]
    assert (less.nbytes, less.ternary) == (full.nbytes * 3 // 4, full.ternary * 3 // 4)


# Limits


LIMITS = Limits(bandwidth=1e9, multiplications=4e9, buffer=10**6, threads=2)


def test_rates_are_fractions_of_the_limits() -> None:
    rates = Rates.of(Need(nbytes=10**8, ternary=10**9), 0.5, LIMITS)
    assert rates == Rates(2e8, 0.2, 2e9, 0.5)
    assert not list(rates.impossible())


@pytest.mark.parametrize(
    ("need", "told"),
    [
        (Need(nbytes=1040_000_000), ["104% of the read bandwidth"]),
        (Need(ternary=8 * 10**9), ["200% of the multiplication peak"]),
        (Need(nbytes=round(1e9 * (1 + TOLERANCE))), []),
    ],
)
def test_what_is_above_a_limit_is_told(need: Need, told: list[str]) -> None:
    assert list(Rates.of(need, 1.0, LIMITS).impossible()) == told


def test_the_better_of_two_measurements_counts() -> None:
    other = Limits(bandwidth=2e9, multiplications=3e9, buffer=10**6, threads=2)
    assert LIMITS.best(other) == Limits(2e9, 4e9, 10**6, 2)


def test_limits_of_this_machine_are_positive() -> None:
    limits = Limits.measure("scalar", 1, 1 << 20)
    assert limits.buffer == 1 << 20
    assert limits.bandwidth > 0
    assert limits.multiplications > 0


def test_the_use_of_a_screened_head_is_a_mean() -> None:
    before = {"screened": 4, "rescored": 10, "full": 1}
    after = {"screened": 14, "rescored": 40, "full": 2}
    assert HeadUse.between(before, after, 10) == HeadUse(3.0, 0.1)


# The gate


def test_other_bits_are_refused() -> None:
    logits = np.array([[1.0, 2.0]], np.float32)
    tokens = np.array([1], np.int32)
    wanted = gate.Evidence(logits, tokens)
    gate.require_equal(gate.Evidence(logits.copy(), tokens.copy()), wanted, "x")
    next_up = np.nextafter(logits, np.array([[1, 9]], np.float32))
    with pytest.raises(MeasurementError, match=r"x: 1 of 2 logits and 0 of 1 tokens differ"):
        gate.require_equal(gate.Evidence(next_up, tokens), wanted, "x")
    with pytest.raises(MeasurementError, match=r"0 of 2 logits and 1 of 1 tokens differ"):
        gate.require_equal(gate.Evidence(logits, tokens - 1), wanted, "x")


def wrong_unless_scalar(change: Callable[[StepOutput], StepOutput]) -> Any:
    """`CpuDecoder.forward` with a changed result on all kernel sets but the scalar one."""
    right = CpuDecoder.forward

    def forward(self: CpuDecoder, batch: Batch) -> StepOutput:
        output = right(self, batch)
        return output if self.info.kernel == "scalar" else change(output)

    return forward


def test_nothing_is_timed_when_the_output_is_wrong(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitllm.backends.cpu import kernel_names

    if kernel_names() == ["scalar"]:
        pytest.skip("this machine runs the scalar kernels only")

    def timed(*_: object) -> Timed:
        raise AssertionError("wrong output was timed")

    monkeypatch.setattr(Workbench, "prefill", timed)
    monkeypatch.setattr(
        CpuDecoder,
        "forward",
        wrong_unless_scalar(lambda output: dataclasses.replace(output, logits=output.logits + 1)),
    )
    with pytest.raises(MeasurementError, match="differ from those of the scalar kernels"):
        run_bench(str(model), SETTINGS)


def test_evidence_of_one_sequence_is_that_of_several(model: Path) -> None:
    options = LoadOptions(kv_tokens=gate.SEQUENCES * gate.CONTEXT, isa="scalar")
    wanted = gate.reference_evidence(CpuBackend(), open_checkpoint(model), options)
    decoder = CpuBackend().load(open_checkpoint(model), options)
    found = gate.evidence(decoder)
    decoder.close()
    assert found.logits.shape == (2 + 3 * gate.DECODED_TOKENS, 640)
    assert (found.logits == wanted.logits).all()
    assert (found.tokens == wanted.tokens).all()
    assert len({row.tobytes() for row in found.logits}) == 1 + gate.DECODED_TOKENS


# From end to end


def test_every_row_that_was_asked_for(result: BenchResult) -> None:
    assert [(row.work, row.tokens, row.batch, row.depth) for row in result.speed] == [
        ("prefill", 20, 1, 0),
        ("prefill", 40, 1, 0),
        ("decode", 3, 1, 0),
        ("decode", 3, 1, 33),
        ("prefill", 20, 3, 0),
        ("decode", 3, 3, 0),
        ("decode", 3, 3, 33),
    ]
    assert (result.backend, result.threads, result.head) == ("cpu", 2, "full")
    assert not result.impossible


def test_figures_follow_from_seconds_and_needs(result: BenchResult) -> None:
    for row in result.speed:
        done = row.batch * (row.tokens if row.work == "prefill" else 1)
        assert row.tokens_per_s == pytest.approx(done / row.seconds)
        rates = row.rates
        assert rates.bytes_per_s == pytest.approx(row.bytes_read / row.seconds)
        assert rates.bandwidth_fraction == pytest.approx(
            rates.bytes_per_s / result.limits.bandwidth
        )
        assert rates.peak_fraction == pytest.approx(
            row.ternary / row.seconds / result.limits.multiplications
        )


def test_bytes_of_a_token_are_weights_head_and_context(result: BenchResult) -> None:
    first, second = (row for row in result.speed if row.work == "decode" and row.batch == 1)
    a_position = 2 * 2 * 16 * 2  # layers, keys and values, head size, bf16
    packed = 2 * (32 + 2 * 16 + 32 + 2 * 64 + 32) * 64
    assert first.bytes_read == packed + 640 * 32 * 2 + 2 * a_position
    assert second.bytes_read - first.bytes_read == 33 * a_position
    assert first.ternary == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    together = next(row for row in result.speed if row.work == "decode" and row.batch == 3)
    assert together.ternary == 3 * first.ternary
    assert together.bytes_read == first.bytes_read + 2 * 2 * a_position


def test_a_prompt_in_pieces_reads_the_weights_for_each(result: BenchResult) -> None:
    short, long = (row for row in result.speed if row.work == "prefill" and row.batch == 1)
    packed = 2 * (32 + 2 * 16 + 32 + 2 * 64 + 32) * 64
    assert long.bytes_read - short.bytes_read == packed + 20 * 2 * 2 * 16 * 2
    assert long.ternary == 2 * short.ternary


def test_stages_add_up(result: BenchResult) -> None:
    for work in ("decode", "prefill"):
        rows = [row for row in result.stages if row.work == work]
        assert [row.stage for row in rows] == [
            *("embed", "quantize", "qkv", "attention", "o", "gate_up", "down", "head"),
            *("sampling", "wait"),
        ]
        assert sum(row.fraction for row in rows) == pytest.approx(1)
        assert all(row.seconds >= 0 for row in rows)
    need = sum((row.need for row in result.stages if row.work == "decode"), Need())
    row = next(row for row in result.speed if (row.work, row.depth) == ("decode", 0))
    assert (need.nbytes, need.ternary) == (row.bytes_read, row.ternary)


def test_zero_rows_are_seen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, zero_rows=0.25)
    settings = dataclasses.replace(SETTINGS, batches=(1,), depths=(0,), prompts=(8,), profile=False)
    row = run_bench(str(tmp_path), settings).speed[-1]
    left_out = 2 * 2 * 16  # layers, gate and up, rows
    packed = (2 * (32 + 2 * 16 + 32 + 2 * 64 + 32) - left_out) * 64
    assert row.bytes_read == packed + 640 * 32 * 2 + 2 * 2 * 2 * 16 * 2
    assert row.ternary == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) - left_out * 32


def test_a_screened_head_is_counted_as_it_is_used(model: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS,
        batches=(1,),
        depths=(0,),
        profile=False,
        engine=EngineOptions(head="screened", threads=1),
    )
    result = run_bench(str(model), settings)
    assert result.head == "screened"
    row = result.speed[-1]
    rounded = 40 * 1 * 16 * 34 + 4 * 640  # groups of rows and columns; norms
    packed = 2 * (32 + 2 * 16 + 32 + 2 * 64 + 32) * 64
    exact = row.head.exact_rows * 32 * 2 + row.head.fallbacks * 640 * 32 * 2
    assert row.bytes_read == pytest.approx(packed + rounded + exact + 2 * 2 * 2 * 16 * 2, abs=1)


def test_the_result_is_json(result: BenchResult) -> None:
    document = json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))
    assert {item.name for item in dataclasses.fields(BenchResult)} == set(document)
    assert document["speed"][0].keys() == {
        *("work", "tokens", "batch", "depth", "tokens_per_s", "spread", "seconds"),
        *("bytes_read", "ternary", "head", "rates", "impossible"),
    }
    assert set(document["speed"][0]["rates"]) == {
        *("bytes_per_s", "bandwidth_fraction", "ternary_per_s", "peak_fraction"),
    }
    assert set(document["peak_memory"]) == {"anonymous", "file", "resident"}
    assert document["loading"]["tokenizer_s"] > 0


def test_native_time_is_within_that_of_python(model: Path) -> None:
    options = LoadOptions(kv_tokens=64, threads=1)
    with Workbench(model, options, repeats=1) as bench:
        bench.load()
        bench.decoder.measure_stages(False)
        run = repeat(lambda: Sequences(bench.decoder, 1, 32, 32).decode(0, 8), 1)
        assert bench.decoder.step_seconds() > 0
        assert bench.step_seconds(8).median < 10 * run.median
        assert all(seconds == 0 for seconds in bench.decoder.stage_seconds().values())


def test_peak_memory_sees_what_is_freed_again() -> None:
    with machine.PeakMemory() as peak:
        before = machine.memory()["anonymous"]
        block = np.ones(64 * machine.MIB, np.uint8)
        peak.sample()
        del block
    assert peak.bytes["anonymous"] - before >= 63 * machine.MIB


# What cannot be measured


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": (0,)}, "prompts must be at least 1"),
        ({"depths": (-1,)}, "depths must be at least 0"),
        ({"batches": ()}, "batches must be at least 1"),
        ({"generate": 0}, "generate must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_settings_check_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**changes)


def test_lengths_beyond_the_context_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"103 tokens are more than the context of 96 tokens"):
        run_bench(str(model), dataclasses.replace(SETTINGS, depths=(100,)))


def test_defaults_stay_within_the_context(model: Path) -> None:
    settings = BenchSettings(repeats=1, generate=2, small=False, batches=(1,))
    rows = run_bench(str(model), settings).speed
    assert [(row.work, row.tokens, row.depth) for row in rows] == [
        ("prefill", 96, 0),
        ("decode", 2, 0),
    ]


def test_another_device_is_refused(model: Path) -> None:
    settings = dataclasses.replace(SETTINGS, engine=EngineOptions(device="reference"))
    with pytest.raises(ConfigError, match="bench measures the devices cpu and mlx, not reference"):
        run_bench(str(model), settings)


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX on a CPU reads slower in one way than in another; no limit is judged here."""
    monkeypatch.setattr(mlx_device, "read_bandwidth", lambda nbytes: 1e15)
    monkeypatch.setattr(mlx_device, "peak_multiplications", lambda: 1e18)


MLX = dataclasses.replace(
    SETTINGS, profile=False, engine=EngineOptions(device="mlx", max_batch_tokens=32)
)


def test_the_mlx_device_is_measured(model: Path, quick_limits: None) -> None:
    found = run_bench(str(model), MLX)
    assert (found.backend, found.packing, found.head) == ("mlx", "2bit", "full")
    assert [(row.work, row.batch, row.depth) for row in found.speed][:4] == [
        ("prefill", 1, 0),
        ("prefill", 1, 0),
        ("decode", 1, 0),
        ("decode", 1, 33),
    ]
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) // 4
    assert found.speed[2].bytes_read == weights + 640 * 32 * 2 + 2 * 2 * 16 * 2 * 2
    assert not found.impossible
    text = "\n".join(report_lines(found))
    assert "up to the order of float sums" in text
    assert "of peak" in text
    assert "of int8" not in text


def test_wrong_logits_of_mlx_are_not_timed(
    model: Path, quick_limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = MlxDecoder._logits
    monkeypatch.setattr(MlxDecoder, "_logits", lambda self, hidden: 1.1 * right(self, hidden))
    with pytest.raises(MeasurementError, match=r"by 0\.01 of their squares, and 0 of"):
        run_bench(str(model), MLX)
    monkeypatch.setattr(MlxDecoder, "_logits", lambda self, hidden: -right(self, hidden))
    with pytest.raises(MeasurementError, match="by 4 of their squares"):
        run_bench(str(model), MLX)


def test_limits_of_mlx_are_measured() -> None:
    limits = Limits.of_mlx(1 << 22)
    assert (limits.buffer, limits.threads) == (1 << 22, 1)
    assert limits.bandwidth > 1e6
    assert limits.multiplications > 1e6


@pytest.mark.parametrize("option", ["profile", "tune"])
def test_what_only_the_cpu_has_is_refused(model: Path, option: str) -> None:
    with pytest.raises(ConfigError, match="not mlx"):
        run_bench(str(model), dataclasses.replace(MLX, **{option: True}))


# Small work


def test_operations_have_a_row_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "SECONDS", 1e-3)
    rows = list(operations.operations("scalar", "base3", 2, 2, sizes=(32, 70)))
    assert [(row.size, row.packing, row.threads) for row in rows] == [
        (32, "base3", 2),
        (70, "base3", 2),
    ]
    assert all(row.native > 0 and row.python > 0 for row in rows)
    (small,) = operations.operations("scalar", "auto", 1, 1, sizes=(32,))
    assert small.packing == "2bit"


def test_a_wrong_operation_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "SECONDS", 1e-3)
    right = ops.PreparedMatrix.matmul
    monkeypatch.setattr(ops.PreparedMatrix, "matmul", lambda self, q: right(self, q) + 1)
    with pytest.raises(MeasurementError, match="kernels scalar: an operation of 32 x 32"):
        list(operations.operations("scalar", "2bit", 1, 1, sizes=(32,)))


def test_latency_of_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "1m", TINY)
    monkeypatch.setattr(operations, "TOKENS", 8)
    said: list[str] = []
    (row,) = operations.latencies(1, None, 2, said.append, models=("1m",))
    dense = 640 * 32 + 32 + 2 * (32 + 32 + 32 + 64)
    assert row.parameters == dense + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert row.native_s > 0
    assert row.public_s > 0
    assert said == ["latency of a token, 1M parameters"]


# The report


def test_columns_are_aligned() -> None:
    assert list(table(("work", "n"), [("decode", "1"), ("x", "1234")])) == [
        "work       n",
        "decode     1",
        "x       1234",
    ]


def test_the_report_names_what_matters(result: BenchResult) -> None:
    need = Need(nbytes=2 * 10**9, ternary=10**9)
    timed = Timed("decode", 32, 1, 256, 12.3, 0.041, 0.1, need.nbytes, need.ternary, HeadUse(7, 0))
    stage = TimedStage("decode", "qkv", 1e-3, 0.25, Need(nbytes=10**6, ternary=2 * 10**6))
    made_up = dataclasses.replace(
        result,
        limits=LIMITS,
        speed=[SpeedRow.of(timed, LIMITS)],
        stages=[StageRow.of(stage, LIMITS)],
    )
    lines = list(report_lines(made_up))
    assert lines[4] == "limits        1.00 GB/s read from 1.00 MB, 4.00 GMAC/s in int8"
    head = lines.index(next(line for line in lines if line.startswith("work")))
    assert " ".join(lines[head + 1].split()) == (
        "decode 32 1 256 12.3 4.1 % 2,000 20.0 2000 % 10.0 250 % IMPOSSIBLE"
    )
    assert "head          7 exact rows a step, whole head in 0.0 %" in lines
    assert " ".join(lines[-1].split()) == "qkv 1,000 25 % 1.00 1.00 100 % 2.00 2.00 50 %"


def test_the_report_of_a_real_run(result: BenchResult) -> None:
    text = "\n".join(report_lines(result))
    assert "output        equal to that of the scalar kernels" in text
    assert "stages of a token (decode)" in text
    assert "IMPOSSIBLE" not in text
    assert "quantised operations" not in text


def test_logits_are_asked_for_by_a_batch_of_their_own() -> None:
    decoder: Any = RecordingDecoder()
    batch = Sequences(decoder, 1, 8, 8).batch([(0, 0, [1, 2])], OutputKind.LOGITS)
    assert batch.output_kinds.tolist() == [OutputKind.LOGITS]
    assert len(batch.plan) == 0
