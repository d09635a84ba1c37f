"""`make mac-check`, as far as a machine without Metal goes: figures, verdicts and the exit code."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bitllm.backends.mlx.linear import PackedMatrix

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "machine", raising=False)
    spec = importlib.util.spec_from_file_location("mac", FOLDER / "mac.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["mac.py", "--no-tests", "--small", "--shape", "1m"])
    return module


def test_it_prints_figures_to_paste(mac: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert mac.main() == 0
    printed = capsys.readouterr().out
    assert "Metal: False" in printed
    assert "PASS: 6 products on the CPU equal the reference" in printed
    result = json.loads(printed.splitlines()[-1])
    assert [row[:3] for row in result["products"]] == [
        ["2560 x 2560", "1", "mlx"],
        ["2560 x 2560", "2", "mlx"],
        ["head", "1", "mlx"],
    ]
    assert [row[1:4] for row in result["speed"]] == [
        [device, work, "1"] for device in ("mlx", "cpu") for work in ("prefill 8", "decode 4")
    ]


def test_a_wrong_product_shows_in_the_exit_code(
    mac: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    product = PackedMatrix.__call__
    monkeypatch.setattr(PackedMatrix, "__call__", lambda self, x: product(self, x) + 1)
    monkeypatch.setattr(mac, "_speeds", lambda *_, **__: [])
    assert mac.main() == 1
    assert "FAIL: MLX computes wrongly on this machine" in capsys.readouterr().out
