"""Log-probabilities with their tokens written out, in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bitllm.engine import outputs
from bitllm.server.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from bitllm.tokenizer import Tokenizer, token_bytes

__all__ = ["chat_logprobs", "completion_logprobs", "echoed_logprobs", "token_text"]


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return the text of a token; bytes that are no whole characters become U+FFFD."""
    return token_bytes(tokenizer, token_id).decode("utf-8", "replace")


def chat_logprobs(
    tokenizer: Tokenizer, logprobs: Iterable[outputs.TokenLogprob] | None, ended_by: int | None
) -> ChatLogprobs | None:
    """Return log-probabilities as chats tell them.

    Args:
        tokenizer: of the model.
        logprobs: of consecutive tokens; None = not asked for.
        ended_by: the id that ended the text, which is no part of it, or None.
    """
    if logprobs is None:
        return None
    told = list(logprobs)
    if ended_by is not None and told and told[-1].token_id == ended_by:
        del told[-1]
    return ChatLogprobs([_chat_token(tokenizer, each) for each in told])


def _chat_token(tokenizer: Tokenizer, token: outputs.TokenLogprob) -> TokenLogprob:
    top = [_top(tokenizer, *each) for each in token.top]
    own = _top(tokenizer, token.token_id, token.logprob)
    return TokenLogprob(own.token, own.logprob, own.bytes, top)


def _top(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    written = token_bytes(tokenizer, token_id)
    return TopLogprob(written.decode("utf-8", "replace"), logprob, list(written))


def completion_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[outputs.TokenLogprob], start: int = 0
) -> CompletionLogprobs:
    """Return log-probabilities as completions tell them, the own token always among the likeliest.

    Args:
        tokenizer: of the model.
        logprobs: of consecutive tokens.
        start: characters of the text before them.
    """
    told = CompletionLogprobs([], [], [], [])
    for each in logprobs:
        text = token_text(tokenizer, each.token_id)
        likely: dict[str, float] = {}
        for token_id, logprob in (*each.top, (each.token_id, each.logprob)):
            # Of tokens that read alike, the likeliest.
            likely.setdefault(token_text(tokenizer, token_id), logprob)
        _append(told, text, each.logprob, likely, start)
        start += len(text)
    return told


def echoed_logprobs(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    completion: outputs.Completion,
    echo: str,
) -> CompletionLogprobs:
    """Return log-probabilities of a prompt and its continuation; the first token has none.

    Args:
        tokenizer: of the model.
        prompt_ids: of the prompt, with the start token.
        completion: with log-probabilities of both.
        echo: the prompt as it stands before the text.
    """
    told = CompletionLogprobs([], [], [], [])
    first = token_text(tokenizer, prompt_ids[0])
    _append(told, first, None, None, 0)
    written = [*(completion.prompt_logprobs or ()), *(completion.logprobs or ())]
    # A start token that was put in front is no part of the text.
    start = len(first) if echo.startswith(first) else 0
    rest = completion_logprobs(tokenizer, written, start)
    told.tokens += rest.tokens
    told.token_logprobs += rest.token_logprobs
    told.top_logprobs += rest.top_logprobs
    told.text_offset += rest.text_offset
    return told


def _append(
    told: CompletionLogprobs,
    text: str,
    logprob: float | None,
    likely: dict[str, float] | None,
    offset: int,
) -> None:
    told.tokens.append(text)
    told.token_logprobs.append(logprob)
    told.top_logprobs.append(likely)
    told.text_offset.append(offset)
