"""Is what was exported what was trained? Codes by equality, the rest by bits per byte."""

from __future__ import annotations

from pathlib import Path

from bitllm.errors import ConversionError
from bitllm.formats import open_checkpoint
from bitllm.formats.writers.huggingface import stored_names
from bitllm.train.model import TernaryDecoder
from bitllm.train.quantizers import quantize_weights

__all__ = ["LARGEST_GAP", "check_codes", "describe_gap"]

LARGEST_GAP = 0.002
"""Bits per byte that the exported model may be away from the trained one without a warning."""


def check_codes(model: TernaryDecoder, folder: Path) -> int:
    """Compare codes and scales of an exported folder with those that the model was trained with.

    Args:
        model: the trained one.
        folder: what `export_model` wrote.

    Returns:
        How many matrices there are.

    Raises:
        ConversionError: a code or a scale differs; names the matrix.
        CheckpointError: one of its kinds: the folder cannot be read.
    """
    checkpoint, parameters = open_checkpoint(folder), dict(model.named_parameters())
    stored = stored_names(model.spec)
    names = [name for name, _ in model.spec.linear_names()]
    for name in names:
        codes, scale = quantize_weights(parameters[f"{stored[name]}.weight"].detach())
        matrix = checkpoint.ternary(name)
        for what, equal in (
            ("codes", (matrix.codes() == codes.cpu().numpy()).all()),
            ("scales", (matrix.scales == scale.cpu().numpy()).all()),
        ):
            if not equal:
                raise ConversionError(
                    f"{folder}: {what} of {name} are not those that were trained",
                    hint="the files were changed, or this is a bug: please report it",
                )
        checkpoint.release()
    return len(names)


def describe_gap(trained: float, exported: float, backend: str, matrices: int) -> str:
    """Return the line of the report: bits per byte in training and as exported.

    A gap above `LARGEST_GAP` is a warning and no error: codes are equal by then, and what is
    left is the rounding of embedding, head and norms, and of the KV cache, to bfloat16.
    """
    gap = exported - trained
    line = (
        f"exported: {matrices} matrices, codes and scales equal; held out: {trained:.4f} bits per "
        f"byte in training, {exported:.4f} as exported ({backend} backend, gap {gap:+.5f})"
    )
    if abs(gap) <= LARGEST_GAP:
        return line
    return f"{line}\nwarning: the gap is above {LARGEST_GAP} bits per byte"
