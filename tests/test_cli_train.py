"""`bitllm train` and `bitllm export`: a tiny run, from text files to a GGUF file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bitllm import load
from bitllm.cli.app import app
from cli_model import write_model
from interrupted import process_to_interrupt
from tiny_training import write_corpus

RECIPE = """
name = "tiny"
[text]
source = "files"
files = [{files}]
held_out_percent = 30.0
[tokenizer]
vocab_size = 300
[model]
hidden_size = 128
layers = 2
heads = 4
kv_heads = 2
head_dim = 32
ffn_size = 128
context = 64
[training]
threads = 1
steps = {steps}
batch_size = 2
sequence_length = 24
warmup_steps = 3
log_every = 4
evaluate_every = 12
checkpoint_every = 4
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BITLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BITLLM_DEVICE", "reference")


def bitllm(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="bitllm")


def write_recipe(folder: Path, steps: int = 8) -> str:
    write_corpus(folder)
    files = ", ".join(f'"text{index}.txt"' for index in range(9))
    (folder / "tiny.toml").write_text(RECIPE.format(files=files, steps=steps))
    return str(folder / "tiny.toml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder)
    return bitllm("train", recipe, "--out", str(folder / "run"), "--json"), folder / "run"


def test_a_run_says_where_its_model_is(trained: tuple[Result, Path]) -> None:
    result, run = trained
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {
        "recipe": "tiny",
        "run": str(run),
        "model": str(run / "model"),
    }
    assert "step 8/8" in result.stderr
    with load(run / "model", device="reference") as llm:
        assert llm.spec.hidden_size == 128


def test_resuming_a_finished_run_prints_its_model(trained: tuple[Result, Path]) -> None:
    run = trained[1]
    result = bitllm("train", str(run.parent / "tiny.toml"), "-o", str(run), "--resume")
    assert result.exit_code == 0
    assert result.stdout == f"{run / 'model'}\n"
    assert "resumed at step 8" in result.stderr


@pytest.mark.parametrize(("form", "name"), [("gguf", "out.gguf"), ("hf", "out"), ("mlx", "out")])
def test_a_run_is_exported(
    trained: tuple[Result, Path], tmp_path: Path, form: str, name: str
) -> None:
    target = tmp_path / name
    run = trained[1]
    result = bitllm("export", str(run), "--to", form, "-o", str(target), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["target"] == str(target)
    with (
        load(target, device="reference") as exported,
        load(run / "model", device="reference") as model,
    ):
        asked: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
        assert exported.generate("The cat", **asked).text == model.generate("The cat", **asked).text


def test_a_model_of_another_origin_is_exported_as_well(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    result = bitllm("export", str(model), "-o", str(tmp_path / "copy"))
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "copy" / "config.json").is_file()


def test_a_run_that_has_not_ended_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").touch()
    result = bitllm("export", str(tmp_path), "-o", str(tmp_path / "x.gguf"))
    assert result.exit_code == 1
    assert "this run has not come to its end" in result.stderr
    assert f"bitllm train RECIPE --out {tmp_path} --resume" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["train"], 2, "missing argument 'recipe'"),
        (["train", "nothing.toml"], 1, "nothing.toml"),
        (["export", "x"], 2, "missing option '-o'"),
        (["export", "./nothing", "-o", "y"], 1, "no such file or directory"),
        (["export", "x", "-o", "y", "--to", "onnx"], 2, "onnx"),
    ],
)
def test_what_is_refused(arguments: list[str], code: int, says: str) -> None:
    result = bitllm(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    assert says in result.stderr.lower()
    assert "this is a bug" not in result.stderr


def test_without_torch_the_way_to_it_is_told(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None; from bitllm.cli import main;"
        "sys.argv = ['bitllm', 'train', 'x.toml']; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: training needs PyTorch" in done.stderr
    assert "hint: install it with `pip install 'bitllm[train]'`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_can_be_resumed(tmp_path: Path, number: signal.Signals) -> None:
    recipe, run = write_recipe(tmp_path, steps=100_000), tmp_path / "run"
    command = [sys.executable, "-m", "bitllm", "train", recipe, "--out", str(run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process_to_interrupt(command, **pipes) as process:
        deadline = time.monotonic() + 100
        while not (run / "checkpoint.pt").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert output == b""
    assert b"Traceback" not in errors
    refused = bitllm("export", str(run), "-o", str(tmp_path / "x.gguf"))
    assert "--resume" in refused.stderr
