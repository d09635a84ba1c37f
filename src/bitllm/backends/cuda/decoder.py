"""A model loaded in PyTorch: batches of the seam in, answers of the seam out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

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
from bitllm.backends.cuda.attention import Angles, KvCache, StepLayout, lay_out
from bitllm.backends.cuda.decode_step import DecodeSteps, StepRows
from bitllm.backends.cuda.layer import Layer
from bitllm.backends.cuda.linear import rms_norm
from bitllm.backends.cuda.sampling import draw, draws_here
from bitllm.backends.cuda.tensors import to_torch, vector
from bitllm.backends.sampling import step_output
from bitllm.checkpoint import Checkpoint, ModelSpec, RopeSpec
from bitllm.errors import ConfigError, InsufficientMemoryError, QuantizationError

if TYPE_CHECKING:
    from bitllm.backends.cuda.fused_layer import FusedLayer

__all__ = ["CudaDecoder"]

I32 = npt.NDArray[np.int32]

_HEAD_ROWS = 16384  # rows of the head widened to float32 at a time, to bound their memory


class CudaDecoder:
    """A model in PyTorch; see `bitllm.backends.base.Decoder`.

    Args:
        checkpoint: the model.
        options: how to load it.
        device: of its tensors.
        kernels: compute with the Triton kernels, where they run a layer.
    """

    spec: ModelSpec
    info: DecoderInfo

    def __init__(
        self, checkpoint: Checkpoint, options: LoadOptions, device: torch.device, *, kernels: bool
    ) -> None:
        self.spec = spec = checkpoint.spec
        self._device = device
        self._max_batch_tokens = options.max_batch_tokens
        self._embed = to_torch(checkpoint.dense("embed"), device)
        self._head = self._embed
        if not spec.tied_head:
            self._head = to_torch(checkpoint.dense("head"), device)
        self._final_norm = vector(checkpoint, "final_norm", device)
        self._layers = [
            _load_layer(checkpoint, index, device, kernels) for index in range(len(spec.layers))
        ]
        self._kernels = kernels
        self._blocks = -(-(options.kv_tokens or spec.max_context) // KV_BLOCK_SIZE)
        stored = self._blocks + kernels  # one more, for the rows that fill up a decode step
        self._caches = [KvCache(stored, layer, options.kv_dtype, device) for layer in spec.layers]
        self._ropes = list(dict.fromkeys(layer.rope for layer in spec.layers))
        plain = [layer for layer in self._layers if isinstance(layer, Layer)]
        self._windows = {layer.spec.sliding_window for layer in plain}
        self._decode_steps = None
        if kernels and not plain:
            self._decode_steps = DecodeSteps(self._step, self._ropes, self._blocks, device)
        held = sum(tensor.nbytes for tensor in self._storage())
        dense = self._embed.nbytes + (0 if spec.tied_head else self._head.nbytes)
        self.info = DecoderInfo(
            backend="cuda",
            kernel="triton" if kernels else "torch",
            threads=1,
            weight_bytes=dense + sum(layer.nbytes for layer in self._layers),
            kv_bytes=held * self._blocks // stored,
            scratch_bytes=held - held * self._blocks // stored,
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
            InsufficientMemoryError: the GPU has no room left for what the step computes.
            QuantizationError: activations have become NaN or infinite.
        """
        check_batch(batch, self.spec, self._blocks, self._max_batch_tokens)
        try:
            with torch.inference_mode():
                return self._compute(batch)
        except torch.OutOfMemoryError as error:
            raise InsufficientMemoryError(
                f"a step of {len(batch.token_ids)} tokens does not fit into the GPU: {error}",
                hint="set a smaller max_batch_tokens, kv_tokens or context",
            ) from error

    def _compute(self, batch: Batch) -> StepOutput:
        if self._decode_steps is not None and self._decode_steps.fits(batch):
            rows = self._decode_steps(batch)
            return self._answer(batch, rows.hidden, rows.logits, rows.finite)
        layout = lay_out(batch, self._windows, self._device)
        angles = {rope: Angles.of(batch.positions, rope, self._device) for rope in self._ropes}
        h = self._hidden(torch.from_numpy(batch.token_ids).to(self._device), layout, angles)
        wanted = torch.from_numpy(batch.output_rows).to(self._device)
        hidden = rms_norm(h[wanted], self._final_norm, self.spec.norm_eps)
        with_logits = np.flatnonzero(batch.output_kinds != OutputKind.HIDDEN)
        logits = self._logits(hidden[torch.from_numpy(with_logits).to(self._device)])
        return self._answer(batch, hidden, logits, torch.isfinite(h).all(-1))

    def _hidden(
        self, ids: torch.Tensor, layout: StepLayout, angles: dict[RopeSpec, Angles]
    ) -> torch.Tensor:
        """Return the hidden states after the last layer, float32 [tokens, hidden]."""
        h = self._embed[ids].to(torch.float32) * self.spec.embedding_scale
        for layer, cache in zip(self._layers, self._caches, strict=True):
            h = layer(h, layout, angles[layer.spec.rope], cache)
        return h

    def _step(
        self, ids: torch.Tensor, layout: StepLayout, angles: dict[RopeSpec, Angles]
    ) -> StepRows:
        """Compute a decode step: nothing in it waits for the device."""
        h = self._hidden(ids, layout, angles)
        hidden = rms_norm(h, self._final_norm, self.spec.norm_eps)
        return StepRows(hidden, self._logits(hidden), torch.isfinite(h).all(-1))

    def _answer(
        self, batch: Batch, hidden: torch.Tensor, logits: torch.Tensor, finite: torch.Tensor
    ) -> StepOutput:
        """Return what was asked for.

        Args:
            batch: the step.
            hidden: of all requests, float32 [outputs, hidden].
            logits: of the requests that need them, float32 [requests, vocab].
            finite: whether activations are numbers, bool [tokens].

        Raises:
            QuantizationError: they are not.
        """
        vocab, kinds = self.spec.vocab_size, batch.output_kinds
        if self._kernels and draws_here(batch):
            # Tokens and the check come back in one piece: the only wait of the step.
            answer = torch.cat([draw(batch.plan, logits), finite]).cpu().numpy()
            _check_finite(answer[len(kinds) :])
            drawn = dict(enumerate(answer[: len(kinds)].tolist()))
            nothing = np.zeros((0, self.spec.hidden_size), np.float32)
            return step_output(batch, vocab, nothing, {}, drawn)
        _check_finite(finite.cpu().numpy())
        with_logits = np.flatnonzero(kinds != OutputKind.HIDDEN).tolist()
        rows = dict(zip(with_logits, logits.cpu().numpy(), strict=True))
        return step_output(batch, vocab, hidden.cpu().numpy(), rows)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states, float32 [n, vocab]."""
        if len(hidden) == 0:
            return torch.empty((0, self.spec.vocab_size), device=self._device)
        if self._kernels:
            from bitllm.backends.cuda.kernels.head import logits_of

            return logits_of(hidden, self._head)
        parts = [
            hidden @ self._head[start : start + _HEAD_ROWS].to(torch.float32).T
            for start in range(0, self.spec.vocab_size, _HEAD_ROWS)
        ]
        return torch.cat(parts, dim=-1)

    def copy_blocks(self, pairs: I32) -> None:
        """Copy KV blocks, int32 [n, 2] of (source, destination), in order."""
        self._check_blocks(pairs)
        for source, destination in pairs.tolist():
            for tensor in self._storage():
                tensor[destination] = tensor[source]

    def read_blocks(self, blocks: I32) -> npt.NDArray[np.uint8]:
        """Return the stored bytes of some KV blocks, uint8 [n, bytes per block]."""
        self._check_blocks(blocks)
        wanted = torch.from_numpy(blocks).to(self._device)
        parts = [tensor[wanted].flatten(1).view(torch.uint8) for tensor in self._storage()]
        return np.asarray(torch.cat(parts, dim=1).cpu().numpy())

    def write_blocks(self, blocks: I32, data: npt.NDArray[np.uint8]) -> None:
        """Store bytes that `read_blocks` returned into these KV blocks."""
        self._check_blocks(blocks)
        block_bytes = sum(tensor[0].nbytes for tensor in self._storage())
        if data.dtype != np.uint8 or data.shape != (len(blocks), block_bytes):
            raise ConfigError(
                f"{len(blocks)} KV blocks need uint8 [{len(blocks)}, {block_bytes}], "
                f"got {data.dtype} {data.shape}"
            )
        wanted, start = torch.from_numpy(blocks).to(self._device), 0
        for tensor in self._storage():
            end = start + tensor[0].nbytes
            columns = torch.from_numpy(np.array(data[:, start:end])).view(tensor.dtype)
            tensor[wanted] = columns.view(len(blocks), *tensor.shape[1:]).to(self._device)
            start = end

    def load_adapter(self, adapter: Adapter) -> int:
        """Refuse an adapter: this backend has no products for them.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{adapter.origin}: the cuda device runs no adapters",
            hint="load the model with device='cpu'",
        )

    def unload_adapter(self, slot: int) -> None:
        """Refuse: none can be loaded.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"there is no adapter in slot {slot}")

    def adapter_bytes(self, adapter: Adapter) -> int:
        """Return the bytes of an adapter's matrices as they are stored."""
        return adapter.nbytes

    def close(self) -> None:
        """Free weights and KV storage; the decoder cannot be used afterwards."""
        self._layers, self._caches, self._blocks = [], [], 0
        self._decode_steps = None
        self._embed = self._head = torch.zeros(0)

    def _storage(self) -> list[torch.Tensor]:
        return [tensor for cache in self._caches for tensor in cache.tensors]

    def _check_blocks(self, blocks: I32) -> None:
        if blocks.size and (blocks.min() < 0 or blocks.max() >= self._blocks):
            raise ConfigError(
                f"KV blocks are 0 .. {self._blocks - 1}, got {blocks.min()} .. {blocks.max()}"
            )


def _load_layer(
    checkpoint: Checkpoint, index: int, device: torch.device, kernels: bool
) -> Layer | FusedLayer:
    if kernels:
        from bitllm.backends.cuda.fused_layer import FusedLayer, can_fuse

        if can_fuse(checkpoint, index):
            return FusedLayer(checkpoint, index, device)
    return Layer(checkpoint, index, device)


def _check_finite(finite: npt.NDArray[Any]) -> None:
    if not finite.all():
        raise QuantizationError(
            "activations hold NaN or infinity: only finite numbers can be rounded to int8",
            hint="the weights are damaged, or scales are read the wrong way round",
        )
