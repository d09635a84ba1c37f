"""Measuring: speed of a model on this machine, beside what the machine can do at all.

`run_bench` is `bitllm bench`. Nothing is timed before the model's output was compared, bit for bit,
with that of the scalar kernels; and a figure above the measured limits of the machine is an error.
"""

from bitllm.bench.run import BenchSettings, run_bench

__all__ = ["BenchSettings", "run_bench"]
