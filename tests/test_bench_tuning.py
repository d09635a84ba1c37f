"""Which packing "auto" means: a table, or what was measured on this account."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitllm.backends.base import LoadOptions
from bitllm.backends.cpu import CpuBackend, cpu_info
from bitllm.backends.cpu.tuning import (
    Packing,
    PackingChoice,
    Tuning,
    choose_packing,
    read_tunings,
    store_tuning,
    tuning_file,
)
from bitllm.bench.gate import reference_evidence
from bitllm.bench.random_model import Shape, write_checkpoint
from bitllm.bench.tune import tune
from bitllm.config import PackingName
from bitllm.errors import MeasurementError
from bitllm.formats import open_checkpoint

TINY = Shape(hidden=32, ffn=64, layers=2, heads=2, kv_heads=1, head_dim=16, vocab=640)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def choice(
    asked: PackingName = "auto",
    *,
    cpu: str = "Cpu 1",
    isa: str = "avx2",
    threads: int = 4,
    ternary_bytes: int = GIB,
) -> PackingChoice:
    return choose_packing(asked, cpu=cpu, isa=isa, threads=threads, ternary_bytes=ternary_bytes)


def measured(packing: Packing = "base3", ternary_bytes: int = GIB, threads: int = 4) -> Tuning:
    return Tuning("Cpu 1", "avx2", threads, ternary_bytes, packing, {"2bit": 10.0, "base3": 12.0})


def test_what_was_asked_for_is_taken() -> None:
    store_tuning(measured("2bit"))
    assert choice("base3") == PackingChoice("base3", "asked for")


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512vnni", "neon", "neon_i8mm"])
def test_the_table_has_an_answer_for_everything(isa: str) -> None:
    for size in (1, 1 << 20, GIB):
        for threads in (1, 64):
            found = choice(isa=isa, ternary_bytes=size, threads=threads)
            assert found.name in ("2bit", "base3")
            assert found.reason.startswith(f"by the table for {isa}: ")


def test_small_models_take_the_simpler_packing() -> None:
    assert choice(isa="avx512vnni", ternary_bytes=1 << 20).name == "2bit"
    assert choice(isa="scalar").name == "2bit"


def test_a_measurement_beats_the_table() -> None:
    other: Packing = "base3" if choice().name == "2bit" else "2bit"
    store_tuning(measured(other))
    assert choice() == PackingChoice(
        other, "measured here by bitllm bench --tune, tok/s: 2bit 10, base3 12"
    )
    for changed in (choice(cpu="Cpu 2"), choice(isa="scalar"), choice(threads=2)):
        assert changed.reason.startswith("by the table")


def test_the_nearest_size_counts_if_it_is_near() -> None:
    store_tuning(measured("base3", 100 << 20))
    store_tuning(measured("2bit", 300 << 20))
    assert choice(ternary_bytes=120 << 20).name == "base3"
    assert choice(ternary_bytes=250 << 20).name == "2bit"
    assert choice(ternary_bytes=5 << 20).reason.startswith("by the table")
    assert choice(ternary_bytes=5 * GIB).reason.startswith("by the table")


def test_a_later_measurement_replaces_the_earlier() -> None:
    store_tuning(measured("base3"))
    store_tuning(measured("base3", threads=2))
    assert store_tuning(measured("2bit")) == tuning_file()
    assert read_tunings() == [measured("base3", threads=2), measured("2bit")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"measured": [1]}',
        '{"measured": [{"cpu": "x"}]}',
        json.dumps({"measured": [{**dict.fromkeys(["cpu", "isa"], "x"), "threads": "1"}]}),
    ],
)
def test_a_damaged_file_is_told_and_not_used(text: str) -> None:
    tuning_file().parent.mkdir()
    tuning_file().write_text(text)
    with pytest.warns(UserWarning, match=r"tuning.json is damaged and not used"):
        assert choice().reason.startswith("by the table")


def test_values_that_mean_nothing_are_damage() -> None:
    for changes in (
        {"packing": "3bit"},
        {"ternary_bytes": "many"},
        {"tokens_per_s": {"2bit": ""}},
        {"tokens_per_s": []},
    ):
        store_tuning(measured())
        document = json.loads(tuning_file().read_text())
        document["measured"][0] |= changes
        tuning_file().write_text(json.dumps(document))
        with pytest.warns(UserWarning, match="damaged"):
            assert read_tunings() == []
        tuning_file().unlink()


def test_a_file_that_is_no_text_is_damage() -> None:
    tuning_file().parent.mkdir()
    tuning_file().write_bytes(b"\xff\xfe{")
    with pytest.warns(UserWarning, match="damaged"):
        assert read_tunings() == []


def test_an_account_without_a_home_has_measured_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert read_tunings() == []
    with pytest.raises(OSError, match="home directory"):
        store_tuning(measured())


def test_the_file_lies_in_the_users_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning_file() == cache / "bitllm" / "tuning.json"
    monkeypatch.setenv("HOME", str(cache / "home"))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert tuning_file() == cache / "home" / ".cache" / "bitllm" / "tuning.json"


def test_tuning_measures_both_and_loading_follows_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TINY)
    options = LoadOptions(threads=1, max_batch_tokens=64)
    backend, checkpoint = CpuBackend(), open_checkpoint(tmp_path / "model")
    wanted = reference_evidence(backend, checkpoint, options)
    said: list[str] = []
    tuned = tune(tmp_path / "model", options, wanted, tokens=4, repeats=2, say=said.append)
    assert set(tuned.tokens_per_s) == set(tuned.spread) == {"2bit", "base3"}
    assert tuned.tokens_per_s[tuned.packing] == max(tuned.tokens_per_s.values())
    (entry,) = read_tunings()
    assert (entry.cpu, entry.threads) == (cpu_info()["name"], 1)
    assert entry.ternary_bytes == 2 * (32 + 2 * 16 + 32 + 2 * 64 + 32) * 64
    assert tuned.file == str(tuning_file())
    decoder = backend.load(checkpoint, options)
    assert decoder.info.packing == tuned.packing
    decoder.close()


def test_a_packing_with_wrong_output_is_not_measured(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TINY)
    options = LoadOptions(threads=1, max_batch_tokens=64)
    wanted = reference_evidence(CpuBackend(), open_checkpoint(tmp_path / "model"), options)
    wanted.logits[-1, -1] += 1
    with pytest.raises(MeasurementError, match="packing 2bit: 1 of "):
        tune(tmp_path / "model", options, wanted, tokens=4, repeats=2, say=lambda text: None)
    assert read_tunings() == []
