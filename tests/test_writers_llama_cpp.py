"""llama.cpp loads the GGUF files that are written, and computes and tokenises what bitllm does.

Its activations are rounded to int8 in blocks of 256, ours for a whole token; so logits differ by
the noise of that rounding. How large this is, a second run shows: the same model with activations
that are not rounded at all, in the reference decoder. The file's logits must be as near to ours as
rounding is to not rounding; a wrong scale, order of rows or norm is further off by a factor of
fifty and more.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batches import logits_of, prompt_ids
from bitllm.backends.base import LoadOptions
from bitllm.backends.reference import ReferenceBackend
from bitllm.checkpoint import LINEAR_NAMES, Checkpoint
from bitllm.convert import plan_conversion, run_conversion
from bitllm.formats import open_checkpoint
from bitllm.tokenizer import load_tokenizer
from model_directories import SUB_NORMS, write_huggingface

pytestmark = pytest.mark.slow

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("divide", {"activation": "silu"}),
    "llama_llama3_rope": (
        "divide",
        {
            "activation": "silu",
            "rope_scaling": "llama3",
            "rope_factor": 8.0,
            "original_context": 32,
        },
    ),
    "llama_linear_rope": (
        "divide",
        {"activation": "silu", "rope_scaling": "linear", "rope_factor": 4.0},
    ),
    "llama_biases": ("divide", {"activation": "silu", "bias": True}),
    "1bitllm": ("multiply", {**SUB_NORMS, "activation": "silu", "tied_head": True}),
    "qwen3": ("divide", {"activation": "silu", "qk_norm": True}),
}
TOKENS = 24


def unrounded(checkpoint: Checkpoint) -> Checkpoint:
    """The model with activations that are not quantised."""

    def layer(spec: Any) -> Any:
        floats = {
            name: dataclasses.replace(spec.linear(name), activation_bits=None)
            for name in LINEAR_NAMES
        }
        return dataclasses.replace(spec, **floats)

    layers = tuple(layer(spec) for spec in checkpoint.spec.layers)
    return dataclasses.replace(checkpoint, spec=dataclasses.replace(checkpoint.spec, layers=layers))


def reference_logits(checkpoint: Checkpoint, ids: list[int]) -> np.ndarray:
    options = LoadOptions(kv_tokens=64, kv_dtype="fp32")
    return logits_of(ReferenceBackend().load(checkpoint, options), ids)


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


@pytest.mark.parametrize("type_name", ["tq2_0", "tq1_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_tokens(kind: str, type_name: Any, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    convention, switches = KINDS[kind]
    directory = write_huggingface(tmp_path / "model", convention, 3, **switches)
    run_conversion(plan_conversion(directory, tmp_path / "model.gguf", kind=type_name))
    engine = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False
    )
    checkpoint = open_checkpoint(directory)
    ids = prompt_ids(TOKENS, checkpoint.spec.vocab_size)
    engine.eval(ids)
    found = np.array(engine.scores[:TOKENS], np.float32)
    ours = reference_logits(checkpoint, ids)
    noise = distance(reference_logits(unrounded(checkpoint), ids), ours)
    assert 0 < noise < 0.02
    assert distance(found, ours) <= 2 * noise
    tokenizer = load_tokenizer(directory)
    for text in ("naïve café, Straße, 你好 мир 🙂", "the list of 12345 things", "a\n\n b"):
        assert engine.tokenize(text.encode(), special=True) == tokenizer.encode(text)
    assert engine.token_eos() in tokenizer.stop_ids
    assert engine.token_bos() == tokenizer.bos_id
    engine.close()
