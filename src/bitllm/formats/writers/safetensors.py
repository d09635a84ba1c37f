"""safetensors files to be written: the header comes from the plan, the data one tensor at a time.

Tensors stand in the order in which the safetensors library writes them, wide types first and then
by name, so that a file that came from it is written back byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from bitllm.formats.writers.planned import Chunks, PlannedFile, PlannedTensor

__all__ = ["plan_safetensors"]

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
# Types in the order of the library, the last first in a file.
_ORDER = ("U8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32")


def plan_safetensors(
    tensors: Sequence[PlannedTensor], metadata: Mapping[str, str], shard_bytes: int
) -> list[PlannedFile]:
    """Plan model.safetensors, or shards of it with their index.

    Args:
        tensors: what the files hold; their `dtype` is that of the format, for example "BF16".
        metadata: the header's `__metadata__`.
        shard_bytes: a file holds at most so many bytes of data, unless one tensor has more.

    Returns:
        The files: the index is the last one.
    """
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        return [_plan_file(_SINGLE_FILE, shards[0], metadata)]
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }
    files = [_plan_file(name, shard, metadata) for name, shard in zip(names, shards, strict=True)]
    return [*files, PlannedFile.of(_INDEX_FILE, json.dumps(index, indent=2).encode())]


def _shards(tensors: Sequence[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _plan_file(
    name: str, tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]
) -> PlannedFile:
    ordered = sorted(tensors, key=lambda tensor: (-_ORDER.index(tensor.dtype), tensor.name))
    header = _header(ordered, metadata)

    def chunks() -> Chunks:
        yield header
        for tensor in ordered:
            yield from tensor.chunks()

    return PlannedFile(name, len(header) + sum(tensor.nbytes for tensor in ordered), chunks)


def _header(tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
