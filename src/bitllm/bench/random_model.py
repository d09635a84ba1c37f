"""Checkpoints of random ternary weights in the packed Hugging Face format, for measurements.

The 2b shape is exactly that of microsoft/bitnet-b1.58-2B-4T: the same tensor names, shapes and
dtypes, 1.18 GB. Speed and memory do not depend on the values of the weights, so this stands in for
the real model wherever only those are measured. The weights file is streamed: peak memory stays
near 130 MB. The tokenizer knows every byte, so any text can be a prompt; its other entries are
syllables and words made of them, so that what a random model writes is text too.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["BYTE_CODES", "RESERVED_IDS", "SHAPES", "Shape", "tokenizer", "write_checkpoint"]

RESERVED_IDS = 256
"""Ids at the end of the vocabulary that are special tokens, as in the Llama 3 tokenizer."""

BYTE_CODES = np.array(
    [
        sum(code << 2 * i for i, code in enumerate(codes))
        for codes in itertools.product(range(3), repeat=4)
    ],
    np.uint8,
)
"""The 81 bytes that hold four ternary codes."""

NO_ROWS = np.zeros(0, np.int64)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a BitNet b1.58 decoder with a tied head."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int = 4096


SHAPES = {
    "2b": Shape(2560, 6912, 30, 20, 5, 128, 128256),
    "10m": Shape(384, 1024, 6, 6, 2, 64, 4096),
    "1m": Shape(128, 384, 4, 4, 2, 32, 1024),
}

Chunks = Iterator[npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the file: its description, and what yields its data piece by piece."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Chunks]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * {"U8": 1, "BF16": 2}[self.dtype]


def bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the bf16 bits of float32 values, rounded half to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def normal_rows(rng: np.random.Generator, rows: int, columns: int, std: float) -> Chunks:
    """Yield bf16 [some rows, columns] of N(0, std) until there are `rows`."""
    for start in range(0, rows, 1024):
        count = min(1024, rows - start)
        yield bf16(rng.standard_normal((count, columns), np.float32) * np.float32(std))


def packed_codes(
    rng: np.random.Generator, rows: int, columns: int, zero: npt.NDArray[np.int64]
) -> Chunks:
    """Yield one packed matrix, uint8 [rows / 4, columns]; the output rows in `zero` are all 0.

    The four codes in a byte belong to rows r, r + rows / 4, ... of the matrix, low bits first.
    """
    quarter = rows // 4
    packed = BYTE_CODES[rng.integers(0, len(BYTE_CODES), (quarter, columns), np.uint8)]
    for slot in range(4):
        here = zero[zero // quarter == slot] % quarter
        packed[here] = packed[here] & ~np.uint8(3 << 2 * slot) | np.uint8(1 << 2 * slot)
    yield packed


def tensors(shape: Shape, rng: np.random.Generator, zero_rows: float) -> Iterator[Tensor]:
    """Yield the tensors of the model in file order; data is drawn only when its chunks are read."""

    def gain(name: str, size: int) -> Tensor:
        # Not all 1: bf16 embeddings would then meet exact ties when they are rounded to int8, which
        # no trained model does, and any two implementations break ties by their last bits.
        return Tensor(
            name,
            "BF16",
            (size,),
            lambda: iter([bf16(rng.uniform(0.5, 1.5, size).astype(np.float32))]),
        )

    def linear(
        name: str, out: int, into: int, zero: npt.NDArray[np.int64] = NO_ROWS
    ) -> Iterator[Tensor]:
        # Two codes of three are not zero: this scale keeps the variance of what goes in.
        scale = bf16(np.array([1 / math.sqrt(into * 2 / 3)], np.float32))
        yield Tensor(
            f"{name}.weight", "U8", (out // 4, into), lambda: packed_codes(rng, out, into, zero)
        )
        yield Tensor(f"{name}.weight_scale", "BF16", (1,), lambda: iter([scale]))

    hidden, query, key = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield Tensor(
        "model.embed_tokens.weight",
        "BF16",
        (shape.vocab, hidden),
        lambda: normal_rows(rng, shape.vocab, hidden, 1 / math.sqrt(hidden)),
    )
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        dead = rng.choice(shape.ffn, int(zero_rows * shape.ffn), replace=False)
        yield gain(f"{layer}.input_layernorm.weight", hidden)
        yield from linear(f"{layer}.self_attn.q_proj", query, hidden)
        yield from linear(f"{layer}.self_attn.k_proj", key, hidden)
        yield from linear(f"{layer}.self_attn.v_proj", key, hidden)
        yield gain(f"{layer}.self_attn.attn_sub_norm.weight", query)
        yield from linear(f"{layer}.self_attn.o_proj", hidden, query)
        yield gain(f"{layer}.post_attention_layernorm.weight", hidden)
        yield from linear(f"{layer}.mlp.gate_proj", shape.ffn, hidden, dead)
        yield from linear(f"{layer}.mlp.up_proj", shape.ffn, hidden, dead)
        yield gain(f"{layer}.mlp.ffn_sub_norm.weight", shape.ffn)
        yield from linear(f"{layer}.mlp.down_proj", hidden, shape.ffn)
    yield gain("model.norm.weight", hidden)


def write_safetensors(file: BinaryIO, entries: list[Tensor]) -> None:
    """Write a safetensors file: header length, JSON header, then each tensor's data in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in entries:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in entries:
        for chunk in tensor.chunks():
            file.write(np.ascontiguousarray(chunk).data)


def config(shape: Shape) -> dict[str, Any]:
    """Return config.json: that of the 2B-4T model with the sizes of `shape`."""
    bos = shape.vocab - RESERVED_IDS
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": shape.context,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": bos + 1,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    }


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def words() -> Iterator[tuple[str, str]]:
    """Yield merges without end: pairs of earlier entries, whose joined word is the new entry."""
    syllables = ["".join(pair) for pair in itertools.product("bdfghjklmnprstvwyz", "aeiou")]
    yield from ((syllable[0], syllable[1]) for syllable in syllables)
    yield from (("Ġ", syllable) for syllable in syllables)
    for length in itertools.count(1):
        for parts in itertools.product(syllables, repeat=length):
            stem = "".join(parts)
            for syllable in syllables:
                yield stem, syllable
                yield f"Ġ{stem}", syllable


def tokenizer(vocab_size: int) -> dict[str, Any]:
    """Return tokenizer.json: byte-level BPE with `vocab_size` entries, the special ones last."""
    vocab = {character: index for index, character in enumerate(byte_alphabet())}
    merges = list(itertools.islice(words(), vocab_size - RESERVED_IDS - len(vocab)))
    for left, right in merges:
        vocab[left + right] = len(vocab)
    names = {0: "begin_of_text", 1: "end_of_text", 9: "eot_id"}
    bos = vocab_size - RESERVED_IDS
    special = [
        {
            "id": bos + index,
            "content": f"<|{names.get(index, f'reserved_special_token_{index}')}|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index in range(RESERVED_IDS)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                "<|begin_of_text|>": {
                    "id": "<|begin_of_text|>",
                    "ids": [bos],
                    "tokens": ["<|begin_of_text|>"],
                }
            },
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def write_checkpoint(
    directory: Path, shape: Shape, *, seed: int = 0, zero_rows: float = 0.0
) -> None:
    """Write a whole model directory; an interrupted run leaves no model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    bos = shape.vocab - RESERVED_IDS
    texts = {
        "config.json": config(shape),
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": [bos + 1, bos + 9]},
        "tokenizer.json": tokenizer(shape.vocab),
        "tokenizer_config.json": {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "model_max_length": shape.context,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in texts.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    unfinished = directory / "model.safetensors.unfinished"
    with unfinished.open("wb") as file:
        write_safetensors(file, list(tensors(shape, np.random.default_rng(seed), zero_rows)))
    os.replace(unfinished, directory / "model.safetensors")
