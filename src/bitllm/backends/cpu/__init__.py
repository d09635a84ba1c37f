"""The CPU backend: the native decoder, one C++ call a step; and what native code knows of the CPU.

available_memory()              bytes this process can still take, 0 = unknown
cpu_info()                      name, physical_cores, usable_cpus, features (name -> present)
kernel_names()                  the kernel sets this machine runs, best first
choose_packing(asked, ...)      how ternary weights are held, and why
peak_multiplications(isa, threads)  8-bit multiplications a second in a kernel set's densest loop
quantized_operations(isa, packing, threads, rows, columns, seconds)
                                operations (quantise, multiply, rescale) a second
read_bandwidth(threads, nbytes) bytes a second at which the threads read a buffer again and again
resident_bytes()                bytes of this process in RAM, 0 = unknown
resident_file_bytes()           those of them that are pages of files
scratch_bytes(spec, options, head_dtype)
                                what a step's intermediate results will take
"""

from bitllm._native import (
    available_memory,
    cpu_info,
    kernel_names,
    peak_multiplications,
    quantized_operations,
    read_bandwidth,
    resident_bytes,
    resident_file_bytes,
)
from bitllm.backends.cpu.backend import CpuBackend
from bitllm.backends.cpu.decoder import CpuDecoder
from bitllm.backends.cpu.scratch import scratch_bytes
from bitllm.backends.cpu.tuning import PackingChoice, choose_packing

__all__ = [
    "CpuBackend",
    "CpuDecoder",
    "PackingChoice",
    "available_memory",
    "choose_packing",
    "cpu_info",
    "kernel_names",
    "peak_multiplications",
    "quantized_operations",
    "read_bandwidth",
    "resident_bytes",
    "resident_file_bytes",
    "scratch_bytes",
]
