"""Writing model files: planned in full before a weight is read, streamed, whole or not at all."""

from __future__ import annotations

from bitllm.formats.writers.atomic import check_target, write_directory, write_file
from bitllm.formats.writers.planned import PlannedFile, PlannedTensor, WritePlan

__all__ = [
    "PlannedFile",
    "PlannedTensor",
    "WritePlan",
    "check_target",
    "write_directory",
    "write_file",
]
