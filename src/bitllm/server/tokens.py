"""Tokenizing and detokenizing, and the text of a chat: in the words of llama.cpp and of vLLM."""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from bitllm.engine.llm import LLM
from bitllm.engine.tools import read_tools, tool_prompt
from bitllm.server.api_error import ApiError
from bitllm.server.call import Call, json_response
from bitllm.server.chat import messages_of
from bitllm.server.requests import ApplyTemplateRequest, DetokenizeRequest, TokenizeRequest
from bitllm.server.responses import (
    DetokenizeResponse,
    TemplateResponse,
    TokenizeResponse,
    TokenizerInfo,
    TokenPiece,
)
from bitllm.tokenizer import token_bytes

__all__ = ["apply_template", "detokenize", "tokenize", "tokenizer_info"]


async def tokenize(call: Call, body: TokenizeRequest) -> Response:
    """Return the token ids of a text or a chat."""
    served = await call.model(body.model)
    return await asyncio.to_thread(_tokenize, served.llm.llm, body)


def _tokenize(llm: LLM, body: TokenizeRequest) -> Response:
    ids = _ids(llm, body)
    tokens: list[int | TokenPiece] = list(ids)
    if body.with_pieces:
        tokens = [_piece(llm, each) for each in ids]
    return json_response(TokenizeResponse(tokens, len(tokens), llm.context))


def _ids(llm: LLM, body: TokenizeRequest) -> list[int]:
    given = [each for each in (body.content, body.prompt, body.messages) if each is not None]
    if len(given) != 1:
        raise ApiError(400, "give one of content, prompt and messages", code="invalid_value")
    if body.messages is not None:
        messages = messages_of(body.messages)
        if body.tools:
            return tool_prompt(messages, read_tools(body.tools, "auto")[0], llm.tokenizer)
        return llm.tokenizer.encode_chat(messages, body.add_generation_prompt)
    wanted = body.add_special if body.add_special_tokens is None else body.add_special_tokens
    text, default = (body.prompt, True) if body.content is None else (body.content, False)
    return llm.encode(text or "", add_bos=default if wanted is None else wanted)


def _piece(llm: LLM, token_id: int) -> TokenPiece:
    written = token_bytes(llm.tokenizer, token_id)
    try:
        return TokenPiece(token_id, written.decode())
    except UnicodeDecodeError:
        return TokenPiece(token_id, list(written))


async def detokenize(call: Call, body: DetokenizeRequest) -> Response:
    """Return the text of token ids, special tokens by their names."""
    served = await call.model(body.model)
    llm = served.llm.llm
    size = llm.spec.vocab_size
    wrong = next((each for each in body.tokens if not 0 <= each < size), None)
    if wrong is not None:
        message = f"token id {wrong} is outside the vocabulary; ids are 0 to {size - 1}"
        raise ApiError(400, message, param="tokens", code="invalid_value")
    text = await asyncio.to_thread(llm.decode, body.tokens, skip_special=False)
    return json_response(DetokenizeResponse(text, text))


async def tokenizer_info(call: Call, body: None) -> Response:
    """Return what clients ask before they encode texts themselves."""
    served = await call.model(call.request.query_params.get("model"))
    tokenizer, defaults = served.llm.llm.tokenizer, served.llm.llm.defaults
    begin = None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
    end = min(defaults.stop_ids, default=None)
    return json_response(
        TokenizerInfo(
            begin,
            None if end is None else tokenizer.token(end),
            tokenizer.vocab_size,
            tokenizer.chat_template,
        )
    )


async def apply_template(call: Call, body: ApplyTemplateRequest) -> Response:
    """Return the prompt that a chat becomes."""
    served = await call.model(body.model)
    tokenizer = served.llm.llm.tokenizer
    messages = messages_of(body.messages)

    def render() -> str:
        tools = [each.definition for each in read_tools(body.tools or (), "auto")[0]] or None
        return tokenizer.apply_chat_template(messages, body.add_generation_prompt, tools)

    return json_response(TemplateResponse(await asyncio.to_thread(render)))
