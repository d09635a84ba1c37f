"""The benchmark scripts run, and their arithmetic holds; what they measure is not judged here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import decode
import machine
import make_checkpoint
import numpy as np
import pytest

from bitllm.backends.base import check_batch
from bitllm.formats import open_checkpoint

TINY = make_checkpoint.Shape(
    hidden=32, ffn=64, layers=2, heads=2, kv_heads=1, head_dim=16, vocab=640
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint.write_checkpoint(path, TINY)
    return path


def test_decode_ends_with_one_line_of_json(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "read_bandwidth", lambda threads, nbytes: 1e9)
    options = [
        "--repeats",
        "2",
        "--prefill",
        "40",
        "--depths",
        "0",
        "33",
        "--steps",
        "3",
        "--threads",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["decode.py", str(model), *options])
    decode.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["backend"], result["threads"]) == ("cpu", 1)
    assert [row["depth"] for row in result["decode"]] == [0, 33]
    for row in result["decode"]:
        speed = row["bytes_per_token"] * row["tokens_per_s"]
        assert row["bandwidth_fraction"] == pytest.approx(speed / 1e9)
    # Two layers of one key and one value head of 16 in bf16, 33 positions more.
    first, second = (row["bytes_per_token"] for row in result["decode"])
    assert second - first == 33 * 2 * 2 * 16 * 2


def test_a_run_is_a_batch_that_every_backend_accepts(model: Path) -> None:
    batch = decode.run_of([1, 2, 3], 31)
    check_batch(batch, open_checkpoint(model).spec, kv_capacity=2, max_batch_tokens=3)
    assert batch.block_tables.tolist() == [[0, 1]]


def test_peak_memory_sees_what_is_freed_again() -> None:
    with machine.PeakMemory() as peak:
        before = machine.memory()["anonymous"]
        block = np.ones(64 * machine.MIB, np.uint8)
        peak.sample()
        del block
    assert peak.bytes["anonymous"] - before >= 63 * machine.MIB
