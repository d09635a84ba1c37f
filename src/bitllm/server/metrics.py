"""Figures for Prometheus, in its text format (https://prometheus.io/docs/instrumenting/exposition_formats).

Written here and not by a library: a counter and a histogram are a few lines, and what the engine
counts is read when somebody asks.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping

from bitllm.backends.base import KV_BLOCK_SIZE
from bitllm.server.admission import Admission
from bitllm.server.models import ServedModel

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_TOKENS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE_REQUEST = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

Labels = tuple[tuple[str, str], ...]


class _Counter:
    """Numbers that only grow, one for each set of labels."""

    def __init__(self, name: str, meaning: str) -> None:
        self.name, self.meaning = name, meaning
        self.values: defaultdict[Labels, float] = defaultdict(float)

    def add(self, amount: float = 1, **labels: str) -> None:
        """Add to the number with these labels."""
        self.values[tuple(labels.items())] += amount

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        yield from _head(self.name, self.meaning, "counter")
        for labels, value in self.values.items():
            yield f"{self.name}{_written(labels)} {value:.17g}"


class _Histogram:
    """How often a time was in which range, one for each model."""

    def __init__(self, name: str, meaning: str, bounds: tuple[float, ...]) -> None:
        self.name, self.meaning, self.bounds = name, meaning, bounds
        self.counts: dict[str, list[int]] = {}
        self.sums: defaultdict[str, float] = defaultdict(float)

    def observe(self, seconds: float, model: str, times: int = 1) -> None:
        """Count a time, in seconds."""
        counts = self.counts.get(model)
        if counts is None:
            counts = self.counts[model] = [0] * (len(self.bounds) + 1)
        counts[bisect_left(self.bounds, seconds)] += times
        self.sums[model] += seconds * times

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        yield from _head(self.name, self.meaning, "histogram")
        for model, counts in self.counts.items():
            total = 0
            for bound, count in zip((*self.bounds, "+Inf"), counts, strict=True):
                total += count
                labels = _written((("model", model), ("le", str(bound))))
                yield f"{self.name}_bucket{labels} {total}"
            only = _written((("model", model),))
            yield f"{self.name}_sum{only} {self.sums[model]:.9g}"
            yield f"{self.name}_count{only} {total}"


class Metrics:
    """What is counted while requests are served; used by one thread only, that of the event loop.

    Attributes:
        started: when counting began, by `time.monotonic`.
        requests: by route, method and status.
        prompt_tokens: read, by model.
        completion_tokens: written, by model.
        cached_tokens: of the prompts, found in the cache, by model.
        first_token: seconds from a streamed request to its first token.
        between_tokens: seconds from a token of a stream to the next.
        whole_request: seconds from a request that generates to the end of its answer.
        hung_up: requests whose client went away before the end.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.requests = _Counter("bitllm_requests_total", "Requests answered.")
        self.prompt_tokens = _Counter("bitllm_prompt_tokens_total", "Tokens of prompts.")
        self.completion_tokens = _Counter("bitllm_completion_tokens_total", "Tokens written.")
        self.cached_tokens = _Counter(
            "bitllm_cached_prompt_tokens_total", "Tokens of prompts that the prefix cache held."
        )
        self.hung_up = _Counter("bitllm_disconnects_total", "Clients gone before the answer ended.")
        self.first_token = _Histogram(
            "bitllm_time_to_first_token_seconds",
            "From the arrival of a streamed request to its first token.",
            _FIRST_TOKEN,
        )
        self.between_tokens = _Histogram(
            "bitllm_inter_token_seconds", "From a token of a stream to the next.", _BETWEEN_TOKENS
        )
        self.whole_request = _Histogram(
            "bitllm_request_seconds",
            "From the arrival of a request that generates to the end of its answer.",
            _WHOLE_REQUEST,
        )

    def text(self, models: list[ServedModel], admission: Admission) -> str:
        """Return all figures, those of the engines as they are now."""
        lines: list[str] = []
        for each in (
            self.requests,
            self.hung_up,
            self.prompt_tokens,
            self.completion_tokens,
            self.cached_tokens,
            self.first_token,
            self.between_tokens,
            self.whole_request,
        ):
            lines += each.lines()
        lines += _gauge("bitllm_requests_under_way", "Requests under way.", admission.under_way)
        lines += _gauge(
            "bitllm_uptime_seconds", "Time of service.", time.monotonic() - self.started
        )
        lines += _engine_lines(models)
        return "\n".join(lines) + "\n"


def _engine_lines(models: list[ServedModel]) -> Iterator[str]:
    stats = {model.name: model.llm.llm.stats() for model in models}
    figures: tuple[tuple[str, str, str, Mapping[str, float]], ...] = (
        ("bitllm_sequences_running", "gauge", "Sequences that take part in steps.",
         {name: s.running for name, s in stats.items()}),
        ("bitllm_sequences_waiting", "gauge", "Sequences in the queue of the engine.",
         {name: s.waiting for name, s in stats.items()}),
        ("bitllm_kv_positions", "gauge", "Positions that the KV cache has.",
         {name: s.blocks * KV_BLOCK_SIZE for name, s in stats.items()}),
        ("bitllm_kv_usage_ratio", "gauge", "The part of the KV cache that sequences hold.",
         {name: s.used_blocks / max(1, s.blocks) for name, s in stats.items()}),
        ("bitllm_kv_cached_ratio", "gauge", "The part of the KV cache kept for later prompts.",
         {name: s.cached_blocks / max(1, s.blocks) for name, s in stats.items()}),
        ("bitllm_steps_total", "counter", "Steps of the decoder.",
         {name: s.steps for name, s in stats.items()}),
        ("bitllm_prefilled_tokens_total", "counter", "Known tokens computed.",
         {name: s.prefilled_tokens for name, s in stats.items()}),
        ("bitllm_prefix_cache_tokens_total", "counter", "Known tokens found in the cache.",
         {name: s.cached_tokens for name, s in stats.items()}),
        ("bitllm_decoded_tokens_total", "counter", "Drawn tokens computed.",
         {name: s.decoded_tokens for name, s in stats.items()}),
        ("bitllm_preemptions_total", "counter", "How often a sequence gave its KV blocks back.",
         {name: s.preemptions for name, s in stats.items()}),
    )  # fmt: skip
    for name, kind, meaning, values in figures:
        yield from _head(name, meaning, kind)
        for model, value in values.items():
            yield f"{name}{_written((('model', model),))} {value:.17g}"


def _gauge(name: str, meaning: str, value: float) -> Iterator[str]:
    yield from _head(name, meaning, "gauge")
    yield f"{name} {value:.9g}"


def _head(name: str, meaning: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"


def _written(labels: Labels) -> str:
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
