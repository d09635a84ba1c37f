"""Showing an answer while it is made, and the status line after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitllm.cli.terminal import emit, waiting

if TYPE_CHECKING:
    from bitllm.backends.base import DecoderInfo
    from bitllm.engine.outputs import Chunk, Usage

__all__ = ["Answer", "show", "status_line"]


@dataclass(slots=True)
class Answer:
    """What has arrived of an answer.

    Attributes:
        text: the text, or as much as came before an interruption.
        last: the last chunk, which holds usage and seed; None if Ctrl-C came before it.
    """

    text: str = ""
    last: Chunk | None = None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the answer."""
        return self.last is None


def show(chunks: Iterator[Chunk]) -> Answer:
    """Write each chunk to stdout as it comes, then end the line; Ctrl-C ends the answer only."""
    answer = Answer()
    try:
        with waiting("reading the prompt"):
            chunk = next(chunks, None)
        while chunk is not None:
            emit(chunk.text, end="")
            answer.text += chunk.text
            if chunk.finish_reason is not None:
                answer.last = chunk
            chunk = next(chunks, None)
    except KeyboardInterrupt:
        answer.last = None
    if not answer.text.endswith("\n"):
        emit("")
    return answer


def status_line(usage: Usage, info: DecoderInfo, resident_bytes: int | None) -> str:
    """Return `prompt 12 tok 300 tok/s · gen 128 tok 61 tok/s · 45 MB · avx2 ×2`.

    Args:
        usage: tokens and time of the answer.
        info: what the decoder runs on.
        resident_bytes: memory of this process, or None if it is not known.
    """
    from bitllm.engine.memory_plan import format_bytes

    parts = [
        _speed("prompt", usage.prompt_tokens, usage.prompt_tokens_per_second),
        _speed("gen", usage.completion_tokens, usage.tokens_per_second),
        None if resident_bytes is None else format_bytes(resident_bytes),
        f"{info.kernel} ×{info.threads}",
    ]
    return " · ".join(part for part in parts if part is not None)


def _speed(what: str, tokens: int, per_second: float) -> str:
    # Too short to measure (one token, or none) is shown as no speed, not as 0 tok/s.
    speed = f"{per_second:.0f}" if per_second >= 100 else f"{per_second:.3g}"
    return f"{what} {tokens} tok" + (f" {speed} tok/s" if per_second > 0 else "")
