"""Adapters of an LLM: names, requests that ask for them, the prefix cache, and what is unloaded."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import bitllm
from bitllm import (
    LLM,
    AsyncLLM,
    ConfigError,
    InsufficientMemoryError,
    ModelNotFoundError,
    SamplingParams,
    TensorShapeError,
)
from bitllm.adapter import Adapter
from bitllm.cli.app import app
from byte_tokenizer import byte_tokenizer
from cli_model import write_model
from fake_decoder import FakeDecoder
from peft_adapter import make_adapter
from synthetic import tiny_spec

PROMPT = "A text that is longer than one block of the cache, so that it can be found again there."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def llm(model: Path) -> Iterator[LLM]:
    with bitllm.load(model, threads=1, context=256, kv_tokens=2048) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("adapters")
    with bitllm.load(model) as loaded:
        return [
            make_adapter(loaded.spec, seed, rank=rank, alpha=40.0).write(directory / name)
            for seed, (name, rank) in enumerate((("law", 4), ("songs", 7)))
        ]


def logprobs(llm: LLM, adapter: str | None) -> list[float]:
    return [token.logprob for token in llm.score(PROMPT, " and more", adapter=adapter).tokens]


def test_the_directory_gives_the_name(llm, adapters):
    assert llm.adapters == {}
    assert llm.load_adapter(adapters[0]) == "law"
    assert llm.load_adapter(str(adapters[1]), name="my songs") == "my songs"
    assert list(llm.adapters) == ["law", "my songs"]
    loaded = llm.adapters["my songs"]
    assert (loaded.name, loaded.origin, loaded.rank) == ("my songs", str(adapters[1]), 7)
    assert loaded.nbytes > 0


def test_what_an_adapter_writes_does_not_depend_on_its_company(llm, adapters):
    first, second = (llm.load_adapter(path) for path in adapters)
    asked = [None, first, second, first, None]
    requests = [llm.prepare(PROMPT, SamplingParams(max_tokens=40, adapter=name)) for name in asked]
    together = [each.completion() for each in llm._run(requests)]
    for name, completion in zip(asked, together, strict=True):
        alone = llm.generate(PROMPT, max_tokens=40, adapter=name, logprobs=0)
        assert alone.token_ids == completion.token_ids
    assert len({each.token_ids for each in together}) == 3


def test_every_way_to_ask_takes_an_adapter(llm, adapters):
    name = llm.load_adapter(adapters[0])
    text = llm.generate(PROMPT, max_tokens=20, adapter=name).text
    assert text != llm.generate(PROMPT, max_tokens=20).text
    assert "".join(map(str, llm.stream(PROMPT, max_tokens=20, adapter=name))) == text
    assert llm.generate(PROMPT, params=SamplingParams(max_tokens=20, adapter=name)).text == text
    assert llm.chat("hi", max_tokens=9, adapter=name).text != llm.chat("hi", max_tokens=9).text
    assert logprobs(llm, name) != logprobs(llm, None)
    assert llm.perplexity(PROMPT, adapter=name) != llm.perplexity(PROMPT)
    assert (llm.forward(PROMPT, adapter=name) != llm.forward(PROMPT)).any()
    vectors = [llm.embed(PROMPT, pooling="last", adapter=each) for each in (name, None)]
    assert (vectors[0] != vectors[1]).any()


def test_choices_share_their_adapter(llm, adapters):
    name = llm.load_adapter(adapters[1])
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 4, "adapter": name}
    several = llm.generate(PROMPT, n=3, **options)
    assert several.choices[0].text == llm.generate(PROMPT, **options).text
    llm.unload_adapter(name)
    assert llm._engine._decoder._adapters == set()


def test_prefixes_are_shared_within_an_adapter_only(llm, model, adapters):
    def cached(name: str | None) -> int:
        return llm.generate(PROMPT, max_tokens=1, adapter=name).usage.cached_tokens

    names = [None, "law", "songs"]
    with bitllm.load(model, threads=1, context=256, prefix_cache=False) as other:
        for each in (llm, other):
            for path in adapters:
                each.load_adapter(path)
        fresh = {name: logprobs(other, name) for name in names}
    assert [cached(name) for name in names] == [0, 0, 0]
    assert [cached(name) for name in names] == [64, 64, 64]
    assert {name: logprobs(llm, name) for name in names} == fresh


def test_an_adapter_of_the_same_name_finds_nothing_of_the_old_one(llm, adapters):
    llm.load_adapter(adapters[0], name="mine")
    old = llm.generate(PROMPT, max_tokens=20, adapter="mine")
    for path in (adapters[1], adapters[0]):
        llm.unload_adapter("mine")
        llm.load_adapter(path, name="mine")
        assert llm.adapters["mine"].slot == 0
        last = llm.generate(PROMPT, max_tokens=20, adapter="mine")
        assert last.usage.cached_tokens == 0
        assert (last.token_ids == old.token_ids) == (path == adapters[0])


def test_unknown_names_tell_the_known_ones(llm, adapters):
    with pytest.raises(ConfigError, match="no adapter 'law'") as caught:
        llm.generate("x", adapter="law")
    assert "no adapter is loaded" in str(caught.value.hint)
    for path in adapters:
        llm.load_adapter(path)
    for call in (llm.unload_adapter, lambda name: llm.perplexity("xyz", adapter=name)):
        with pytest.raises(ConfigError, match="no adapter 'lw'") as caught:
            call("lw")
        assert "law, songs" in str(caught.value.hint)
    for odd in (7, "", ["law"], b"law"):
        with pytest.raises(ConfigError, match="adapter"):
            llm.generate("x", adapter=odd)
        with pytest.raises(ConfigError, match="adapter"):
            llm.score("x", "y", adapter=odd)


def test_a_name_is_given_once(llm, adapters):
    llm.load_adapter(adapters[0])
    with pytest.raises(ConfigError, match="'law' is loaded already"):
        llm.load_adapter(adapters[1], name="law")
    for name in ("", 3, "x" * 1001):
        with pytest.raises(ConfigError, match="name of an adapter"):
            llm.load_adapter(adapters[1], name=name)
    with pytest.raises(ModelNotFoundError):
        llm.load_adapter("nowhere")
    assert list(llm.adapters) == ["law"]


def test_an_adapter_of_another_model_leaves_nothing_behind(llm, tmp_path):
    path = make_adapter(tiny_spec(num_layers=1)).write(tmp_path)
    with pytest.raises(TensorShapeError, match="base_model_name_or_path"):
        llm.load_adapter(path)
    assert llm.adapters == {}
    assert llm._engine._decoder._adapters == set()


def test_adapters_count_against_the_memory_limit(llm, model, adapters):
    llm.load_adapter(adapters[0])
    needed = llm.adapters["law"].nbytes
    assert llm.plan is not None
    options = {"threads": 1, "context": 256, "kv_tokens": 2048}
    for spare, fits in ((-1, False), (0, True)):
        limit = llm.plan.total + needed + spare
        with bitllm.load(model, memory_limit=limit, **options) as other:
            expected = contextlib.nullcontext() if fits else pytest.raises(InsufficientMemoryError)
            with expected:
                other.load_adapter(adapters[0])
            with pytest.raises(InsufficientMemoryError, match="memory_limit leaves"):
                other.load_adapter(adapters[1])


def test_requests_under_way_keep_an_adapter_that_is_unloaded(llm, adapters):
    name = llm.load_adapter(adapters[0])
    whole = llm.generate(PROMPT, max_tokens=30, adapter=name).text
    chunks = llm.stream(PROMPT, max_tokens=30, adapter=name)
    begun = str(next(chunks))
    prepared = llm.prepare(PROMPT, SamplingParams(adapter=name))
    llm.unload_adapter(name)
    assert llm.adapters == {}
    with pytest.raises(ConfigError, match="no adapter"):
        llm.generate(PROMPT, adapter=name)
    with pytest.raises(ConfigError, match="was unloaded"):
        llm.engine.add(prepared)
    llm.load_adapter(adapters[1], name=name)  # the name is free, the slot is not
    assert llm.adapters[name].slot == 1
    assert begun + "".join(map(str, chunks)) == whole
    assert llm._engine._decoder._adapters == {1}


def test_a_stream_that_is_left_lets_go(llm, adapters):
    name = llm.load_adapter(adapters[0])
    chunks = llm.stream(PROMPT, adapter=name)
    next(chunks)
    llm.unload_adapter(name)
    assert llm._engine._decoder._adapters == {0}
    del chunks
    assert llm._engine._decoder._adapters == set()


def test_aborting_twice_frees_once(llm, adapters):
    name = llm.load_adapter(adapters[0])
    request = llm.prepare(PROMPT, SamplingParams(max_tokens=2, adapter=name))
    sequences = [llm.engine.add(request) for _ in range(2)]
    llm.unload_adapter(name)
    for _ in range(2):
        llm.engine.abort(sequences[0])
    assert llm._engine._decoder._adapters == {0}
    llm.engine.abort(sequences[1])
    assert llm._engine._decoder._adapters == set()


def test_a_closed_model_loads_nothing(llm, adapters):
    llm.load_adapter(adapters[0])
    llm.close()
    assert llm.adapters == {}
    for call in (lambda: llm.load_adapter(adapters[1]), lambda: llm.unload_adapter("law")):
        with pytest.raises(ConfigError, match="closed"):
            call()


def test_adapters_come_and_go_while_others_write(llm, adapters):
    expected = {
        path.name: (llm.load_adapter(path), llm.generate(PROMPT, max_tokens=15, adapter=path.name))
        for path in adapters
    }
    plain = llm.generate(PROMPT, max_tokens=15).text
    failures: list[str] = []

    def write(path: Path) -> None:
        for turn in range(8):
            name = llm.load_adapter(path, name=f"{path.name} {turn}")
            text = llm.generate(PROMPT, max_tokens=15, adapter=name).text
            llm.unload_adapter(name)
            if text != expected[path.name][1].text:
                failures.append(name)

    threads = [threading.Thread(target=write, args=(path,)) for path in adapters]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert llm.generate(PROMPT, max_tokens=15).text == plain
    for thread in threads:
        thread.join()
    assert failures == []
    assert llm._engine._decoder._adapters == {0, 1}


def test_preempted_sequences_come_back_with_their_adapter(adapters):
    """With few blocks, sequences are computed again: the fake asserts which entries they read."""
    fake = FakeDecoder(blocks=6, max_batch_tokens=32)
    with LLM(fake, byte_tokenizer(), name="fake", context=128, max_batch_tokens=32) as llm:
        llm.engine.load_adapter("one", Adapter("nothing", {}))
        llm.engine.load_adapter("two", Adapter("nothing", {}))
        asked = [None, "one", "two", "one", None]
        params = SamplingParams(max_tokens=60, temperature=1.0, seed=3)
        requests = [llm.prepare(PROMPT[:40], replace(params, adapter=name)) for name in asked]
        together = [each.completion().token_ids for each in llm._run(requests)]
        assert llm.stats().preemptions > 0
        for name, ids in zip(asked, together, strict=True):
            assert llm.generate(PROMPT[:40], params=replace(params, adapter=name)).token_ids == ids
        assert len(set(together)) == 3


def test_async_requests_take_adapters(model, adapters):
    async def main() -> None:
        async with await AsyncLLM.load(model, threads=1, context=256) as llm:
            assert await llm.load_adapter(adapters[0]) == "law"
            assert list(llm.adapters) == ["law"]
            plain, adapted = await asyncio.gather(
                llm.generate(PROMPT, max_tokens=20),
                llm.generate(PROMPT, max_tokens=20, adapter="law"),
            )
            assert plain.text != adapted.text
            chunks = [str(each) async for each in llm.stream(PROMPT, max_tokens=20, adapter="law")]
            assert "".join(chunks) == adapted.text
            score, other = await asyncio.gather(
                llm.score(PROMPT, " x", adapter="law"), llm.score(PROMPT, " x")
            )
            assert score != other
            assert await llm.perplexity(PROMPT, adapter="law") != await llm.perplexity(PROMPT)
            logits = await llm.forward(PROMPT, adapter="law")
            assert (logits != await llm.forward(PROMPT)).any()
            vector = await llm.embed(PROMPT, pooling="last", adapter="law")
            assert (vector != await llm.embed(PROMPT, pooling="last")).any()
            stream = llm.stream(PROMPT, max_tokens=20, adapter="law")
            begun = str(await anext(stream))
            await llm.unload_adapter("law")
            assert begun + "".join([str(each) async for each in stream]) == adapted.text
            with pytest.raises(ConfigError, match="no adapter 'law'"):
                await llm.generate(PROMPT, adapter="law")
        with pytest.raises(ConfigError, match="closed"):
            await llm.load_adapter(adapters[1])

    asyncio.run(main())


def test_the_command_line_takes_an_adapter(model, adapters):
    def run(*more: str) -> Result:
        arguments = ["run", "-m", str(model), "-n", "20", "-q", "--threads", "1", PROMPT, *more]
        return CliRunner().invoke(app, arguments, prog_name="bitllm")

    answers = [run(), *(run("--adapter", str(path)) for path in adapters)]
    assert [each.exit_code for each in answers] == [0, 0, 0]
    assert len({each.stdout for each in answers}) == 3
    with bitllm.load(model, threads=1) as llm:
        name = llm.load_adapter(adapters[0])
        assert llm.generate(PROMPT, max_tokens=20, adapter=name).text in answers[1].stdout
    failed = run("--adapter", "nowhere")
    assert failed.exit_code != 0
    assert "no adapter 'nowhere'" in failed.stderr


def test_the_adapters_of_a_batch_are_those_of_its_requests() -> None:
    fake = FakeDecoder(blocks=32)
    with LLM(fake, byte_tokenizer(), name="fake", context=128, max_batch_tokens=64) as llm:
        llm.engine.load_adapter("one", Adapter("nothing", {}))
        requests = [
            llm.prepare("ab", SamplingParams(max_tokens=4, adapter=name)) for name in ("one", None)
        ]
        list(llm._run(requests))
        assert [batch.adapter_slots.tolist() for batch in fake.steps] == [[0, -1]] * 4
