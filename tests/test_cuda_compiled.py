"""What Triton's compiler makes of the kernels for three generations of GPUs, without one.

Each kernel is compiled for compute capability 8.0, 8.9 and 9.0 in a process of its own, since here
Triton interprets. A tool that comes with Triton then says whether registers were spilled.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TARGETS = (80, 89, 90)
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # a thread block may have
INTEGER_KERNELS = ("product decode", "product prefill", "gated decode", "gated prefill")
INTEGER_KERNELS += ("grouped decode", "grouped prefill")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Facts about every kernel for every target, as `compiled_kernels.py` prints them."""
    script = Path(__file__).with_name("compiled_kernels.py")
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, TARGETS)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return facts


@pytest.mark.slow
def test_no_kernel_spills_registers_or_wants_too_much_shared_memory(compiled):
    assert len(compiled) >= 3 * 10
    for name, facts in compiled.items():
        assert facts["stack_bytes"] == 0, name
        assert facts["shared_bytes"] <= SHARED_BYTES[facts["target"]], name


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", INTEGER_KERNELS)
def test_ternary_products_run_on_int8_tensor_cores(compiled, kernel, target):
    facts = compiled[f"{kernel} sm_{target}"]
    assert facts["int8_products"] > 0
    if target == 90 and kernel in ("product prefill", "gated prefill"):
        assert facts["int8_warpgroup_products"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_attention_and_head_run_on_bfloat16_tensor_cores(compiled, target):
    for kernel in ("attention bf16", "attention int8", "head decode", "head prefill"):
        assert compiled[f"{kernel} sm_{target}"]["bf16_products"] > 0, kernel


@pytest.mark.slow
def test_rounding_is_not_fused_and_divides_exactly(compiled):
    kernels = [f"{name} sm_{target}" for name in ("rounding", "noise") for target in TARGETS]
    for facts in map(compiled.__getitem__, kernels):
        assert facts["fused_multiply_adds"] == 0
        assert facts["exact_divisions"] > 0
        assert facts["approximate_divisions"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_noise_has_its_constants_in_all_bits(compiled, target):
    """A constant that passed through float32 would give other tokens than the host's."""
    found = compiled[f"noise sm_{target}"]["doubles"]
    for value in (2**0.5, 0.6931471805599453, *(1.0 / divisor for divisor in range(3, 22, 2))):
        assert struct.pack(">d", value).hex().upper() in found, value
