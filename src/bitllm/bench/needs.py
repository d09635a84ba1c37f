"""What a step needs: the bytes it has to read and the multiplications it has to do, by stage.

A step reads each packed matrix once, whatever its number of tokens; the head as it is used; and the
keys and values that its tokens see. Multiplications of int8 with ternary codes are counted apart
from those of floats: the yardstick of the first is the int8 peak. All-zero rows that the decoder
left out count in neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bitllm.checkpoint import LINEAR_NAMES, ModelSpec

__all__ = ["Need", "Needs", "nominal_bytes"]

BLOCK_BYTES = 64
BLOCK_WEIGHTS = {"2bit": 256, "base3": 320}
"""Rows are padded to whole blocks: native/kernels/kernels.h."""

KV_VALUE_BYTES = {"bf16": 2, "fp32": 4, "int8": 1}
KV_SCALE_BYTES = {"bf16": 0, "fp32": 0, "int8": 4}
"""Bytes of a value in the KV cache, and of the scale of a head's key or value."""

STAGE_OF = {
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "o": "o",
    "gate": "gate_up",
    "up": "gate_up",
    "down": "down",
}
"""The stage that computes each linear."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes to be read, ternary and float multiplications to be done."""

    nbytes: int = 0
    ternary: int = 0
    dense: int = 0

    def __add__(self, other: Need) -> Need:
        return Need(
            self.nbytes + other.nbytes, self.ternary + other.ternary, self.dense + other.dense
        )


@dataclass(frozen=True, slots=True)
class Needs:
    """What steps of one loaded model need.

    Attributes:
        spec: the architecture.
        packing: "2bit" or "base3".
        packed: bytes of the packed matrices of each linear, over all layers.
        head_bytes: bytes of the head that a step reads.
        kv_dtype: how keys and values are stored.
    """

    spec: ModelSpec
    packing: str
    packed: Mapping[str, int]
    head_bytes: int
    kv_dtype: str

    def step(self, runs: Iterable[tuple[int, int]], outputs: int) -> dict[str, Need]:
        """Return the needs of a step by stage.

        Args:
            runs: (first position, tokens) of each run.
            outputs: rows that want logits.
        """
        runs = list(runs)
        tokens = sum(count for _, count in runs)
        stages = {stage: Need() for stage in dict.fromkeys(STAGE_OF.values())}
        for name in LINEAR_NAMES:
            stages[STAGE_OF[name]] += Need(
                nbytes=self.packed[name], ternary=tokens * self._weights(name)
            )
        stages["attention"] = sum((self._attention(*run) for run in runs), Need())
        head = self.spec.vocab_size * self.spec.hidden_size
        stages["head"] = Need(nbytes=self.head_bytes if outputs else 0, dense=outputs * head)
        return stages

    def _weights(self, name: str) -> int:
        """Return the weights of a linear over all layers, without the rows that were left out."""
        linears = [layer.linear(name) for layer in self.spec.layers]
        count = sum(linear.out_features * linear.in_features for linear in linears)
        whole = nominal_bytes(self.spec, self.packing)[name]
        return round(count * self.packed[name] / whole)

    def _attention(self, first: int, tokens: int) -> Need:
        nbytes = dense = 0
        for layer in self.spec.layers:
            window = layer.sliding_window or first + tokens
            seen = sum(min(position + 1, window) for position in range(first, first + tokens))
            read = min(first + tokens, window + tokens - 1)
            row = layer.head_dim * KV_VALUE_BYTES[self.kv_dtype] + KV_SCALE_BYTES[self.kv_dtype]
            nbytes += 2 * layer.num_kv_heads * row * read
            dense += 2 * layer.num_heads * layer.head_dim * seen
        return Need(nbytes=nbytes, dense=dense)


def nominal_bytes(spec: ModelSpec, packing: str) -> dict[str, int]:
    """Return the bytes of each linear over all layers in a packing, if no row is left out."""
    return {
        name: sum(
            layer.linear(name).out_features
            * -(-layer.linear(name).in_features // BLOCK_WEIGHTS[packing])
            * BLOCK_BYTES
            for layer in spec.layers
        )
        for name in LINEAR_NAMES
    }
