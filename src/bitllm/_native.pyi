"""
The native core of bitllm; private: use bitllm.backends.cpu and bitllm.ops.
"""

from typing import Annotated, Any

import numpy
from numpy.typing import NDArray


class Adapter:
    """Low-rank matrices, copied one pair at a time."""

    def __init__(self, layers: int, nbytes: int) -> None:
        """nbytes: what all matrices take, each rounded up to 64 bytes."""

    def set(self, layer: int, name: str, a: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], a_dtype: str, b: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], b_dtype: str, scale: float) -> None:
        """
        Copy the bytes of A [rank, in] and B [out, rank]; dtypes as in set_head.
        """

class Decoder:
    """A model on the CPU: built piece by piece, then prepare()d."""

    def __init__(self, *, isa: str, vocab: int, hidden: int, norm_eps: float, embedding_scale: float, kv_blocks: int, kv_dtype: str, threads: int, max_batch_tokens: int, packing: str) -> None: ...

    def add_layer(self, *, heads: int, kv_heads: int, head_dim: int, activation: str, norm_eps: float, query_scale: float, window: int, inverse_frequencies: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> int:
        """Append a layer and return its index."""

    def set_embedding(self, rows: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], dtype: str) -> None:
        """Borrow the bytes of [vocab, hidden]; dtype is f32, bf16 or f16."""

    def set_head(self, rows: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], dtype: str, kind: str = 'full') -> None:
        """
        Borrow the bytes of [vocab, hidden]; dtype is f32, bf16 or f16, kind as in LoadOptions.head.
        """

    def set_final_norm(self, gain: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    def set_vector(self, layer: int, name: str, values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None:
        """Copy a norm of a layer, by its canonical name."""

    def set_linear(self, layer: int, name: str, stored: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], layout: str, out_features: int, in_features: int, scales: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], group: int, input: str = 'int8') -> int:
        """
        Pack a matrix for the kernels; returns how many rows are not all zero. Its inputs are rounded to int8, or stay float.
        """

    def set_linear_norm(self, layer: int, name: str, gain: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], eps: float) -> None: ...

    def set_linear_bias(self, layer: int, name: str, bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    def prepare(self) -> None:
        """Check that the model is whole; take KV storage and scratch."""

    def load_adapter(self, adapter: Adapter) -> int:
        """Return the slot of the adapter, for adapter_slots of forward."""

    def unload_adapter(self, slot: int) -> None: ...

    def more_adapter_scratch(self, rank: int) -> int:
        """
        Bytes of scratch that adapters of this rank need beside those loaded now.
        """

    def forward(self, token_ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], positions: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], run_offsets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], block_tables: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], adapter_slots: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], output_rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], output_kinds: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], score_targets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], score_top_n: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], temperature: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], top_k: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], top_p: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], min_p: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], typical_p: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], seed: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], choice: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], position: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], top_logprobs: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], repetition_penalty: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], frequency_penalty: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], presence_penalty: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], seen_offsets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], seen_ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], seen_counts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], bias_offsets: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], bias_ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], bias_values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], mask: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), order='C', device='cpu', writable=False)], mask_rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], hidden: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], sampled: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu')], logprobs: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')], top_ids: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu')], top_values: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None:
        """One step: Batch, SamplePlan, then the arrays of StepOutput to fill."""

    def measure_stages(self, on: bool) -> None:
        """
        Forget what the stages of steps took; measure them from now on or no more.
        """

    @property
    def stage_seconds(self) -> dict[str, float]:
        """
        Seconds of each stage since measure_stages(True), the mean of the workers.
        """

    @property
    def step_seconds(self) -> float:
        """Seconds of all steps since measure_stages(), or since loading."""

    @property
    def packed_bytes(self) -> dict[str, int]:
        """Bytes of packed ternary weights, by linear, over all layers."""

    def copy_blocks(self, pairs: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> None: ...

    def read_blocks(self, blocks: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

    def write_blocks(self, blocks: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], data: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> None: ...

    @property
    def kv_blocks(self) -> int: ...

    @property
    def kv_block_bytes(self) -> int: ...

    @property
    def kv_bytes(self) -> int: ...

    @property
    def scratch_bytes(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def rounded_head_bytes(self) -> int: ...

    @property
    def head(self) -> str: ...

    @property
    def head_statistics(self) -> dict[str, int]:
        """
        Rows screened so far; rows of the head computed exactly for them; how many of them read the whole head after all.
        """

def scratch_bytes(*, vocab: int, hidden: int, kv_blocks: int, threads: int, max_batch_tokens: int, head: str, head_dtype: str, layers: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], rope_pairs: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> int:
    """
    Decoder.scratch_bytes before there is one. Each row of layers: heads, kv_heads, head_dim, ffn, and whether there are linears with norms of their own, with int8 and with float inputs; rope_pairs: of each distinct table of frequencies.
    """

class PreparedMatrix:
    """A ternary matrix packed for the kernels."""

    def __init__(self, packed: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], in_features: int, packing: str, isa: str) -> None: ...

    def multiply(self, q: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

    @property
    def nbytes(self) -> int: ...

def quantize_activations(x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], q: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order='C', device='cpu')], a: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')], isa: str) -> None: ...

def pack(codes: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order='C', device='cpu', writable=False)], packed: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

def unpack(packed: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], codes: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

def exp_f32(x: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

def log_f64(x: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

def sincos_f64(x: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu', writable=False)], sines: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')], cosines: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

def gumbel_noise(seed: int, choice: int, position: int, ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

def lane_sum(values: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> float: ...

def cpu_info() -> dict[str, Any]:
    """Name, cores and features of this CPU."""

def kernel_names() -> list[str]:
    """The kernel sets this machine runs, best first."""

def available_memory() -> int:
    """Bytes that can still be allocated; 0 = unknown."""

def trim_heap() -> None:
    """Give memory that the heap has free back to the system, where it can."""

def resident_bytes() -> int:
    """Bytes of this process in RAM; 0 = unknown."""

def resident_file_bytes() -> int:
    """Those of them that are pages of files."""

def read_bandwidth(threads: int, nbytes: int) -> float:
    """
    Bytes a second at which the threads together read a buffer again and again.
    """

def peak_multiplications(isa: str, threads: int) -> float:
    """8-bit multiplications a second in the densest loop of a kernel set."""

def quantized_operations(isa: str, packing: str, threads: int, rows: int, columns: int, seconds: float) -> float:
    """Operations (quantise, multiply, rescale) a second that the threads do."""
