"""The CPU backend: the native decoder, one C++ call a step; and what native code knows of the CPU.

available_memory()              bytes this process can still take, 0 = unknown
cpu_info()                      name, physical_cores, usable_cpus, features (name -> present)
kernel_names()                  the kernel sets this machine runs, best first
read_bandwidth(threads, nbytes) bytes a second at which the threads read a buffer of main memory
resident_bytes()                bytes of this process in RAM, 0 = unknown
"""

from bitllm._native import (
    available_memory,
    cpu_info,
    kernel_names,
    read_bandwidth,
    resident_bytes,
)
from bitllm.backends.cpu.backend import CpuBackend
from bitllm.backends.cpu.decoder import CpuDecoder

__all__ = [
    "CpuBackend",
    "CpuDecoder",
    "available_memory",
    "cpu_info",
    "kernel_names",
    "read_bandwidth",
    "resident_bytes",
]
