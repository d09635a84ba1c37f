"""What is fuzzed: functions of hostile bytes that may only return or raise a `BitllmError`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from bitllm.errors import BitllmError
from bitllm.formats.architecture import read_model_spec
from bitllm.formats.gguf.container import GgufFile
from bitllm.formats.json_file import read_json_object
from bitllm.formats.quantization import read_quantization
from bitllm.formats.safetensors import SafetensorsFile

Target = Callable[[Path], None]

# A file in memory: libFuzzer ends without giving Python the time to remove one from a disk.
if hasattr(os, "memfd_create"):
    _PATH = Path(f"/proc/self/fd/{os.memfd_create('fuzzed')}")
else:
    _PATH = Path(tempfile.mkstemp(prefix="bitllm-fuzz-")[1])


def read_safetensors(path: Path) -> None:
    """Read the header and a view of every tensor; each lies inside the file."""
    size = path.stat().st_size
    file = SafetensorsFile(path)
    for name, entry in file.entries.items():
        assert 8 < entry.start <= entry.stop <= size, (name, entry)
        with suppress(BitllmError):  # a dtype that NumPy lacks
            file.array(name)


def read_gguf(path: Path) -> None:
    """Read the header, all metadata and the bytes of every tensor; each lies inside the file."""
    size = path.stat().st_size
    file = GgufFile(path)
    for key in file.metadata:
        with suppress(BitllmError):
            file.values(key)
    for name, tensor in file.tensors.items():
        assert 0 < tensor.start <= tensor.stop <= size, (name, tensor)
        file.bytes(name)


def read_config(path: Path) -> None:
    """Read a config.json: how the weights are stored, and the architecture."""
    fields = read_json_object(path)
    read_model_spec(path, fields, read_quantization(path, fields), ["lm_head.weight"])


TARGETS: Mapping[str, Target] = {
    "safetensors": read_safetensors,
    "gguf": read_gguf,
    "config": read_config,
}


def attempt(target: Target, content: bytes) -> None:
    """Let a target read `content`; anything but success or a `BitllmError` is a finding."""
    _PATH.write_bytes(content)
    with suppress(BitllmError):
        target(_PATH)
