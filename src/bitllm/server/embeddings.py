"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from starlette.responses import Response

from bitllm.engine.prompt import Prompt
from bitllm.server.api_error import ApiError
from bitllm.server.call import Call, json_response
from bitllm.server.prompts import read_prompts
from bitllm.server.requests import EmbeddingRequest
from bitllm.server.responses import Embedding, EmbeddingResponse, EmbeddingUsage
from bitllm.tokenizer import Tokenizer

__all__ = ["embed"]


async def embed(call: Call, body: EmbeddingRequest) -> Response:
    """Return a vector of length 1 for each input.

    Raises:
        ApiError, BitllmError: what is wrong with the request.
    """
    inputs = read_prompts(body.input, "input")
    served = await call.model(body.model)
    _check_dimensions(body.dimensions, served.llm.llm.spec.hidden_size)
    encoded = await asyncio.to_thread(_encode, inputs, served.llm.llm.tokenizer)
    vectors = await served.llm.embed(
        encoded, pooling=call.service.options.pooling, adapter=served.adapter
    )
    tokens = sum(map(len, encoded))
    call.service.metrics.prompt_tokens.add(tokens, model=served.name)
    call.entry.prompt_tokens = tokens
    answer = EmbeddingResponse(
        data=_data(_shortened(vectors, body.dimensions), body.encoding_format or "float"),
        model=served.name,
        usage=EmbeddingUsage(tokens, tokens),
    )
    return await asyncio.to_thread(json_response, answer)


def _check_dimensions(dimensions: int | None, size: int) -> None:
    if dimensions is not None and not 1 <= dimensions <= size:
        message = f"dimensions must be 1 to {size} for this model, got {dimensions}"
        raise ApiError(400, message, param="dimensions", code="invalid_value")


def _encode(inputs: Sequence[Prompt], tokenizer: Tokenizer) -> list[list[int]]:
    for number, each in enumerate(inputs):
        if not each:
            raise ApiError(400, f"input[{number}] is empty", param="input", code="invalid_value")
    return [tokenizer.encode(each) if isinstance(each, str) else list(each) for each in inputs]


def _shortened(vectors: npt.NDArray[np.float32], dimensions: int | None) -> npt.NDArray[np.float32]:
    """Return the first numbers of each vector, scaled to length 1 again.

    Models for which that makes sense are trained for it (Matryoshka representation learning,
    Kusupati et al. 2022).
    """
    if dimensions is None:
        return vectors
    kept = vectors[:, :dimensions]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    return (kept / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _data(vectors: npt.NDArray[np.float32], encoding: str) -> list[Embedding]:
    if encoding == "base64":
        little = vectors.astype("<f4", copy=False)
        written = [base64.b64encode(row.tobytes()).decode() for row in little]
        return [Embedding(index, text) for index, text in enumerate(written)]
    return [Embedding(index, row.tolist()) for index, row in enumerate(vectors)]
