"""transformers loads the directories that are written, misses nothing, and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import quantizer_bitnet

from batches import logits_of, prompt_ids
from bitllm.backends.base import LoadOptions
from bitllm.backends.reference import ReferenceBackend
from bitllm.formats import open_checkpoint
from bitllm.tokenizer import load_tokenizer
from model_directories import SUB_NORMS, write_huggingface

# Run what transformers compiles as it is written: nothing is gained at these sizes.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch, "compile", lambda function: function)
    from transformers.integrations import bitnet as hf

LLAMA = {"activation": "silu"}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "original_context": 16}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bitnet": ("multiply", {**SUB_NORMS, "activation": "relu2", "tied_head": True}),
    "bitnet_divide": ("divide", {**SUB_NORMS, "activation": "relu2"}),
    "1bitllm": ("multiply", {**SUB_NORMS, "activation": "silu", "tied_head": True}),
    "bitnet_linear_rope": (
        "multiply",
        {**SUB_NORMS, "activation": "relu2", "rope_scaling": "linear", "rope_factor": 4.0},
    ),
    "llama": ("divide", LLAMA),
    "llama_multiply": ("multiply", LLAMA),
    "llama_llama3_rope": ("divide", {**LLAMA, **LLAMA3}),
    "llama_biases": ("divide", {**LLAMA, "bias": True}),
    "llama_linear_norms": ("divide", {**LLAMA, "linear_norm_eps": 1e-6}),
    "qwen3": ("divide", {**LLAMA, "qk_norm": True, "tied_head": True}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_written_directory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 on both sides; the bound is the noise of a code that flips at a tie."""
    # Its quantizer asks for accelerate, which it needs to spread a model over devices only.
    monkeypatch.setattr(quantizer_bitnet, "is_accelerate_available", lambda: True)
    convention, switches = KINDS[kind]
    directory = write_huggingface(tmp_path / "model", convention, 3, **switches)
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    wanted_class = hf.AutoBitLinear if convention == "multiply" else hf.BitLinear
    assert type(model.model.layers[0].mlp.down_proj) is wanted_class
    model = torch.nn.Module.float(model)  # its own float() refuses quantised models
    checkpoint = open_checkpoint(directory)
    ids = prompt_ids(50, checkpoint.spec.vocab_size)
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    options = LoadOptions(kv_tokens=64, kv_dtype="fp32")
    found = logits_of(ReferenceBackend().load(checkpoint, options), ids)
    errors = ((found - wanted) ** 2).sum(axis=1) / (wanted**2).sum(axis=1)
    assert np.median(errors) <= 1e-4
    assert errors.max() <= 1e-2
    assert errors.min() <= 1e-9


def test_the_tokenizer_of_a_written_directory(tmp_path: Path) -> None:
    directory = write_huggingface(tmp_path / "model", **LLAMA)
    theirs, ours = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    for text in ("naïve café 你好 🙂", "the list<|eot_id|>", "", "\x00 \r\n"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": "the list"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
