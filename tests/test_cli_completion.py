"""`bitllm completion`: the scripts, and what they are told when a word is completed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitllm.cli import options
from bitllm.cli.app import COMMANDS, app
from bitllm.formats.hub import cache as cache_module
from bitllm.formats.hub.cache import CachedModel

BITLLM = [sys.executable, "-m", "bitllm"]


def completed(*words: str, shell: str = "bash", **variables: str) -> list[str]:
    """What the script of a shell is told when the last of the words is completed."""
    environment = {
        **os.environ,
        "_BITLLM_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": " ".join(["bitllm", *words]),
        "COMP_CWORD": str(len(words)),
        **variables,
    }
    script = "from bitllm.cli.app import app; app.main(prog_name='bitllm')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_that_of_the_shell(shell: str) -> None:
    result = CliRunner().invoke(app, ["completion", shell], prog_name="something else")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert f"_BITLLM_COMPLETE={shell}_complete" in result.stdout
    assert "something else" not in result.stdout


def test_another_shell_is_refused() -> None:
    result = CliRunner().invoke(app, ["completion", "csh"], prog_name="bitllm")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "'csh' is not one of 'bash', 'zsh', 'fish'" in result.stderr


def test_commands_options_and_values() -> None:
    assert completed("") == [f"plain,{name}" for name in COMMANDS]
    assert completed("per") == ["plain,perplexity"]
    assert completed("run", "--temp") == ["plain,--temperature"]
    assert completed("bench", "--kv-dtype", "") == ["plain,bf16", "plain,fp32", "plain,int8"]
    assert completed("completion", "f") == ["plain,fish"]


def test_a_model_is_a_file_or_a_known_name(tmp_path: Path) -> None:
    for words in (["run", "-m", "2"], ["info", "2"], ["convert", "2"], ["pull", "2"]):
        found = completed(*words, HF_HUB_CACHE=str(tmp_path / "empty"))
        assert found[:2] == ["file,2", "plain,2b"], words


def test_models_in_the_cache_complete_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(name: str, complete: bool) -> CachedModel:
        return CachedModel(name, Path(), "gguf", 1, 0.0, complete)

    models = [model("Org/Small", True), model("org/half", False), model("else/where", True)]
    monkeypatch.setattr(cache_module, "cached_models", lambda: models)
    context = app.make_context("bitllm", ["run"], resilient_parsing=True)
    parameter = app.params[0]
    found = options.complete_model(context, parameter, "org")
    assert [(item.value, item.type) for item in found] == [("org", "file"), ("Org/Small", "plain")]

    def broken() -> list[CachedModel]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache_module, "cached_models", broken)
    names = [item.value for item in options.complete_model(context, parameter, "2b-")]
    assert names[0] == "2b-"
    assert "2b-gguf" in names


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_by_the_script(tmp_path: Path) -> None:
    wrapper = tmp_path / "bitllm"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m bitllm "$@"\n')
    wrapper.chmod(0o755)
    script = (
        'eval "$(bitllm completion bash)"; complete -p bitllm;'
        "COMP_WORDS=(bitllm doc); COMP_CWORD=1; _bitllm_completion bitllm;"
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "complete -o nosort -F _bitllm_completion bitllm",
        "doctor",
    ]
