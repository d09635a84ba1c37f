"""Speculation: the text without guesses, whatever is guessed; and guesses only where they pay."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from bitllm.backends.base import KV_BLOCK_SIZE, Batch, StepOutput
from bitllm.engine import ngrams
from bitllm.engine.draft_model import DraftModel
from bitllm.engine.engine import Engine
from bitllm.engine.ngrams import LONGEST_MATCH, NgramIndex, first_rates
from bitllm.engine.request import Request
from bitllm.engine.sequence import Sequence
from bitllm.engine.speculation import Drafter, NgramDrafter, Speculation, StepCosts
from bitllm.errors import QuantizationError
from drafters import EagerNgrams, Guess, Guesses
from fake_decoder import FakeDecoder
from test_engine import Bytes
from test_engine_interrupts import interrupted

END = 257


class Watch:
    """A clock by which a step takes as long as a test says for its rows."""

    def __init__(self, decoder: FakeDecoder, seconds: Callable[[int], float]) -> None:
        self.now = 0.0
        decoder.on_step = lambda: self._pass(seconds(len(decoder.steps[-1].token_ids)))

    def _pass(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def make_engine(
    *drafters: Drafter, most: int = 6, decoder: FakeDecoder | None = None, **options: Any
) -> tuple[Engine, FakeDecoder]:
    decoder = decoder or FakeDecoder()
    rows = decoder.max_batch_tokens
    speculation = Speculation(drafters, most, rows, shortest=0.0)
    options.setdefault("clock", lambda: 0.0)
    return Engine(
        decoder, Bytes, max_batch_tokens=rows, speculation=speculation, **options
    ), decoder


def request(prompt: str = "hello", max_tokens: int = 20, **options: Any) -> Request:
    return Request(prompt_ids=tuple(prompt.encode()), max_tokens=max_tokens, **options)


def complete(engine: Engine, *requests: Request) -> list[Any]:
    """Return everything that a text consists of, for each choice of each request."""
    groups = [engine.add_choices(each) for each in requests]
    results = []
    for sequence in itertools.chain.from_iterable(groups):
        engine.finish(sequence)
        done = sequence.completion()
        results.append((done.text, done.token_ids, done.finish_reason, done.logprobs, done.index))
        results.append(done.prompt_logprobs)
    for sequence in itertools.chain.from_iterable(groups):
        engine.abort(sequence)
    assert engine.free_blocks == engine.stats().blocks
    return results


def truth(*requests: Request, next_token: Callable[[list[int]], int] | None = None) -> Guess:
    """Return a guess that knows the texts of these requests."""
    engine, _ = make_engine(decoder=FakeDecoder(next_token=next_token))
    texts: dict[tuple[Request, int], list[int]] = {}
    for each in requests:
        longer = dataclasses.replace(each, stop_ids=frozenset(), stop_strings=())
        for sequence in engine.add_choices(longer):
            engine.finish(sequence)
            texts[id(each), sequence.choice] = sequence.token_ids  # type: ignore[index]
            engine.abort(sequence)

    def guess(sequence: Sequence, tokens: list[int]) -> int:
        return texts[id(sequence.request), sequence.choice][len(tokens)]  # type: ignore[index]

    return guess


def wrong(guess: Guess) -> Guess:
    """Return a guess that is never right."""
    return lambda sequence, tokens: (guess(sequence, tokens) + 1) % 258


EVERYTHING = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "log-probabilities": {"top_logprobs": 4, "temperature": 0.7},
    "penalties": {"repetition_penalty": 3.0, "frequency_penalty": 2.0, "presence_penalty": 1.0},
    "few words": {
        "logit_bias": {97: 30.0, 98: 30.0, 99: 30.0},
        "repetition_penalty": 1.5,
        "frequency_penalty": 3.0,
    },
    "a text that may not end": {
        "logit_bias": {97: 50.0, END: 50.0, 98: 49.0},
        "stop_ids": frozenset({END}),
        "banned_ids": frozenset({END}),
        "min_tokens": 7,
        "frequency_penalty": 2.0,
    },
    "choices": {"choices": 3, "temperature": 1.0, "seed": 1, "top_logprobs": 0},
}


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING.keys())
@pytest.mark.parametrize("drafter", ["truth", "wrong", "ngrams", "model"])
def test_everything_about_a_text_is_as_without_guesses(
    options: dict[str, Any], drafter: str
) -> None:
    asked = [request("hello", 40, **options), request("ab" * 20, 33, **options)]
    plain, _ = make_engine(decoder=FakeDecoder(blocks=32))
    right = truth(*asked)
    drafters: dict[str, Drafter] = {
        "truth": Guesses(right),
        "wrong": Guesses(wrong(right)),
        "ngrams": EagerNgrams(),
        "model": DraftModel(FakeDecoder(blocks=32), 64, lambda: 0.0),
    }
    engine, decoder = make_engine(drafters[drafter], decoder=FakeDecoder(blocks=32))
    assert complete(engine, *asked) == complete(plain, *asked)
    stats = engine.stats()
    assert stats.decoded_tokens + stats.accepted_tokens == plain.stats().decoded_tokens
    if drafter in ("truth", "model"):
        assert stats.accepted_tokens > stats.steps
        assert len(decoder.steps) <= plain.stats().steps / 2
    if drafter == "wrong":
        assert stats.drafted_tokens > 50
        assert stats.accepted_tokens == 0
        assert stats.steps == plain.stats().steps


def test_right_guesses_past_the_end_do_not_count() -> None:
    """Neither behind a stop id, nor in a stop string, nor beyond max_tokens."""
    text = b"one. two three four five."

    def writes(tokens: list[int]) -> int:
        return [*text, END][(len(tokens) - 5) % (len(text) + 1)]

    asked = [
        request(stop_ids=frozenset({END}), max_tokens=60),
        request(stop_strings=("wo t",), max_tokens=60),
        request(stop_strings=("wo t",), max_tokens=60, min_tokens=18),
        *(request(max_tokens=most) for most in range(1, 10)),
    ]
    guess = truth(*asked, next_token=writes)
    for each in asked:
        plain, _ = make_engine(decoder=FakeDecoder(next_token=writes))
        engine, decoder = make_engine(
            Guesses(guess), most=64, decoder=FakeDecoder(next_token=writes)
        )
        assert complete(engine, each) == complete(plain, each)
        assert max(batch.positions.max() for batch in decoder.steps) <= 5 + each.max_tokens - 2


def test_usage_tells_what_guessing_brought() -> None:
    asked = request(max_tokens=15)
    engine, _ = make_engine(Guesses(truth(asked)), most=4)
    sequence = engine.add(asked)
    engine.finish(sequence)
    usage = sequence.completion().usage
    # One token from the prompt, one from the step whose time is taken first, then five a step.
    assert usage.completion_tokens == 15
    assert (usage.drafted_tokens, usage.accepted_tokens) == (10, 10)
    assert engine.stats().acceptance_rate == 1.0
    assert engine.stats().steps == 5
    engine.abort(sequence)


def test_blocks_of_wrong_guesses_are_given_back_and_never_kept() -> None:
    asked = request("x" * 30, max_tokens=60)
    guess = wrong(truth(asked))
    engine, decoder = make_engine(Guesses(guess), most=40)
    sequence = engine.add(asked)
    while not sequence.finished:
        engine.advance()
        assert len(sequence.block_ids) <= -(-len(sequence.token_ids) // KV_BLOCK_SIZE)
    engine.abort(sequence)
    kept = engine._pool._by_key.values()
    text = sequence.token_ids
    assert [decoder._cache[block].tolist() for block in sorted(kept)] == [text[:32], text[32:64]]


def test_guesses_take_no_blocks_from_anybody() -> None:
    """Two sequences want a second block, and there is one: whoever has to wait, has to anyway."""
    asked = [request("x" * 20, max_tokens=40), request("y" * 20, max_tokens=40)]
    engine, _ = make_engine(Guesses(truth(*asked)), most=40, decoder=FakeDecoder(blocks=3))
    plain, _ = make_engine(decoder=FakeDecoder(blocks=3))
    assert complete(engine, *asked) == complete(plain, *asked)
    assert engine.stats().preemptions == plain.stats().preemptions == 0
    assert engine.stats().accepted_tokens > 20


def test_a_step_has_no_more_rows_than_it_may_have() -> None:
    asked = [request(prompt, max_tokens=30) for prompt in ("abc", "defg", "hij")]
    decoder = FakeDecoder(max_batch_tokens=8)  # which refuses more
    engine, _ = make_engine(Guesses(truth(*asked)), most=40, decoder=decoder)
    plain, _ = make_engine()
    assert complete(engine, *asked) == complete(plain, *asked)
    assert max(len(batch.token_ids) for batch in decoder.steps) == 8


def test_a_guess_that_cannot_be_computed_ends_nothing() -> None:
    """A model may overflow at tokens that it would never write."""

    class Fragile(FakeDecoder):
        refusals = 0

        def forward(self, batch: Batch) -> StepOutput:
            if 255 in batch.token_ids:
                self.refusals += 1
                raise QuantizationError("not finite")
            return super().forward(batch)

    asked = request("x" * 30, max_tokens=20)
    decoder = Fragile()
    engine, _ = make_engine(Guesses(lambda sequence, tokens: 255), decoder=decoder)
    plain, _ = make_engine()
    assert complete(engine, asked) == complete(plain, asked)
    assert decoder.refusals > 10
    assert engine.stats().drafted_tokens == 0


def test_a_token_that_cannot_be_drawn_after_a_wrong_guess_is_nobodys() -> None:
    class Silent(FakeDecoder):
        def forward(self, batch: Batch) -> StepOutput:
            output = super().forward(batch)
            if len(batch.output_rows) > 1:
                output.sampled[1:] = -1
            return output

    asked = request(max_tokens=20)
    engine, _ = make_engine(Guesses(wrong(truth(asked))), decoder=Silent())
    plain, _ = make_engine()
    assert complete(engine, asked) == complete(plain, asked)
    engine, _ = make_engine(Guesses(truth(asked)), decoder=Silent())
    sequence = engine.add(asked)
    with pytest.raises(Exception, match="computes no number"):
        engine.finish(sequence)
    engine.abort(sequence)
    assert engine.free_blocks == 8


def test_those_who_may_not_be_guessed_for_are_not() -> None:
    """A form needs the token before its mask."""
    guesses = Guesses(lambda sequence, tokens: 97)
    engine, _ = make_engine(guesses)
    sequence = engine.add(request(max_tokens=6))
    sequence.form = _AnyForm()  # type: ignore[assignment]
    engine.finish(sequence)
    engine.abort(sequence)
    assert engine.stats().drafted_tokens == 0
    assert guesses.forgotten == [sequence]
    engine.close()
    assert guesses.closed


class _AnyForm:
    error = None
    complete = False
    may_end = False

    def __init__(self) -> None:
        import numpy as np

        self.mask = np.full(-(-258 // 32), 0xFFFFFFFF, np.uint32)

    def accept(self, token: int) -> None:
        pass


def test_an_interrupted_step_starts_drafters_anew() -> None:
    asked = request(max_tokens=30)
    guesses = Guesses(truth(asked))
    engine, decoder = make_engine(guesses)

    def interrupt() -> None:
        if len(decoder.steps) == 4:
            raise KeyboardInterrupt

    decoder.on_step = interrupt
    sequence = engine.add(asked)
    with pytest.raises(KeyboardInterrupt):
        engine.finish(sequence)
    assert guesses.restarts == 1
    engine.finish(sequence)
    assert sequence.token_ids == _plain_ids(asked)


def _plain_ids(asked: Request) -> list[int]:
    engine, _ = make_engine()
    sequence = engine.add(asked)
    engine.finish(sequence)
    return sequence.token_ids


def test_ngrams_that_an_interrupt_cut_short_foretell_what_there_is() -> None:
    """Before any line; a place at the very end of the text would be repeated for ever."""
    for line in itertools.count(1):
        tokens = [1, 2, 3, 4, 5, 1, 2, 3]
        index = NgramIndex(tokens, 0, 100, first_rates())
        index.read()
        tokens.append(4)
        if not interrupted(index.read, line, 9, {ngrams.__file__}):
            break
        index.read()
        assert 0 <= index._source < len(tokens), line
        assert len(index.foretell(6)) in (0, 6)
        tokens += [5, 6, 7]
        index.read()
        assert 0 <= index._source < len(tokens), line
    assert line > 10


# --- where it pays ------------------------------------------------------------------------------


def looping(tokens: list[int]) -> int:
    return len(tokens) % 9


def drafted(
    seconds: Callable[[int], float],
    *,
    next_token: Callable[[list[int]], int] | None = looping,
    sequences: int = 1,
    max_tokens: int = 150,
) -> tuple[float, float, float]:
    """Return guesses and right guesses for each drawn token, and the seconds of all steps."""
    decoder = FakeDecoder(blocks=64, next_token=next_token)
    watch = Watch(decoder, seconds)
    engine, _ = make_engine(NgramDrafter(), most=16, decoder=decoder, clock=watch)
    complete(engine, *(request("a" * (n + 5), max_tokens) for n in range(sequences)))
    stats = engine.stats()
    tokens = sequences * max_tokens
    return stats.drafted_tokens / tokens, stats.accepted_tokens / tokens, watch.now


def test_a_text_that_repeats_itself_is_guessed_where_rows_are_cheap() -> None:
    _, right, took = drafted(lambda rows: 1 + 0.1 * (rows - 1))
    assert right > 0.7
    assert took < 60  # instead of 150


def test_nothing_is_guessed_where_rows_cost_as_much_as_steps() -> None:
    guesses, _, took = drafted(lambda rows: rows)
    assert guesses < 0.2  # what rows cost had to be found out
    assert took < 1.1 * (150 + 5)


def test_a_text_that_does_not_repeat_itself_is_hardly_guessed() -> None:
    guesses, _, took = drafted(lambda rows: 1 + 0.4 * (rows - 1), next_token=None)
    assert guesses < 0.1
    assert took < 1.1 * (150 + 5 * 0.4)


def test_many_at_once_leave_no_rows() -> None:
    guesses, *_ = drafted(lambda rows: 1.0, sequences=17, max_tokens=60)
    assert guesses == 0
    guesses, *_ = drafted(lambda rows: 1.0, sequences=16, max_tokens=60)
    assert guesses > 0


def test_what_does_not_repeat_waits_no_longer_for_what_does() -> None:
    """One of two sequences loops; the other may not take half as long again for it."""

    def next_token(tokens: list[int]) -> int:
        return len(tokens) % 5 if tokens[0] == ord("a") else hash(tuple(tokens)) % 251

    decoder = FakeDecoder(blocks=64, next_token=next_token)
    watch = Watch(decoder, lambda rows: 1 + 0.2 * (rows - 1))
    engine, _ = make_engine(NgramDrafter(), most=16, decoder=decoder, clock=watch)
    loops, wanders = engine.add(request("a", 1800)), engine.add(request("b", 100))
    engine.finish(wanders)
    assert loops.accepted_tokens > 20
    assert watch.now < 100 * 1.2 * 1.3
    for each in (loops, wanders):
        engine.abort(each)


def test_it_begins_again_when_a_text_begins_to_repeat_itself() -> None:
    def next_token(tokens: list[int]) -> int:
        return hash(tuple(tokens)) % 251 if len(tokens) < 100 else len(tokens) % 7

    decoder = FakeDecoder(blocks=64, next_token=next_token)
    watch = Watch(decoder, lambda rows: 1 + 0.3 * (rows - 1))
    engine, _ = make_engine(NgramDrafter(), most=16, decoder=decoder, clock=watch)
    sequence = engine.add(request("b", 200))
    while len(sequence.token_ids) < 100:
        engine.advance()
    before = sequence.drafted_tokens
    assert before < 10
    engine.finish(sequence)
    assert sequence.accepted_tokens - before > 50
    engine.abort(sequence)


@pytest.mark.parametrize(("seconds", "guesses"), [(1e-4, False), (1e-3, True)])
def test_nothing_is_guessed_where_a_step_takes_less_than_looking(
    seconds: float, guesses: bool
) -> None:
    wanted = request("ababababab")
    decoder = FakeDecoder()
    speculation = Speculation([Guesses(truth(wanted))], 6, decoder.max_batch_tokens)
    engine = Engine(
        decoder,
        Bytes,
        max_batch_tokens=decoder.max_batch_tokens,
        speculation=speculation,
        clock=Watch(decoder, lambda rows: seconds),
    )
    complete(engine, wanted)
    assert (engine.stats().drafted_tokens > 0) == guesses


def test_costs_between_and_beyond_what_is_known() -> None:
    costs = StepCosts()
    assert not costs.knows(1)
    costs.add(1, 10.0)
    assert costs.knows(1)
    assert costs.curve(1, 3) == pytest.approx([10, 14, 18])
    costs.add(5, 30.0)
    assert costs.curve(1, 6) == pytest.approx([10, 15, 20, 25, 30, 35])
    costs.add(5, 3000.0)  # an accident counts twice at most
    assert costs.curve(5, 5) == pytest.approx([37.5])
    for _ in range(StepCosts.STALE):
        costs.add(1, 10.0)
    assert costs.curve(1, 2) == pytest.approx([10, 14])
    assert not costs.knows(5)


# --- n-grams ------------------------------------------------------------------------------------


def index_of(text: str, drawn: int = 0) -> NgramIndex:
    index = NgramIndex(list(text.encode()), drawn, 1000, first_rates())
    index.read()
    return index


def foretold(text: str, count: int = 4) -> str:
    return bytes(index_of(text).foretell(count)).decode()


def test_what_followed_the_last_tokens_follows_again() -> None:
    assert foretold("the cat sat. the c") == "at s"
    assert foretold("abcdefgh") == ""
    assert foretold("") == ""
    assert foretold("ab1 ab2 ab") == "2 ab"  # the last place of two that are alike
    assert foretold("xyab1 .. zab2 .. xyab") == "1 .."  # the longer agreement of two places


def test_a_loop_goes_on() -> None:
    assert foretold("abcabc", 8) == "abcabcab"
    assert foretold("zzz", 5) == "zzzzz"


def test_an_index_reads_on_as_the_text_grows() -> None:
    text = "it was the best of times, it was the worst of times, it was the age"
    tokens: list[int] = []
    index = NgramIndex(tokens, 0, 1000, first_rates())
    for end in range(1, len(text) + 1):
        tokens.append(ord(text[end - 1]))
        index.read()
    assert index.foretell(6) == index_of(text).foretell(6)


def test_rates_are_learnt_from_drawn_tokens_alone() -> None:
    text = "abcdefgh" * 8
    assert index_of(text, drawn=len(text)).chances(3, 0.0) == pytest.approx(
        [0.85, 0.85**2, 0.85**3]
    )
    learnt = index_of(text, drawn=0).chances(1, 0.0)
    assert learnt[0] > 0.95
    assert index_of("abcdefgh").chances(3, 0.0) == []
    assert len(index_of("abxxab").chances(9, 0.05)) < 9


def test_an_index_tells_what_it_foretold() -> None:
    tokens = list(b"abcde abcd")
    index = NgramIndex(tokens, len(tokens), 100, first_rates())
    assert index.read() == []
    tokens += b"ex"
    assert index.read() == [(2, True), (2, False)]


def test_an_index_is_bounded() -> None:
    index = NgramIndex([], 0, 10**9, first_rates())
    assert len(index._long) == len(index._short) == 1 << 16
    tokens = [n * n * 7919 % 50021 for n in range(100_000)]
    index = NgramIndex(tokens, 0, 64, first_rates())  # so many share a slot
    index.read()
    period = 7
    tokens += [n % period for n in range(2 * LONGEST_MATCH)]
    index.read()
    assert index.foretell(3) == tuple((2 * LONGEST_MATCH + n) % period for n in range(3))


# --- a second model -----------------------------------------------------------------------------


def test_a_second_model_goes_on_from_right_guesses() -> None:
    asked = request("x" * 50, max_tokens=60)
    second = FakeDecoder(max_batch_tokens=16)
    engine, _ = make_engine(DraftModel(second, 16, lambda: 0.0), most=5)
    assert complete(engine, asked) == complete(make_engine()[0], asked)
    rows = [len(batch.token_ids) for batch in second.steps]
    assert rows[:4] == [16, 16, 16, 4]  # the prompt and two tokens
    assert max(rows[4:]) == 2
    assert engine.stats().acceptance_rate == 1.0


def test_a_second_model_in_little_room_gives_up_the_longest_unused() -> None:
    asked = [request(prompt * 20, max_tokens=40) for prompt in "abcd"]
    second = FakeDecoder(blocks=4)
    engine, _ = make_engine(
        DraftModel(second, 64, lambda: 0.0), most=5, decoder=FakeDecoder(blocks=16)
    )
    assert complete(engine, *asked) == complete(
        make_engine(decoder=FakeDecoder(blocks=16))[0], *asked
    )
    assert engine.stats().accepted_tokens > 0


def test_a_second_model_of_a_shorter_context_stops_there() -> None:
    asked = request("x" * 50, max_tokens=60)
    second = FakeDecoder(blocks=2)
    engine, _ = make_engine(DraftModel(second, 64, lambda: 0.0), most=5)
    assert complete(engine, asked) == complete(make_engine()[0], asked)
    assert engine.stats().drafted_tokens > 0
    assert max(batch.positions.max() for batch in second.steps) <= 63


def test_a_broken_second_model_is_left_alone() -> None:
    class Broken(FakeDecoder):
        def forward(self, batch: Batch) -> StepOutput:
            self.steps.append(batch)
            raise QuantizationError("not finite")

    asked = request(max_tokens=20)
    second = Broken()
    engine, _ = make_engine(DraftModel(second, 64, lambda: 0.0))
    assert complete(engine, asked) == complete(make_engine()[0], asked)
    assert len(second.steps) == 1
    engine.close()
    assert second.closed


def test_a_second_model_that_is_wrong_is_asked_less_and_less() -> None:
    asked = request(max_tokens=150)
    second = FakeDecoder(next_token=lambda tokens: 0)
    decoder = FakeDecoder(blocks=16)
    watch = Watch(decoder, lambda rows: 1 + 0.3 * (rows - 1))
    engine, _ = make_engine(DraftModel(second, 64, watch), decoder=decoder, clock=watch)
    complete(engine, asked)
    assert 0 < engine.stats().drafted_tokens < 30
    assert watch.now < 150 * 1.1
