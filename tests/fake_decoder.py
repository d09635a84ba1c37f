"""A decoder without a network, for tests of everything above the seam.

Its keys and values are the token ids themselves: a row's logits depend on every token that the
block table leads to, and on nothing else. So a wrong block, a lost token or a wrong position shows
in the text, as it would with a real model. With an adapter they are the ids plus a number of it, so
that keys and values of another adapter show too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from bitllm.adapter import Adapter
from bitllm.backends.base import (
    KV_BLOCK_SIZE,
    Batch,
    DecoderInfo,
    OutputKind,
    SamplePlan,
    StepOutput,
    check_batch,
)
from bitllm.checkpoint import LayerSpec, LinearSpec, ModelSpec, RopeSpec

NOTHING = -1
ADAPTED = 1_000_000


def fake_spec(vocab_size: int = 258, max_context: int = 256) -> ModelSpec:
    square = LinearSpec(out_features=8, in_features=8)
    layer = LayerSpec(
        q=square,
        k=square,
        v=square,
        o=square,
        gate=square,
        up=square,
        down=square,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        rope=RopeSpec(theta=10000.0, dim=8),
        activation="relu2",
        norm_eps=1e-5,
        query_scale=8**-0.5,
    )
    return ModelSpec(
        architecture="FakeForCausalLM",
        vocab_size=vocab_size,
        hidden_size=8,
        layers=(layer,),
        norm_eps=1e-5,
        tied_head=True,
        max_context=max_context,
    )


class FakeDecoder:
    """Deterministic pseudo-logits of all tokens before a row; counts what it is asked.

    Args:
        blocks: KV blocks.
        max_batch_tokens: most rows of a step.
        next_token: makes the id it returns for the tokens so far the likeliest; None = random.
        spec: the architecture it claims.
    """

    def __init__(
        self,
        *,
        blocks: int = 8,
        max_batch_tokens: int = 64,
        next_token: Callable[[list[int]], int] | None = None,
        spec: ModelSpec | None = None,
    ) -> None:
        self.spec = fake_spec() if spec is None else spec
        self.info = DecoderInfo("fake", "none", 1, 0, 0, 0)
        self.kv_capacity = blocks
        self.max_batch_tokens = max_batch_tokens
        self.steps: list[Batch] = []
        self.closed = False
        self.on_step: Callable[[], None] = lambda: None
        self.adapters: dict[int, int] = {}  # slot -> a number that no two loads share
        self._loads = 0
        self._next_token = next_token
        self._cache = np.full((blocks, KV_BLOCK_SIZE), NOTHING, np.int64)

    def forward(self, batch: Batch) -> StepOutput:
        assert not self.closed
        check_batch(batch, self.spec, self.kv_capacity, self.max_batch_tokens, self.adapters)
        self.steps.append(batch)
        self.on_step()
        rows: list[list[int]] = []
        for run in range(len(batch.run_offsets) - 1):
            table = batch.block_tables[run]
            added = ADAPTED * self.adapters.get(int(batch.adapter_slots[run]), 0)
            for row in range(batch.run_offsets[run], batch.run_offsets[run + 1]):
                position = int(batch.positions[row])
                block, offset = divmod(position, KV_BLOCK_SIZE)
                self._cache[table[block], offset] = batch.token_ids[row] + added
                prefix = self._cache[table[: block + 1]].reshape(-1)[: position + 1]
                assert (prefix != NOTHING).all(), "attention reads a position never written"
                rows.append(prefix.tolist())
        wanted: list[list[list[int]]] = [[] for _ in range(OutputKind.COUNT)]
        for row, kind in zip(batch.output_rows, batch.output_kinds, strict=True):
            wanted[kind].append(rows[row])
        return self._outputs(wanted, batch)

    def logits(self, tokens: list[int]) -> np.ndarray:
        seed = zlib.crc32(np.array(tokens, np.int64).tobytes())
        logits = 3 * np.random.default_rng(seed).standard_normal(self.spec.vocab_size)
        if self._next_token is not None:
            logits[self._next_token(tokens)] = 50.0
        return logits

    def hidden(self, tokens: list[int]) -> np.ndarray:
        return self.logits(tokens)[: self.spec.hidden_size]

    def _outputs(self, wanted: list[list[list[int]]], batch: Batch) -> StepOutput:
        plan = batch.plan
        samples, scores = wanted[OutputKind.SAMPLE], wanted[OutputKind.SCORE]
        prefixes = samples + scores
        top_n = [*plan.top_logprobs.tolist(), *batch.score_top_n.tolist()]
        width = max([0, *top_n])
        drawn = np.zeros(len(samples), np.int32)
        logprobs = np.full(len(prefixes), np.nan, np.float32)
        top_ids = np.full((len(prefixes), width), -1, np.int32)
        top_logprobs = np.full((len(prefixes), width), np.nan, np.float32)
        for index, prefix in enumerate(prefixes):
            raw = self.logits(prefix)
            if index < len(samples):
                target = drawn[index] = draw(raw.copy(), plan, index)
            else:
                target = batch.score_targets[index - len(samples)]
            if (count := top_n[index]) >= 0:
                log_softmax = raw - np.log(np.exp(raw).sum())
                logprobs[index] = log_softmax[target]
                best = np.argsort(-raw, kind="stable")[:count]
                top_ids[index, :count] = best
                top_logprobs[index, :count] = log_softmax[best]
        hidden = [self.hidden(prefix) for prefix in wanted[OutputKind.HIDDEN]]
        logits = [self.logits(prefix) for prefix in wanted[OutputKind.LOGITS]]
        return StepOutput(
            np.array(hidden, np.float32).reshape(-1, self.spec.hidden_size),
            np.array(logits, np.float32).reshape(-1, self.spec.vocab_size),
            drawn,
            logprobs,
            top_ids,
            top_logprobs,
        )

    def load_adapter(self, adapter: Adapter) -> int:
        self._loads += 1
        slot = min(set(range(len(self.adapters) + 1)) - set(self.adapters))
        self.adapters[slot] = self._loads
        return slot

    def unload_adapter(self, slot: int) -> None:
        del self.adapters[slot]

    def adapter_bytes(self, adapter: Adapter) -> int:
        return adapter.nbytes

    def close(self) -> None:
        self.closed = True

    def copy_blocks(self, pairs: np.ndarray) -> None:
        for source, destination in pairs:
            self._cache[destination] = self._cache[source]

    def read_blocks(self, blocks: np.ndarray) -> np.ndarray:
        return self._cache[blocks].view(np.uint8)

    def write_blocks(self, blocks: np.ndarray, data: np.ndarray) -> None:
        self._cache[blocks] = data.view(np.int64)


def draw(logits: np.ndarray, plan: SamplePlan, index: int) -> int:
    """Bias, penalties, mask, temperature and a Gumbel draw; the cuts are not imitated."""
    biased = slice(plan.bias_offsets[index], plan.bias_offsets[index + 1])
    logits[plan.bias_ids[biased]] += plan.bias_values[biased]
    seen = slice(plan.seen_offsets[index], plan.seen_offsets[index + 1])
    ids, counts = plan.seen_ids[seen], plan.seen_counts[seen]
    factor = float(plan.repetition_penalty[index])
    logits[ids] = np.where(logits[ids] > 0, logits[ids] / factor, logits[ids] * factor)
    logits[ids] -= plan.frequency_penalty[index] * counts
    logits[ids] -= plan.presence_penalty[index] * (counts > 0)
    if (row := plan.mask_rows[index]) >= 0:
        every = np.arange(len(logits))
        allowed = plan.mask[row][every // 32] >> (every % 32).astype(np.uint32) & 1
        logits[allowed == 0] = -np.inf
    if plan.temperature[index] > 0:
        key = [int(plan.seed[index]), int(plan.choice[index]), int(plan.position[index])]
        noise = np.random.default_rng(key).gumbel(size=len(logits))
        logits = logits / float(plan.temperature[index]) + noise
    return int(np.argmax(logits))
