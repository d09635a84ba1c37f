"""Write a GGUF file of random ternary weights in the shape of a bitllm checkpoint, for peers.

    python benchmarks/peer_gguf.py build/models/2b build/models/2b.gguf --type TQ2_0 --head Q6_K

The architecture is `bitnet`, as llama.cpp has it: sub-norms and a tied head; its feed-forward block
has another activation (SiLU) than BitNet b1.58 2B-4T, which costs the same. Codes and scales are
random, since speed does not depend on them. The vocabulary is that of make_checkpoint.py. Needs
the package `gguf`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm.bench.random_model import BYTE_CODES, RESERVED_IDS, Shape, tokenizer

BLOCK = 256
"""Weights that share a scale, in each of the quantised types here."""

FIVE_CODES = np.array([(value * 256 + 242) // 243 for value in range(3**5)], np.uint8)
"""The bytes that hold five ternary digits as a fixed-point fraction of 243, rounded up."""

FOUR_CODES = FIVE_CODES[::3]
"""The same with four digits: the last digit is 0."""

TERNARY_TYPES = ("TQ2_0", "TQ1_0")
HEAD_TYPES = ("Q6_K", "F16")

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file: its name, numpy shape, and GGML type."""

    name: str
    shape: tuple[int, ...]
    type: str


def read_shape(model: Path) -> Shape:
    """Return the sizes that the config.json of a checkpoint states."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    return Shape(
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
    )


def file_name(shape: Shape, ternary: str, head: str) -> str:
    """Return a name that two files share only if they have the same shape and types."""
    sizes = f"{shape.layers}x{shape.hidden}x{shape.ffn}-{shape.heads}-{shape.kv_heads}"
    return f"bitnet-{sizes}-{shape.vocab}-{ternary}-{head}.gguf"


def check(shape: Shape) -> None:
    """Raise ValueError for a shape that the architecture or the types cannot hold."""
    for name, columns in (("hidden size", shape.hidden), ("feed-forward size", shape.ffn)):
        if columns % BLOCK:
            raise ValueError(f"GGUF needs a {name} in multiples of {BLOCK}, not {columns}")
    if shape.heads * shape.head_dim != shape.hidden:
        raise ValueError(
            f"the GGUF architecture bitnet needs heads x head size = hidden size,"
            f" not {shape.heads} x {shape.head_dim} = {shape.hidden}"
        )


def entries(shape: Shape, ternary: str, head: str) -> Iterator[Entry]:
    """Yield the tensors of the file in order."""
    hidden, key = shape.hidden, shape.kv_heads * shape.head_dim
    yield Entry("token_embd.weight", (shape.vocab, hidden), head)
    for index in range(shape.layers):
        block = f"blk.{index}"
        yield Entry(f"{block}.attn_norm.weight", (hidden,), "F32")
        yield Entry(f"{block}.attn_q.weight", (hidden, hidden), ternary)
        yield Entry(f"{block}.attn_k.weight", (key, hidden), ternary)
        yield Entry(f"{block}.attn_v.weight", (key, hidden), ternary)
        yield Entry(f"{block}.attn_sub_norm.weight", (hidden,), "F32")
        yield Entry(f"{block}.attn_output.weight", (hidden, hidden), ternary)
        yield Entry(f"{block}.ffn_norm.weight", (hidden,), "F32")
        yield Entry(f"{block}.ffn_gate.weight", (shape.ffn, hidden), ternary)
        yield Entry(f"{block}.ffn_up.weight", (shape.ffn, hidden), ternary)
        yield Entry(f"{block}.ffn_sub_norm.weight", (shape.ffn,), "F32")
        yield Entry(f"{block}.ffn_down.weight", (hidden, shape.ffn), ternary)
    yield Entry("output_norm.weight", (hidden,), "F32")


def half(value: float, count: int) -> Bytes:
    """Return `count` copies of a float16, as bytes [count, 2]."""
    return np.full((count, 1), value, np.float16).view(np.uint8)


def random_bytes(rng: np.random.Generator, count: int, width: int, allowed: Bytes) -> Bytes:
    """Return bytes [count, width], each drawn from `allowed`."""
    drawn: Bytes = allowed[rng.integers(0, len(allowed), (count, width), np.uint8)]
    return drawn


def tq2_0(rng: np.random.Generator, blocks: int, scale: float) -> Bytes:
    """Return random blocks [blocks, 66]: four codes a byte, then the scale."""
    return np.concatenate([random_bytes(rng, blocks, 64, BYTE_CODES), half(scale, blocks)], axis=1)


def tq1_0(rng: np.random.Generator, blocks: int, scale: float) -> Bytes:
    """Return random blocks [blocks, 54]: 48 bytes of five codes, 4 of four, then the scale."""
    parts = [
        random_bytes(rng, blocks, 48, FIVE_CODES),
        random_bytes(rng, blocks, 4, FOUR_CODES),
        half(scale, blocks),
    ]
    return np.concatenate(parts, axis=1)


def q6_k(rng: np.random.Generator, blocks: int, std: float) -> Bytes:
    """Return random blocks [blocks, 210]: codes of 6 bits, 16 scales of 1, then the block's scale.

    Codes are uniform in -32 .. 31, whose standard deviation is 18.5.
    """
    codes = rng.integers(0, 256, (blocks, 128 + 64), np.uint8)
    return np.concatenate(
        [codes, np.ones((blocks, 16), np.uint8), half(std / 18.5, blocks)], axis=1
    )


def data(entry: Entry, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Return random contents of a tensor: quantised types as bytes [rows, bytes of a row]."""
    *_, columns = entry.shape
    rows = math.prod(entry.shape) // columns
    if entry.type == "F32":
        return rng.uniform(0.5, 1.5, columns).astype(np.float32)
    if entry.type == "F16":
        values = np.empty(entry.shape, np.float16)
        for row in values:
            row[:] = rng.standard_normal(columns, np.float32) / np.float32(math.sqrt(columns))
        return values
    fill = {"TQ2_0": tq2_0, "TQ1_0": tq1_0, "Q6_K": q6_k}[entry.type]
    # Two codes of three are not zero: this scale keeps the variance of what goes in.
    scale = 1 / math.sqrt(columns * (1 if entry.type == "Q6_K" else 2 / 3))
    return fill(rng, rows * columns // BLOCK, scale).reshape(rows, -1)


def row_bytes(entry: Entry) -> int:
    """Return the bytes of one row."""
    columns = entry.shape[-1]
    blocks = {"TQ2_0": 66, "TQ1_0": 54, "Q6_K": 210}
    if entry.type in blocks:
        return columns // BLOCK * blocks[entry.type]
    return columns * {"F32": 4, "F16": 2}[entry.type]


def describe(writer: Any, shape: Shape, gguf: Any) -> None:
    """Add the metadata: sizes, and a vocabulary of the right size."""
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    contents = tokenizer(shape.vocab)
    special = [token["content"] for token in contents["added_tokens"]]
    bos = shape.vocab - RESERVED_IDS
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([*contents["model"]["vocab"], *special])
    writer.add_token_types([normal] * bos + [control] * len(special))
    writer.add_token_merges([" ".join(pair) for pair in contents["model"]["merges"]])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(bos + 1)


def write_gguf(path: Path, shape: Shape, ternary: str, head: str, seed: int = 0) -> None:
    """Write the file, one tensor in memory at a time; an interrupted run leaves no `path`."""
    check(shape)
    gguf = importlib.import_module("gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    writer = gguf.GGUFWriter(unfinished, "bitnet")
    describe(writer, shape, gguf)
    tensors = list(entries(shape, ternary, head))
    for entry in tensors:
        rows = math.prod(entry.shape) // entry.shape[-1]
        floats = {"F32": np.float32, "F16": np.float16}
        dtype = np.dtype(floats.get(entry.type, np.uint8))
        stored = entry.shape if entry.type in floats else (rows, row_bytes(entry))
        kind = gguf.GGMLQuantizationType[entry.type]
        writer.add_tensor_info(entry.name, stored, dtype, rows * row_bytes(entry), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for entry in tensors:
        writer.write_tensor_data(data(entry, rng))
    writer.close()
    os.replace(unfinished, path)


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the checkpoint whose shape to take")
    parser.add_argument("path", type=Path, help="the file to write")
    parser.add_argument("--type", choices=TERNARY_TYPES, default="TQ2_0")
    parser.add_argument("--head", choices=HEAD_TYPES, default="Q6_K")
    arguments = parser.parse_args()
    try:
        shape = read_shape(arguments.model)
        write_gguf(arguments.path, shape, arguments.type, arguments.head)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"{arguments.path}: {arguments.path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
