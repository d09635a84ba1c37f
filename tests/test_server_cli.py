"""`bitllm serve` and `bitllm ps` as a person has them: processes, ports and signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bitllm.cli.app import app
from cli_model import write_model
from live_server import live, slow_llm

BITLLM = [sys.executable, "-m", "bitllm"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BITLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BITLLM_THREADS", "1")


class Serving:
    """A `bitllm serve` that has begun to answer."""

    def __init__(self, process: subprocess.Popen[str], greeting: list[str]) -> None:
        self.process, self.greeting = process, greeting
        (self.url,) = set(re.findall(r"http://[^ /]+:\d+", greeting[0]))

    def post(self, path: str, body: Any, **headers: str) -> Any:
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **headers},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def end(self, number: int = signal.SIGTERM) -> str:
        """Send a signal, and return what is said from then on."""
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=20)
        return rest


@contextmanager
def serving(*arguments: str, lines: int = 2, **variables: str) -> Iterator[Serving]:
    process = subprocess.Popen(
        [*BITLLM, "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )
    try:
        assert process.stderr is not None
        greeting = []
        while len(greeting) < lines:
            line = process.stderr.readline()
            assert line, (greeting, process.wait(10))
            if "no model named" not in line:
                greeting.append(line.rstrip())
        yield Serving(process, greeting)
    finally:
        process.kill()
        process.communicate()


def test_it_says_where_it_is_and_ends_well(model: str) -> None:
    with serving(model) as server:
        assert server.greeting[0] == f"tiny at {server.url} (OpenAI: base_url={server.url}/v1)"
        command = server.greeting[1].removeprefix("try: ")
        shown = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
        assert json.loads(shown.stdout)["object"] == "text_completion"
        log = server.end()
        assert server.process.returncode == 0
    entry, end = log.splitlines()
    assert json.loads(entry)["path"] == "/v1/completions"
    assert end == "ending; 0 requests under way (Ctrl-C again: at once)"


def test_a_signal_lets_requests_end(model: str) -> None:
    with serving(model, "--no-access-log") as server:
        body = {"prompt": "a", "max_tokens": 3000, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(
            server.url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.readline()
            server.process.send_signal(signal.SIGINT)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        server.process.communicate(timeout=20)
        assert server.process.returncode == 0


def test_a_second_signal_ends_at_once(model: str) -> None:
    with serving(model, "--no-access-log") as server:
        body = {"prompt": "a", "max_tokens": 8000, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(
            server.url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.readline()
            server.process.send_signal(signal.SIGINT)
            assert "1 request under way" in server.process.stderr.readline()  # type: ignore[union-attr]
            start = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            server.process.wait(15)
            assert time.monotonic() - start < 10


def test_keys_and_names(model: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("file-key\n")
    with serving(
        f"one={model}", "-m", f"two={model}", "--api-key-file", str(keys), BITLLM_API_KEY="env-key"
    ) as server:
        assert server.greeting[0].startswith("one, two at ")
        assert "Authorization: Bearer $KEY" in server.greeting[1]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.post("/v1/completions", {"prompt": "a"})
        for key in ("file-key", "env-key"):
            found = server.post(
                "/v1/completions",
                {"prompt": "a", "max_tokens": 1, "model": "two"},
                Authorization=f"Bearer {key}",
            )
            assert found["model"] == "two"


def test_a_warning_where_everybody_is_answered(model: str) -> None:
    with serving(model, "--host", "0.0.0.0", lines=3) as server:
        assert server.greeting[2].startswith("warning: 0.0.0.0 can be reached from the network")
        assert server.url.startswith("http://127.0.0.1:")
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})


def test_options_by_variables(model: str) -> None:
    with serving(BITLLM_MODEL=model, BITLLM_STRICT_MODEL="1", BITLLM_CONTEXT="64") as server:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            server.post("/v1/completions", {"prompt": "a", "model": "other"})
        with urllib.request.urlopen(server.url + "/v1/models", timeout=10) as answer:
            assert json.load(answer)["data"][0]["max_model_len"] == 64


def refused(*arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [*BITLLM, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=60,
        check=False,
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_refusals(model: str, tmp_path: Path) -> None:
    with live({"m": slow_llm(seconds=0)}) as other:
        said = refused("serve", model, "--port", str(other.port))
        assert f"cannot listen at 127.0.0.1 port {other.port}" in said
    assert "no.such.host.invalid" in refused("serve", model, "--host", "no.such.host.invalid")
    assert "two models have the name 'tiny'" in refused("serve", model, model, "--port", "0")
    assert "two models have the name 'a'" in refused(
        "serve", f"a={model}", f"a={model}", "--port", "0"
    )
    assert "should be a model, or NAME=REF" in refused("serve", "=x", "--port", "0")
    assert "the API keys cannot be read" in refused(
        "serve", model, "--port", "0", "--api-key-file", str(tmp_path / "none")
    )
    assert "size" in refused("serve", model, "--max-body", "much")
    assert "printable ASCII" in refused("serve", model, "--port", "0", BITLLM_API_KEY="clé")
    assert "none" in refused("serve", str(tmp_path / "none"), "--port", "0")


def test_ps_shows_a_server() -> None:
    with live({"fake": slow_llm(seconds=0)}, api_keys=("k",)) as server:
        url = f"{server.url}/v1/"
        server.post("/v1/completions", {"prompt": "a"}, {"X-Api-Key": "k"})
        said = CliRunner().invoke(app, ["ps", "--url", url], env={"BITLLM_API_KEY": "k"})
        assert said.exit_code == 0, said.output
        first, head, row = said.output.splitlines()
        assert "0 of 256 requests" in first
        assert head.split()[:2] == ["MODEL", "DEVICE"]
        assert row.split()[:3] == ["fake", "fake", "(none"]
        found = CliRunner().invoke(app, ["ps", "--url", url, "--json"], env={"BITLLM_API_KEY": "k"})
        assert json.loads(found.output)["models"][0]["id"] == "fake"
        said = CliRunner().invoke(app, ["ps", "--url", url])
        assert said.exit_code == 1
        assert "answers 401" in said.output
        assert "BITLLM_API_KEY" in said.output


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://x", "nonsense", "file:///etc/passwd"])
def test_ps_without_a_server(url: str) -> None:
    said = CliRunner().invoke(app, ["ps", "--url", url])
    assert said.exit_code == 1
    assert said.output.startswith(f"error: {url}")
    assert "bitllm serve" in said.output
