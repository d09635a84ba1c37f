"""The command line as a whole: help, verbs, failures, exit codes, streams, environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from bitllm.cli import info as info_module
from bitllm.cli.app import COMMANDS, app
from bitllm.errors import CheckpointError, FormatError
from cli_model import write_model
from interrupted import process_to_interrupt

BITLLM = [sys.executable, "-m", "bitllm"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BITLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BITLLM_DEVICE", "reference")


def invoke(*arguments: str, **settings: Any) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="bitllm", **settings)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `bitllm info` raise `error`."""

    @click.command()
    def broken() -> None:
        raise error

    monkeypatch.setattr(info_module, "info", broken)


def test_without_arguments_the_help_is_printed() -> None:
    bare, asked = invoke(), invoke("--help")
    assert bare.exit_code == asked.exit_code == 0
    assert bare.stdout == asked.stdout
    assert bare.stderr == ""


def test_the_help_lists_each_verb_with_the_first_line_of_its_own_help() -> None:
    text = invoke("--help").stdout
    context = click.Context(app)
    for name, summary in COMMANDS.items():
        assert [name, summary] in [line.split(None, 1) for line in text.splitlines()]
        command = app.get_command(context, name)
        assert command is not None
        assert command.help is not None
        assert command.help.splitlines()[0] == summary


def test_examples_keep_their_lines() -> None:
    for name in COMMANDS:
        text = invoke(name, "--help").stdout
        assert "\\b" not in text
        assert "\b" not in text
    assert '\n  bitllm run "The list"\n' in invoke("run", "--help").stdout


def test_the_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from bitllm.cli import main\n"
        "sys.argv = ['bitllm', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'rich', 'prompt_toolkit', 'tokenizers', 'huggingface_hub', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n"


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("bitllm ")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("rnu", "did you mean 'bitllm run'?"),
        ("docter", "did you mean 'bitllm doctor'?"),
        ("Tell me a story", 'to continue a prompt: bitllm run "Tell me a story"'),
        ("zzz", f"the commands are {', '.join(COMMANDS)}"),
    ],
)
def test_a_mistyped_verb_gets_a_suggestion(typed: str, hint: str) -> None:
    result = invoke(typed)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert f"error: no such command: '{typed}'" in result.stderr
    assert hint in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nope"], "--nope"),
        (["run", "x", "--temprature", "1"], "did you mean"),
        (["run", "x", "--top-p", "1.5"], "--top-p"),
        (["run", "x", "--max-tokens", "0"], "--max-tokens"),
        (["run", "x", "--seed", "one"], "one"),
        (["info", "a", "b"], "unexpected extra argument"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_a_hint(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr.lower()
    assert "\n\nhint: 'bitllm" in result.stderr
    assert "--help' lists what it takes" in result.stderr


def test_a_deliberate_error_is_message_and_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, FormatError("model.safetensors: cut short", hint="fetch it again"))
    result = invoke("info")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: model.safetensors: cut short\n\nhint: fetch it again\n"


def test_an_error_without_hint_prints_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, CheckpointError("cut short"))
    assert invoke("info").stderr == "error: cut short\n"


def test_what_the_system_refuses_is_told_without_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_with(monkeypatch, PermissionError(13, "Permission denied", "/secret/model"))
    result = invoke("info")
    assert result.exit_code == 1
    assert result.stderr == "error: /secret/model: Permission denied\n"


def test_a_bug_says_so_and_hides_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError("division\nby zero"))
    result = invoke("info")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: unexpected ZeroDivisionError: division by zero; this is a bug in bitllm\n"
    )
    assert "bitllm doctor" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("how", ["before", "environment"])
def test_the_traceback_is_shown_on_request(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError("division by zero"))
    if how == "environment":
        monkeypatch.setenv("BITLLM_TRACEBACK", "1")
    result = invoke(*(["--verbose", "info"] if how == "before" else ["info"]))
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "error: unexpected ZeroDivisionError" in result.stderr


def test_verbose_after_the_verb_shows_the_traceback_of_a_deliberate_error(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    quiet, verbose = invoke("info", missing), invoke("info", missing, "--verbose")
    assert quiet.exit_code == verbose.exit_code == 1
    assert "Traceback" not in quiet.stderr
    assert "ModelNotFoundError" in verbose.stderr
    assert quiet.stderr in verbose.stderr


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    result = invoke("info")
    assert result.exit_code == 130
    assert result.stderr.strip() == ""


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def warned() -> None:
        warnings.simplefilter("always")
        warnings.warn("every weight is zero", stacklevel=1)

    monkeypatch.setattr(info_module, "info", warned)
    before = warnings.showwarning
    result = invoke("info")
    assert result.exit_code == 0
    assert result.stderr == "warning: every weight is zero\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    ("variables", "colored"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colors_need_a_terminal_that_wants_them(
    variables: dict[str, str], colored: bool, tmp_path: Path
) -> None:
    """Through a pty, for a pipe never gets colours (tested everywhere else)."""
    environment = {**os.environ, "TERM": "xterm", **variables}
    if "NO_COLOR" not in variables:
        environment.pop("NO_COLOR", None)
    leader, follower = os.openpty()
    command = [*BITLLM, "info", str(tmp_path / "nothing")]
    subprocess.run(command, stderr=follower, stdout=subprocess.DEVNULL, env=environment)
    os.close(follower)
    text = os.read(leader, 10_000).decode()
    os.close(leader)
    assert "there is no model" in text
    assert ("\x1b[" in text) == colored


def test_a_reader_that_goes_away_ends_it_quietly(model: str) -> None:
    command = [*BITLLM, "run", "-m", model, "--max-tokens", "4000", "abc"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 141
    assert errors == b""


def test_a_reader_that_was_never_there_ends_it_quietly(model: str) -> None:
    """The output is short enough to be written at the end only."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*BITLLM, "info", model], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 141


def test_sigint_stops_a_run_with_130_after_the_text_so_far(model: str) -> None:
    command = [*BITLLM, "run", "-m", model, "--max-tokens", "7000", "abc"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process_to_interrupt(command, **pipes) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 100)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first
    assert (first + rest).endswith(b"\n")
    assert b"Traceback" not in errors


def test_a_narrow_encoding_prints_question_marks(model: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [*BITLLM, "run", "-m", model, "--max-tokens", "30", "abc"]
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert b"?" in done.stdout
    assert b"tok/s" in done.stderr


def test_a_verb_can_be_called_as_a_module() -> None:
    done = subprocess.run([*BITLLM, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("bitllm ")


def test_every_option_has_its_environment_variable() -> None:
    context = click.Context(app)
    for name in COMMANDS:
        command = app.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                long = next(opt for opt in parameter.opts if opt.startswith("--"))
                wanted = "BITLLM_" + long[2:].replace("-", "_").upper()
                assert parameter.envvar == wanted, (name, long)
                assert parameter.show_envvar


# Streams that take nothing


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which `$BITLLM` is the command."""
    return subprocess.run(
        ["sh", "-c", line],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "BITLLM": " ".join(BITLLM), **variables},
    )


@pytest.mark.parametrize("arguments", ["--version", "--help", "run hi", "info"])
def test_a_closed_stdout_is_one_clear_error(arguments: str) -> None:
    done = shell(f"$BITLLM {arguments} >&-")
    assert done.stderr == "error: standard output is closed\n"
    assert done.returncode == 1


def test_notes_do_not_go_to_stdout_when_stderr_is_closed(model: str) -> None:
    done = shell(f"$BITLLM run x -n 1 -m {model}-missing 2>&-")
    assert done.stdout == ""
    assert done.returncode == 1
    done = shell("$BITLLM --version 2>&-")
    assert done.stdout.startswith("bitllm ")
    assert done.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("arguments", ["--version", "--help", "run --help", ""])
def test_a_full_disk_behind_stdout_is_one_clear_error(arguments: str) -> None:
    done = shell(f"$BITLLM {arguments} >/dev/full")
    assert done.stderr == "error: No space left on device\n"
    assert done.returncode == 1


# Where a value came from


def test_a_wrong_device_of_the_environment_is_said_to_be_from_there(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLLM_DEVICE", "foo")
    assert "unknown device 'foo', set by BITLLM_DEVICE" in invoke("info", model).stderr
    assert "unknown device 'bar', asked for" in invoke("info", model, "--device", "bar").stderr
