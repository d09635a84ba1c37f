"""Several models in one server, and adapters: loaded when asked for, listed, unloaded, refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import bitllm
from bitllm import AsyncLLM, AsyncModelPool
from bitllm.cli.app import app
from bitllm.cli.served_models import Wanted
from bitllm.errors import ConfigError, ModelNotFoundError
from bitllm.server import AdapterFiles, ServedModels, ServerOptions, serve
from bitllm.server.run import listen, url_of
from cli_model import write_model
from live_server import LiveServer, live, slow_llm, until
from peft_adapter import make_adapter
from test_server_cli import BITLLM, serving

TEXT = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def adapter(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    with bitllm.load(model, threads=1) as llm:
        spec = llm.spec
    written = make_adapter(spec, alpha=64.0).write(tmp_path_factory.mktemp("adapters") / "poet")
    return str(written)


def asked(name: str | None, **more: Any) -> dict[str, Any]:
    return {"prompt": "a b", "max_tokens": 6, "temperature": 0, "model": name, **more}


def pool_of(models: dict[str, str], contexts: dict[str, int], **options: Any) -> AsyncModelPool:
    pool = AsyncModelPool(known_only=True, **options)
    for name, ref in models.items():
        pool.add(name, ref, context=contexts[name], threads=1)
    return pool


@pytest.fixture
def two(model: str) -> Iterator[LiveServer]:
    models, contexts = {"one": model, "two": model}, {"one": 64, "two": 96}
    with live(pool_of(models, contexts)) as server:
        yield server


def states(server: LiveServer) -> dict[str, str]:
    return {each["id"]: each["status"] for each in server.get("/v1/models").json["data"]}


def test_models_are_loaded_by_their_first_request(two: LiveServer) -> None:
    assert states(two) == {"one": "unloaded", "two": "unloaded"}
    assert two.get("/v1/models/two").json["max_model_len"] is None
    assert two.get("/health").status == 200
    assert two.get("/metrics").status == 200
    assert two.get("/stats").json["models"] == []
    assert two.post(TEXT, asked("two")).json["model"] == "two"
    assert states(two) == {"one": "unloaded", "two": "loaded"}
    assert two.get("/v1/models/two").json["max_model_len"] == 96
    assert [each["id"] for each in two.get("/stats").json["models"]] == ["two"]
    assert 'bitllm_steps_total{model="two"}' in two.get("/metrics").body.decode()
    assert two.post(TEXT, asked(None)).json["model"] == "one"
    assert two.post(TEXT, asked("three")).status == 404


def test_many_first_requests_load_once_and_all_are_answered(two: LiveServer) -> None:
    answers: list[Any] = []

    def ask(number: int) -> None:
        answers.append(two.post(TEXT, asked("one" if number % 2 else "two")))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.status for each in answers] == [200] * 8
    assert set(states(two).values()) == {"loaded"}


def limit_for_one(model: str) -> int:
    """Return a budget in which either of two models fits, but not both."""
    pools = pool_of({"one": model}, {"one": 8192})

    async def planned() -> int:
        async with pools, pools.lease("one"):
            return pools.planned_bytes

    return int(asyncio.run(planned()) * 1.02)


def test_the_model_used_longest_ago_makes_room_and_a_busy_one_does_not(model: str) -> None:
    models, contexts = {"one": model, "two": model}, {"one": 8192, "two": 8191}
    with live(pool_of(models, contexts, memory_limit=limit_for_one(model))) as server:
        assert server.post(TEXT, asked("one")).status == 200
        assert server.post(TEXT, asked("two")).status == 200
        assert states(server) == {"one": "unloaded", "two": "loaded"}
        endless = json.dumps(asked("two", max_tokens=8000, stream=True)).encode()
        connection = server.raw()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
            % (len(endless), endless)
        )
        assert connection.recv(1000)
        refused = server.post(TEXT, asked("one"))
        assert refused.status == 503
        assert refused.json["error"]["code"] == "out_of_memory"
        assert int(refused.headers["retry-after"]) > 0
        assert states(server)["two"] == "loaded"
        connection.close()
        until(server.is_idle)
        assert server.post(TEXT, asked("one")).status == 200


def test_idle_models_are_unloaded_by_time_and_ps_tells(model: str) -> None:
    pool = pool_of({"one": model, "two": model}, {"one": 64, "two": 64}, keep_alive=0.2)
    pool.add("three", model, context=96)
    with live(pool) as server:
        assert server.post(TEXT, asked("one")).status == 200
        figures = server.get("/stats").json["pool"]
        assert figures["unloaded"] == ["three"]
        assert set(figures["unload_seconds"]) <= {"one", "two"}
        until(lambda: set(states(server).values()) == {"unloaded"})
        said = CliRunner().invoke(app, ["ps", "--url", server.url]).output
        assert "unloaded: one, two, three" in said
        assert "planned: 40 MB" in said


def test_a_model_that_is_broken_is_an_error_and_the_server_goes_on(
    model: str, tmp_path: Path
) -> None:
    broken = write_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    models, contexts = {"one": model, "bad": str(broken)}, {"one": 64, "bad": 64}
    with live(pool_of(models, contexts)) as server:
        answer = server.post(TEXT, asked("bad"))
        assert answer.status == 500
        assert "is missing" in answer.json["error"]["message"]
        assert server.post(TEXT, asked("one")).status == 200


# --- adapters ----------------------------------------------------------------------------------


def test_an_adapter_is_a_model_of_its_own(model: str, adapter: str) -> None:
    with bitllm.load(model, threads=1) as llm:
        llm.load_adapter(adapter, "poet")
        plain = llm.generate("a b", max_tokens=6, temperature=0).text
        adapted = llm.generate("a b", max_tokens=6, temperature=0, adapter="poet").text
        chat = llm.chat(HI, max_tokens=6, temperature=0, adapter="poet").text
        vector = llm.embed(["a"], pooling="mean", adapter="poet")[0].tolist()
    assert plain != adapted
    files = {"poet": AdapterFiles("tiny", adapter)}
    llm = bitllm.load(model, threads=1)
    with live({"tiny": llm}, adapters=files, pooling="mean") as server:
        for name, text in (("tiny", plain), ("poet", adapted), (None, plain)):
            found = server.post(TEXT, asked(name)).json
            assert (found["model"], found["choices"][0]["text"]) == (name or "tiny", text)
            events = server.post(TEXT, asked(name, stream=True)).events[:-1]
            assert "".join(each["choices"][0]["text"] for each in events) == text
        body = {"messages": HI, "max_tokens": 6, "temperature": 0, "model": "poet"}
        answer = server.post("/v1/chat/completions", body).json
        assert answer["choices"][0]["message"]["content"] == chat
        found = server.post("/v1/embeddings", {"input": "a", "model": "poet"}).json
        assert found["data"][0]["embedding"] == vector
        assert server.post(TEXT, asked("other")).status == 404
        cards = server.get("/v1/models").json["data"]
        assert [(each["id"], each["parent"]) for each in cards] == [
            ("tiny", None), ("poet", "tiny")
        ]  # fmt: skip


def test_an_adapter_of_a_model_that_is_loaded_when_asked_for(model: str, adapter: str) -> None:
    models, contexts = {"one": model, "two": model}, {"one": 64, "two": 96}
    files = {"poet": AdapterFiles("two", adapter), "none": AdapterFiles("two", adapter + "x")}
    with live(pool_of(models, contexts, keep_alive=0.3), adapters=files) as server:
        for _ in range(2):  # the second time it is loaded anew, with its adapter
            assert states(server)["poet"] == "unloaded"
            found = server.post(TEXT, asked("poet")).json
            assert (
                found["choices"][0]["text"]
                != server.post(TEXT, asked("two")).json["choices"][0]["text"]
            )
            until(lambda: set(states(server).values()) == {"unloaded"})
        refused = server.post(TEXT, asked("none"))
        assert refused.status == 404
        assert adapter + "x" in refused.json["error"]["message"]


def test_names_that_cannot_be(model: str, adapter: str) -> None:
    files = {"fake": AdapterFiles("fake", adapter)}
    with slow_llm(seconds=0) as llm:
        models = {"fake": AsyncLLM(llm)}
        with pytest.raises(ConfigError, match="a model and an adapter have the name 'fake'"):
            ServedModels(models, files)
        with pytest.raises(ConfigError, match="'other', which is not served"):
            ServedModels(models, {"a": AdapterFiles("other", adapter)})
    with pytest.raises(ConfigError, match="at least one model"):
        ServedModels({})


# --- the command -------------------------------------------------------------------------------


def test_the_command_line_of_models_and_adapters(model: str, adapter: str) -> None:
    arguments = [adapter, f"x={adapter}", f"two:y={adapter}"]
    found = Wanted.of([f"one={model}", f"two={model}"], arguments, {"context": 64}, None)
    assert found.names == ["one", "two", "poet", "x", "y"]
    assert [each.model for each in found.adapters.values()] == ["one", "one", "two"]
    assert found.pooled
    assert not Wanted.of([model], (), {}, None).pooled
    assert Wanted.of([model], (), {}, 5.0).pooled
    assert found.options["one"]["kv_tokens"] == 16384  # small contexts: as many as make sense
    assert Wanted.of([model], (), {}, None).options["tiny"]["kv_tokens"] == 8 * 8192
    given = Wanted.of([model], (), {"kv_tokens": 8192}, None)
    assert given.options["tiny"]["kv_tokens"] == 8192
    with pytest.raises(ConfigError, match="two adapters have the name 'poet'"):
        Wanted.of([model], [adapter, adapter], {}, None)
    with pytest.raises(ConfigError, match=r"'x=' should be an adapter"):
        Wanted.of([model], ["x="], {}, None)
    with pytest.raises(ModelNotFoundError):
        Wanted.of([model, model + "x"], (), {}, None)


def test_models_and_adapters_of_the_command(model: str, adapter: str) -> None:
    command = [f"one={model}", f"two={model}", "--adapter", f"two:poet={adapter}"]
    with serving(*command, "--context", "64", "--no-access-log") as server:
        assert server.greeting[0].startswith("one, two, poet at ")
        for name in ("one", "two", "poet"):
            assert server.post(TEXT, asked(name))["model"] == name
        said = CliRunner().invoke(app, ["ps", "--url", server.url]).output
        assert "planned: " in said
        assert "unloaded" not in said
        server.end()
        assert server.process.returncode == 0


def test_an_adapter_that_is_not_there_ends_the_command(model: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*BITLLM, "serve", model, "--port", "0", "--adapter", f"a={tmp_path / 'none'}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert str(tmp_path / "none") in done.stderr
    assert "Traceback" not in done.stderr


# --- while the models are loaded ---------------------------------------------------------------


def ask(url: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_it_listens_while_models_are_loaded() -> None:
    async def run() -> None:
        options = ServerOptions(port=0, access_log=False)
        listener = listen(options)
        url = url_of(listener)
        go_on, ready = asyncio.Event(), asyncio.Event()

        async def opened() -> ServedModels:
            await go_on.wait()
            return ServedModels({"fake": AsyncLLM(slow_llm(seconds=0))})

        running = asyncio.create_task(serve(opened(), options, listener, on_ready=ready.set))
        status, health = await asyncio.to_thread(ask, f"{url}/health")
        assert (status, health["error"]["code"]) == (503, "loading")
        status, answer = await asyncio.to_thread(ask, f"{url}{TEXT}", asked(None))
        assert (status, answer["error"]["code"]) == (503, "loading")
        assert (await asyncio.to_thread(ask, f"{url}/v1/models"))[0] == 503
        status, stats = await asyncio.to_thread(ask, f"{url}/stats")
        assert (status, stats["loading"], stats["models"]) == (200, True, [])
        said = await asyncio.to_thread(CliRunner().invoke, app, ["ps", "--url", url])
        assert "loading" in said.output
        assert not ready.is_set()
        go_on.set()
        await asyncio.wait_for(ready.wait(), 10)
        assert (await asyncio.to_thread(ask, f"{url}/health"))[0] == 200
        assert (await asyncio.to_thread(ask, f"{url}{TEXT}", asked(None)))[0] == 200
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 10)

    asyncio.run(run())


def test_what_cannot_be_loaded_ends_the_server() -> None:
    async def run() -> None:
        options = ServerOptions(port=0, access_log=False)

        async def opened() -> ServedModels:
            raise ModelNotFoundError("nothing there")

        with pytest.raises(ModelNotFoundError, match="nothing there"):
            await asyncio.wait_for(serve(opened(), options, listen(options)), 10)

    asyncio.run(run())


def test_a_signal_while_models_are_loaded_ends_at_once() -> None:
    async def run() -> None:
        options = ServerOptions(port=0, access_log=False)
        began, cancelled = asyncio.Event(), asyncio.Event()

        async def opened() -> ServedModels:
            began.set()
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()
            raise AssertionError

        running = asyncio.create_task(serve(opened(), options, listen(options)))
        await asyncio.wait_for(began.wait(), 10)
        start = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 10)
        assert cancelled.is_set()
        assert time.monotonic() - start < 5

    asyncio.run(run())
