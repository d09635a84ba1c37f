"""Does each kernel set of this machine compute what the reference computes?

The numerics contract makes this a comparison with `==`: products of codes and int8 are exact, and
logits have the same bits on every kernel set and in the NumPy reference. The model is random, made
in memory, and has one layer for each activation and kind of norm; its widths are multiples of
nothing that kernels work in, so that the ends of their loops are tested too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from bitllm import ops, ternary
from bitllm.backends.base import KV_BLOCK_SIZE, Backend, Batch, Decoder, LoadOptions, OutputKind
from bitllm.backends.cpu import CpuBackend
from bitllm.backends.reference import ReferenceBackend
from bitllm.checkpoint import (
    Activation,
    Checkpoint,
    DenseTensor,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    RopeSpec,
    TernaryMatrix,
)
from bitllm.cli.failures import CheckFailedError

__all__ = ["SelfTest", "difference", "model_logits", "random_model"]

SEED = 158
VOCABULARY, HIDDEN, FEED_FORWARD = 211, 300, 517
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 34
PRODUCTS = ((1, 1, 1), (3, 17, 2), (63, 65, 1), (65, 257, 5), (16, 2560, 3), (8, 6912, 1))
"""(rows, columns, tokens) of the products that are compared."""
PROMPT_TOKENS = 40
"""More than a KV block, so that attention merges two."""
DECODED_TOKENS = 2


@dataclass(frozen=True)
class RandomTensors:
    """A `TensorSource` of random values, made when they are asked for; the same at each call."""

    spec: ModelSpec
    _linears: dict[str, LinearSpec] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._linears.update(self.spec.linear_names())

    def dense(self, name: str) -> DenseTensor | None:
        """Return float32 values around 0 for embedding and head, around 1 for norm gains."""
        shape = self.spec.dense_shapes().get(name)
        if shape is None:
            return None
        values = _random(name).standard_normal(shape, np.float32)
        is_gain = len(shape) == 1
        return DenseTensor(np.float32(1) + np.float32(0.2) * values if is_gain else values, "f32")

    def ternary(self, name: str) -> TernaryMatrix | None:
        """Return random codes with one scale."""
        linear = self._linears.get(name)
        if linear is None:
            return None
        shape = (linear.out_features, linear.in_features)
        codes = _random(name).integers(-1, 2, shape, np.int8)
        scale = np.float32(1) / np.sqrt(np.float32(linear.in_features))
        return TernaryMatrix.from_codes(codes, np.asarray(scale))


class SelfTest:
    """Compares kernel sets with the reference, whose logits are computed once."""

    def __init__(self) -> None:
        self._model = random_model()

    @cached_property
    def _wanted(self) -> npt.NDArray[np.float32]:
        return model_logits(ReferenceBackend(), self._model)

    def check(self, isa: str) -> str:
        """Return what was found equal on the kernel set `isa`.

        Raises:
            CheckFailedError: what differs.
        """
        for rows, columns, tokens in PRODUCTS:
            check_product(isa, rows, columns, tokens)
        for threads in (1, 2):
            found = model_logits(CpuBackend(), self._model, isa=isa, threads=threads)
            problem = difference(found, self._wanted)
            if problem is not None:
                raise CheckFailedError(f"with {threads} threads {problem}")
        return f"{len(PRODUCTS)} products and {self._wanted.size} logits equal the reference"


def check_product(isa: str, rows: int, columns: int, tokens: int) -> None:
    """Compare quantised activations and int32 products of random values with the reference.

    Raises:
        CheckFailedError: the first difference.
    """
    random = _random(f"product {rows} {columns} {tokens}")
    codes = random.integers(-1, 2, (rows, columns), np.int8)
    x = random.standard_normal((tokens, columns), np.float32)
    wanted_q, wanted_a = ternary.quantize_activations(x)
    q, a = ops.quantize_activations(x, isa=isa)
    if (q != wanted_q).any() or (a.view(np.uint32) != wanted_a.view(np.uint32)).any():
        raise CheckFailedError(f"{tokens} x {columns} activations are quantised differently")
    found = ops.ternary_matmul(ops.pack(codes), q, isa=isa)
    wrong = found != ternary.matmul_int32(codes, q)
    if wrong.any():
        raise CheckFailedError(
            f"{wrong.sum()} of {wrong.size} sums differ in {rows} x {columns} codes times {tokens}"
        )


def random_model() -> Checkpoint:
    """Return the model that is computed on each kernel set."""
    spec = ModelSpec(
        architecture="self-test",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        layers=(_layer("relu2", sub_norms=True), _layer("silu", qk_norm=True), _layer("gelu_tanh")),
        norm_eps=1e-5,
        tied_head=True,
        max_context=2 * KV_BLOCK_SIZE,
    )
    return Checkpoint(spec, RandomTensors(spec), "the self-test's model")


def model_logits(
    backend: Backend, checkpoint: Checkpoint, *, isa: str | None = None, threads: int | None = None
) -> npt.NDArray[np.float32]:
    """Return the logits of a prompt's last token and of each decoded one, [steps, vocabulary]."""
    options = LoadOptions(
        kv_tokens=2 * KV_BLOCK_SIZE, threads=threads, isa=isa, max_batch_tokens=PROMPT_TOKENS
    )
    tokens = _random("prompt").integers(0, VOCABULARY, PROMPT_TOKENS + DECODED_TOKENS, np.int32)
    decoder = backend.load(checkpoint, options)
    try:
        steps = [(0, PROMPT_TOKENS)]
        steps += [(PROMPT_TOKENS + i, PROMPT_TOKENS + i + 1) for i in range(DECODED_TOKENS)]
        return np.concatenate([_step(decoder, tokens, *step) for step in steps])
    finally:
        decoder.close()


def _step(
    decoder: Decoder, tokens: npt.NDArray[np.int32], start: int, stop: int
) -> npt.NDArray[np.float32]:
    batch = Batch(
        token_ids=tokens[start:stop],
        positions=np.arange(start, stop, dtype=np.int32),
        run_offsets=np.array([0, stop - start], np.int32),
        block_tables=np.array([[1, 0]], np.int32),
        adapter_slots=np.array([-1], np.int32),
        output_rows=np.array([stop - start - 1], np.int32),
        output_kinds=np.array([OutputKind.LOGITS], np.uint8),
    )
    return decoder.forward(batch).logits


def difference(found: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> str | None:
    """Return how two arrays of logits differ, None if they have the same bits."""
    if found.shape != wanted.shape:
        return f"shape {found.shape} instead of {wanted.shape}"
    wrong = found.view(np.uint32) != wanted.view(np.uint32)
    if not wrong.any():
        return None
    with np.errstate(invalid="ignore"):
        worst = np.abs(found - wanted)[wrong].max()
    return f"{wrong.sum()} of {wrong.size} logits differ from the reference, by up to {worst:.3g}"


def _layer(activation: Activation, *, sub_norms: bool = False, qk_norm: bool = False) -> LayerSpec:
    attention, cache = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
    return LayerSpec(
        q=LinearSpec(attention, HIDDEN),
        k=LinearSpec(cache, HIDDEN),
        v=LinearSpec(cache, HIDDEN),
        o=LinearSpec(HIDDEN, attention),
        gate=LinearSpec(FEED_FORWARD, HIDDEN),
        up=LinearSpec(FEED_FORWARD, HIDDEN),
        down=LinearSpec(HIDDEN, FEED_FORWARD),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        rope=RopeSpec(theta=10000.0, dim=HEAD_SIZE),
        activation=activation,
        norm_eps=1e-5,
        query_scale=HEAD_SIZE**-0.5,
        attn_sub_norm=sub_norms,
        ffn_sub_norm=sub_norms,
        qk_norm=qk_norm,
    )


def _random(name: str) -> np.random.Generator:
    return np.random.default_rng([SEED, *name.encode()])
