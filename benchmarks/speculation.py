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
from dataclasses import replace

import machine

from bitllm.bench.timing import Spread
from bitllm.config import SamplingParams
from bitllm.engine.engine import Engine
from bitllm.engine.llm import LLM
from bitllm.engine.loading import load
from bitllm.engine.outputs import Usage
from bitllm.engine.request import Request
from bitllm.engine.sequence import Sequence
from bitllm.engine.speculation import NgramDrafter, Speculation

FACTS = (
    "The list holds three names. The list holds three numbers. A string is not a list. "
    "A file holds a list of strings, and each string is the name of a file."
)
PROMPTS = {
    "quote": f"{FACTS}\n\nThe same again, word for word:\n\n{FACTS[:90]}",
    "summary": f"{FACTS}\n\nIn one sentence:",
    "code": "def first(a):\n    return a[0]\n\n\ndef last(a):\n    return a[-1]\n\n\ndef ",
    "free": "Yesterday",
}
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


def write(engine: Engine, request: Request, speculation: Speculation) -> tuple[list[int], Usage]:
    """Return the ids of a text and what it took."""
    engine._speculation = speculation
    sequence = engine.add(request)
    try:
        engine.finish(sequence)
        return sequence.token_ids, sequence.completion().usage
    finally:
        engine.abort(sequence)


def compare(
    engine: Engine, request: Request, speculation: Speculation, repeats: int
) -> dict[str, float]:
    """Return speeds without and with guesses, in turns, and guesses for each drawn token.

    Raises:
        SystemExit: the text is another one.
    """
    none = Speculation((), 0, 256)
    write(engine, request, speculation)  # finds out what rows cost
    plain, guessed, ratios = [], [], []
    for _ in range(repeats):
        ids, before = write(engine, request, none)
        found, usage = write(engine, request, speculation)
        if found != ids:
            sys.exit("another text than without guesses")
        plain.append(before.tokens_per_second)
        guessed.append(usage.tokens_per_second)
        ratios.append(guessed[-1] / plain[-1])
    drawn = usage.completion_tokens - 1
    return {
        "plain": Spread.of(plain).median,
        "guessed": Spread.of(guessed).median,
        "ratio": Spread.of(ratios).median,
        "spread": Spread.of(ratios).spread,
        "drafted": usage.drafted_tokens / drawn,
        "right": usage.accepted_tokens / drawn,
    }


def prepared(llm: LLM, prompt: str, tokens: int, sampled: bool) -> Request:
    """Return the request of a prompt that ends nowhere before `tokens`."""
    greedy = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
    params = replace(greedy, temperature=0.8, seed=1) if sampled else greedy
    return llm.prepare(prompt, params)


def texts(llm: LLM, tokens: int) -> dict[str, Request]:
    """Return what is written with guesses of its own: a loop, and continuations of prompts."""
    loop = prepared(llm, PROMPTS["free"], tokens, sampled=False)
    found = {"one token over and over": replace(loop, logit_bias={loop.prompt_ids[-1]: 1000.0})}
    for name, prompt in PROMPTS.items():
        found[f"{name}, greedy"] = prepared(llm, prompt, tokens, sampled=False)
        found[f"{name}, sampled"] = prepared(llm, prompt, tokens, sampled=True)
    return found


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
    llm = load(arguments.model, threads=arguments.threads, context=512, prefix_cache=False)
    figures: dict[str, dict[str, float]] = {}
    request = prepared(llm, PROMPTS["free"], arguments.tokens, sampled=True)
    ids, _ = write(llm.engine, request, Speculation((), 0, 256))
    for most in CEILING:
        always = Always([KnownText(ids)], most, 256)
        figures[f"known, always {most}"] = compare(llm.engine, request, always, arguments.repeats)
    for name, request in texts(llm, arguments.tokens).items():
        auto = Speculation([NgramDrafter()], 16, 256)
        figures[name] = compare(llm.engine, request, auto, arguments.repeats)
    rows = [
        (
            name,
            f"{each['plain']:6.1f} -> {each['guessed']:6.1f} tok/s, {each['ratio']:.2f} x"
            f" (spread {each['spread']:.0%}); guesses a token {each['drafted']:.2f},"
            f" right {each['right']:.2f}",
        )
        for name, each in figures.items()
    ]
    machine.report(rows, {"benchmark": "speculation", "model": llm.name, "figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
