"""A loaded model: arrays of the seam in, one native call, arrays of the seam out."""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm import _native
from bitllm.adapter import Adapter, LowRankUpdate
from bitllm.backends.base import (
    Batch,
    DecoderInfo,
    LoadOptions,
    OutputKind,
    SamplePlan,
    StepOutput,
    check_batch,
)
from bitllm.checkpoint import DenseTensor, ModelSpec
from bitllm.errors import ConfigError, InsufficientMemoryError, QuantizationError

__all__ = ["CpuDecoder"]

I32 = npt.NDArray[np.int32]

_ALIGNMENT = 64  # of each matrix of an adapter, in bytes

# In the order of the native call's arguments.
_PLAN_FIELDS = tuple(field.name for field in fields(SamplePlan))
_plan_values = attrgetter(*_PLAN_FIELDS)
_output_values = attrgetter(*(field.name for field in fields(StepOutput)))


class CpuDecoder:
    """The native decoder behind the seam; see `bitllm.backends.base.Decoder`.

    Safe to call from several threads: their steps queue. The GIL is released during a step.
    """

    spec: ModelSpec
    info: DecoderInfo

    def __init__(
        self,
        native: _native.Decoder,
        spec: ModelSpec,
        options: LoadOptions,
        kernel: str,
        threads: int,
        packing: str,
        dense_bytes: int,
    ) -> None:
        self.spec = spec
        self._native: _native.Decoder | None = native
        self._max_batch_tokens = options.max_batch_tokens
        self._kv_capacity = native.kv_blocks
        self._adapters: set[int] = set()
        self.info = DecoderInfo(
            backend="cpu",
            kernel=kernel,
            threads=threads,
            weight_bytes=native.weight_bytes + dense_bytes,
            kv_bytes=native.kv_bytes,
            scratch_bytes=native.scratch_bytes,
            head=native.head,
            packing=packing,
        )

    @property
    def kv_capacity(self) -> int:
        """Number of KV blocks."""
        return self._kv_capacity

    @property
    def head_statistics(self) -> dict[str, int]:
        """Counts since loading: rows "screened", head rows "rescored" exactly, and "full".

        "full" are those of the screened rows that read the whole head after all.
        """
        return self._open().head_statistics

    def forward(self, batch: Batch) -> StepOutput:
        """Compute one step; see `bitllm.backends.base.Decoder.forward`."""
        native = self._open()
        try:
            output = _empty_output(batch, self.spec)
            native.forward(
                batch.token_ids,
                batch.positions,
                batch.run_offsets,
                np.ascontiguousarray(batch.block_tables),
                batch.adapter_slots,
                batch.output_rows,
                batch.output_kinds,
                batch.score_targets,
                batch.score_top_n,
                *_plan_values(batch.plan),
                *_output_values(output),
            )
        except (TypeError, ValueError) as error:
            # The native code checks as much as these two, faster, but says less about it.
            _check_arrays(batch)
            check_batch(batch, self.spec, self._kv_capacity, self._max_batch_tokens, self._adapters)
            raise ConfigError(f"the batch cannot be computed: {error}") from error
        except OverflowError as error:
            raise QuantizationError(
                f"{error}: only finite numbers can be multiplied with weights",
                hint="the weights are damaged, or too large for float32",
            ) from error
        return output

    def load_adapter(self, adapter: Adapter) -> int:
        """Copy an adapter and return its slot; see `bitllm.backends.base.Decoder.load_adapter`."""
        native = self._open()
        adapter.check(self.spec)
        wanted, free = self.adapter_bytes(adapter), _native.available_memory()
        try:
            if free and wanted > free:
                raise MemoryError(f"{free / 1e6:.0f} MB of memory are free")
            copied = _native.Adapter(len(self.spec.layers), _matrix_bytes(adapter))
            for name, update in adapter.updates.items():
                _, layer, linear = name.split(".")
                _copy_update(copied, int(layer), linear, update)
            slot = native.load_adapter(copied)
        except MemoryError as error:
            raise InsufficientMemoryError(
                f"{adapter.origin}: the adapter needs {wanted / 1e6:.0f} MB ({error})",
                hint="unload another adapter, or load the model with a shorter context",
            ) from error
        self._adapters.add(slot)
        return slot

    def unload_adapter(self, slot: int) -> None:
        """Free an adapter, after a step that is under way.

        Raises:
            ConfigError: there is no adapter in this slot.
        """
        if slot not in self._adapters:
            raise ConfigError(f"adapter slot {slot} is empty")
        self._adapters.remove(slot)
        self._open().unload_adapter(slot)

    def adapter_bytes(self, adapter: Adapter) -> int:
        """Return the bytes that `load_adapter` would take, for weights and for scratch."""
        return _matrix_bytes(adapter) + self._open().more_adapter_scratch(adapter.rank)

    def copy_blocks(self, pairs: I32) -> None:
        """Copy KV blocks, int32 [n, 2] of (source, destination), in order."""
        native = self._open()
        self._check_blocks(pairs)
        native.copy_blocks(np.ascontiguousarray(pairs, np.int32).reshape(-1, 2))

    def read_blocks(self, blocks: I32) -> npt.NDArray[np.uint8]:
        """Return the stored bytes of some KV blocks, uint8 [n, bytes per block]."""
        native = self._open()
        self._check_blocks(blocks)
        data = np.empty((len(blocks), native.kv_block_bytes), np.uint8)
        native.read_blocks(np.ascontiguousarray(blocks, np.int32), data)
        return data

    def write_blocks(self, blocks: I32, data: npt.NDArray[np.uint8]) -> None:
        """Store bytes that `read_blocks` returned into these KV blocks."""
        native = self._open()
        self._check_blocks(blocks)
        wanted = (len(blocks), native.kv_block_bytes)
        if data.dtype != np.uint8 or data.shape != wanted:
            raise ConfigError(
                f"{len(blocks)} KV blocks need uint8 {list(wanted)}, got {data.dtype} {data.shape}"
            )
        native.write_blocks(np.ascontiguousarray(blocks, np.int32), np.ascontiguousarray(data))

    @property
    def rounded_head_bytes(self) -> int:
        """Bytes of the rounded copy of the head that steps read; 0 where there is none."""
        return self._open().rounded_head_bytes

    def packed_bytes(self) -> dict[str, int]:
        """Return the bytes of packed ternary weights, by linear, over all layers."""
        return self._open().packed_bytes

    def measure_stages(self, on: bool) -> None:
        """Forget what steps and their stages took; measure stages from now on, or no more."""
        self._open().measure_stages(on)

    def stage_seconds(self) -> dict[str, float]:
        """Return the seconds of each stage since `measure_stages(True)`, the mean of the workers.

        "wait" is the time that a worker waits for others at the end of stages.
        """
        return self._open().stage_seconds

    def step_seconds(self) -> float:
        """Return the seconds of all native steps since `measure_stages`, or since loading."""
        return self._open().step_seconds

    def close(self) -> None:
        """Free weights and KV storage, after a step that is under way; no use afterwards."""
        self._native = None

    def _open(self) -> _native.Decoder:
        native = self._native
        if native is None:
            raise ConfigError("this decoder is closed", hint="load the model again")
        return native

    def _check_blocks(self, blocks: I32) -> None:
        if blocks.size and (blocks.min() < 0 or blocks.max() >= self._kv_capacity):
            raise ConfigError(
                f"KV blocks are 0 .. {self._kv_capacity - 1}, got {blocks.min()} .. {blocks.max()}"
            )


def _matrix_bytes(adapter: Adapter) -> int:
    matrices = [matrix for each in adapter.updates.values() for matrix in (each.a, each.b)]
    return sum(-(-matrix.nbytes // _ALIGNMENT) * _ALIGNMENT for matrix in matrices)


def _copy_update(copied: _native.Adapter, layer: int, linear: str, update: LowRankUpdate) -> None:
    a, b = update.a, update.b
    copied.set(layer, linear, _bytes(a), a.dtype, _bytes(b), b.dtype, update.scale)


def _bytes(matrix: DenseTensor) -> npt.NDArray[np.uint8]:
    """Return a view of a matrix as it is stored, uint8 [rows, bytes of a row]."""
    return np.ascontiguousarray(matrix.data).view(np.uint8)


def _empty_output(batch: Batch, spec: ModelSpec) -> StepOutput:
    # Counted as bytes and lists: there are few, and NumPy would take longer to begin.
    kinds = batch.output_kinds.tobytes()
    samples = kinds.count(OutputKind.SAMPLE)
    scored = samples + kinds.count(OutputKind.SCORE)
    width = max([0, *batch.plan.top_logprobs.tolist(), *batch.score_top_n.tolist()])
    return StepOutput(
        hidden=np.empty((kinds.count(OutputKind.HIDDEN), spec.hidden_size), np.float32),
        logits=np.empty((kinds.count(OutputKind.LOGITS), spec.vocab_size), np.float32),
        sampled=np.empty(samples, np.int32),
        logprobs=_filled(scored, np.nan, np.float32),
        top_ids=_filled((scored, width), -1, np.int32),
        top_logprobs=_filled((scored, width), np.nan, np.float32),
    )


def _filled(shape: int | tuple[int, int], value: float, dtype: type) -> npt.NDArray[Any]:
    """Return what `np.full` does, in a third of its time."""
    array: npt.NDArray[Any] = np.empty(shape, dtype)
    array.fill(value)
    return array


def _check_arrays(batch: Batch) -> None:
    """Refuse an array that native code cannot read as it is."""
    named = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    plan, blank = named.pop("plan"), SamplePlan.greedy()
    wanted = dict.fromkeys(named, np.dtype(np.int32)) | {"output_kinds": np.dtype(np.uint8)}
    for name in _PLAN_FIELDS:
        named[f"plan.{name}"] = getattr(plan, name)
        wanted[f"plan.{name}"] = getattr(blank, name).dtype
    for name, array in named.items():
        strided = name != "block_tables" and not array.flags.c_contiguous
        if array.dtype != wanted[name] or strided:
            raise ConfigError(
                f"{name} must be a contiguous array of {wanted[name]}, "
                f"got {array.dtype} {list(array.shape)} with strides {array.strides}"
            )
