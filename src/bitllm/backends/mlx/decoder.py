"""A model loaded in MLX: batches of the seam in, answers of the seam out."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from bitllm.adapter import Adapter
from bitllm.backends.base import (
    KV_BLOCK_SIZE,
    Batch,
    DecoderInfo,
    LoadOptions,
    OutputKind,
    StepOutput,
    check_batch,
)
from bitllm.backends.mlx.adapters import AdapterSlots
from bitllm.backends.mlx.attention import Angles, KvCache, group_runs
from bitllm.backends.mlx.kernels import head_logits, use_kernels
from bitllm.backends.mlx.kernels.head import HEAD_TOKENS
from bitllm.backends.mlx.layer import Layer
from bitllm.backends.mlx.tensors import to_host, to_mlx, vector
from bitllm.backends.sampling import step_output
from bitllm.checkpoint import LINEAR_NAMES, Checkpoint, ModelSpec
from bitllm.errors import ConfigError, InsufficientMemoryError, QuantizationError

__all__ = ["MlxDecoder"]

I32 = npt.NDArray[np.int32]

_HEAD_ROWS = 16384  # rows of the head widened to float32 at a time, to bound their memory


class MlxDecoder:
    """A model in MLX; see `bitllm.backends.base.Decoder`."""

    spec: ModelSpec
    info: DecoderInfo

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        self.spec = spec = checkpoint.spec
        self._adapters = AdapterSlots()
        self._max_batch_tokens = options.max_batch_tokens
        self._embed = to_mlx(checkpoint.dense("embed"))
        self._head = self._embed if spec.tied_head else to_mlx(checkpoint.dense("head"))
        whole_words = self._head.dtype == mx.bfloat16 and spec.hidden_size % 2 == 0
        own = whole_words and use_kernels()
        self._head_words = self._head.view(mx.uint32) if own else None
        self._final_norm = vector(checkpoint, "final_norm")
        self._layers = [Layer(checkpoint, index) for index in range(len(spec.layers))]
        self._blocks = -(-(options.kv_tokens or spec.max_context) // KV_BLOCK_SIZE)
        self._caches = [KvCache(self._blocks, layer, options.kv_dtype) for layer in spec.layers]
        self._ropes = list(dict.fromkeys(layer.rope for layer in spec.layers))
        self._windows = {layer.sliding_window for layer in spec.layers}
        mx.eval(
            self._embed,
            self._head,
            self._head_words,
            self._final_norm,
            [cache.arrays for cache in self._caches],
        )
        dense = self._embed.nbytes + (0 if spec.tied_head else self._head.nbytes)
        self.info = DecoderInfo(
            backend="mlx",
            kernel=_kernel_name(),
            threads=1,
            weight_bytes=dense + sum(layer.nbytes for layer in self._layers),
            kv_bytes=sum(array.nbytes for cache in self._caches for array in cache.arrays),
            scratch_bytes=0,
            packing="2bit",
            head="full",
        )

    @property
    def kv_capacity(self) -> int:
        """Number of KV blocks."""
        return self._blocks

    def forward(self, batch: Batch) -> StepOutput:
        """Compute one step; see `bitllm.backends.base.Decoder.forward`.

        Raises:
            ConfigError: the batch contradicts itself or the model.
            QuantizationError: activations have become NaN or infinite.
        """
        check_batch(batch, self.spec, self._blocks, self._max_batch_tokens, self._adapters.used)
        h = self._hidden(batch)
        finite = mx.all(mx.isfinite(h))
        hidden = mx.fast.rms_norm(
            h[mx.array(batch.output_rows)], self._final_norm, self.spec.norm_eps
        )
        output = self._answer(batch, hidden)
        if not bool(finite.item()):
            raise QuantizationError(
                "activations hold NaN or infinity: only finite numbers can be rounded to int8",
                hint="the weights are damaged, or scales are read the wrong way round",
            )
        return output

    def _hidden(self, batch: Batch) -> mx.array:
        """Return the hidden states after the last layer, float32 [tokens, hidden]."""
        layout = group_runs(batch, self._windows)
        adapted = self._adapters.of_step(batch)
        angles = {rope: Angles.of(batch.positions, rope) for rope in self._ropes}
        h = self._embed[mx.array(batch.token_ids)].astype(mx.float32) * self.spec.embedding_scale
        for layer, cache in zip(self._layers, self._caches, strict=True):
            h = layer(h, layout, angles[layer.spec.rope], cache, adapted)
        mx.eval(h, [cache.arrays for cache in self._caches])
        return h

    def _answer(self, batch: Batch, hidden: mx.array) -> StepOutput:
        with_logits = np.flatnonzero(batch.output_kinds != OutputKind.HIDDEN)
        if len(with_logits) == 0:
            return step_output(batch, self.spec.vocab_size, to_host(hidden), {})
        logits = self._logits(hidden[mx.array(with_logits.astype(np.int32))])
        drawn = self._best(batch, with_logits, logits) if _is_greedy(batch) else {}
        if len(drawn) == len(with_logits):
            return step_output(batch, self.spec.vocab_size, to_host(hidden), {}, drawn)
        rows = dict(zip(with_logits.tolist(), to_host(logits), strict=True))
        return step_output(batch, self.spec.vocab_size, to_host(hidden), rows, drawn)

    def _logits(self, hidden: mx.array) -> mx.array:
        """Return the logits of hidden states, float32 [n, vocab]."""
        if self._head_words is not None and len(hidden) <= HEAD_TOKENS:
            return head_logits(self._head_words, hidden)
        parts = [
            hidden @ self._head[start : start + _HEAD_ROWS].astype(mx.float32).T
            for start in range(0, self.spec.vocab_size, _HEAD_ROWS)
        ]
        return mx.concatenate(parts, axis=-1)

    def _best(self, batch: Batch, rows: npt.NDArray[np.intp], logits: mx.array) -> dict[int, int]:
        """Return the argmax of each row, the lowest id winning a tie, by the request's number."""
        if (batch.output_kinds != OutputKind.SAMPLE).any():
            return {}
        highest = mx.max(logits, axis=-1, keepdims=True)
        ids = mx.arange(self.spec.vocab_size, dtype=mx.int32)
        best = to_host(mx.min(mx.where(logits == highest, ids, self.spec.vocab_size), axis=-1))
        best[best == self.spec.vocab_size] = -1  # NaN equals nothing
        return dict(zip(rows.tolist(), best.tolist(), strict=True))

    def copy_blocks(self, pairs: I32) -> None:
        """Copy KV blocks, int32 [n, 2] of (source, destination), in order."""
        self._check_blocks(pairs)
        for source, destination in pairs.tolist():
            for cache in self._caches:
                for array in cache.arrays:
                    array[destination] = array[source]
        mx.eval([cache.arrays for cache in self._caches])

    def read_blocks(self, blocks: I32) -> npt.NDArray[np.uint8]:
        """Return the stored bytes of some KV blocks, uint8 [n, bytes per block]."""
        self._check_blocks(blocks)
        wanted = mx.array(blocks)
        parts = [_bytes(array[wanted]) for cache in self._caches for array in cache.arrays]
        return np.concatenate([to_host(part) for part in parts], axis=1)

    def write_blocks(self, blocks: I32, data: npt.NDArray[np.uint8]) -> None:
        """Store bytes that `read_blocks` returned into these KV blocks."""
        self._check_blocks(blocks)
        arrays = [array for cache in self._caches for array in cache.arrays]
        block_bytes = sum(array.nbytes // self._blocks for array in arrays)
        if data.dtype != np.uint8 or data.shape != (len(blocks), block_bytes):
            raise ConfigError(
                f"{len(blocks)} KV blocks need uint8 [{len(blocks)}, {block_bytes}], "
                f"got {data.dtype} {data.shape}"
            )
        wanted, start = mx.array(blocks), 0
        for array in arrays:
            end = start + array.nbytes // self._blocks
            columns = mx.array(np.ascontiguousarray(data[:, start:end])).view(array.dtype)
            array[wanted] = columns.reshape(len(blocks), *array.shape[1:])
            start = end
        mx.eval(arrays)

    def load_adapter(self, adapter: Adapter) -> int:
        """Copy an adapter and return its slot; see `bitllm.backends.base.Decoder.load_adapter`."""
        try:
            return self._adapters.load(adapter, self.spec)
        except (MemoryError, RuntimeError) as error:
            raise InsufficientMemoryError(
                f"{adapter.origin}: the adapter does not fit into the device's memory: {error}",
                hint="unload another adapter, or load the model with a shorter context",
            ) from error

    def unload_adapter(self, slot: int) -> None:
        """Free an adapter.

        Raises:
            ConfigError: there is no adapter in this slot.
        """
        self._adapters.unload(slot)

    def adapter_bytes(self, adapter: Adapter) -> int:
        """Return the bytes of an adapter's matrices as they are stored."""
        return adapter.nbytes

    def packed_bytes(self) -> dict[str, int]:
        """Return the bytes of the matrices of each linear, over all layers."""
        return {
            name: sum(layer.linear[name].nbytes for layer in self._layers) for name in LINEAR_NAMES
        }

    def close(self) -> None:
        """Free weights and KV storage; the decoder cannot be used afterwards."""
        self._layers, self._caches, self._blocks = [], [], 0
        self._adapters = AdapterSlots()
        self._embed = self._head = mx.zeros((0,))
        self._head_words = None

    def _check_blocks(self, blocks: I32) -> None:
        if blocks.size and (blocks.min() < 0 or blocks.max() >= self._blocks):
            raise ConfigError(
                f"KV blocks are 0 .. {self._blocks - 1}, got {blocks.min()} .. {blocks.max()}"
            )


def _bytes(blocks: mx.array) -> mx.array:
    return blocks.reshape(blocks.shape[0], -1).view(mx.uint8)


def _kernel_name() -> str:
    if use_kernels():
        return "metal, bitllm"
    return "metal, mlx" if mx.metal.is_available() else "mlx cpu"


def _is_greedy(batch: Batch) -> bool:
    """Whether every entry of the plan is the plain argmax of the model's logits."""
    plan: Any = batch.plan
    plain = (plan.temperature == 0) & (plan.top_logprobs < 0) & (plan.mask_rows < 0)
    return bool(plain.all()) and not len(plan.seen_ids) and not len(plan.bias_ids)
