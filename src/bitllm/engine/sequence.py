"""One request on its way: its tokens, its KV blocks, its text, and why it ended."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import KV_BLOCK_SIZE, OutputKind
from bitllm.engine.blocks import block_key, root_key
from bitllm.engine.grammar import GrammarState
from bitllm.engine.ngrams import NgramIndex
from bitllm.engine.outputs import Chunk, Completion, FinishReason, TokenLogprob, ToolCall, Usage
from bitllm.engine.readout import Rows, longest_run
from bitllm.engine.request import Request
from bitllm.engine.seen import SeenTokens
from bitllm.engine.text import Detokenizer, TextStream
from bitllm.engine.tools import parse_calls
from bitllm.errors import BitllmError, CheckpointError, ConfigError

__all__ = ["Sequence"]


class Sequence:
    """The state of one request, or of one of its choices.

    Everything but `token_ids` can be computed again from them: a sequence that loses its blocks
    (`computed` = 0) goes on as if nothing had been, because drawing depends on the request and
    the position alone. So may text and form, where an interrupt has left them behind the tokens
    (`restore`).

    Args:
        request: what is asked for.
        make_detokenizer: returns a fresh detokenizer.
        choice: which completion of the request this is.
        rows: where to put what was asked of the rows of the prompt.

    Attributes:
        request: as given.
        token_ids: prompt and output.
        computed: leading tokens whose keys and values are in the cache.
        block_ids: KV blocks held, in order of position.
        table_version: another number after each change of them.
        finish_reason: None while it runs.
        failure: why no further token can be drawn, None if nothing went wrong.
        choice: which completion of the request this is; each has draws of its own.
        rows: what was asked of the rows of the prompt, None if nothing was; its choices share it.
        seen: the ids that penalties look at, None if there are none.
        form: what may come next by the request's grammar, None if everything may.
        leader: the sequence that reads the prompt for this one too; None once it has, and for the
            leader itself.
        followers: the sequences that have this one for their leader.
        rank: place in the order of service, given by the scheduler.
        cached_tokens: tokens of the prompt that were found in the cache.
        drafted_tokens: guesses at its next tokens that were computed.
        accepted_tokens: those that were right.
        ngrams: where in this text its last tokens stood before; made when it is first asked for.
    """

    def __init__(
        self,
        request: Request,
        make_detokenizer: Callable[[], Detokenizer],
        choice: int = 0,
        rows: Rows | None = None,
    ) -> None:
        self.request = request
        self.choice = choice
        self.leader: Sequence | None = None
        self.followers: list[Sequence] = []
        self.rank: tuple[int, int, int] = (0, 0, choice)
        self.cached_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.ngrams: NgramIndex | None = None
        self.token_ids = list(request.prompt_ids)
        self.computed = 0
        self.block_ids: list[int] = []
        self.table_version = 0
        self.finish_reason: FinishReason | None = None
        self.failure: BitllmError | None = None
        self.rows = rows
        self._make_detokenizer = make_detokenizer
        self._begin()
        self._settled = len(self.token_ids)  # tokens that text, form and the like have taken in
        longest = len(request.prompt_ids) + request.max_tokens
        self._table = np.full(self.blocks_for(longest), -1, np.int32)
        self._keys = [root_key(request.prefix_key)]
        self._logprobs: list[TokenLogprob] = []
        self._chunk_start = self.prompt_length
        self._reported = False
        self._times = [0.0, 0.0, 0.0]

    @staticmethod
    def blocks_for(tokens: int) -> int:
        """Return how many KV blocks hold this many tokens."""
        return -(-tokens // KV_BLOCK_SIZE)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        """Tokens not computed yet; 1 while decoding."""
        return len(self.token_ids) - self.computed

    @property
    def draws(self) -> bool:
        """Whether the row of its last token draws the next one."""
        return self.request.max_tokens > 0

    @property
    def skippable(self) -> int:
        """Leading tokens that need not be computed if the cache has them.

        All but the last, and none whose row is still wanted.
        """
        if not self.request.prefix_cache:
            return 0
        known = len(self.token_ids) - 1
        if self.rows is None or self.rows.complete:
            return known
        return min(known, self.rows.readout.start + self.rows.done)

    def next_length(self, budget: int) -> int:
        """Return how many of its pending tokens the next step computes, at most `budget`."""
        return min(self.pending, longest_run(self.rows, budget))

    @property
    def finished(self) -> bool:
        """Whether the last token is drawn, or none can be."""
        return self.finish_reason is not None or self.failure is not None

    def add_block(self, block: int) -> None:
        """Take a KV block for the next positions."""
        self._table[len(self.block_ids)] = block
        self.block_ids.append(block)
        self.table_version += 1

    def replace_block(self, index: int, block: int) -> None:
        """Take another KV block in the place of one that is held."""
        self._table[index] = block
        self.block_ids[index] = block
        self.table_version += 1

    def block_key(self, index: int) -> bytes:
        """Return the key of a full block, which stands for all tokens up to its end."""
        while len(self._keys) <= index + 1:
            start = (len(self._keys) - 1) * KV_BLOCK_SIZE
            tokens = self.token_ids[start : start + KV_BLOCK_SIZE]
            self._keys.append(block_key(self._keys[-1], tokens))
        return self._keys[index + 1]

    def drop_blocks(self) -> list[int]:
        """Forget everything computed and return the blocks that held it."""
        blocks, self.block_ids, self.computed = self.block_ids, [], 0
        self._table.fill(-1)
        self.table_version += 1
        return blocks

    def drop_last_block(self) -> int:
        """Give the last block up and return it."""
        block = self.block_ids.pop()
        self._table[len(self.block_ids)] = -1
        self.table_version += 1
        return block

    def block_table(self, blocks: int) -> npt.NDArray[np.int32]:
        """Return the first entries of the block table, int32 [blocks]."""
        return self._table[:blocks]

    def started(self, now: float) -> None:
        """Note the time (seconds) of the first step this sequence takes part in."""
        if self._times[0] == 0.0:
            self._times = [now, now, now]

    def follow(self, leader: Sequence) -> None:
        """Go on from the prompt that the leader has read, with its blocks."""
        for block in leader.block_ids:
            self.add_block(block)
        self.computed = leader.computed
        self.cached_tokens = leader.cached_tokens
        self._times = list(leader._times)

    def append(self, token_id: int, logprob: TokenLogprob | None, now: float) -> None:
        """Add a drawn token and find out whether it is the last."""
        if logprob is not None:
            self._logprobs.append(logprob)
        generated = self.generated
        self._times[2] = now
        if generated == 0:
            self._times[1] = now
        self.token_ids.append(token_id)  # from here on it is drawn: what follows can be done again
        self._read_token(token_id, generated + 1)
        self._settled = len(self.token_ids)

    def restore(self) -> None:
        """Make what is a function of the tokens anew, if an interrupt has torn it from them."""
        del self._logprobs[self.generated :]
        if self.finished or self._settled == len(self.token_ids):
            return
        taken = self._stream.taken
        self._begin()
        self._stream.taken = taken
        for count, token_id in enumerate(self.token_ids[self.prompt_length :], 1):
            self._read_token(token_id, count)
        self._settled = len(self.token_ids)

    def _begin(self) -> None:
        """Set what is a function of the tokens to what it is of the prompt."""
        request = self.request
        self.form = None if request.grammar is None else request.grammar.start()
        self.seen = SeenTokens(request.prompt_ids) if request.penalised else None
        self._stream = TextStream(self._make_detokenizer(), request.stop_strings)

    def _read_token(self, token_id: int, generated: int) -> None:
        """Take in the last of so many generated tokens."""
        request = self.request
        if self.seen is not None:
            self.seen.add(token_id)
        if token_id in request.stop_ids:
            self._stream.finish()
            self.finish_reason = "stop"
        elif self._stream.push(token_id, may_stop=generated >= request.min_tokens):
            self.finish_reason = "stop"
        elif self.form is not None and self._completes(self.form, token_id):
            self._stream.finish()
            self.finish_reason = "stop"
        elif generated >= request.max_tokens and self.failure is None:
            self._stream.finish()
            self.finish_reason = "length"

    def _completes(self, form: GrammarState, token_id: int) -> bool:
        form.accept(token_id)
        self.failure = form.error
        return form.complete

    def read(self, now: float) -> None:
        """End where nothing is to be drawn and the last of the wanted rows is there."""
        self._times[2] = now
        if not self.draws and self.rows is not None and self.rows.complete:
            self._times[1] = now
            self.finish_reason = "length"

    def expire(self) -> None:
        """End here, with the text so far: its time is up."""
        self._settled = 0  # until it has ended: text is flushed once only
        self._stream.finish()
        self.finish_reason = "timeout"

    def fail(self) -> None:
        """End without a result: the decoder found no token that may be drawn."""
        if self.form is not None and self.form.error is not None:
            self.failure = self.form.error
        elif self.request.banned_ids and self.generated < self.request.min_tokens:
            self.failure = ConfigError(
                f"no token is left to draw: min_tokens={self.request.min_tokens} forbids the "
                f"{len(self.request.banned_ids)} ids that would end the text",
                hint="lower min_tokens, or give fewer stop_token_ids",
            )
        else:
            self.failure = CheckpointError(
                f"the model computes no number for any token after {len(self.token_ids)} tokens",
                hint="its weights are damaged or overflow; download it again",
            )

    def take_chunk(self) -> Chunk | None:
        """Return what is new since the last call; None without new text, or after the last."""
        text = self._stream.take()
        if self._reported or not (text or self.finished):
            return None
        start, self._chunk_start = self._chunk_start, len(self.token_ids)
        logprobs = None
        if self.request.top_logprobs >= 0:
            logprobs = tuple(self._logprobs[start - self.prompt_length :])
        ids = tuple(self.token_ids[start:])
        if not self.finished:
            return Chunk(text=text, token_ids=ids, logprobs=logprobs, index=self.choice)
        self._reported = True
        return Chunk(
            text=text,
            token_ids=ids,
            finish_reason=self.finish_reason,
            usage=self._usage(),
            seed=self._seed(),
            logprobs=logprobs,
            prompt_logprobs=self._prompt_logprobs(),
            tool_calls=self._tool_calls(),
            index=self.choice,
        )

    def completion(self) -> Completion:
        """Return the whole result of a finished sequence."""
        if self.finish_reason is None:
            raise RuntimeError("the sequence has not ended")
        return Completion(
            text=self._stream.text,
            token_ids=tuple(self.token_ids[self.prompt_length :]),
            finish_reason=self.finish_reason,
            usage=self._usage(),
            seed=self._seed(),
            logprobs=tuple(self._logprobs) if self.request.top_logprobs >= 0 else None,
            prompt_logprobs=self._prompt_logprobs(),
            tool_calls=self._tool_calls(),
            index=self.choice,
        )

    def _tool_calls(self) -> tuple[ToolCall, ...]:
        names = self.request.tool_names
        return parse_calls(self._stream.text, names) if names else ()

    def rows_read(self) -> Rows:
        """Return the rows of a finished request that wanted some."""
        if self.rows is None or not self.rows.complete:
            raise RuntimeError("the sequence has no rows, or not all of them")
        return self.rows

    def _prompt_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        scored = self.rows is not None and self.rows.readout.kind == OutputKind.SCORE
        return self.rows.logprobs() if self.rows is not None and scored else None

    def _seed(self) -> int | None:
        return self.request.seed if self.request.temperature > 0 else None

    def _usage(self) -> Usage:
        start, first, last = self._times
        return Usage(
            prompt_tokens=self.prompt_length,
            completion_tokens=self.generated,
            prefill_seconds=first - start,
            decode_seconds=last - first,
            cached_tokens=self.cached_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )
