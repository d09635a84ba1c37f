"""Models of random ternary weights in memory, and batches of them: what `gpu.py` checks and times.

No file is written and no tokenizer needed, so that a source tree and NumPy are enough.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import KV_BLOCK_SIZE, Batch, OutputKind, SamplePlan
from bitllm.checkpoint import (
    Checkpoint,
    DenseTensor,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    RopeSpec,
    TernaryMatrix,
)

__all__ = ["SPECS", "decode_batch", "prompt_batch", "random_bytes", "random_model"]

_FOUR_CODES = np.array(
    [
        sum(code << 2 * i for i, code in enumerate(codes))
        for codes in itertools.product(range(3), repeat=4)
    ],
    np.uint8,
)
"""The 81 bytes that hold four ternary codes."""


def _spec(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int) -> ModelSpec:
    """Return an architecture with the switches of BitNet b1.58 2B-4T."""
    head_dim = hidden // heads
    shapes = {
        "q": (hidden, hidden),
        "k": (kv_heads * head_dim, hidden),
        "v": (kv_heads * head_dim, hidden),
        "o": (hidden, hidden),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }
    linears: dict[str, Any] = {name: LinearSpec(*shape) for name, shape in shapes.items()}
    layer = LayerSpec(
        **linears,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=RopeSpec(500000.0, head_dim),
        activation="relu2",
        norm_eps=1e-5,
        query_scale=head_dim**-0.5,
        attn_sub_norm=True,
        ffn_sub_norm=True,
    )
    return ModelSpec(
        architecture="random",
        vocab_size=vocab,
        hidden_size=hidden,
        layers=(layer,) * layers,
        norm_eps=1e-5,
        tied_head=True,
        max_context=4096,
    )


SPECS = {
    "2b": _spec(2560, 6912, 30, 20, 5, 128256),
    "2b-4-layers": _spec(2560, 6912, 4, 20, 5, 32064),
    "10m": _spec(384, 1024, 6, 6, 2, 4096),
    "tiny": _spec(64, 128, 1, 2, 1, 256),
}
"""Architectures by name; "2b" has every size of microsoft/bitnet-b1.58-2B-4T."""


def random_bytes(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return bytes of four random ternary codes each, uint8 [shape]."""
    found: npt.NDArray[np.uint8] = _FOUR_CODES[rng.integers(0, len(_FOUR_CODES), shape, np.uint8)]
    return found


@dataclass(frozen=True)
class _RandomSource:
    """A `TensorSource` whose tensors are functions of their name; each is made once."""

    spec: ModelSpec
    made: dict[str, DenseTensor | TernaryMatrix] = field(default_factory=dict)

    def dense(self, name: str) -> DenseTensor | None:
        shape = self.spec.dense_shape(name)
        if shape is None:
            return None
        if name not in self.made:
            self.made[name] = _dense(name, shape)
        found = self.made[name]
        return found if isinstance(found, DenseTensor) else None

    def ternary(self, name: str) -> TernaryMatrix | None:
        if name not in self.made:
            linear = dict(self.spec.linear_names())[name]
            packed = random_bytes(_rng(name), (linear.out_features, -(-linear.in_features // 4)))
            # Two codes of three are not zero: this scale keeps the variance of what goes in.
            scale = np.array((linear.in_features * 2 / 3) ** -0.5, np.float32)
            self.made[name] = TernaryMatrix(packed, linear.in_features, scale)
        found = self.made[name]
        return found if isinstance(found, TernaryMatrix) else None


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _dense(name: str, shape: tuple[int, ...]) -> DenseTensor:
    rng = _rng(name)
    if len(shape) == 1:
        # Gains that are not all 1: embeddings in bf16 would meet ties where they are rounded.
        return DenseTensor(rng.uniform(0.5, 1.5, shape).astype(np.float32), "f32")
    values = np.empty(shape, np.uint16)
    for row in range(0, shape[0], 4096):
        part = values[row : row + 4096]
        normal = rng.standard_normal(part.shape, np.float32)
        part[:] = (normal * np.float32(0.02)).view(np.uint32) >> 16
    return DenseTensor(values, "bf16")


def random_model(name: str) -> Checkpoint:
    """Return a model of random weights by the name of its architecture in `SPECS`."""
    spec = SPECS[name]
    return Checkpoint(spec, _RandomSource(spec), f"random model {name}")


def prompt_batch(ids: list[int], kind: int, first_output: int = 0, start: int = 0) -> Batch:
    """Return a step that reads a prompt into the first KV blocks.

    Args:
        ids: the tokens.
        kind: what each row from `first_output` on wants.
        first_output: the first row that wants something.
        start: the position of the first token.
    """
    blocks = -(-(start + len(ids)) // KV_BLOCK_SIZE)
    rows = np.arange(first_output, len(ids), dtype=np.int32)
    return Batch(
        token_ids=np.array(ids, np.int32),
        positions=np.arange(start, start + len(ids), dtype=np.int32),
        run_offsets=np.array([0, len(ids)], np.int32),
        block_tables=np.arange(blocks, dtype=np.int32)[None],
        adapter_slots=np.array([-1], np.int32),
        output_rows=rows,
        output_kinds=np.full(len(rows), kind, np.uint8),
        plan=SamplePlan.greedy(len(rows) if kind == OutputKind.SAMPLE else 0),
    )


def decode_batch(
    ids: npt.NDArray[np.int32], position: int, table_width: int, **sampling: float
) -> Batch:
    """Return a step that decodes one token of several sequences, all at one position.

    Args:
        ids: int32 [sequences], the tokens to be read.
        position: of these tokens.
        table_width: KV blocks of each sequence.
        sampling: fields of the plan that all sequences share; without any the draws are greedy.
    """
    rows = len(ids)
    plan = SamplePlan.greedy(rows)
    shared = {name: np.full_like(getattr(plan, name), value) for name, value in sampling.items()}
    seeds = np.arange(rows, dtype=np.uint64)
    positions = np.full(rows, position, np.int32)
    return Batch(
        token_ids=ids,
        positions=positions,
        run_offsets=np.arange(rows + 1, dtype=np.int32),
        block_tables=np.arange(rows * table_width, dtype=np.int32).reshape(rows, table_width),
        adapter_slots=np.full(rows, -1, np.int32),
        output_rows=np.arange(rows, dtype=np.int32),
        output_kinds=np.full(rows, OutputKind.SAMPLE, np.uint8),
        plan=replace(plan, seed=seeds, position=positions, **shared),
    )
