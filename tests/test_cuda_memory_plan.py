"""The memory plan of the device "cuda": what the GPU has free, and what a model takes of it."""

from __future__ import annotations

import pytest
import torch

from batches import Run, make_batch
from bitllm.backends.base import LoadOptions
from bitllm.backends.cuda import CudaBackend
from bitllm.config import EngineOptions
from bitllm.engine.memory_plan import available_memory, plan_memory
from bitllm.errors import InsufficientMemoryError
from synthetic import random_checkpoint, tiny_spec

OPTIONS = EngineOptions(device="cuda", context=128, max_batch_tokens=64)


def test_a_plan_counts_what_the_decoder_holds():
    checkpoint = random_checkpoint(tiny_spec(hidden_size=256, ffn_size=512))
    plan = plan_memory(checkpoint, OPTIONS, available=1 << 30)
    loaded = CudaBackend(torch.device("cpu")).load(checkpoint, LoadOptions(kv_tokens=128))
    assert plan.kv == loaded.info.kv_bytes
    assert plan.weights == pytest.approx(loaded.info.weight_bytes, rel=0.2)  # scales, norms
    assert plan.process == 0


def test_what_the_gpu_has_free_is_the_bound(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 1 << 40))
    assert available_memory("cuda") == 1000
    plan = plan_memory(random_checkpoint(tiny_spec()), OPTIONS)
    with pytest.raises(InsufficientMemoryError, match="does not fit into the memory available"):
        plan.check("a model")


def test_without_a_gpu_nothing_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_memory("cuda") is None


def test_a_step_that_does_not_fit_says_so(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 MiB")

    backend = CudaBackend(torch.device("cpu"), kernels=False)
    decoder = backend.load(random_checkpoint(tiny_spec()), LoadOptions())
    monkeypatch.setattr(decoder, "_logits", no_memory)
    with pytest.raises(InsufficientMemoryError, match="step of 2 tokens") as caught:
        decoder.forward(make_batch([Run([1, 2])]))
    assert "max_batch_tokens" in caught.value.hint
