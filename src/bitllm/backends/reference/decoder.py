"""The decoder step in NumPy: the executable specification of `Decoder.forward`.

The order of every float operation is part of it: norms, quantisation, rescaling, attention and
head give the same bits as the native decoder. What does not change the result is left simple.

    h = embed[token] * embedding_scale
    each layer:  x = attn_norm(h); q, k, v = linears(x); q, k normed and turned by their position
                 a = softmax(q k * query_scale) v over the KV cache
                 h = h + post_attn_norm(o(attn_sub_norm(a)))
                 x = ffn_norm(h); f = act(gate(x)) * up(x)
                 h = h + post_ffn_norm(down(ffn_sub_norm(f)))
                 rows with an adapter: linear(x) is linear(x) + (B (A x)) * scale
    wanted rows: hidden = final_norm(h); logits = head(hidden); draws and scores of the logits
"""

from __future__ import annotations

import itertools
import math
from itertools import pairwise
from typing import Any

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
from bitllm.backends.numerics import lane_sum
from bitllm.backends.reference.attention import KvCache
from bitllm.backends.reference.layer import Layer, rms_norm
from bitllm.backends.sampling import step_output
from bitllm.checkpoint import Checkpoint, DenseTensor, ModelSpec
from bitllm.errors import ConfigError, InsufficientMemoryError

__all__ = ["ReferenceBackend", "ReferenceDecoder"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

_HEAD_ROWS = 4096  # rows of the head multiplied at a time, to bound the memory of their products


class ReferenceDecoder:
    """A model in plain NumPy; see `bitllm.backends.base.Decoder`."""

    spec: ModelSpec
    info: DecoderInfo

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        self.spec = spec = checkpoint.spec
        self._max_batch_tokens = options.max_batch_tokens
        self._embed = checkpoint.dense("embed")
        self._head = self._embed if spec.tied_head else checkpoint.dense("head")
        self._final_norm = checkpoint.dense("final_norm").to_float32()
        self._layers = [Layer(checkpoint, index) for index in range(len(spec.layers))]
        self._blocks = math.ceil((options.kv_tokens or spec.max_context) / KV_BLOCK_SIZE)
        self._adapters: dict[int, Adapter] = {}
        self._caches = [KvCache(self._blocks, layer, options.kv_dtype) for layer in spec.layers]
        self.info = DecoderInfo(
            backend="reference",
            kernel="numpy",
            threads=1,
            weight_bytes=self._weight_bytes(),
            kv_bytes=sum(part.nbytes for part in self._storage()),
            scratch_bytes=0,
        )

    def _weight_bytes(self) -> int:
        linears = [linear for layer in self._layers for linear in layer.linear.values()]
        head = 0 if self.spec.tied_head else self._head.nbytes
        ternary = sum(linear.codes.nbytes + linear.scales.nbytes for linear in linears)
        return self._embed.nbytes + head + ternary

    @property
    def kv_capacity(self) -> int:
        """Number of KV blocks."""
        return self._blocks

    def forward(self, batch: Batch) -> StepOutput:
        """Compute one step; see `bitllm.backends.base.Decoder.forward`.

        Raises:
            ConfigError: the batch contradicts itself or the model.
            QuantizationError: the hidden states have left the range of float32.
        """
        check_batch(batch, self.spec, self._blocks, self._max_batch_tokens, self._adapters)
        with np.errstate(all="ignore"):
            return self._step(batch)

    def _step(self, batch: Batch) -> StepOutput:
        h = _rows(self._embed, batch.token_ids) * np.float32(self.spec.embedding_scale)
        runs = zip(pairwise(batch.run_offsets), batch.adapter_slots.tolist(), strict=True)
        adapted = [(slice(*run), self._adapters[slot]) for run, slot in runs if slot >= 0]
        for layer, cache in zip(self._layers, self._caches, strict=True):
            h = h + layer.attention_block(h, batch, cache, adapted)
            h = h + layer.ffn_block(h, adapted)
        return self._outputs(h, batch)

    def _outputs(self, h: F32, batch: Batch) -> StepOutput:
        hidden = rms_norm(h[batch.output_rows], self._final_norm, self.spec.norm_eps)
        logits = {
            request: self._logits(hidden[request])
            for request, kind in enumerate(batch.output_kinds)
            if kind != OutputKind.HIDDEN
        }
        return step_output(batch, self.spec.vocab_size, hidden, logits)

    def _logits(self, hidden: F32) -> F32:
        parts = [
            lane_sum(_rows(self._head, slice(start, start + _HEAD_ROWS)) * hidden)
            for start in range(0, self.spec.vocab_size, _HEAD_ROWS)
        ]
        return np.concatenate(parts)

    def copy_blocks(self, pairs: I32) -> None:
        """Copy KV blocks, int32 [n, 2] of (source, destination), in order."""
        self._check_blocks(pairs)
        for source, destination in pairs:
            for cache in self._caches:
                for part in cache.arrays():
                    part[destination] = part[source]

    def read_blocks(self, blocks: I32) -> npt.NDArray[np.uint8]:
        """Return the stored bytes of some KV blocks, uint8 [n, bytes per block]."""
        self._check_blocks(blocks)
        parts = [part[blocks].reshape(len(blocks), -1) for part in self._storage()]
        return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=1)

    def write_blocks(self, blocks: I32, data: npt.NDArray[np.uint8]) -> None:
        """Store bytes that `read_blocks` returned into these KV blocks."""
        self._check_blocks(blocks)
        block_bytes = sum(part[0].nbytes for part in self._storage())
        if data.dtype != np.uint8 or data.shape != (len(blocks), block_bytes):
            raise ConfigError(
                f"{len(blocks)} KV blocks need uint8 [{len(blocks)}, {block_bytes}], "
                f"got {data.dtype} {data.shape}"
            )
        start = 0
        for part in self._storage():
            columns = np.ascontiguousarray(data[:, start : start + part[0].nbytes])
            part[blocks] = columns.view(part.dtype).reshape(len(blocks), *part.shape[1:])
            start += part[0].nbytes

    def load_adapter(self, adapter: Adapter) -> int:
        """Keep an adapter and return its slot; see `bitllm.backends.base.Decoder`."""
        adapter.check(self.spec)
        slot = next(slot for slot in itertools.count() if slot not in self._adapters)
        self._adapters[slot] = adapter
        return slot

    def unload_adapter(self, slot: int) -> None:
        """Forget an adapter.

        Raises:
            ConfigError: there is no adapter in this slot.
        """
        if self._adapters.pop(slot, None) is None:
            raise ConfigError(f"adapter slot {slot} is empty")

    def adapter_bytes(self, adapter: Adapter) -> int:
        """Return the bytes of the adapter's matrices, which stay as they are stored."""
        return adapter.nbytes

    def close(self) -> None:
        """Free weights and KV storage; the decoder cannot be used afterwards."""
        self._layers, self._caches, self._blocks = [], [], 0
        self._adapters = {}

    def _storage(self) -> list[npt.NDArray[Any]]:
        return [part for cache in self._caches for part in cache.arrays()]

    def _check_blocks(self, blocks: I32) -> None:
        if blocks.size and (blocks.min() < 0 or blocks.max() >= self._blocks):
            raise ConfigError(
                f"KV blocks are 0 .. {self._blocks - 1}, got {blocks.min()} .. {blocks.max()}"
            )


class ReferenceBackend:
    """Loads checkpoints into `ReferenceDecoder`; runs wherever NumPy does."""

    name = "reference"

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> ReferenceDecoder:
        """Unpack the weights of `checkpoint`; `options.threads` has no meaning here.

        Raises:
            CheckpointError: a tensor is missing or broken.
            ConfigError: `options.isa` is set; NumPy has no kernel sets to choose from.
            InsufficientMemoryError: NumPy could not get the memory.
        """
        if options.isa is not None:
            raise ConfigError(
                f"the reference backend has no kernel set {options.isa!r}",
                hint="leave isa out, or use the cpu device",
            )
        try:
            return ReferenceDecoder(checkpoint, options)
        except MemoryError as error:
            raise InsufficientMemoryError(
                f"{checkpoint.origin} does not fit into memory: {error}",
                hint="ask for a shorter context (kv_tokens), or use the cpu device, which packs",
            ) from error


def _rows(tensor: DenseTensor, rows: I32 | slice) -> F32:
    return DenseTensor(tensor.data[rows], tensor.dtype).to_float32()
