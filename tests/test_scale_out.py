"""Two servers behind the SMG gateway, as docs/scale-out.md tells it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli_model import write_model
from test_server_cli import Serving, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="smg has wheels for Linux"),
]

SMG = [sys.executable, "-m", "smg"]
TEXT = "/v1/completions"


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def gateway(workers: list[Serving], log: Path) -> Iterator[str]:
    port = free_port()
    with log.open("w") as said:
        process = subprocess.Popen(
            [*SMG, "launch", "--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware",
             "--prometheus-port", str(free_port()), "--health-check-interval-secs", "1",
             "--health-failure-threshold", "1", "--worker-urls", *(each.url for each in workers)],
            stdout=said, stderr=said,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not ready(url, workers):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait(20)


def ready(url: str, workers: list[Serving]) -> bool:
    """Whether the gateway knows that all workers are well."""
    try:
        found = get(f"{url}/workers")["workers"]
    except (OSError, ValueError, KeyError):
        return False
    return len(found) == len(workers) and all(each["is_healthy"] for each in found)


@pytest.fixture
def workers(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Serving]]:
    monkeypatch.setenv("BITLLM_THREADS", "1")
    model = str(write_model(tmp_path_factory.mktemp("models") / "tiny"))
    with serving(model, "--no-access-log") as one, serving(model, "--no-access-log") as two:
        yield [one, two]


def counts(workers: list[Serving], figure: str) -> list[int]:
    return [get(f"{each.url}/stats")["models"][0]["load"][figure] for each in workers]


def test_prompts_that_begin_alike_go_to_one_worker(workers: list[Serving], tmp_path: Path) -> None:
    with gateway(workers, tmp_path / "log") as url:
        for letter in "abcd":
            before = counts(workers, "decoded_tokens")
            for number in range(5):
                body = {"model": "tiny", "prompt": letter * 600 + str(number), "max_tokens": 4}
                assert post(f"{url}{TEXT}", body)["usage"]["completion_tokens"] == 4
            used = [
                now > then
                for now, then in zip(counts(workers, "decoded_tokens"), before, strict=True)
            ]
            assert used.count(True) == 1, (letter, used)
        assert sum(counts(workers, "cached_tokens")) >= 4 * 4 * 500
        assert min(counts(workers, "decoded_tokens")) > 0, "both were used"


def test_a_worker_that_is_killed_loses_no_request(workers: list[Serving], tmp_path: Path) -> None:
    def ask(number: int) -> int:
        prompt = f"{number}: " + str(number) * 50
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 150, "ignore_eos": True}
        answer = post(f"{url}{TEXT}", body)
        assert answer["choices"][0]["finish_reason"] == "length"
        return int(answer["usage"]["completion_tokens"])

    with gateway(workers, tmp_path / "log") as url, ThreadPoolExecutor(16) as clients:
        asked = [clients.submit(ask, number) for number in range(64)]
        deadline = time.monotonic() + 30
        while min(counts(workers, "running")) == 0:
            assert time.monotonic() < deadline, "both work"
            time.sleep(0.02)
        workers[0].process.kill()
        assert [each.result(120) for each in asked] == [150] * 64
        assert counts(workers[1:], "decoded_tokens")[0] > 0
