"""AsyncLLM: many readers on one event loop, and a thread that makes the steps."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitllm
from bitllm import (
    LLM,
    AsyncLLM,
    CheckpointError,
    Chunk,
    ConfigError,
    ContextOverflowError,
    QuantizationError,
)
from bitllm.backends.base import Batch, StepOutput
from bitllm.engine.async_llm import _Bells
from bitllm.engine.request import ModelDefaults
from byte_tokenizer import END, byte_tokenizer
from cli_model import write_model
from fake_decoder import FakeDecoder

BLOCKS = 16
LETTERS = 97


def make_llm(*, seconds: float = 0.0, blocks: int = BLOCKS, endless: bool = False) -> LLM:
    """A model whose every step takes some time."""
    llm = LLM(
        FakeDecoder(blocks=blocks, next_token=(lambda tokens: LETTERS) if endless else None),
        byte_tokenizer(),
        name="fake",
        context=256,
        max_batch_tokens=64,
        defaults=ModelDefaults(stop_ids=frozenset({END})),
    )
    decoder_of(llm).on_step = lambda: time.sleep(seconds)
    return llm


def decoder_of(llm: LLM) -> FakeDecoder:
    decoder = llm.engine._decoder
    assert isinstance(decoder, FakeDecoder)
    return decoder


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.002)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test on a loop of its own; one that hangs fails."""

    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(limited())


PROMPTS = ["one", "two words", "three", "x" * 70]


def test_the_same_words_give_the_same_results() -> None:
    sync = make_llm()
    asked: Any = {"temperature": 0.9, "seed": 3, "max_tokens": 12, "logprobs": 1}

    async def test() -> None:
        async with AsyncLLM(make_llm()) as llm:
            assert without_times(await llm.generate(PROMPTS, **asked)) == without_times(
                sync.generate(PROMPTS, **asked)
            )
            assert without_times([await llm.generate("a", **asked)]) == without_times(
                [sync.generate("a", **asked)]
            )
            chunks = [chunk async for chunk in llm.stream("two words", **asked)]
            expected = list(sync.stream("two words", **asked))
            assert [(each.text, each.token_ids, each.logprobs) for each in chunks] == [
                (each.text, each.token_ids, each.logprobs) for each in expected
            ]
            assert chunks[-1].finish_reason == expected[-1].finish_reason
            answer = await llm.chat("hi", **asked)
            assert answer.token_ids == sync.chat("hi", **asked).token_ids
            spoken = [chunk async for chunk in llm.chat("hi", stream=True, **asked)]
            assert "".join(map(str, spoken)) == answer.text
            assert await llm.score("ab", ["c", "de"], top=2) == sync.score("ab", ["c", "de"], top=2)
            assert await llm.perplexity("some text") == sync.perplexity("some text")
            np.testing.assert_array_equal(await llm.forward("ab"), sync.forward("ab"))
            np.testing.assert_array_equal(
                await llm.embed(["a", "bc"], pooling="mean"),
                sync.embed(["a", "bc"], pooling="mean"),
            )
            assert llm.llm.free_blocks == BLOCKS

    run(test)


def without_times(completions: list[Any]) -> list[Any]:
    return [(each.text, each.token_ids, each.finish_reason, each.logprobs) for each in completions]


def test_a_stream_can_be_started_before_it_is_read() -> None:
    async def test() -> None:
        async with AsyncLLM(make_llm()) as llm:
            with pytest.raises(ContextOverflowError):
                await llm.stream("a", max_tokens=9999).start()
            stream = llm.stream("two words", max_tokens=5)
            await stream.start()
            await until(lambda: llm.llm.stats().decoded_tokens == 4)  # without a reader
            await stream.start()  # once is enough
            chunks = [chunk async for chunk in stream]
            assert sum(len(chunk.token_ids) for chunk in chunks) == 5
            left = llm.stream("a")
            await left.aclose()
            await left.start()
            assert [chunk async for chunk in left] == []
            assert llm.llm.free_blocks == BLOCKS

    run(test)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_real_model_writes_the_same(tmp_path: Path, device: str) -> None:
    model = str(write_model(tmp_path / "tiny"))
    asked: Any = {"temperature": 0.8, "seed": 5, "max_tokens": 10}
    with bitllm.load(model, device=device, context=128) as sync:
        expected = sync.generate(PROMPTS[:3], **asked)

    async def test() -> None:
        async with await AsyncLLM.load(model, device=device, context=128) as llm:
            assert "AsyncLLM 'tiny'" in repr(llm)
            results = await asyncio.gather(*(llm.generate(each, **asked) for each in PROMPTS[:3]))
            assert without_times(list(results)) == without_times(expected)

    run(test)


def test_choices_and_timeouts_are_as_in_llm() -> None:
    asked: Any = {"temperature": 1.0, "seed": 4, "max_tokens": 10, "ignore_eos": True}
    sync = make_llm()
    expected = sync.generate("hello", n=3, best_of=5, **asked)

    async def test() -> None:
        async with AsyncLLM(make_llm(), max_unread=2) as llm:
            result = await llm.generate("hello", n=3, best_of=5, **asked)
            assert without_times(list(result.choices)) == without_times(list(expected.choices))
            texts = ["", "", ""]
            async for chunk in llm.stream("hello", n=3, **asked):
                texts[chunk.index] += chunk.text
                await asyncio.sleep(0.001)
            assert texts == [each.text for each in sync.generate("hello", n=3, **asked).choices]
            with pytest.raises(ConfigError, match="cannot be streamed"):
                llm.stream("hello", n=1, best_of=2)
            await until(lambda: llm.llm.free_blocks == BLOCKS)
        async with AsyncLLM(make_llm(seconds=0.02, endless=True)) as llm:
            late = await llm.generate("hello", max_tokens=200, timeout=0.2)
            assert late.finish_reason == "timeout"
            assert 0 < len(late.token_ids) < 200

    run(test)


def test_many_streams_share_the_steps() -> None:
    sync = make_llm()
    expected = [sync.generate(f"prompt {n}", max_tokens=20).text for n in range(10)]

    async def read(llm: AsyncLLM, n: int) -> str:
        return "".join([c.text async for c in llm.stream(f"prompt {n}", max_tokens=20)])

    async def test() -> None:
        async with AsyncLLM(make_llm(seconds=0.002)) as llm:
            assert await asyncio.gather(*(read(llm, n) for n in range(10))) == expected
            widest = max(len(batch.plan) for batch in decoder_of(llm.llm).steps)
            assert widest >= 5
            assert llm.llm.free_blocks == BLOCKS

    run(test)


def test_the_event_loop_keeps_its_pace_while_the_model_writes() -> None:
    gaps: list[float] = []

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    async def test() -> None:
        async with AsyncLLM(make_llm(seconds=0.25, endless=True)) as llm:
            ticking = asyncio.create_task(tick())
            streams = [llm.stream("hello", max_tokens=5) for _ in range(3)]
            for stream in streams:
                async for _ in stream:
                    pass
            # Also joining, leaving and asking are done while a step is under way.
            async for _ in llm.stream("again", max_tokens=20):
                break
            ticking.cancel()

    run(test)
    assert len(gaps) > 50
    # A step takes 250 ms: a loop that waited for one would show it in its median of a busy machine
    # no more than in its highest gaps, so both are looked at.
    assert sorted(gaps)[int(len(gaps) * 0.95)] < 0.1


@pytest.mark.parametrize("way", ["break", "cancel", "timeout", "aclose", "forget", "with"])
def test_leaving_frees_the_blocks(way: str) -> None:
    async def endless(llm: AsyncLLM, started: asyncio.Event) -> None:
        async for _ in llm.stream("hello" * 20, max_tokens=100):
            started.set()

    async def test() -> None:
        async with AsyncLLM(make_llm(seconds=0.005, endless=True)) as llm:
            started = asyncio.Event()
            if way == "break":
                async for _ in llm.stream("hello" * 20, max_tokens=100):
                    assert llm.llm.free_blocks < BLOCKS
                    break
            elif way == "cancel":
                task = asyncio.create_task(endless(llm, started))
                await started.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif way == "timeout":
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await endless(llm, started)
                assert started.is_set()
            elif way == "with":
                async with llm.stream("hello" * 20, max_tokens=100) as stream:
                    await anext(stream)
            else:
                stream = llm.stream("hello" * 20, max_tokens=100)
                await anext(stream)
                if way == "aclose":
                    await stream.aclose()
                    with pytest.raises(StopAsyncIteration):
                        await anext(stream)
                del stream
                gc.collect()
            await until(lambda: llm.llm.free_blocks == BLOCKS)
            steps = len(decoder_of(llm.llm).steps)
            await asyncio.sleep(0.05)
            assert len(decoder_of(llm.llm).steps) == steps < 100

    run(test)


def test_a_cancelled_generate_or_score_frees_its_blocks() -> None:
    async def test() -> None:
        async with AsyncLLM(make_llm(seconds=0.005, endless=True)) as llm:
            for work in (
                llm.generate(["hello" * 9] * 4, max_tokens=200),
                llm.score("hello", [[97] * 100] * 300),
                llm.perplexity([97] * 5000, context=64, stride=1),
            ):
                task = asyncio.create_task(work)  # type: ignore[arg-type]
                await until(lambda: llm.llm.free_blocks < BLOCKS)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await until(lambda: llm.llm.free_blocks == BLOCKS)
            assert len((await llm.generate("still there", max_tokens=2)).token_ids) == 2

    run(test)


def test_long_reads_leave_the_threads_of_others_alone() -> None:
    async def test() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        async with AsyncLLM(make_llm(seconds=0.002)) as llm:
            reading = asyncio.create_task(llm.perplexity([97] * 5000, context=64, stride=1))
            await until(lambda: llm.llm.free_blocks < BLOCKS)
            await llm.generate("hello", max_tokens=2)
            assert not reading.done()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    run(test)


def test_a_stream_that_fails_gives_the_chunks_before_and_the_error() -> None:
    def failing(llm: LLM) -> LLM:
        decoder = decoder_of(llm)
        forward = decoder.forward

        def draw_nothing_at_last(batch: Batch) -> StepOutput:
            output = forward(batch)
            if len(decoder.steps) == 5:
                output = replace(output, sampled=np.full_like(output.sampled, -1))
            return output

        decoder.forward = draw_nothing_at_last  # type: ignore[method-assign]
        return llm

    def seen(chunk: Chunk) -> tuple[str, tuple[int, ...], object]:
        return chunk.text, chunk.token_ids, chunk.usage

    expected: list[object] = []
    with pytest.raises(CheckpointError, match="no number"):
        expected.extend(map(seen, failing(make_llm(endless=True)).stream("hello")))
    assert expected == [("a", (LETTERS,), None)] * 4

    async def test() -> None:
        async with AsyncLLM(failing(make_llm(endless=True))) as llm:
            stream = llm.stream("hello")
            assert [seen(await anext(stream)) for _ in expected] == expected
            with pytest.raises(CheckpointError, match="no number"):
                await anext(stream)

    run(test)


@pytest.mark.parametrize("wrong", [0, -1, "8", 2.5, True, None])
def test_max_unread_is_checked_before_a_model_is_loaded(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="max_unread must be"):
        AsyncLLM(make_llm(), max_unread=wrong)
    with pytest.raises(ConfigError, match="max_unread must be"):
        asyncio.run(AsyncLLM.load("/no/such/model", max_unread=wrong))


def test_a_stream_that_is_not_read_makes_no_request() -> None:
    async def test() -> None:
        async with AsyncLLM(make_llm()) as llm:
            llm.stream("hello")
            await asyncio.sleep(0.02)
            assert decoder_of(llm.llm).steps == []

    run(test)


def test_a_slow_reader_is_waited_for_by_nobody_and_loses_nothing() -> None:
    expected = make_llm(endless=True).generate("slow", max_tokens=200).text

    async def test() -> None:
        async with AsyncLLM(make_llm(endless=True), max_unread=8) as llm:
            slow = llm.stream("slow", max_tokens=200)
            text = (await anext(slow)).text
            await until(lambda: slow._feed is not None and slow._feed.paused)
            assert slow._feed is not None
            assert len(slow._feed.chunks) == 8
            assert llm.llm.free_blocks == BLOCKS  # it holds nothing while it waits
            steps = len(decoder_of(llm.llm).steps)
            await asyncio.sleep(0.02)
            assert len(decoder_of(llm.llm).steps) == steps
            quick = await llm.generate("quick", max_tokens=50)
            assert len(quick.token_ids) == 50
            async for chunk in slow:
                text += chunk.text
                assert slow._feed is not None
                assert len(slow._feed.chunks) <= 8
            assert text == expected

    run(test)


def test_readers_of_every_pace() -> None:
    choice = random.Random(11)
    paces = [choice.choice([0.0, 0.0, 0.001, 0.004]) for _ in range(12)]
    sync = make_llm(blocks=4)
    expected = [sync.generate(f"reader {n}", max_tokens=30).text for n in range(12)]

    async def read(llm: AsyncLLM, n: int) -> str:
        text = ""
        async for chunk in llm.stream(f"reader {n}", max_tokens=30):
            text += chunk.text
            await asyncio.sleep(paces[n])
        return text

    async def test() -> None:
        async with AsyncLLM(make_llm(blocks=4), max_unread=3) as llm:
            assert await asyncio.gather(*(read(llm, n) for n in range(12))) == expected
            assert llm.llm.free_blocks == 4

    run(test)


def test_errors_reach_those_who_wait() -> None:
    async def test() -> None:
        async with AsyncLLM(make_llm(seconds=0.002)) as llm:
            with pytest.raises(ConfigError, match="no sampling option"):
                llm.stream("hello", temprature=1)  # type: ignore[call-arg]
            with pytest.raises(ConfigError, match="stream takes one prompt"):
                llm.stream(["a", "b"])
            with pytest.raises(ContextOverflowError):
                await anext(llm.stream("x" * 300))
            with pytest.raises(ContextOverflowError):
                await llm.generate(["fits", "x" * 300], max_tokens=1)
            with pytest.raises(ConfigError, match="not made for embeddings"):
                await llm.embed("a")
            decoder = decoder_of(llm.llm)

            def fail() -> None:
                if len(decoder.steps) == 4:
                    raise QuantizationError("the weights are damaged")

            decoder.on_step = fail
            results = await asyncio.gather(
                llm.generate("one", max_tokens=50, ignore_eos=True),
                llm.generate("two", max_tokens=50, ignore_eos=True),
                return_exceptions=True,
            )
            assert [type(each) for each in results] == [QuantizationError] * 2
            assert llm.llm.free_blocks == BLOCKS
            assert (await llm.generate("three", max_tokens=3)).usage.completion_tokens == 3

    run(test)


def test_a_cache_that_is_too_small_is_told() -> None:
    async def test() -> None:
        async with AsyncLLM(make_llm(blocks=2)) as llm:
            with pytest.raises(ContextOverflowError, match="KV cache"):
                await llm.generate("hello", max_tokens=100)
            with pytest.raises(ContextOverflowError, match="KV cache"):
                await anext(llm.stream("hello", max_tokens=100))

    run(test)


@pytest.mark.parametrize("drain", [True, False])
def test_closing_completes_what_is_under_way_or_drops_it(drain: bool) -> None:
    async def test() -> None:
        inner = make_llm(seconds=0.005, endless=True)
        llm = AsyncLLM(inner, max_unread=4)
        unread = llm.stream("never read again", max_tokens=20)
        await anext(unread)
        waiting = asyncio.create_task(llm.generate("hello", max_tokens=20))
        await until(lambda: len(llm._thread._feeds) == 2)
        await llm.aclose(drain=drain)
        assert decoder_of(inner).closed
        if drain:
            assert len((await waiting).token_ids) == 20
            assert len([chunk async for chunk in unread]) == 19
        else:
            with pytest.raises(ConfigError, match="this model is closed"):
                await waiting
        with pytest.raises(ConfigError, match="this model is closed"):
            await llm.generate("more")
        await llm.aclose()

    run(test)


def test_draining_has_a_time_limit() -> None:
    async def test() -> None:
        inner = make_llm(seconds=0.05, endless=True)
        llm = AsyncLLM(inner)
        waiting = asyncio.create_task(llm.generate("hello", max_tokens=200))
        await until(lambda: inner.free_blocks < BLOCKS)
        begin = time.monotonic()
        await llm.aclose(drain=True, timeout=0.1)
        assert time.monotonic() - begin < 5
        with pytest.raises(ConfigError, match="this model is closed"):
            await waiting

    run(test)


def test_requests_at_the_moment_of_closing_are_answered() -> None:
    """Nobody waits for ever, however the request and the end of the thread fall together."""

    async def test() -> None:
        for pause in np.linspace(0, 0.004, 40):
            llm = AsyncLLM(make_llm(seconds=0.001))
            asked = [asyncio.create_task(llm.generate("a", max_tokens=3)) for _ in range(3)]
            await asyncio.sleep(float(pause))
            asked += [asyncio.create_task(llm.generate("b", max_tokens=3)) for _ in range(3)]
            closing = asyncio.create_task(llm.aclose())
            answers = await asyncio.gather(*asked, return_exceptions=True)
            await closing
            for answer in answers:
                assert isinstance(answer, ConfigError) or len(answer.token_ids) == 3  # type: ignore[union-attr]

    run(test)


def test_an_idle_engine_thread_sleeps_and_a_forgotten_one_ends() -> None:
    llm = AsyncLLM(make_llm())
    thread = llm._thread._thread
    time.sleep(0.05)
    begin = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - begin < 0.1
    del llm
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_random_cancellations_leave_nothing_behind() -> None:
    choice = random.Random(3)

    async def one(llm: AsyncLLM, n: int) -> None:
        stop_after = choice.choice([None, 1, 3, 8])
        seconds = choice.choice([None, 0.001, 0.01])
        try:
            async with asyncio.timeout(seconds):
                count = 0
                async for _ in llm.stream(f"request {n}" * choice.randint(1, 8), max_tokens=12):
                    count += 1
                    if count == stop_after:
                        break
        except TimeoutError:
            pass

    async def test() -> None:
        async with AsyncLLM(make_llm(), max_unread=4) as llm:
            for _ in range(10):
                await asyncio.gather(*(one(llm, n) for n in range(30)))
            await until(lambda: llm.llm.free_blocks == BLOCKS)
            assert llm._thread._feeds == {}
            assert len(llm.llm.engine._scheduler) == 0

    run(test)


def test_a_loop_that_ends_early_does_no_harm() -> None:
    inner = make_llm(seconds=0.005, endless=True)
    llm = AsyncLLM(inner)

    async def leave_open() -> Any:
        stream = llm.stream("hello", max_tokens=200)
        await anext(stream)
        return stream

    stream = asyncio.run(leave_open())
    deadline = time.monotonic() + 5
    while inner.free_blocks != BLOCKS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert inner.free_blocks == BLOCKS

    async def test() -> None:
        assert len((await llm.generate("again", max_tokens=3)).token_ids) == 3
        await llm.aclose()

    run(test)
    del stream


def test_the_interpreter_ends_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    program = f"""
import asyncio, bitllm
async def main():
    global llm, stream
    llm = await bitllm.AsyncLLM.load({str(model)!r}, context=2048)
    stream = llm.stream("hello", max_tokens=1500)
    print(len((await anext(stream)).token_ids) > 0)
asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


def test_a_forked_child_is_told_that_the_thread_is_not_its_own(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    program = f"""
import asyncio, os, sys, bitllm
async def main():
    async with await bitllm.AsyncLLM.load({str(model)!r}, context=512) as llm:
        stream = llm.stream("hello", max_tokens=400)
        await anext(stream)
        child = os.fork()
        if child == 0:
            try:
                await llm.generate("more", max_tokens=2)
            except bitllm.ConfigError:
                os._exit(7)
            os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(len((await llm.generate("more", max_tokens=2)).token_ids))
asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "7\n2\n"), ended.stderr


def test_a_stream_has_one_reader_at_a_time() -> None:
    """A second one is refused, computes nothing, and does not disturb the first."""

    async def test() -> None:
        async with AsyncLLM(make_llm(seconds=0.01)) as llm:
            whole = await llm.generate("hello", max_tokens=9)
            stream = llm.stream("hello", max_tokens=9)
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            with pytest.raises(ConfigError, match="already being read"):
                await anext(stream)
            texts = [(await first).text] + [chunk.text async for chunk in stream]
            assert "".join(texts) == whole.text
            assert llm.llm.stats().prefilled_tokens == 2 * (1 + len("hello"))

    run(test)


def test_the_timeout_of_a_stream_counts_from_the_call() -> None:
    async def test() -> None:
        async with AsyncLLM(make_llm()) as llm:
            late = llm.stream("hello", max_tokens=9, timeout=0.05)
            await asyncio.sleep(0.06)
            assert [(chunk.text, chunk.finish_reason) async for chunk in late] == [("", "timeout")]

    run(test)


def test_readers_of_a_step_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ring() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        bell = _Bells().here()
        calls: list[object] = []
        wake = loop.call_soon_threadsafe

        def counted(act: Callable[[], None]) -> asyncio.Handle:
            calls.append(act)
            return wake(act)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        events = [asyncio.Event() for _ in range(8)]
        for event in events:
            bell.ring(event)
        at_once = len(calls)
        await asyncio.gather(*(event.wait() for event in events))
        again = asyncio.Event()
        bell.ring(again)
        await again.wait()
        return at_once, len(calls)

    assert asyncio.run(asyncio.wait_for(ring(), 30)) == (1, 2)
