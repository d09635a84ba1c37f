"""Embeddings: hidden states of last tokens, whatever else the engine computes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from batches import Run, make_batch
from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions, OutputKind
from bitllm.checkpoint import Checkpoint
from bitllm.engine.llm import LLM
from bitllm.errors import CheckpointError, ConfigError, ContextOverflowError
from byte_tokenizer import byte_tokenizer
from synthetic import random_checkpoint, tiny_spec

CONTEXT, BATCH = 96, 16
OPTIONS = LoadOptions(kv_tokens=2 * CONTEXT, max_batch_tokens=BATCH, threads=1)
TEXTS = [[5], list(range(1, 40)), [9, 8, 7, 6], list(range(3, 99))]


def checkpoint(**switches: Any) -> Checkpoint:
    made = random_checkpoint(tiny_spec(vocab_size=258, **switches))
    return replace(made, spec=replace(made.spec, pooling="last"))


def make_llm(model: Checkpoint, device: str = "cpu") -> LLM:
    decoder = get_backend(device).load(model, OPTIONS)
    tokenizer = byte_tokenizer()
    return LLM(decoder, tokenizer, name="embedder", context=CONTEXT, max_batch_tokens=BATCH)


@pytest.fixture(params=["cpu", "reference"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with make_llm(checkpoint(), request.param) as made:
        yield made


def expected(device: str, ids: list[int]) -> np.ndarray:
    """One forward of the decoder over all of a text, and its last hidden state divided."""
    options = replace(OPTIONS, max_batch_tokens=CONTEXT)
    decoder = get_backend(device).load(checkpoint(), options)
    batch = make_batch([Run(ids, 0, range(3))], OutputKind.HIDDEN, rows=[len(ids) - 1])
    hidden = decoder.forward(batch).hidden[0].astype(np.float64)
    decoder.close()
    return (hidden / np.linalg.norm(hidden)).astype(np.float32)


def test_an_embedding_is_the_last_hidden_state_of_length_one(llm: LLM) -> None:
    for ids in TEXTS:
        found = llm.embed(ids)
        assert found.shape == (llm.spec.hidden_size,)
        assert found.dtype == np.float32
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
        assert np.allclose(found, expected(llm.info.backend, ids), rtol=0, atol=1e-7)


def test_a_list_gives_the_rows_of_its_texts(llm: LLM) -> None:
    together = llm.embed(TEXTS)
    assert together.shape == (len(TEXTS), llm.spec.hidden_size)
    assert (together == np.stack([llm.embed(ids) for ids in TEXTS])).all()
    assert llm.embed([]).shape == (0, llm.spec.hidden_size)


def test_texts_are_tokenised_as_the_model_wants(llm: LLM) -> None:
    assert (llm.embed("héllo") == llm.embed(llm.encode("héllo"))).all()
    assert llm.embed(["a", "b"]).shape[0] == 2


def test_a_text_that_is_being_written_is_not_disturbed() -> None:
    with make_llm(checkpoint()) as llm:
        alone = llm.generate([1, 2, 3], max_tokens=20).token_ids
        embedding = llm.embed(TEXTS[1])
        chunks = llm.stream([1, 2, 3], max_tokens=20)
        ids = list(next(chunks).token_ids)
        assert (llm.embed(TEXTS[1]) == embedding).all()
        ids += [token for chunk in chunks for token in chunk.token_ids]
        assert tuple(ids) == alone


def test_blocks_are_free_afterwards(llm: LLM) -> None:
    free = llm.free_blocks
    llm.embed(TEXTS)
    assert llm.free_blocks == free


def test_a_model_that_does_not_embed() -> None:
    model = random_checkpoint(tiny_spec(vocab_size=258))
    with make_llm(model) as llm, pytest.raises(ConfigError, match="not made for embeddings"):
        llm.embed([1])


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ([258], ConfigError, "258"),
        ([-1], ConfigError, "-1"),
        ([[1], []], ConfigError, "no tokens"),
        (list(range(97)), ContextOverflowError, "97 tokens"),
        ([1.5], ConfigError, "whole numbers"),
    ],
)
def test_texts_that_are_none(llm: LLM, text: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        llm.embed(text)


def test_the_whole_context_may_be_used(llm: LLM) -> None:
    assert np.isfinite(llm.embed(list(range(CONTEXT)))).all()


def test_a_model_that_computes_no_numbers() -> None:
    model = checkpoint()
    norm = model.source.dense_tensors["final_norm"]
    norm.data[:] = 0
    with make_llm(model) as llm, pytest.raises(CheckpointError, match="no number"):
        llm.embed([1])
