"""Model directories for tests of writers: a random checkpoint in memory, and its text files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel

from bitllm.checkpoint import Checkpoint, DenseTensor, ModelSpec, TernaryMatrix
from bitllm.formats.writers import write_directory
from bitllm.formats.writers.huggingface import plan_huggingface
from bitllm.formats.writers.texts import ModelTexts
from synthetic import MemorySource, dense_tensor, random_checkpoint, tiny_spec

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = [
    "the list of the things that the listener listens to",
    "naïve café, Straße, 你好 мир 🙂",
] * 9


def sized_spec(vocab_size: int, **switches: Any) -> ModelSpec:
    """An architecture whose rows every block format can hold: multiples of 256."""
    sizes = {"hidden_size": 256, "ffn_size": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    return tiny_spec(vocab_size=vocab_size, **{**sizes, **switches})


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE with merges, in the manner of Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    tokenizer.add_tokens(["<tool>"])
    begin = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return tokenizer


def make_texts(tokenizer: Tokenizer) -> ModelTexts:
    """The text files of a model with that tokenizer."""
    bos, end, turn = (
        tokenizer.token_to_id(text)
        for text in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    )
    settings = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "add_bos_token": True,
        "chat_template": TEMPLATE,
    }
    return ModelTexts(
        files={
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps(settings).encode(),
            "generation_config.json": json.dumps({"eos_token_id": [end, turn]}).encode(),
        },
        token_ids={"bos_token_id": bos, "eos_token_id": end},
    )


def published(checkpoint: Checkpoint, convention: str = "multiply") -> Checkpoint:
    """The checkpoint as a published one would be read: bfloat16, stored scales of a convention."""
    source = checkpoint.source
    assert isinstance(source, MemorySource)
    dense = {
        name: dense_tensor(tensor.to_float32(), "bf16")
        for name, tensor in source.dense_tensors.items()
    }
    ternary = {
        name: _with_stored_scale(matrix, convention)
        for name, matrix in source.ternary_matrices.items()
    }
    if convention == "multiply":
        # transformers adds the bias and then multiplies by the scale.
        for name in [name for name in dense if name.endswith(".bias")]:
            scale = ternary[name.removesuffix(".bias")].scales
            dense[name] = DenseTensor(dense[name].to_float32() * scale, "f32")
    return dataclasses.replace(checkpoint, source=MemorySource(dense, ternary))


def _with_stored_scale(matrix: TernaryMatrix, convention: str) -> TernaryMatrix:
    held = matrix.scales if convention == "multiply" else np.float32(1) / matrix.scales
    stored: DenseTensor = dense_tensor(np.asarray(held, np.float32).reshape(1), "bf16")
    value = stored.to_float32().reshape(())
    return TernaryMatrix(
        matrix.packed,
        matrix.in_features,
        np.asarray(value if convention == "multiply" else np.float32(1) / value, np.float32),
        source_scales=stored,
        source_convention=convention,  # type: ignore[arg-type]
    )


def write_huggingface(
    directory: Path, convention: str = "multiply", seed: int = 0, **switches: Any
) -> Path:
    """Write a packed model with tokenizer; `switches` are those of `sized_spec`."""
    tokenizer = make_tokenizer()
    spec = sized_spec(tokenizer.get_vocab_size(), **switches)
    checkpoint = published(random_checkpoint(spec, seed), convention)
    plan = plan_huggingface(checkpoint, make_texts(tokenizer), convention=convention)  # type: ignore[arg-type]
    write_directory(directory, plan.files)
    return directory


def same_weights(checkpoint: Checkpoint, other: Checkpoint) -> None:
    """Assert that all tensors of two checkpoints are equal: codes, scales, dense values."""
    for name, _ in checkpoint.spec.linear_names():
        one, two = checkpoint.ternary(name), other.ternary(name)
        assert (one.packed == two.packed).all(), name
        assert one.scales.shape == two.scales.shape, name
        assert (one.scales == two.scales).all(), name
    for name in checkpoint.spec.dense_shapes():
        one_values, two_values = checkpoint.dense(name), other.dense(name)
        assert (one_values.to_float32() == two_values.to_float32()).all(), name


SUB_NORMS = {"attn_sub_norm": True, "ffn_sub_norm": True}
"""The switches of a BitNet layer; without them `sized_spec` gives a Llama."""
