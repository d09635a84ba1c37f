"""The Triton kernels of the CUDA backend, one file a stage of the decoder step.

Each module has the kernel and the function that launches it. Without a GPU they run under Triton's
interpreter (TRITON_INTERPRET=1 before Triton is imported) on CPU tensors, number for number but for
bfloat16: the interpreter cuts instead of rounding, and cannot multiply it.
"""

import triton

__all__ = ["INTERPRETED"]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run under the interpreter, where products of bfloat16 are to be avoided."""
