"""Speed with and without guesses at coming tokens, of texts that repeat themselves and others.

    python benchmarks/speculation.py                              # the demo model
    python benchmarks/speculation.py build/models/2b --tokens 48

The ceiling is what guesses would bring that are always right: a drafter that knows the text, made
without guesses before, for some numbers of guesses at once. Then the same prompts with what
`speculation="auto"` guesses. No figure without right output: ids that differ end the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Ordered

import machine

from bitllm.bench.timing import Spread
from bitllm.engine.engine import Engine
from bitllm.engine.llm import LLM
from bitllm.engine.loading import load
from bitllm.engine.request import Request
from bitllm.engine.sequence import Sequence
from bitllm.engine.speculation import Drafter, NgramDrafter, Speculation

FACTS = (
    "The list holds three names. The list holds three numbers. A string is not a list. "
    "A file holds a list of strings, and each string is the name of a file."
)
PROMPTS = {
    "quote": f"{FACTS}\n\nThe same again, word for word:\n\n{FACTS[:90]}",
    "summary": f"{FACTS}\n\nIn one sentence:",
    "code": "def first(values):\n    return values[0]\n\n\ndef last(values):\n    return values[-1]\n",
    "free": "Yesterday",
}
SAMPLED = {"temperature": 0.8, "seed": 1}
CEILING = (1, 2, 3, 4, 6, 8, 12, 16)


class KnownText:
    """Guesses the tokens of a text that is known, as many as there may be."""

    def __init__(self, token_ids: Ordered[int]) -> None:
        self._token_ids = token_ids

    def chances(self, sequence: Sequence, most: int) -> Ordered[float]:
        """Return certainty."""
        return [1.0] * most

    def seconds(self, depth: int) -> float:
        """Return 0."""
        return 0.0

    def draft(self, counts: Mapping[Sequence, int]) -> Mapping[Sequence, Ordered[int]]:
        """Return what comes."""
        return {
            each: self._token_ids[len(each.token_ids) : len(each.token_ids) + count]
            for each, count in counts.items()
        }

    def forget(self, sequence: Sequence) -> None:
        """Do nothing."""

    def restart(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Always(Speculation):
    """Takes all guesses that a drafter has, whatever they cost."""

    def observe(self, runs: object, seconds: float) -> None:
        """Take every step to cost the same."""
        super().observe(runs, 0.0)  # type: ignore[arg-type]


def measure(
    engine: Engine, request: Request, speculation: Speculation, repeats: int
) -> tuple[list[int], Spread, float]:
    """Return the ids, the tokens a second, and the guesses for each drawn token that were right."""
    engine._speculation = speculation
    speeds = []
    for _ in range(repeats + 1):  # the first finds out what rows cost
        sequence = engine.add(request)
        engine.finish(sequence)
        usage = sequence.completion().usage
        speeds.append(usage.tokens_per_second)
        engine.abort(sequence)
    right = usage.accepted_tokens / max(1, usage.completion_tokens - 1)
    return sequence.token_ids, Spread.of(speeds[1:]), right


def prepared(llm: LLM, prompt: str, tokens: int, sampled: bool) -> Request:
    """Return the request of a prompt that ends nowhere before `tokens`."""
    options = {"max_tokens": tokens, "ignore_eos": True, **(SAMPLED if sampled else {})}
    from bitllm.config import SamplingParams

    return llm.prepare(prompt, SamplingParams(**options))


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a model; none = the demo model")
    parser.add_argument("--tokens", type=int, default=128, help="drawn for each text")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each figure")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.tokens < 2 or arguments.repeats < 1:
        parser.error("--tokens must be at least 2, --repeats at least 1")
    llm = load(arguments.model, threads=arguments.threads, context=1024, prefix_cache=False)
    rows, figures = [], []

    def compare(name: str, request: Request, *drafters: tuple[str, Speculation]) -> None:
        none = Speculation((), 0, 256)
        ids, plain, _ = measure(llm.engine, request, none, arguments.repeats)
        for what, speculation in drafters:
            found, speed, right = measure(llm.engine, request, speculation, arguments.repeats)
            if found != ids:
                sys.exit(f"{name}, {what}: another text than without guesses")
            ratio = speed.median / plain.median
            text = f"{plain.median:6.1f} -> {speed.median:6.1f} tok/s, {ratio:.2f} x"
            rows.append((f"{name}, {what}", f"{text}, right guesses a token {right:.2f}"))
            figures.append(
                {"text": name, "guesses": what, "plain": plain.median}
                | {
                    "tokens_per_s": speed.median,
                    "spread": speed.spread,
                    "right": right,
                }
            )

    request = prepared(llm, PROMPTS["free"], arguments.tokens, sampled=True)
    ids, _, _ = measure(llm.engine, request, Speculation((), 0, 256), 1)
    known: Drafter = KnownText(ids)
    ceiling = [(f"always {most}", Always([known], most, 256)) for most in CEILING]
    compare("a known text", request, *ceiling)
    for name, prompt in PROMPTS.items():
        for sampled in (False, True):
            request = prepared(llm, prompt, arguments.tokens, sampled)
            auto = Speculation([NgramDrafter()], 16, 256)
            compare(f"{name}, {'sampled' if sampled else 'greedy'}", request, ("auto", auto))
    machine.report(rows, {"benchmark": "speculation", "model": llm.name, "figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
