"""Facts about this machine, as plain values: versions, CPU, kernels, memory, disk, environment."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "device",
    "environment",
    "kernel_sets",
    "memory",
    "mlx_device",
    "processor",
    "storage",
    "versions",
]

PACKAGES = ("numpy", "tokenizers", "safetensors", "huggingface_hub", "torch", "transformers", "mlx")
BANDWIDTH_BYTES = 1 << 28
"""Read to measure bandwidth: more than the last-level cache of most machines."""
_X86 = {
    "avx512vnni": ("avx2", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"),
    "avxvnni": ("avx2", "f16c", "avxvnni"),
    "avx2": ("avx2", "f16c"),
}
_ARM: dict[str, tuple[str, ...]] = {
    "neon-i8mm": ("dotprod", "i8mm"),
    "neon": ("dotprod",),
    "neon-base": (),
}
NEEDS: dict[str, tuple[str, ...]] = {
    **(_ARM if platform.machine().lower() in ("aarch64", "arm64") else _X86),
    "scalar": (),
}
"""CPU features that each kernel set of this architecture needs, best set first; the decision itself
is native code's."""
HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT")


def versions() -> dict[str, str]:
    """Return the versions of bitllm, Python, the system, and the packages that are installed."""
    from bitllm import __version__

    found = {"bitllm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "system": platform.platform()}


def processor() -> dict[str, Any] | None:
    """Return name, cores and features of the CPU; None if the native module is missing."""
    try:
        from bitllm.backends.cpu import cpu_info
    except ImportError:
        return None
    info: dict[str, Any] = cpu_info()
    return info


def kernel_sets() -> list[dict[str, Any]]:
    """Return name, `runs` and the reason why of each kernel set, the one that is chosen first."""
    try:
        from bitllm.backends.cpu import kernel_names
    except ImportError as error:
        return [{"name": "none", "runs": False, "reason": f"no native module: {error}"}]
    info = processor() or {}
    features = {name for name, present in info.get("features", {}).items() if present}
    runnable = kernel_names()
    sets = [
        {"name": name, "runs": True, "reason": "runs here" if index else "chosen: the best here"}
        for index, name in enumerate(runnable)
    ]
    for name, needs in NEEDS.items():
        if name not in runnable:
            missing = " ".join(need for need in needs if need not in features)
            reason = f"this CPU lacks {missing}" if missing else "not in this build"
            sets.append({"name": name, "runs": False, "reason": reason})
    return sets


def device() -> dict[str, str]:
    """Return the device that `auto` means here, and why."""
    from bitllm.backends import choose_device
    from bitllm.errors import BitllmError

    try:
        choice = choose_device()
    except BitllmError as error:
        return {"name": "none", "reason": error.message}
    return {"name": choice.name, "reason": choice.reason}


def mlx_device() -> dict[str, Any] | None:
    """Return what MLX computes on and the memory it may take; None where it is not installed."""
    try:
        from bitllm.backends.mlx.device import device_facts
    except ImportError:
        return None
    return dataclasses.asdict(device_facts())


def memory() -> dict[str, Any]:
    """Return the bytes available, None if unknown, and the bytes a second that threads can read.

    `bandwidth` maps a number of threads, as text, to bytes a second; it is empty without the native
    module.
    """
    from bitllm.engine.memory_plan import available_memory

    available = available_memory()
    size = BANDWIDTH_BYTES if available is None else min(BANDWIDTH_BYTES, available // 4)
    return {"available": available, "bandwidth": _bandwidth(size)}


def _bandwidth(size: int) -> dict[str, float]:
    try:
        from bitllm.backends.cpu import read_bandwidth
    except ImportError:
        return {}
    cores = int((processor() or {}).get("physical_cores", 1))
    return {str(threads): read_bandwidth(threads, size) for threads in sorted({1, cores})}


def storage() -> dict[str, Any]:
    """Return the directory that downloads go to, and the free bytes of its disk."""
    cache = Path(_hub_cache()).expanduser().absolute()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return {"cache": _without_home(str(cache)), "free": shutil.disk_usage(existing).free}


def _hub_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def environment() -> dict[str, str]:
    """Return the environment variables that change what bitllm does, without tokens."""
    return {
        name: _without_home(value)
        for name, value in sorted(os.environ.items())
        if name.startswith("BITLLM_") or name in HUB_VARIABLES or name == "NO_COLOR"
    }


def _without_home(path: str) -> str:
    home = str(Path.home())
    return path.replace(home, "~", 1) if path.startswith(home + os.sep) else path
