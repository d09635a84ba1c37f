"""`bitllm doctor`: passes here, and fails loudly for each thing that can be wrong."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import bitllm
from bitllm import ops
from bitllm.backends import cpu
from bitllm.backends.base import Batch, StepOutput
from bitllm.backends.mlx import device as mlx_device
from bitllm.backends.mlx.device import DeviceFacts
from bitllm.backends.mlx.linear import PackedMatrix
from bitllm.cli import checks, machine
from bitllm.cli.app import app
from bitllm.cli.checks import check_demo, run_checks
from bitllm.cli.failures import CheckFailedError
from bitllm.cli.selftest import SelfTest, difference
from bitllm.engine.llm import LLM
from bitllm.errors import ModelNotFoundError

KERNELS = cpu.kernel_names()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BITLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "BANDWIDTH_BYTES", 1 << 22)


@pytest.fixture(scope="module")
def selftest() -> SelfTest:
    return SelfTest()


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], prog_name="bitllm")


def skip_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "check_demo", lambda: "not run")


def test_this_machine_is_healthy() -> None:
    result = doctor()
    assert result.exit_code == 0, result.stdout
    assert result.stderr == ""
    for name in KERNELS:
        assert f"PASS  kernels {name}" in result.stdout
    assert "PASS  demo model         wrote 16 of 16 tokens" in result.stdout
    assert result.stdout.endswith("\nall checks passed\n")
    assert "FAIL" not in result.stdout


def test_json_holds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_demo(monkeypatch)
    document = json.loads(doctor("--json").stdout)
    assert document["healthy"] is True
    assert [check["name"] for check in document["checks"]] == [
        *(f"kernels {name}" for name in KERNELS),
        "mlx",
        "demo model",
    ]
    assert all(check["passed"] for check in document["checks"])
    assert document["versions"]["bitllm"] == bitllm.__version__
    assert document["versions"]["numpy"] == np.__version__
    assert document["cpu"]["physical_cores"] >= 1
    speeds = document["memory"]["bandwidth"]
    assert set(speeds) == {"1", str(document["cpu"]["physical_cores"])}
    assert all(speed > 0 for speed in speeds.values())
    assert document["storage"]["free"] > 0


def test_the_device_of_mlx_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_demo(monkeypatch)
    assert "(no Metal: MLX runs on the CPU, slowly)" in doctor().stdout
    facts = DeviceFacts("0.32", "Apple M9", True, 16 * 10**9, 12 * 10**9, 0)
    monkeypatch.setattr(mlx_device, "device_facts", lambda: facts)
    told = doctor().stdout
    assert "mlx        Apple M9 (through Metal)" in told
    assert "12 GB of 16 GB for the GPU" in told
    assert json.loads(doctor("--json").stdout)["mlx"]["name"] == "Apple M9"


def test_without_mlx_nothing_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_demo(monkeypatch)
    monkeypatch.setitem(sys.modules, "bitllm.backends.mlx.device", None)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    result = doctor()
    assert result.exit_code == 0
    assert "\nmlx " not in result.stdout
    assert "PASS  mlx" not in result.stdout


def test_a_wrong_product_of_mlx_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_demo(monkeypatch)
    product = PackedMatrix.__call__
    monkeypatch.setattr(PackedMatrix, "__call__", lambda self, x: product(self, x) + (len(x) == 40))
    result = doctor()
    assert result.exit_code == 1
    assert "FAIL  mlx" in result.stdout
    assert "640 of 640 sums differ in 16 x 2560 codes times 40" in result.stdout


@pytest.mark.parametrize("isa", KERNELS)
def test_each_kernel_set_passes(selftest: SelfTest, isa: str) -> None:
    assert "equal the reference" in selftest.check(isa)


def wrong(function: Callable[..., Any], isa: str, change: Callable[[Any], Any]) -> Any:
    """The function, with a changed result on one kernel set."""

    def broken(*arguments: Any, **settings: Any) -> Any:
        result = function(*arguments, **settings)
        return change(result) if settings.get("isa") == isa else result

    return broken


@pytest.mark.parametrize("isa", KERNELS)
def test_a_wrong_product_fails_that_kernel_set_only(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(sums: np.ndarray) -> np.ndarray:
        changed = sums.copy()
        changed.flat[-1] += 1
        return changed

    skip_demo(monkeypatch)
    monkeypatch.setattr(ops, "ternary_matmul", wrong(ops.ternary_matmul, isa, off_by_one))
    result = doctor()
    assert result.exit_code == 1
    assert f"FAIL  kernels {isa}" in result.stdout
    assert "1 of 1 sums differ in 1 x 1 codes times 1" in result.stdout
    assert result.stdout.count("FAIL  ") == 1
    assert result.stdout.endswith("SOMETHING IS WRONG: see FAIL above\n")


def test_a_wrong_quantisation_fails(selftest: SelfTest, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(result: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return result[0], np.nextafter(result[1], np.float32(np.inf))

    monkeypatch.setattr(
        ops, "quantize_activations", wrong(ops.quantize_activations, "scalar", scaled)
    )
    with pytest.raises(CheckFailedError, match="activations are quantised differently"):
        selftest.check("scalar")


def test_one_wrong_bit_of_a_logit_fails(
    selftest: SelfTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = cpu.CpuDecoder.forward

    def broken(self: cpu.CpuDecoder, batch: Batch) -> StepOutput:
        output = forward(self, batch)
        output.logits.view(np.uint32)[0, 7] ^= 1
        return output

    monkeypatch.setattr(cpu.CpuDecoder, "forward", broken)
    with pytest.raises(CheckFailedError, match="with 1 threads 3 of 633 logits differ"):
        selftest.check("scalar")


def test_differences_are_bits() -> None:
    zero, minus_zero = np.array([[0.0]], np.float32), np.array([[-0.0]], np.float32)
    nan = np.array([[np.nan]], np.float32)
    assert difference(zero, zero) is None
    assert difference(nan, nan) is None
    assert "1 of 1 logits differ" in (difference(minus_zero, zero) or "")
    assert "1 of 1 logits differ" in (difference(nan, zero) or "")
    assert "shape" in (difference(zero, zero[0]) or "")


def test_a_kernel_that_raises_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no such kernel")

    skip_demo(monkeypatch)
    monkeypatch.setattr(ops, "ternary_matmul", broken)
    result = doctor()
    assert result.exit_code == 1
    assert result.stdout.count("ValueError: no such kernel") == len(KERNELS)
    assert "Traceback" not in result.stderr
    assert "Traceback" in doctor("--verbose").stderr


def test_a_missing_native_module_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_demo(monkeypatch)
    monkeypatch.setitem(sys.modules, "bitllm.backends.cpu", None)
    result = doctor()
    assert result.exit_code == 1
    assert "FAIL  native module" in result.stdout
    assert "kernels    none" in result.stdout


def test_a_missing_demo_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> None:
        raise ModelNotFoundError("this installation has no embedded demo model")

    monkeypatch.setattr("bitllm.formats.resolve_model", missing)
    check = run_checks()[-1]
    assert check.name == "demo model"
    assert not check.passed
    assert check.detail == "this installation has no embedded demo model"


def test_a_demo_model_that_stops_early_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = LLM.generate

    def short(self: LLM, prompt: str, **options: Any) -> Any:
        return generate(self, prompt, **{**options, "max_tokens": 3})

    monkeypatch.setattr(LLM, "generate", short)
    with pytest.raises(CheckFailedError, match="wrote 3 of 16 tokens"):
        check_demo()


def test_every_kernel_set_has_a_reason() -> None:
    sets = {kernel["name"]: kernel for kernel in machine.kernel_sets()}
    assert set(sets) == set(machine.NEEDS)
    assert [name for name, kernel in sets.items() if kernel["runs"]] == KERNELS
    assert sets[KERNELS[0]]["reason"] == "chosen: the best here"
    features = cpu.cpu_info()["features"]
    for name, needs in machine.NEEDS.items():
        missing = [need for need in needs if not features[need]]
        assert sets[name]["runs"] == (not missing)
        if missing:
            assert sets[name]["reason"] == f"this CPU lacks {' '.join(missing)}"


def test_tokens_and_home_are_not_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    skip_demo(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("BITLLM_MODEL", str(tmp_path / "model"))
    text = doctor().stdout
    assert "hf_secret" not in text
    assert str(tmp_path) not in text.replace("~", "")
    assert "BITLLM_MODEL ~/model" in text
    assert "HF_HOME      ~/hub" in text


def test_an_impossible_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLLM_DEVICE", "abacus")
    assert machine.device() == {
        "name": "none",
        "reason": "unknown device 'abacus', set by BITLLM_DEVICE",
    }
