"""`bitllm chat`: the conversation, lines on stdin, and a person at a terminal (through a pty)."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bitllm.cli.answer import Answer
from bitllm.cli.app import app
from bitllm.cli.conversation import COMMANDS, Conversation, Message
from bitllm.cli.keyboard import default_history
from bitllm.engine.loading import load
from bitllm.engine.outputs import Chunk
from bitllm.errors import ContextOverflowError
from cli_model import write_model
from interrupted import process_to_interrupt, unmeasured

BITLLM = [sys.executable, "-m", "bitllm"]
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BITLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BITLLM_DEVICE", "reference")


class Echo:
    """Answers "1", "2", ... and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []
        self.attempts: list[int] = []
        self.error: BaseException | None = None

    def __call__(self, messages: list[Message], attempt: int) -> Answer:
        if self.error is not None:
            raise self.error
        self.asked.append([dict(message) for message in messages])
        self.attempts.append(attempt)
        return Answer(str(len(self.asked)), Chunk("", (), "stop"))


def turns(*contents: str) -> list[Message]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_each_question_carries_what_was_said_before() -> None:
    echo = Echo()
    conversation = Conversation(echo, None)
    assert conversation.handle("a")
    assert conversation.handle("b\nc")
    assert echo.asked == [turns("a"), turns("a", "1", "b\nc")]
    assert conversation.messages == turns("a", "1", "b\nc", "2")


def test_the_system_message_comes_first_and_survives_clear() -> None:
    echo = Echo()
    conversation = Conversation(echo, "be brief")
    system = [{"role": "system", "content": "be brief"}]
    conversation.handle("a")
    conversation.handle("/clear")
    assert conversation.messages == system
    conversation.handle("b")
    assert echo.asked == [system + turns("a"), system + turns("b")]


def test_system_sets_shows_and_starts_again(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(Echo(), None)
    conversation.handle("/system")
    conversation.handle("a")
    conversation.handle("/system be  kind")
    conversation.handle("/system")
    assert conversation.messages == [{"role": "system", "content": "be  kind"}]
    captured = capsys.readouterr()
    assert captured.err == "no system message\nbe  kind\n"
    assert captured.out == ""


def test_regenerate_asks_the_same_again_and_counts() -> None:
    echo = Echo()
    conversation = Conversation(echo, None)
    conversation.handle("a")
    conversation.handle("/regenerate")
    conversation.handle("/regenerate")
    assert echo.asked == [turns("a")] * 3
    assert echo.attempts == [0, 1, 2]
    assert conversation.messages == turns("a", "3")
    conversation.handle("b")
    assert echo.attempts[-1] == 0


def test_undo_forgets_question_and_answer(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(Echo(), "s")
    conversation.handle("a")
    conversation.handle("b")
    conversation.handle("/undo")
    assert conversation.messages[1:] == turns("a", "1")
    conversation.handle("/undo")
    conversation.handle("/undo")
    assert conversation.messages == [{"role": "system", "content": "s"}]
    assert capsys.readouterr().err == "nothing to undo\n"


def test_regenerate_before_any_answer(capsys: pytest.CaptureFixture[str]) -> None:
    echo = Echo()
    Conversation(echo, "s").handle("/regenerate")
    assert echo.asked == []
    assert capsys.readouterr().err == "nothing to answer yet\n"


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye"])
def test_leaving(word: str) -> None:
    assert not Conversation(Echo(), None).handle(word)


@pytest.mark.parametrize("blank", ["", "   ", "\t"])
def test_nothing_is_not_asked(blank: str) -> None:
    echo = Echo()
    assert Conversation(echo, None).handle(blank)
    assert echo.asked == []


def test_a_message_may_begin_with_a_slash() -> None:
    echo = Echo()
    Conversation(echo, None).handle("//usr/bin is a path")
    assert echo.asked == [turns("/usr/bin is a path")]


@pytest.mark.parametrize(
    ("typed", "hint"), [("/regen", "did you mean /regenerate?"), ("/xyzzy", "/help lists")]
)
def test_a_mistyped_command_is_not_sent(
    typed: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = Echo()
    assert Conversation(echo, None).handle(typed)
    assert echo.asked == []
    errors = capsys.readouterr().err
    assert f"error: no such command: {typed}" in errors
    assert hint in errors
    assert f"/{typed}" in errors


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    Conversation(Echo(), None).handle("/help")
    errors = capsys.readouterr().err
    for entry, summary in COMMANDS.items():
        assert f"{entry:<14} {summary}" in errors


def test_every_command_of_the_help_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for entry in COMMANDS:
        Conversation(Echo(), None).handle(entry.split()[0])
    assert "no such command" not in capsys.readouterr().err


def test_a_question_that_fails_is_forgotten() -> None:
    echo = Echo()
    conversation = Conversation(echo, None)
    conversation.handle("a")
    echo.error = ContextOverflowError("too long")
    with pytest.raises(ContextOverflowError):
        conversation.handle("b")
    assert conversation.messages == turns("a", "1")


def test_an_answer_that_cannot_be_made_again_is_kept() -> None:
    echo = Echo()
    conversation = Conversation(echo, None)
    conversation.handle("a")
    echo.error = ContextOverflowError("too long")
    with pytest.raises(ContextOverflowError):
        conversation.handle("/regenerate")
    assert conversation.messages == turns("a", "1")


def chat(model: str, *arguments: str, **settings: Any) -> Result:
    command = ["chat", "-m", model, *arguments]
    return CliRunner().invoke(app, command, prog_name="bitllm", **settings)


def test_each_line_of_stdin_is_a_message(model: str) -> None:
    result = chat(model, "--max-tokens", "6", input="abc\n\ndef\n/clear\r\nabc")
    with load(model, device="reference") as llm:
        first = llm.chat("abc", max_tokens=6).text
        second = llm.chat([*turns("abc", first), *turns("def")], max_tokens=6).text
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert result.stderr.count("(cut after 6 tokens)\nprompt ") == 3
    assert "tok/s" in result.stderr


def test_exit_ends_the_lines(model: str) -> None:
    result = chat(model, "--max-tokens", "2", "-q", input="/exit\nabc\n")
    assert result.exit_code == 0
    assert result.stdout == ""


def test_an_error_ends_the_lines(model: str) -> None:
    result = chat(model, "--context", "64", "-q", input=f"{'long ' * 40}\nabc\n")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")


def test_regenerating_with_a_seed_takes_the_next_one(model: str) -> None:
    options = ["--max-tokens", "8", "--temperature", "1", "-q"]
    again = chat(model, *options, "--seed", "5", input="abc\n/regenerate\n").stdout
    first = chat(model, *options, "--seed", "5", input="abc\n").stdout
    second = chat(model, *options, "--seed", "6", input="abc\n").stdout
    assert first != second
    assert again == first + second


def test_regenerating_greedily_says_why_nothing_changes(model: str) -> None:
    result = chat(model, "--max-tokens", "4", "-q", input="abc\n/regenerate\n")
    assert result.stderr.count("greedy: the same again") == 1


def test_sigint_ends_a_chat_without_terminal(model: str) -> None:
    command = [*BITLLM, "chat", "-m", model]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process_to_interrupt(command, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"abc\n")
        process.stdin.flush()
        os.read(process.stdout.fileno(), 10)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_the_history_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_history() == tmp_path / "bitllm" / "chat-history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_history() == tmp_path / ".local" / "state" / "bitllm" / "chat-history"


class Terminal:
    """`bitllm chat` with a keyboard: stdin and stderr are a pty, stdout is a pipe."""

    def __init__(
        self,
        model: str,
        state: Path,
        *arguments: str,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._leader, follower = os.openpty()
        variables = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(state)}
        self.process = subprocess.Popen(
            [*BITLLM, "chat", "-m", model, *arguments],
            stdin=follower,
            stdout=subprocess.PIPE,
            stderr=follower,
            env={**environment, **variables},
            start_new_session=True,
        )
        os.close(follower)
        self._seen = ""

    def expect(self, text: str) -> str:
        """Read the screen up to and including `text`."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self._seen:
            left = deadline - time.monotonic()
            assert left > 0, f"no {text!r} in {self._seen!r}"
            if select.select([self._leader], [], [], left)[0]:
                self._seen += os.read(self._leader, 4096).decode(errors="replace")
        before, _, self._seen = self._seen.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self._leader, keys.encode())

    def answer(self) -> str:
        """Read one line of stdout."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode(errors="replace")

    def leave(self) -> int:
        """Press Ctrl-D and return the exit code."""
        self.type("\x04")
        return self.process.wait(timeout=PATIENCE_S)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._leader)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def terminal(model: str, state: Path) -> Iterator[Terminal]:
    with Terminal(model, state, "--max-tokens", "6") as terminal:
        yield terminal


def expected(model: str, *messages: str) -> list[str]:
    """The answers to messages that follow one another."""
    with load(model, device="reference") as llm:
        said: list[str] = []
        for message in messages:
            said += [message, llm.chat(turns(*said, message), max_tokens=6).text]
    return [f"{answer}\n" for answer in said[1::2]]


def test_a_person_types(model: str, terminal: Terminal, state: Path) -> None:
    first, second = expected(model, "abc", "one\ntwo")
    terminal.expect(">>>")
    terminal.type("abc\r")
    assert terminal.answer() == first
    terminal.expect("tok/s")
    terminal.expect(">>>")
    terminal.type("one\x1b\rtwo\r")
    assert terminal.answer() == second
    terminal.expect(">>>")
    terminal.type("/nope\r")
    terminal.expect("no such command: /nope")
    terminal.expect(">>>")
    terminal.type("half a line\x03")
    terminal.expect("Ctrl-D or /exit leaves the chat")
    terminal.expect(">>>")
    assert terminal.leave() == 0
    remembered = (state / "bitllm" / "chat-history").read_text()
    assert "+abc\n" in remembered
    assert "+one\n+two\n" in remembered


def test_a_backslash_continues_the_message(model: str, terminal: Terminal) -> None:
    terminal.expect(">>>")
    terminal.type("one\\\rtwo\r")
    assert terminal.answer() == expected(model, "one\ntwo")[0]
    terminal.expect(">>>")
    assert terminal.leave() == 0


def test_an_error_does_not_end_the_chat(model: str, state: Path) -> None:
    with Terminal(model, state, "--context", "64", "--max-tokens", "6") as terminal:
        terminal.expect(">>>")
        terminal.type("long " * 40 + "\r")
        terminal.expect("error:")
        terminal.expect(">>>")
        terminal.type("abc\r")
        assert terminal.answer() == expected(model, "abc")[0]
        terminal.expect(">>>")
        assert terminal.leave() == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(model: str, state: Path) -> None:
    with Terminal(model, state, environment=unmeasured()) as terminal:
        terminal.expect(">>>")
        terminal.type("abc\r")
        assert terminal.process.stdout is not None
        os.read(terminal.process.stdout.fileno(), 10)
        # The pty is no controlling terminal, so the key sends no signal by itself.
        terminal.process.send_signal(signal.SIGINT)
        terminal.expect("(stopped)")
        terminal.expect(">>>")
        terminal.type("/exit\r")
        assert terminal.process.wait(timeout=PATIENCE_S) == 0


def test_a_history_that_cannot_be_written_is_told(model: str, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with Terminal(model, blocked, "--max-tokens", "6") as terminal:
        terminal.expect("what you type is not remembered: ")
        terminal.expect(">>>")
        terminal.type("abc\r")
        assert terminal.answer() == expected(model, "abc")[0]
        assert terminal.leave() == 0
