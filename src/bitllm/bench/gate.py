"""No figure without right output: the model's steps against those of the scalar kernels, by bits.

The numerics contract makes this a comparison with `==`: logits have the same bits on every kernel
set, packing, thread count and batch, and drawn tokens are those of the full head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import Backend, Decoder, LoadOptions, OutputKind
from bitllm.bench.steps import Run, Sequences, prompt_ids
from bitllm.checkpoint import Checkpoint
from bitllm.errors import MeasurementError

__all__ = [
    "CONTEXT",
    "SEQUENCES",
    "Evidence",
    "evidence",
    "reference_evidence",
    "require_equal",
    "require_near",
]

LARGEST_ERROR = 1e-3
"""Of logits against others: the sum of squared differences over that of squares."""
PROMPT_TOKENS = 19
"""No multiple of what kernels take at once."""
DECODED_TOKENS = 3
SEQUENCES = 2
CONTEXT = 32
"""Sequences, and positions of each, that the comparison needs."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Logits float32 [steps, vocabulary] and tokens int32 [steps] of some steps."""

    logits: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]


def evidence(decoder: Decoder) -> Evidence:
    """Return what a prompt and some decoded tokens give, of one sequence and of two together.

    The tokens that are fed do not depend on those that are drawn, so that one wrong token is one.
    """
    sequences = Sequences(decoder, SEQUENCES, CONTEXT, PROMPT_TOKENS)
    logits, tokens = [], []
    for step in _steps(decoder.spec.vocab_size):
        # A request for all logits may take another way than a draw: each has a step of its own.
        tokens.append(decoder.forward(sequences.batch(step)).sampled)
        logits.append(decoder.forward(sequences.batch(step, OutputKind.LOGITS)).logits)
    return Evidence(np.concatenate(logits), np.concatenate(tokens))


def _steps(vocab_size: int) -> list[list[Run]]:
    """Return both prompts, then each further token for the first sequence and for both."""
    ids = prompt_ids(PROMPT_TOKENS + DECODED_TOKENS, vocab_size)
    steps: list[list[Run]] = [[(index, 0, ids[:PROMPT_TOKENS])] for index in range(SEQUENCES)]
    for position in range(PROMPT_TOKENS, len(ids)):
        token = ids[position : position + 1]
        steps.append([(0, position, token)])
        steps.append([(index, position, token) for index in range(SEQUENCES)])
    return steps


def reference_evidence(backend: Backend, checkpoint: Checkpoint, options: LoadOptions) -> Evidence:
    """Return what `evidence` has to be: by scalar kernels, 2-bit weights and the full head.

    It is computed for one sequence, since the others are the same; and tokens are the highest
    logits. The approximate int8 head is compared with itself.
    """
    plain = dataclasses.replace(
        options,
        isa="scalar",
        packing="2bit",
        head="int8" if options.head == "int8" else "full",
        kv_tokens=CONTEXT,
        max_batch_tokens=PROMPT_TOKENS,
    )
    decoder = backend.load(checkpoint, plain)
    found: dict[int, npt.NDArray[np.float32]] = {}
    wanted = []
    try:
        sequence = Sequences(decoder, 1, CONTEXT, PROMPT_TOKENS)
        for step in _steps(decoder.spec.vocab_size):
            for _, position, ids in step:
                if position not in found:
                    batch = sequence.batch([(0, position, ids)], OutputKind.LOGITS)
                    found[position] = decoder.forward(batch).logits
                wanted.append(found[position])
    finally:
        decoder.close()
    logits = np.concatenate(wanted)
    return Evidence(logits, logits.argmax(axis=1).astype(np.int32))


def require_equal(found: Evidence, wanted: Evidence, what: str) -> None:
    """Refuse output that differs.

    Raises:
        MeasurementError: what differs; nothing may be measured then.
    """
    wrong = found.logits.view(np.uint32) != wanted.logits.view(np.uint32)
    missed = found.tokens != wanted.tokens
    if wrong.any() or missed.any():
        raise MeasurementError(
            f"{what}: {wrong.sum()} of {wrong.size} logits and {missed.sum()} of {missed.size}"
            " tokens differ from those of the scalar kernels, so its speed means nothing",
            hint="run bitllm doctor, and report its output",
        )


def require_near(found: Evidence, wanted: Evidence, what: str) -> None:
    """Refuse output of a device that adds floats in an order of its own, where it is too far off.

    The rule of the comparison with other implementations: a normalised squared error of at most
    `LARGEST_ERROR`, and other tokens only where the two best logits are closer than four times the
    row's difference.

    Raises:
        MeasurementError: what differs; nothing may be measured then.
    """
    difference = found.logits.astype(np.float64) - wanted.logits
    error = float((difference**2).sum() / (wanted.logits.astype(np.float64) ** 2).sum())
    lowest = np.take_along_axis(wanted.logits, found.tokens[:, None], axis=1)[:, 0]
    gaps = wanted.logits.max(axis=1) - lowest
    missed = int((gaps > 4 * np.abs(difference).max(axis=1)).sum())
    if not error <= LARGEST_ERROR or missed:
        raise MeasurementError(
            f"{what}: logits differ from those of the scalar kernels by {error:.2g} of their"
            f" squares, and {missed} of {len(gaps)} tokens, so its speed means nothing",
            hint="run bitllm doctor, and report its output",
        )
