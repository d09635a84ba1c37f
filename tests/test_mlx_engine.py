"""The engine over the mlx backend: many at once, many threads, and steps that are compiled."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import bitllm
from batches import Run, logits_of, make_batch, prompt_ids
from bitllm import LLM, AsyncLLM
from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.backends.mlx import layer as mlx_layer
from synthetic import SWITCHES, random_checkpoint, tiny_spec

# No two best logits come close in these texts: near ties are counted in test_gpu_backends.py.
PROMPTS = ["The list", "A string is", "Return the", "When a"]
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def wanted() -> list[tuple[int, ...]]:
    with bitllm.load(device="cpu") as llm:
        return [result.token_ids for result in llm.generate(PROMPTS, **GREEDY)]


@pytest.fixture
def llm() -> Any:
    with bitllm.load(device="mlx", max_batch_tokens=16) as loaded:
        yield loaded


def test_many_texts_share_steps(llm: LLM, wanted: list[tuple[int, ...]]) -> None:
    assert llm.info.backend == "mlx"
    assert [result.token_ids for result in llm.generate(PROMPTS, **GREEDY)] == wanted
    # Once more: their prefixes are cached now.
    assert [result.token_ids for result in llm.generate(PROMPTS, **GREEDY)] == wanted


def test_a_small_cache_preempts_and_goes_on(wanted: list[tuple[int, ...]]) -> None:
    with bitllm.load(device="mlx", context=32, max_batch_tokens=16) as llm:
        assert [result.token_ids for result in llm.generate(PROMPTS, **GREEDY)] == wanted


def test_steps_run_on_a_thread_of_the_engine(wanted: list[tuple[int, ...]]) -> None:
    async def write() -> list[tuple[int, ...]]:
        async with await AsyncLLM.load(device="mlx", max_batch_tokens=16) as llm:
            results = await asyncio.gather(*(llm.generate(each, **GREEDY) for each in PROMPTS))
            return [result.token_ids for result in results]

    assert asyncio.run(write()) == wanted


@pytest.mark.parametrize("switch", ["plain", "sub_norms"])
def test_compiled_steps_give_what_others_give(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = random_checkpoint(tiny_spec(**SWITCHES[switch]))
    decoder = get_backend("mlx").load(checkpoint, LoadOptions(kv_tokens=256))
    runs = [Run(prompt_ids(2, 101, seed), 0, [seed]) for seed in range(3)]
    plain = [decoder.forward(make_batch(runs[:count])).logits for count in (1, 3)]
    monkeypatch.setattr(mlx_layer, "compiles", lambda: True)
    compiled = [decoder.forward(make_batch(runs[:count])).logits for count in (1, 3)]
    for one, other in zip(plain, compiled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    long = logits_of(decoder, prompt_ids(2 * mlx_layer.COMPILED_ROWS, 101), [3, 11])
    assert np.isfinite(long).all()
