"""A planned conversion, carried out: written under another name, read back, and only then named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitllm.convert.plan import Conversion
from bitllm.convert.verify import Verification, verify
from bitllm.formats.writers import write_directory, write_file

__all__ = ["ConversionResult", "run_conversion"]

Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """A conversion that is done; `verification` is None if nobody wanted one."""

    target: Path
    nbytes: int
    verification: Verification | None


def run_conversion(
    conversion: Conversion,
    *,
    check: bool = True,
    device: str | None = None,
    writing: Advance | None = None,
    verifying: Advance | None = None,
) -> ConversionResult:
    """Write the target; it has its name when all of it is on the disk and was found right.

    Args:
        conversion: what `plan_conversion` returned.
        check: whether to read it back: codes, scales, dense values, and logits of a short prompt.
        device: what computes those logits, as in `EngineOptions`.
        writing: told of the bytes written and the bytes there will be.
        verifying: told of the tensors compared and the tensors there are.

    Raises:
        ConversionError: what is read back is not what was to be written.
        CheckpointError: one of its kinds: the source is broken, or the target cannot be written.
    """
    found: list[Verification] = []

    def read_back(unfinished: Path) -> None:
        if check:
            found.append(
                verify(conversion.checkpoint, conversion.plan, unfinished, device, verifying)
            )

    if conversion.plan.format == "gguf":
        write_file(
            conversion.target,
            conversion.plan.files[0],
            replace=conversion.replace,
            advance=writing,
            check=read_back,
        )
    else:
        write_directory(
            conversion.target,
            conversion.plan.files,
            replace=conversion.replace,
            advance=writing,
            check=read_back,
        )
    return ConversionResult(conversion.target, conversion.plan.nbytes, found[0] if found else None)
