"""Several models in one process: who is loaded, who has to go, and who may not."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import bitllm
from bitllm import (
    LLM,
    AsyncLLM,
    AsyncModelPool,
    ConfigError,
    EngineOptions,
    FormatError,
    InsufficientMemoryError,
    ModelNotFoundError,
    ModelPool,
)
from bitllm.engine import async_model_pool, model_pool
from bitllm.engine.memory_plan import PROCESS_BYTES, MemoryPlan
from bitllm.engine.request import ModelDefaults
from bitllm.engine.residency import Admit, ModelSource
from byte_tokenizer import END, byte_tokenizer
from cli_model import write_model
from fake_decoder import FakeDecoder
from interrupted import process_to_interrupt

MB = 1_000_000
LETTER = 97


class FakeModels:
    """What the pools load in most tests: models of a stated size, that can be slow or broken.

    A reference is "NAME:MEGABYTES".
    """

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.on_load: Callable[[str], object] = lambda name: None

    def open(self, source: ModelSource, admit: Admit) -> LLM:
        assert source.ref is not None
        name, size = source.ref.split(":")
        admit(name, plan_of(int(size) * MB, source.options.memory_limit))
        self.loads.append(name)
        self.on_load(name)
        return LLM(
            FakeDecoder(blocks=16, next_token=lambda tokens: LETTER),
            byte_tokenizer(),
            name=name,
            context=256,
            max_batch_tokens=64,
            defaults=ModelDefaults(stop_ids=frozenset({END})),
        )


def plan_of(size: int, limit: int | None = None) -> MemoryPlan:
    return MemoryPlan(
        weights=size,
        kv=0,
        scratch=0,
        process=PROCESS_BYTES,
        available=None,
        limit=limit,
        context=256,
        kv_tokens=256,
        kv_bytes_per_token=1,
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeModels:
    models = FakeModels()
    monkeypatch.setattr(model_pool, "open_model", models.open)
    monkeypatch.setattr(async_model_pool, "open_model", models.open)
    return models


def pool_of(megabytes: int, **options: Any) -> ModelPool:
    """A pool with room for so much, and models a to d of 10 MB each."""
    return ModelPool(
        {name: f"{name}:10" for name in "abcd"},
        memory_limit=PROCESS_BYTES + megabytes * MB,
        **options,
    )


def names(pool: Any) -> list[str]:
    return sorted(each.name for each in pool.loaded())


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


class TestBudget:
    def test_a_model_is_loaded_once(self, fake: FakeModels) -> None:
        with pool_of(20) as models:
            assert models["a"] is models["a"]
            assert fake.loads == ["a"]

    def test_the_least_recently_used_goes_first(self, fake: FakeModels) -> None:
        with pool_of(25) as models:
            first = models["a"]
            models["b"]
            assert models["a"] is first  # now b is the one that was used longest ago
            models["c"]
            assert names(models) == ["a", "c"]
            models["b"]
            assert names(models) == ["b", "c"]
            assert fake.loads == ["a", "b", "c", "b"]
            assert first.engine.closed

    def test_a_request_is_a_use(self, fake: FakeModels) -> None:
        with pool_of(25) as models:
            a = models["a"]
            models["b"]
            a.generate("x", max_tokens=1)
            models["c"]
            assert names(models) == ["a", "c"]

    def test_the_plans_together_stay_within_the_limit(self, fake: FakeModels) -> None:
        sizes = {"a": 7, "b": 11, "c": 16, "d": 3, "e": 20}
        with ModelPool(memory_limit=PROCESS_BYTES + 25 * MB) as models:
            for name in "abcdeabdcebadcedbca":
                models[f"{name}:{sizes[name]}"]
                held = sum(sizes[each.name[0]] * MB for each in models.loaded())
                assert models.planned_bytes == PROCESS_BYTES + held <= PROCESS_BYTES + 25 * MB

    def test_no_more_is_unloaded_than_needed(self, fake: FakeModels) -> None:
        with pool_of(45) as models:
            for name in "abcd":
                models[name]
            models["e:14"]
            assert names(models) == ["b", "c", "d", "e:14"]

    def test_what_cannot_fit_unloads_nothing(self, fake: FakeModels) -> None:
        with pool_of(25) as models:
            models["a"], models["b"]
            with pytest.raises(InsufficientMemoryError, match="big needs 26 MB") as caught:
                models["big:26"]
            assert "memory_limit of all models, 65 MB" in str(caught.value)
            assert names(models) == ["a", "b"]

    def test_a_leased_model_stays_and_the_error_names_it(self, fake: FakeModels) -> None:
        with pool_of(15) as models, models.lease("a") as llm:
            with pytest.raises(InsufficientMemoryError) as caught:
                models["b"]
            assert "a  10 MB, 1 lease" in caught.value.message
            assert llm.generate("x", max_tokens=2).text == "aa"
            assert names(models) == ["a"]

    def test_a_model_with_a_request_under_way_stays(self, fake: FakeModels) -> None:
        with pool_of(15) as models:
            stream = models["a"].stream("x", max_tokens=9)
            next(stream)
            with pytest.raises(InsufficientMemoryError, match="a  10 MB, 1 request"):
                models["b"]
            assert len(list(stream)) == 8
            models["b"]
            assert names(models) == ["b"]

    def test_a_finished_stream_that_is_still_read_stays(self, fake: FakeModels) -> None:
        with pool_of(15) as models:
            llm = models["a"]
            stream = llm.stream("x", max_tokens=3)
            next(stream)
            llm.generate("y", max_tokens=9)  # makes the steps of both
            with pytest.raises(InsufficientMemoryError, match="1 request"):
                models["b"]
            assert [str(chunk) for chunk in stream] == ["aa"]

    def test_leases_of_one_model_are_counted(self, fake: FakeModels) -> None:
        with pool_of(15) as models:
            with models.lease("a") as one, models.lease("a") as two:
                assert one is two
                assert models.loaded()[0].leases == 2
            with models.lease("a"), pytest.raises(InsufficientMemoryError):
                models["b"]
            models["b"]

    def test_waiting_for_room(self, fake: FakeModels) -> None:
        with pool_of(15, wait=5.0) as models, ThreadPoolExecutor(1) as threads:
            with models.lease("a"):
                coming = threads.submit(lambda: models["b"].name)
                until(lambda: len(models.loaded()) == 2)
                assert not coming.done()
            assert coming.result(5) == "b"
            assert names(models) == ["b"]

    def test_a_models_own_limit_holds_too(self, fake: FakeModels) -> None:
        with pool_of(50) as models:
            models["a"]
            with pytest.raises(InsufficientMemoryError, match="memory_limit"):
                models.get("x:10", memory_limit=5 * MB)
            assert names(models) == ["a"]

    def test_memory_that_others_took_counts(
        self, fake: FakeModels, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free = [12 * MB]
        monkeypatch.setattr("bitllm.engine.residency.available_memory", lambda: free[0])
        with pool_of(1000) as models:
            models["a"]
            free[0] = 2 * MB
            with models.lease("a"), pytest.raises(InsufficientMemoryError, match="available"):
                models["b"]
            monkeypatch.setattr(
                "bitllm.engine.residency.available_memory",
                lambda: 2 * MB + (0 if "a" in names(models) else 10 * MB),
            )
            models["b"]
            assert names(models) == ["b"]

    def test_without_a_limit_it_is_what_the_machine_has(
        self, fake: FakeModels, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model_pool, "available_memory", lambda: PROCESS_BYTES + 15 * MB)
        with ModelPool() as models:
            assert models.memory_limit == PROCESS_BYTES + 15 * MB
            models["a:10"]
            models["b:10"]
            assert names(models) == ["b:10"]


class TestNames:
    def test_aliases_share_what_is_loaded(self, fake: FakeModels) -> None:
        with ModelPool({"a": "x:1", "b": "x:1"}) as models:
            models.add("c", "x:1", context=128)
            assert models["a"] is models["b"]
            assert models["c"] is not models["a"]
            assert {(each.name, each.aliases) for each in models.loaded()} == {
                ("a", ("b",)),
                ("c", ()),
            }

    def test_options_reach_the_load(self, fake: FakeModels) -> None:
        seen: list[EngineOptions] = []
        load = fake.open

        def note(source: ModelSource, admit: Admit) -> LLM:
            seen.append(source.options)
            return load(source, admit)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_pool, "open_model", note)
            with ModelPool(options=EngineOptions(threads=1)) as models:
                models.get("x:1", context=64)
        assert seen == [EngineOptions(threads=1, context=64)]

    def test_a_name_means_one_thing(self, fake: FakeModels) -> None:
        with ModelPool({"a": "x:1"}) as models:
            models.add("a", "x:1")
            with pytest.raises(ConfigError, match="under the name 'a'"):
                models.add("a", "y:1")
            models.get("z:1", context=64)
            with pytest.raises(ConfigError, match="other options"):
                models.get("z:1", context=96)

    def test_only_known_names_if_so_wished(self, fake: FakeModels) -> None:
        with ModelPool({"a": "x:1"}, known_only=True) as models:
            with pytest.raises(ModelNotFoundError, match="'/etc/passwd'") as caught:
                models["/etc/passwd"]
            assert caught.value.hint == "there are: a"
            assert models.names == ("a",)

    def test_a_reference_that_fails_is_not_remembered(self, fake: FakeModels) -> None:
        def broken(name: str) -> None:
            raise FormatError("no such thing")

        fake.on_load = broken
        with ModelPool() as models:
            with pytest.raises(FormatError):
                models["x:1"]
            assert (models.names, models.loaded()) == ((), [])

    @pytest.mark.parametrize(
        ("wrong", "what"),
        [
            ({"memory_limit": 0}, "memory_limit"),
            ({"memory_limit": "much"}, "'much'"),
            ({"keep_alive": -1}, "keep_alive"),
            ({"wait": "long"}, "wait"),
            ({"models": {"": "x"}}, "name"),
            ({"models": {"a": 7}}, "7"),
            ({"options": {"threads": 2}}, "EngineOptions"),
        ],
    )
    def test_wrong_arguments(self, wrong: dict[str, Any], what: str) -> None:
        with pytest.raises(ConfigError, match=what):
            ModelPool(**wrong)

    def test_an_option_that_does_not_exist(self) -> None:
        with ModelPool() as models, pytest.raises(ConfigError, match="contxt"):
            models.add("a", "x", contxt=5)  # type: ignore[call-arg]


class TestFailures:
    def test_a_load_that_fails_leaves_the_pool_as_it_was(self, fake: FakeModels) -> None:
        def broken(name: str) -> None:
            if name == "b":
                raise FormatError("a bad byte")

        fake.on_load = broken
        with pool_of(25) as models:
            a = models["a"]
            before = models.planned_bytes
            for _ in range(2):
                with pytest.raises(FormatError, match="a bad byte"):
                    models["b"]
                assert models.planned_bytes == before
            assert models["a"] is a
            assert names(models) == ["a"]
            fake.on_load = lambda name: None
            assert models["b"].name == "b"

    def test_everybody_who_waits_hears_of_it(self, fake: FakeModels) -> None:
        go = threading.Event()

        def broken(name: str) -> None:
            go.wait(5)
            raise FormatError("a bad byte")

        fake.on_load = broken
        with pool_of(25) as models, ThreadPoolExecutor(4) as threads:
            coming = [threads.submit(lambda: models["a"]) for _ in range(4)]
            until(lambda: any(each.leases == 4 for each in models.loaded()))
            go.set()
            assert all(isinstance(each.exception(5), FormatError) for each in coming)
            assert fake.loads == ["a"]
            assert models.loaded() == []

    def test_an_interrupt_is_for_whoever_loads_and_others_go_on(self, fake: FakeModels) -> None:
        begun, go = threading.Event(), threading.Event()

        def interrupted(name: str) -> None:
            if len(fake.loads) == 1:
                begun.set()
                go.wait(5)
                raise KeyboardInterrupt

        fake.on_load = interrupted
        with pool_of(15) as models, ThreadPoolExecutor(2) as threads:
            first = threads.submit(lambda: models["a"])
            begun.wait(5)
            second = threads.submit(lambda: models["a"].name)
            until(lambda: models.loaded()[0].leases == 2)
            go.set()
            assert isinstance(first.exception(5), KeyboardInterrupt)
            assert second.result(5) == "a"
            assert fake.loads == ["a", "a"]
            assert models.planned_bytes == PROCESS_BYTES + 10 * MB

    def test_a_claim_that_nobody_carries_out_holds_up_nobody(self, fake: FakeModels) -> None:
        with pool_of(15) as models:
            abandoned = models._claim("a")
            del abandoned
            assert models["a"].name == "a"


class TestRetiring:
    """The engine's own part: no request can slip in between looking and closing."""

    def test_not_under_a_request(self, fake: FakeModels) -> None:
        with pool_of(15) as models:
            llm = models["a"]
            stream = llm.stream("x", max_tokens=3)
            next(stream)
            assert not llm.engine.retire()
            assert "".join(map(str, stream)) == "aa"
            assert llm.engine.retire()
            with pytest.raises(ConfigError, match="closed"):
                llm.generate("x", max_tokens=1)

    def test_not_during_a_step(self, fake: FakeModels) -> None:
        with pool_of(15) as models, ThreadPoolExecutor(1) as threads:
            llm = models["a"]
            llm.engine.hold()
            assert threads.submit(llm.engine.retire).result(5) is False
            llm.engine.let_go()
            assert threads.submit(llm.engine.retire).result(5) is True


class TestThreads:
    def test_many_ask_and_one_loads(self, fake: FakeModels) -> None:
        fake.on_load = lambda name: time.sleep(0.05)
        with pool_of(25) as models, ThreadPoolExecutor(16) as threads:
            found = list(threads.map(lambda _: models["a"], range(16)))
            assert len({id(each) for each in found}) == 1
            assert fake.loads == ["a"]

    def test_a_load_holds_up_nobody_else(self, fake: FakeModels) -> None:
        go = threading.Event()
        fake.on_load = lambda name: name == "a" and go.wait(5)
        with pool_of(35) as models, ThreadPoolExecutor(2) as threads:
            models["b"]
            slow = threads.submit(lambda: models["a"].name)
            until(lambda: fake.loads == ["b", "a"])
            assert models["b"].generate("x", max_tokens=1).text == "a"
            assert models["c"].name == "c"
            assert {each.name: each.loading for each in models.loaded()} == {
                "a": True,
                "b": False,
                "c": False,
            }
            assert not slow.done()
            go.set()
            assert slow.result(5) == "a"

    def test_what_is_being_loaded_is_in_use(self, fake: FakeModels) -> None:
        go = threading.Event()
        fake.on_load = lambda name: name == "a" and go.wait(5)
        with pool_of(15) as models, ThreadPoolExecutor(1) as threads:
            slow = threads.submit(lambda: models["a"].name)
            until(lambda: fake.loads == ["a"])
            with pytest.raises(InsufficientMemoryError, match="a  10 MB, being loaded"):
                models["b"]
            go.set()
            assert slow.result(5) == "a"

    def test_under_pressure_no_text_is_lost(self, fake: FakeModels) -> None:
        """Room for two of four models, eight threads: every lease works, the limit holds."""
        limit = PROCESS_BYTES + 25 * MB
        over: list[int] = []
        with pool_of(25, wait=30.0) as models, ThreadPoolExecutor(8) as threads:

            def use(index: int) -> str:
                with models.lease("abcd"[index * 7 % 4]) as llm:
                    over.append(models.planned_bytes - limit)
                    return llm.generate("x", max_tokens=1 + index % 5).text

            texts = list(threads.map(use, range(200)))
        assert texts == ["a" * (1 + index % 5) for index in range(200)]
        assert max(over) <= 0
        assert len(fake.loads) > 4

    def test_requests_and_unloading_do_not_cross(self, fake: FakeModels) -> None:
        """Without leases a model may be closed before a request, never under it."""
        ended = threading.Event()
        with pool_of(15, wait=30.0) as models, ThreadPoolExecutor(1) as threads:

            def thrash() -> int:
                count = 0
                while not ended.is_set():
                    models["ab"[count % 2]]
                    count += 1
                return count

            loads = threads.submit(thrash)
            for _ in range(200):
                try:
                    llm = models["a"]
                    chunks = llm.stream("x", max_tokens=4)
                    text = str(next(chunks))
                except ConfigError:
                    continue  # unloaded before the request was there
                assert text + "".join(map(str, chunks)) == "aaaa"
            ended.set()
            assert loads.result(5) > 1


class TestClosing:
    def test_close_ends_what_is_under_way(self, fake: FakeModels) -> None:
        models = pool_of(25)
        stream = models["a"].stream("x", max_tokens=9)
        next(stream)
        models.close()
        models.close()
        with pytest.raises(ConfigError, match="closed"):
            next(stream)
        with pytest.raises(ConfigError, match="these models are closed"):
            models["a"]
        assert models.planned_bytes == PROCESS_BYTES

    def test_close_while_leased(self, fake: FakeModels) -> None:
        models = pool_of(25)
        with models.lease("a") as llm:
            models.close()
            with pytest.raises(ConfigError, match="closed"):
                llm.generate("x", max_tokens=1)
        assert models.loaded() == []

    def test_close_while_loading(self, fake: FakeModels) -> None:
        go = threading.Event()
        fake.on_load = lambda name: go.wait(5)
        models = pool_of(25)
        with ThreadPoolExecutor(1) as threads:
            coming = threads.submit(lambda: models["a"])
            until(lambda: fake.loads == ["a"])
            models.close()
            go.set()
            assert isinstance(coming.exception(5), ConfigError)
        assert models.planned_bytes == PROCESS_BYTES

    def test_unload(self, fake: FakeModels) -> None:
        with pool_of(25) as models:
            llm = models["a"]
            with models.lease("a"):
                assert not models.unload("a")
            assert models.unload("a")
            assert llm.engine.closed
            assert not models.unload("a")
            assert not models.unload("nobody")

    def test_a_pool_that_is_forgotten_frees_its_models(self, fake: FakeModels) -> None:
        models = pool_of(25, keep_alive=60.0)
        llm = models["a"]
        del models
        gc.collect()
        assert llm.engine.closed
        until(lambda: "bitllm keep_alive" not in [each.name for each in threading.enumerate()])


class TestKeepAlive:
    def test_idle_models_go_after_a_while(self, fake: FakeModels) -> None:
        with pool_of(25, keep_alive=0.15) as models:
            with models.lease("b"):
                llm = models["a"]
                until(lambda: names(models) == ["b"])
                assert llm.engine.closed
                time.sleep(0.3)
                assert names(models) == ["b"]
            until(lambda: models.loaded() == [])

    def test_a_request_under_way_keeps_it(self, fake: FakeModels) -> None:
        with pool_of(25, keep_alive=0.1) as models:
            stream = models["a"].stream("x", max_tokens=3)
            next(stream)
            time.sleep(0.3)
            assert "".join(map(str, stream)) == "aa"
            until(lambda: models.loaded() == [])

    def test_what_is_told_about_it(self, fake: FakeModels) -> None:
        with pool_of(25, keep_alive=100.0) as models:
            with models.lease("a"):
                (told,) = models.loaded()
                assert (told.idle_seconds, told.unload_seconds, told.leases) == (0.0, None, 1)
            time.sleep(0.02)
            (told,) = models.loaded()
            assert 0.02 <= told.idle_seconds < 50
            assert told.unload_seconds == pytest.approx(100 - told.idle_seconds, abs=0.01)
            assert (told.bytes, told.context, told.requests) == (10 * MB, 256, 0)


class TestFork:
    def test_a_child_owns_its_own_models(self, fake: FakeModels) -> None:
        go = threading.Event()
        fake.on_load = lambda name: name == "b" and len(fake.loads) == 2 and go.wait(20)
        with pool_of(25, keep_alive=60.0) as models, ThreadPoolExecutor(1) as threads:
            models["a"]
            loading = threads.submit(lambda: models["b"].name)
            until(lambda: fake.loads == ["a", "b"])
            child = os.fork()
            if child == 0:  # what another thread was loading is not on its way here
                signal.alarm(20)
                right = models["a"].generate("x", max_tokens=2).text == "aa"
                right = right and models["b"].name == "b"
                os._exit(0 if right else 1)
            go.set()
            assert loading.result(5) == "b"
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_forks_beside_threads_that_use_the_pool(self, fake: FakeModels) -> None:
        ended = threading.Event()
        with pool_of(15, wait=10.0) as models, ThreadPoolExecutor(2) as threads:

            def use(name: str) -> None:
                while not ended.is_set():
                    with models.lease(name) as llm:
                        llm.generate("x", max_tokens=1)

            users = [threads.submit(use, name) for name in "ab"]
            for _ in range(20):
                child = os.fork()
                if child == 0:
                    signal.alarm(10)
                    os._exit(0 if models.loaded() is not None else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            ended.set()
            for user in users:
                user.result(10)


class TestAsync:
    def run(
        self, work: Callable[[AsyncModelPool], Any], megabytes: int = 25, **options: Any
    ) -> Any:
        async def main() -> Any:
            pool = AsyncModelPool(
                {name: f"{name}:10" for name in "abcd"},
                memory_limit=PROCESS_BYTES + megabytes * MB,
                **options,
            )
            async with pool as models:
                return await work(models)

        return asyncio.run(main())

    def test_a_lease_gives_a_model_for_servers(self, fake: FakeModels) -> None:
        async def work(models: AsyncModelPool) -> str:
            async with models.lease("a") as llm:
                assert isinstance(llm, AsyncLLM)
                assert models.loaded()[0].leases == 1
                return "".join([str(chunk) async for chunk in llm.stream("x", max_tokens=3)])

        assert self.run(work) == "aaa"

    def test_many_ask_and_one_loads_while_the_loop_runs(self, fake: FakeModels) -> None:
        go = threading.Event()
        fake.on_load = lambda name: go.wait(5)

        async def work(models: AsyncModelPool) -> None:
            async def use() -> str:
                async with models.lease("a") as llm:
                    return (await llm.generate("x", max_tokens=2)).text

            tasks = [asyncio.create_task(use()) for _ in range(50)]
            while not (models.loaded() and models.loaded()[0].leases == 50):
                await asyncio.sleep(0.001)
            assert models.loaded()[0].loading
            go.set()
            assert await asyncio.gather(*tasks) == ["aa"] * 50
            assert fake.loads == ["a"]
            assert models.loaded()[0].leases == 0

        self.run(work)

    def test_a_cancelled_task_leaves_the_load_to_others(self, fake: FakeModels) -> None:
        go = threading.Event()
        fake.on_load = lambda name: go.wait(5)

        async def work(models: AsyncModelPool) -> None:
            async def use() -> None:
                async with models.lease("a"):
                    pass

            task = asyncio.create_task(use())
            while not fake.loads:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert models.loaded()[0].leases == 0
            go.set()
            async with models.lease("a") as llm:
                assert llm.llm.name == "a"
            assert fake.loads == ["a"]
            async with models.lease("b"), models.lease("c"):  # it is idle, and makes room
                assert names(models) == ["b", "c"]

        self.run(work)

    def test_errors_reach_the_task(self, fake: FakeModels) -> None:
        async def work(models: AsyncModelPool) -> None:
            async with models.lease("a"), models.lease("b"):
                with pytest.raises(InsufficientMemoryError, match="a  10 MB, 1 lease"):
                    async with models.lease("c"):
                        pass
            async with models.lease("c") as llm:
                stream = llm.stream("x", max_tokens=200)  # more than may wait unread
                await anext(stream)
            with pytest.raises(InsufficientMemoryError, match="1 request"):  # it is still read
                async with models.lease("big:20"):
                    pass
            await stream.aclose()

        self.run(work)

    def test_two_models_that_take_turns(self, fake: FakeModels) -> None:
        async def work(models: AsyncModelPool) -> list[str]:
            async def use(index: int) -> str:
                async with models.lease("ab"[index % 2]) as llm:
                    return (await llm.generate("x", max_tokens=1 + index % 3)).text

            return await asyncio.gather(*(use(index) for index in range(20)))

        texts = self.run(work, megabytes=15, wait=20.0)
        assert texts == ["a" * (1 + index % 3) for index in range(20)]

    def test_closing_with_and_without_patience(self, fake: FakeModels) -> None:
        async def read(models: AsyncModelPool, begun: asyncio.Event) -> str:
            async with models.lease("a") as llm:
                text = ""
                async for chunk in llm.stream("x", max_tokens=150):
                    text += str(chunk)
                    begun.set()
                return text

        async def work(drain: bool) -> str:
            models = AsyncModelPool({"a": "a:1"})
            begun = asyncio.Event()
            task = asyncio.create_task(read(models, begun))
            await begun.wait()
            await models.aclose(drain=drain)
            with pytest.raises(ConfigError, match="these models are closed"):
                async with models.lease("a"):
                    pass
            await models.aclose()
            return await task

        assert asyncio.run(work(True)) == "a" * 150
        with pytest.raises(ConfigError, match="closed"):
            asyncio.run(work(False))

    def test_unload(self, fake: FakeModels) -> None:
        async def work(models: AsyncModelPool) -> None:
            async with models.lease("a"):
                assert not await models.unload("a")
            assert await models.unload("a")
            assert models.loaded() == []

        self.run(work)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {name: write_model(directory / name) for name in "ab"}


class TestRealModels:
    def test_texts_are_those_of_a_model_alone(self, written: dict[str, Path]) -> None:
        options = EngineOptions(context=128, max_batch_tokens=16, threads=1)
        with bitllm.load(written["a"], context=128, max_batch_tokens=16, threads=1) as alone:
            expected = alone.generate("hello", max_tokens=20).token_ids
            assert alone.plan is not None
            size = alone.plan.total
        with ModelPool(written, memory_limit=size + 1000, options=options) as models:
            for name in "abab":
                assert models[name].generate("hello", max_tokens=20).token_ids == expected
                assert names(models) == [name]
                assert models.planned_bytes == size

    def test_a_broken_file_is_found_before_anything_is_unloaded(
        self, written: dict[str, Path], tmp_path: Path
    ) -> None:
        broken = write_model(tmp_path / "broken")
        (broken / "tokenizer.json").write_text("{")
        options = EngineOptions(context=128, max_batch_tokens=16, threads=1)
        with ModelPool({**written, "broken": broken}, options=options) as models:
            size = models["a"].plan.total  # type: ignore[union-attr]
        with ModelPool({**written, "broken": broken}, memory_limit=size, options=options) as models:
            llm = models["a"]
            with pytest.raises(bitllm.TokenizerError):
                models["broken"]
            assert models["a"] is llm

    def test_ctrl_c_in_a_load(self, written: dict[str, Path]) -> None:
        program = f"""
import signal, sys, bitllm
from bitllm.backends.cpu import CpuBackend
load, slow = CpuBackend.load, True
def wait(self, *args):
    if slow:
        print("loading", flush=True)
        signal.sigtimedwait([signal.SIGUSR1], 20)
    return load(self, *args)
CpuBackend.load = wait
models = bitllm.ModelPool({{"a": {str(written["a"])!r}}})
try:
    models["a"]
except KeyboardInterrupt:
    assert models.loaded() == [] and models.planned_bytes < 50_000_000
    slow = False
    print(models["a"].generate("x", max_tokens=1).usage.completion_tokens)
"""
        command = [sys.executable, "-c", program]
        with process_to_interrupt(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"loading\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.read() == b"1\n"
            assert process.wait(20) == 0

    def test_a_server_that_ends_without_closing(self, written: dict[str, Path]) -> None:
        program = f"""
import asyncio, bitllm
models = bitllm.AsyncModelPool({{"a": {str(written["a"])!r}}}, keep_alive=60)
async def main():
    async with models.lease("a") as llm:
        print((await llm.generate("x", max_tokens=2)).usage.completion_tokens)
asyncio.run(main())
"""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
