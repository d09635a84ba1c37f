"""`bitllm perplexity`: the figures against PyTorch, the streams, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from bitllm import LLM, load
from bitllm.cli import text_input
from bitllm.cli.app import app
from bitllm.engine.outputs import TextScore
from cli_model import write_model
from interrupted import process_to_interrupt
from transformers_model import CONTEXT, write_transformers_model

BITLLM = [sys.executable, "-m", "bitllm"]
TEXT = "The quick brown fox jumps over the lazy dog. Größe × 3\n" * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "some text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BITLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BITLLM_DEVICE", "reference")


def perplexity(*arguments: str, **settings: Any) -> Result:
    return CliRunner().invoke(app, ["perplexity", *arguments], prog_name="bitllm", **settings)


def torch_logprobs(model: Any, ids: list[int], window: int, stride: int) -> list[float]:
    """Log-probabilities by transformers, each token scored in the first window that reaches it."""
    found: list[float] = []
    for start in range(0, len(ids), stride):
        piece = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(piece).logits[0].double(), -1)
        fresh = range(1 + len(found) - start, piece.shape[1])
        found += [float(logprobs[i - 1, piece[0, i]]) for i in fresh]
        if start + window >= len(ids):
            return found
    raise AssertionError


@pytest.mark.parametrize("stride", [None, 100])
def test_the_figures_are_those_of_transformers(tmp_path: Path, stride: int | None) -> None:
    torch.set_num_threads(1)
    oracle = write_transformers_model(tmp_path / "model")
    options = ["--kv-dtype", "fp32"]
    options += [] if stride is None else ["--stride", str(stride)]
    result = perplexity(str(tmp_path / "model"), "--json", *options, input=TEXT)
    facts = json.loads(result.stdout)
    with load(tmp_path / "model", device="reference") as llm:
        ids = llm.encode(TEXT)
    assert len(ids) > 2 * CONTEXT
    logprobs = torch_logprobs(oracle, ids, CONTEXT, stride or CONTEXT // 2)
    assert facts["scored_tokens"] == len(logprobs) == len(ids) - 1
    assert facts["scored_bytes"] == len(TEXT.encode())
    nats = -sum(logprobs)
    # A rounding of the activations may fall to the other side: in some windows, not in all.
    assert -facts["logprob"] == pytest.approx(nats, rel=1e-4)
    assert facts["perplexity"] == pytest.approx(math.exp(nats / len(logprobs)), rel=1e-3)
    assert facts["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / len(TEXT.encode()), rel=1e-4
    )
    spread = torch.tensor(logprobs, dtype=torch.float64).std() / len(logprobs) ** 0.5
    assert facts["perplexity_error"] == pytest.approx(
        math.exp(nats / len(logprobs)) * float(spread), rel=1e-2
    )


def test_the_json_says_what_was_measured(model: str, text_file: Path) -> None:
    result = perplexity(model, "-f", str(text_file), "--context", "64", "--stride", "20", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    with load(model, device="reference", context=64) as llm:
        score = llm.score_text(TEXT, stride=20)
    seconds = facts.pop("seconds")
    assert seconds > 0
    assert facts == {
        "model": Path(model).name,
        "file": str(text_file),
        "context": 64,
        "stride": 20,
        "scored_tokens": len(TEXT.encode()),
        "scored_bytes": len(TEXT.encode()),
        "logprob": score.logprob,
        "perplexity": score.perplexity,
        "perplexity_error": score.perplexity_error,
        "byte_perplexity": score.byte_perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
    assert score.byte_perplexity == pytest.approx(score.perplexity)  # one byte is one token here
    assert score.bits_per_byte == pytest.approx(math.log2(score.perplexity))


def test_the_text_shows_the_same_figures(model: str, text_file: Path) -> None:
    result = perplexity("-m", model, "-f", str(text_file), "--tokens", "101")
    facts = json.loads(
        perplexity("-m", model, "-f", str(text_file), "--tokens", "101", "--json").stdout
    )
    assert facts["scored_tokens"] == facts["scored_bytes"] == 100
    assert result.stderr == ""
    assert f"perplexity  {facts['perplexity']:.4f} ± " in result.stdout
    assert f"bits        {facts['bits_per_byte']:.4f} a byte\n" in result.stdout
    assert re.search(r"100 tokens scored, 100 bytes, \d+ tok/s\n", result.stdout)


def test_stdin_by_name_and_by_default(model: str) -> None:
    named = json.loads(perplexity(model, "-f", "-", "--json", input="some text").stdout)
    piped = json.loads(perplexity(model, "--json", input="some text").stdout)
    assert named["file"] == piped["file"] == "stdin"
    assert named["logprob"] == piped["logprob"]
    assert piped["scored_tokens"] == 9


def test_a_character_that_a_limit_cuts_is_not_counted(model: str) -> None:
    facts = json.loads(perplexity(model, "--tokens", "5", "--json", input="aé🦊b").stdout)
    assert (facts["scored_tokens"], facts["scored_bytes"]) == (4, 3)


def test_infinite_is_null_in_json_and_a_word_in_text(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = TextScore(-2000.0, 2e6, 2, 2)
    assert score.perplexity == math.inf
    monkeypatch.setattr(LLM, "score_text", lambda *_, **__: score)
    assert json.loads(perplexity(model, "--json", input="ab").stdout)["perplexity"] is None
    assert "perplexity  infinite ± infinite a token" in perplexity(model, input="ab").stdout


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "two tokens or more, got 1"),
        (b"gr\xfc\xdfe", "not UTF-8 text, by its byte 2"),
        (b"x" * 101, "longer than the 0 MiB"),
    ],
)
def test_a_text_that_cannot_be_read(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, says: str
) -> None:
    monkeypatch.setattr(text_input, "MOST_BYTES", 100)
    path = tmp_path / "text"
    path.write_bytes(content)
    for result in (perplexity(model, "-f", str(path)), perplexity(model, input=content)):
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert says in result.stderr
        assert "bug" not in result.stderr


def test_a_file_that_is_not_there_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    result = perplexity("no/such/model", "-f", str(tmp_path / "nothing.txt"))
    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path / 'nothing.txt'}: No such file or directory\n"


def test_a_stride_beyond_the_window_is_refused(model: str) -> None:
    result = perplexity(model, "--context", "64", "--stride", "64", input=TEXT)
    assert result.exit_code == 1
    assert "stride must be 1 to 63, got 64" in result.stderr


def test_two_models_are_one_too_many(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = perplexity(model, "-m", "other", input="ab")
    assert result.exit_code == 2
    assert "two models are named" in result.stderr
    monkeypatch.setenv("BITLLM_MODEL", "other")  # the command line wins
    assert perplexity(model, input="ab").exit_code == 0
    assert perplexity(input="ab").exit_code == 1


def test_a_byte_order_mark_is_no_text(model: str) -> None:
    facts = json.loads(perplexity(model, "--json", input=b"\xef\xbb\xbfabc").stdout)
    assert facts["scored_bytes"] == 3


def test_ctrl_c_ends_it_with_130_and_no_figures(model: str, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("abc " * 100_000)
    command = [*BITLLM, "perplexity", model, "-f", str(path), "--stride", "1", "-v"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process_to_interrupt(command, **pipes) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == b""
    assert b"Traceback" not in errors


def test_a_reader_that_went_away(model: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*BITLLM, "perplexity", model], input=b"text", stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
