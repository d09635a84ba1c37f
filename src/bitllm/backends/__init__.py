"""Devices behind one seam: which backend runs, and why; the seam itself is `bitllm.backends.base`.

    cpu         the native decoder
    cuda        NVIDIA GPUs, through PyTorch and Triton
    mlx         Apple GPUs, through MLX
    reference   the same computation in NumPy: slow, for comparison

The choice is made once, by argument, by the environment variable BITLLM_DEVICE, or by "auto"; a
device that was asked for and is missing raises. Nothing falls back silently.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from bitllm.backends.base import Backend
from bitllm.errors import BackendUnavailableError, ConfigError

__all__ = ["DEVICES", "DEVICE_VARIABLE", "DeviceChoice", "choose_device", "get_backend"]

DEVICE_VARIABLE = "BITLLM_DEVICE"
"""Environment variable that names the device where no argument does."""

_BACKENDS = {
    "cpu": ("bitllm.backends.cpu", "CpuBackend"),
    "cuda": ("bitllm.backends.cuda", "CudaBackend"),
    "mlx": ("bitllm.backends.mlx", "MlxBackend"),
    "reference": ("bitllm.backends.reference", "ReferenceBackend"),
}
_EXTRAS = {"cuda": "bitllm[cuda]", "mlx": "bitllm[mlx]"}

_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # has a directory for each GPU with a driver

DEVICES = ("auto", *_BACKENDS)
"""Names that `get_backend` takes."""


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """A device and why it was chosen, in words that follow its name."""

    name: str
    reason: str


def choose_device(device: str | None = "auto") -> DeviceChoice:
    """Say which device a name stands for; loads nothing.

    Args:
        device: a name of `DEVICES`; "auto" or None follows BITLLM_DEVICE, and without it takes the
            GPU of a Mac with Apple silicon where MLX is installed, and the CPU everywhere else.

    Raises:
        ConfigError: an unknown name; says whether it came from the environment.
    """
    asked, origin = device or "auto", "asked for"
    if asked == "auto":
        asked, origin = os.environ.get(DEVICE_VARIABLE) or "auto", f"set by {DEVICE_VARIABLE}"
    if asked == "auto":
        return _automatic()
    if asked not in _BACKENDS:
        raise ConfigError(
            f"unknown device {asked!r}, {origin}", hint=f"choose one of {', '.join(DEVICES)}"
        )
    return DeviceChoice(asked, origin)


def _automatic() -> DeviceChoice:
    """Choose by the machine alone, so that a plan and a load choose alike.

    An NVIDIA GPU has to be asked for, until `benchmarks/gpu.py` has passed on one.
    """
    if _NVIDIA_GPUS.is_dir():
        reason = "the native decoder; the NVIDIA GPU here has to be asked for (device='cuda')"
        return DeviceChoice("cpu", f"chosen by auto: {reason}")
    if (sys.platform, platform.machine()) != ("darwin", "arm64"):
        return DeviceChoice("cpu", "chosen by auto: the native decoder")
    if importlib.util.find_spec("mlx") is None:
        return DeviceChoice(
            "cpu", f"chosen by auto: the GPU of this Mac needs `pip install '{_EXTRAS['mlx']}'`"
        )
    return DeviceChoice("mlx", "chosen by auto: Apple silicon, and MLX is installed")


def get_backend(device: str | None = "auto") -> Backend:
    """Return the backend of a device; imports it and nothing of the others.

    Raises:
        BackendUnavailableError: the device is known, but not here; the hint is the install line.
        ConfigError: an unknown name.
    """
    choice = choose_device(device)
    module, name = _BACKENDS[choice.name]
    try:
        backend = getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = _EXTRAS.get(choice.name, "bitllm")
        raise BackendUnavailableError(
            f"the {choice.name} backend ({choice.reason}) cannot be imported: {error}",
            hint=f"install it with `pip install '{package}'`, "
            f"from a source tree with `pip install -e '{package.replace('bitllm', '.')}'`",
        ) from error
    return cast(Backend, backend())
