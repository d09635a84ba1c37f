"""Scores, perplexity, logits and embeddings of a model: what `LLM` offers besides writing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast, overload

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import ModelSpec
from bitllm.config import as_integer
from bitllm.engine.adapters import LoadedAdapter, find_adapter
from bitllm.engine.outputs import Score, TextScore
from bitllm.engine.prompt import Prompt, is_one, pairs_to_score, token_ids_of
from bitllm.engine.request import Request, adapted
from bitllm.engine.scoring import (
    Pooling,
    check_pooling,
    hidden_request,
    logits_request,
    pool,
    score_of,
    score_request,
    scored_bytes,
    text_score_of,
    windows,
)
from bitllm.engine.sequence import Sequence
from bitllm.tokenizer import Tokenizer

__all__ = ["TokenAccess"]

F32 = npt.NDArray[np.float32]


class TokenAccess:
    """Reading a model token by token, through the batches of the engine.

    Attributes:
        tokenizer: from text to ids.
        spec: the architecture.
        context: most tokens of one text.
    """

    tokenizer: Tokenizer
    spec: ModelSpec
    context: int

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The loaded adapters by name, as of now."""
        raise NotImplementedError

    def _run(self, requests: Iterable[Request]) -> Iterator[Sequence]:
        """Yield the finished sequences of these requests, in their order."""
        raise NotImplementedError

    def _read(self, requests: Iterable[Request], adapter: str | None) -> Iterator[Sequence]:
        """The same, with an adapter."""
        found = find_adapter(self.adapters, adapter)
        return self._run(adapted(request, found) for request in requests)

    @overload
    def score(
        self, prompt: Prompt, continuation: Prompt, *, top: int = 0, adapter: str | None = None
    ) -> Score: ...

    @overload
    def score(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        continuation: list[str] | list[list[int]],
        *,
        top: int = 0,
        adapter: str | None = None,
    ) -> list[Score]: ...

    def score(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        continuation: Prompt | list[str] | list[list[int]],
        *,
        top: int = 0,
        adapter: str | None = None,
    ) -> Score | list[Score]:
        """Return how likely a continuation is after a prompt.

        A text is encoded on its own, the prompt with the start token and the continuation without:
        so a continuation begins with its space. Where a word could fall into other tokens, give
        ids. The text of a prompt may be empty if the model has a start token.

        Args:
            prompt: a text or its token ids, or one for each continuation.
            continuation: a text or its token ids; or a list of those.
            top: how many of the likeliest tokens are told at each place.
            adapter: name of a loaded adapter; None = the model as it is.

        Raises:
            ConfigError: nothing to score, or an id outside the vocabulary.
            ContextOverflowError: prompt and continuation do not fit into the context.
        """
        requests = [
            score_request(before, after, top, self.spec, self.context)
            for before, after in pairs_to_score(self.tokenizer, prompt, continuation)
        ]
        read = self._read(requests, adapter)
        scores = [score_of(each.rows_read().logprobs(), top) for each in read]
        return scores[0] if is_one(continuation) else scores

    def perplexity(
        self,
        text: Prompt,
        *,
        context: int | None = None,
        stride: int | None = None,
        adapter: str | None = None,
    ) -> float:
        """Return exp of the mean negative log-probability of the tokens of a text.

        The `perplexity` of `score_text`, with its arguments and errors.
        """
        return self.score_text(text, context=context, stride=stride, adapter=adapter).perplexity

    def score_text(
        self,
        text: Prompt,
        *,
        context: int | None = None,
        stride: int | None = None,
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        adapter: str | None = None,
    ) -> TextScore:
        """Return how well the model foresees a text: perplexity a token, bits a byte.

        Every token but the first is scored once. A text longer than `context` is read in windows,
        each `stride` tokens further than the one before: a token then sees at least
        context - stride tokens before it (but at the start of the text).

        Args:
            text: a text, of any length, or its token ids.
            context: tokens of a window; None = what the model was loaded with.
            stride: 1 to context - 1; smaller is slower and nearer to what the model can do. None =
                half of a window.
            limit: read only so many tokens from the beginning of the text, at least 2.
            progress: called with (done, total) tokens after each window.
            adapter: as in `score`.

        Raises:
            ConfigError: fewer than two tokens, or a window or stride out of range.
        """
        ids = token_ids_of(text, self.tokenizer)
        if limit is not None:
            ids = ids[: as_integer("limit", limit, low=2)]
        text_bytes = None
        if isinstance(text, str):
            text_bytes = scored_bytes(text, ids, limit, self.tokenizer)
        window = self.context if context is None else context
        parts = windows(ids, window, stride, self.spec, self.context)

        def advance(done: int) -> None:
            if progress is not None:
                progress(done, len(ids) - 1)

        values = (each.rows_read().values for each in self._read(parts, adapter))
        return text_score_of(values, text_bytes, advance)

    def forward(self, token_ids: Prompt, *, start: int = 0, adapter: str | None = None) -> F32:
        """Return the logits after each token, float32 [tokens - start, vocab].

        Row i belongs to token start + i, and says what the model expects after it. They are
        computed in pieces, straight into the result.

        Args:
            token_ids: ids, or a text.
            start: the first token whose logits are wanted; len(token_ids) - 1 = only the last.
            adapter: as in `score`.

        Raises:
            ConfigError: no tokens, an id outside the vocabulary, or `start` beyond the last.
            ContextOverflowError: they do not fit into the context.
            InsufficientMemoryError: the result does not fit into memory.
        """
        ids = token_ids_of(token_ids, self.tokenizer)
        request = logits_request(ids, start, self.spec, self.context)
        (sequence,) = self._read([request], adapter)
        return sequence.rows_read().values

    def embed(
        self,
        texts: Prompt | list[str] | list[list[int]],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        adapter: str | None = None,
    ) -> F32:
        """Return the embedding of a text, or of several.

        Texts that the model expects behind an instruction have to be given with it.

        Args:
            texts: a text or its token ids; or a list of those.
            pooling: "mean" of the hidden states of all tokens, or that of the "last" token; None =
                what the model was made for.
            normalize: scale each vector to length 1, so that products of two are cosines.
            adapter: as in `score`.

        Returns:
            float32 [hidden]; for a list of n texts, [n, hidden].

        Raises:
            ConfigError: no tokens, or no `pooling` for a model that was not made for embeddings.
            ContextOverflowError: a text does not fit into the context.
            CheckpointError: the model computes no numbers.
        """
        chosen = check_pooling(pooling, self.spec)
        one = is_one(texts)
        given = [cast(Prompt, texts)] if one else cast("list[Prompt]", texts)
        requests = [
            hidden_request(token_ids_of(each, self.tokenizer), chosen, self.spec, self.context)
            for each in given
        ]
        read = self._read(requests, adapter)
        vectors = [pool(each.rows_read().values, normalize=normalize) for each in read]
        rows = np.array(vectors, np.float32).reshape(-1, self.spec.hidden_size)
        return rows.reshape(-1) if one else rows
