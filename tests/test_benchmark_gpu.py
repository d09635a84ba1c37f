"""The script that checks and times the cuda backend, end to end, with tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu
import gpu_checks
import pytest
import torch

ROOT = Path(__file__).parents[1]

# What a machine with a GPU may lack: everything but NumPy, PyTorch and Triton.
BARE = """
import runpy, sys
for name in ("bitllm._native", "tokenizers", "safetensors", "huggingface_hub", "transformers",
             "jinja2", "click", "rich", "msgspec", "llguidance", "nanobind_backend"):
    sys.modules[name] = None
sys.argv = [sys.argv[1], *sys.argv[2:]]
sys.path.insert(0, "benchmarks")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_everything_is_checked_and_timed_from_a_bare_source_tree(tmp_path):
    found = tmp_path / "gpu.json"
    command = [sys.executable, "-c", BARE, "benchmarks/gpu.py", "--interpret", "--json", str(found)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(found.read_text())
    assert result["failures"] == {}
    assert all(each["passed"] for each in result["checks"])
    assert len(result["products"]) == len(gpu.TINY.timed) * len(gpu.TINY.timed_tokens)
    assert {row["rows"] for row in result["model"]["decode"]} == set(gpu.TINY.rows)
    assert result["model"]["prefill"][0]["tokens"] == gpu.TINY.prompts[0]
    assert result["training"][0]["linear_seconds"] > 0


def test_nothing_is_timed_where_a_product_is_wrong(monkeypatch, capsys, tmp_path):
    right = gpu_checks.ternary_product
    monkeypatch.setattr(gpu_checks, "ternary_product", lambda *args: right(*args) + 1)
    monkeypatch.setattr(gpu, "TINY", replace(gpu.TINY, checked=[(5, 3)], models=[]))
    found = tmp_path / "gpu.json"
    assert gpu.main(["--interpret", "--json", str(found)]) == 1
    assert "wrong results" in capsys.readouterr().err
    result = json.loads(found.read_text())
    assert "limits" not in result
    wrong = [each["name"] for each in result["checks"] if not each["passed"]]
    assert "product 5 x 3, 1 tokens" in wrong


def test_what_fails_is_reported_and_the_rest_is_timed(monkeypatch, capsys, tmp_path):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gpu, "time_model", out_of_memory)
    monkeypatch.setattr(gpu, "TINY", replace(gpu.TINY, checked=[], models=[], timed_tokens=[1]))
    found = tmp_path / "gpu.json"
    assert gpu.main(["--interpret", "--json", str(found)]) == 1
    result = json.loads(found.read_text())
    assert "no memory" in result["failures"]["model"]
    assert len(result["products"]) == 1


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "finds no NVIDIA GPU" in capsys.readouterr().err
