"""`bitllm run`: where the prompt comes from, where the text goes, and what is said about it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bitllm.backends.base import DecoderInfo
from bitllm.cli.answer import status_line
from bitllm.cli.app import app
from bitllm.cli.run import compose
from bitllm.engine.loading import load
from bitllm.engine.outputs import Usage
from bitllm.errors import ConfigError
from cli_model import write_model

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


def run(*arguments: str, **settings: Any) -> Result:
    return CliRunner().invoke(app, ["run", *arguments], prog_name="bitllm", **settings)


def written(model: str, prompt: str, **options: Any) -> str:
    """What the Python API writes for the same question."""
    with load(model, device="reference") as llm:
        return llm.generate(prompt, **options).text


def test_text_goes_to_stdout_and_the_status_line_to_stderr(model: str) -> None:
    result = run("abc", "-m", model, "--max-tokens", "9")
    assert result.exit_code == 0
    assert result.stdout == written(model, "abc", max_tokens=9) + "\n"
    speed = r"\d+(\.\d+)? tok/s"
    assert re.fullmatch(
        rf"prompt 4 tok {speed} · gen 9 tok {speed}( · [\d.]+ [kMG]B)? · numpy ×1\n", result.stderr
    )


def test_quiet_prints_no_status_line(model: str) -> None:
    assert run("abc", "-m", model, "--max-tokens", "3", "--quiet").stderr == ""


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_streamed_or_not_the_text_is_the_same(model: str, flag: str) -> None:
    options = ["--max-tokens", "12", "--temperature", "1", "--seed", "5"]
    result = run("abc", "-m", model, flag, *options)
    assert result.stdout == written(model, "abc", max_tokens=12, temperature=1, seed=5) + "\n"


def test_sampling_options_reach_the_model(model: str) -> None:
    arguments = [
        "--top-k",
        "30",
        "--top-p",
        "0.9",
        "--min-p",
        "0.01",
        "--repetition-penalty",
        "1.5",
    ]
    arguments += ["--typical-p", "0.4"]
    result = run("abc", "-m", model, "-n", "12", "-t", "2", "--seed", "1", *arguments)
    assert result.stdout == (
        written(
            model,
            "abc",
            max_tokens=12,
            temperature=2,
            seed=1,
            top_k=30,
            top_p=0.9,
            min_p=0.01,
            typical_p=0.4,
            repetition_penalty=1.5,
        )
        + "\n"
    )


def test_stop_strings_end_the_text(model: str) -> None:
    whole = written(model, "abc", max_tokens=30, temperature=1, seed=5)
    first, second = whole[12], whole[6]
    sampling = ["--max-tokens", "30", "--temperature", "1", "--seed", "5"]
    result = run("abc", "-m", model, *sampling, "--stop", first, "--stop", second)
    cut = min(whole.index(first), whole.index(second))
    assert result.stdout == whole[:cut] + "\n"


@pytest.mark.parametrize(
    ("stdin", "prompt", "whole"),
    [
        (None, "ask", "ask"),
        ("text", None, "text"),
        ("text", "ask", "text\nask"),
        ("", "ask", "ask"),
        ("", None, None),
        (None, None, None),
    ],
)
def test_stdin_comes_before_the_argument(
    stdin: str | None, prompt: str | None, whole: str | None
) -> None:
    assert compose(stdin, prompt) == whole


@pytest.mark.parametrize(
    ("stdin", "arguments", "whole"),
    [
        ("one\ntwo\n", [], "one\ntwo"),
        ("one\n\n", [], "one\n"),
        ("one", ["ask"], "one\nask"),
        ("", ["ask"], "ask"),
    ],
)
def test_stdin_is_read(model: str, stdin: str, arguments: list[str], whole: str) -> None:
    result = run(*arguments, "-m", model, "--max-tokens", "8", input=stdin)
    assert result.stdout == written(model, whole, max_tokens=8) + "\n"


def test_no_prompt_is_a_usage_error(model: str) -> None:
    result = run("-m", model, input="")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no prompt: give it as an argument or on stdin\n")


def test_stdin_through_a_real_pipe(model: str) -> None:
    command = [*BITLLM, "run", "-m", model, "--max-tokens", "8", "-q"]
    done = subprocess.run(command, input="é ü\n".encode(), capture_output=True, check=True)
    assert done.stdout.decode() == written(model, "é ü", max_tokens=8) + "\n"
    assert done.stderr == b""


def test_files_come_before_stdin_and_the_argument(model: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("one\n")
    second.write_text("two\r\n")
    options = ["-m", model, "--max-tokens", "6"]
    result = run("ask", "-f", str(first), "-f", str(second), *options, input="piped")
    assert result.stdout == written(model, "one\ntwo\npiped\nask", max_tokens=6) + "\n"
    result = run("ask", "-f", "-", "-f", str(first), *options, input="piped\n")
    assert result.stdout == written(model, "piped\none\nask", max_tokens=6) + "\n"
    missing = run("-f", str(tmp_path / "none.txt"), *options)
    assert missing.exit_code == 1
    assert missing.stderr == f"error: {tmp_path / 'none.txt'}: No such file or directory\n"


def test_several_completions_have_a_line_between_them(model: str) -> None:
    sampling = ["-m", model, "-n", "6", "-t", "1", "--seed", "5"]
    with load(model, device="reference") as llm:
        wanted = llm.generate("abc", max_tokens=6, temperature=1, seed=5, n=3)
        best = llm.generate("abc", max_tokens=6, temperature=1, seed=5, best_of=3)
    result = run("abc", *sampling, "--completions", "3")
    assert result.stdout == "---\n".join(f"{each.text}\n" for each in wanted.choices)
    assert run("abc", *sampling, "--best-of", "3").stdout == best.text + "\n"
    document = json.loads(run("abc", *sampling, "--completions", "3", "--json").stdout)
    texts = [document["text"], *(other["text"] for other in document["alternatives"])]
    assert texts == [each.text for each in wanted.choices]


def test_more_sampling_options_reach_the_model(model: str) -> None:
    arguments = ["--frequency-penalty", "0.5", "--presence-penalty", "0.25", "--min-tokens", "2"]
    arguments += ["--logit-bias", "65=3.5", "--logit-bias", "66=-100", "--stop-token-id", "67"]
    result = run("abc", "-m", model, "-n", "20", "-t", "1", "--seed", "1", *arguments)
    options = {"frequency_penalty": 0.5, "presence_penalty": 0.25, "min_tokens": 2}
    bias = {"logit_bias": {65: 3.5, 66: -100.0}, "stop_token_ids": [67]}
    plain = {"max_tokens": 20, "temperature": 1, "seed": 1}
    assert result.stdout == written(model, "abc", **plain, **options, **bias) + "\n"
    assert result.stdout != written(model, "abc", **plain) + "\n"


def test_ignored_stop_ids_and_a_timeout(model: str) -> None:
    forced = ["-m", model, "-n", "5", "--logit-bias", "257=1000", "--json"]
    ended = json.loads(run("abc", *forced).stdout)
    assert (ended["finish_reason"], len(ended["token_ids"])) == ("stop", 1)
    ignored = json.loads(run("abc", *forced, "--ignore-eos").stdout)
    assert (ignored["finish_reason"], ignored["token_ids"]) == ("length", [257] * 5)
    late = json.loads(run("abc", "-m", model, "-n", "5000", "--timeout", "0.05", "--json").stdout)
    assert late["finish_reason"] == "timeout"


def test_forms_of_a_text(model: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "boolean"}')
    options = ["-m", model, "--max-tokens", "40", "-q"]
    for value in (str(schema), schema.read_text()):
        assert json.loads(run("x", *options, "--json-schema", value).stdout) in (True, False)
    assert re.fullmatch("[ab]{3}\n", run("x", *options, "--regex", "[ab]{3}").stdout)
    chosen = run("x", *options, "--choice", "one two", "--choice", "three")
    assert chosen.stdout in ("one two\n", "three\n")
    grammar = tmp_path / "grammar.lark"
    grammar.write_text('start: "yes" | "no"')
    assert run("x", *options, "--grammar", str(grammar)).stdout in ("yes\n", "no\n")
    both = run("x", *options, "--regex", "a", "--choice", "b")
    assert both.exit_code == 1
    assert "regex and choice cannot be asked for together" in both.stderr


def test_log_probabilities_are_in_the_json(model: str) -> None:
    options = ["--logprobs", "2", "--prompt-logprobs", "1", "--json"]
    document = json.loads(run("abc", "-m", model, "-n", "3", *options).stdout)
    assert [len(token["top"]) for token in document["logprobs"]] == [2, 2, 2]
    assert [len(token["top"]) for token in document["prompt_logprobs"]] == [1, 1, 1]


def test_engine_options_reach_the_engine(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def remember(ref: str, progress: Any, **options: Any) -> Any:
        seen.update(options)
        raise ConfigError("seen")

    monkeypatch.setattr("bitllm.engine.loading.load", remember)
    monkeypatch.delenv("BITLLM_DEVICE")
    monkeypatch.setenv("BITLLM_MEMORY_LIMIT", "2.5GB")
    arguments = ["--kv-tokens", "600", "--max-batch-tokens", "32", "--no-prefix-cache"]
    assert run("x", "-m", model, "--isa", "scalar", *arguments).stderr == "error: seen\n"
    assert seen == {
        "isa": "scalar",
        "kv_tokens": 600,
        "max_batch_tokens": 32,
        "prefix_cache": False,
        "memory_limit": 2_500_000_000,
    }
    seen.clear()
    monkeypatch.delenv("BITLLM_MEMORY_LIMIT")
    run("x", "-m", model)
    assert seen == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--memory-limit", "lots"], "'lots' is no size in bytes; write 4096, 800MB"),
        (["--logit-bias", "A=1"], "'A=1' is no token id and number such as 42=-1.5"),
        (["--completions", "0"], "0 is not in the range"),
    ],
)
def test_values_that_cannot_be_read(model: str, arguments: list[str], says: str) -> None:
    result = run("abc", "-m", model, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr


def test_json_is_one_document_with_everything(model: str) -> None:
    result = run("abc", "-m", model, "--max-tokens", "6", "--json")
    document = json.loads(result.stdout)
    with load(model, device="reference") as llm:
        completion = llm.generate("abc", max_tokens=6)
    assert document["text"] == completion.text
    assert document["token_ids"] == list(completion.token_ids)
    assert document["finish_reason"] == "length"
    assert document["usage"]["prompt_tokens"] == 4
    assert document["usage"]["completion_tokens"] == 6
    assert document["model"] == Path(model).name
    assert "tok/s" in result.stderr


def test_chat_uses_the_template(model: str) -> None:
    with load(model, device="reference") as llm:
        question = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "abc"},
        ]
        alone = llm.chat("abc", max_tokens=7).text
        both = llm.chat(question, max_tokens=7).text
    options = ["-m", model, "--max-tokens", "7"]
    assert run("abc", "--chat", *options).stdout == alone + "\n"
    assert run("abc", "--system", "be brief", *options).stdout == both + "\n"
    assert json.loads(run("abc", "--chat", "--json", *options).stdout)["text"] == alone


def test_chat_without_a_template_is_an_error(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "plain", chat=False))
    result = run("abc", "--chat", "-m", model)
    assert result.exit_code == 1
    assert "chat template" in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr


def test_options_come_from_the_environment_and_the_command_line_wins(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLLM_MODEL", model)
    monkeypatch.setenv("BITLLM_MAX_TOKENS", "5")
    monkeypatch.setenv("BITLLM_JSON", "1")
    assert len(json.loads(run("abc").stdout)["token_ids"]) == 5
    assert len(json.loads(run("abc", "--max-tokens", "3").stdout)["token_ids"]) == 3
    monkeypatch.setenv("BITLLM_MAX_TOKENS", "many")
    result = run("abc")
    assert result.exit_code == 2
    assert "many" in result.stderr


def test_guesses_can_be_switched_off_and_a_second_model_named(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["ab ab ab ab", "-m", model, "-n", "60", "--context", "128", "--json"]
    usages = {}
    for options in (("--speculation", "off"), ("--draft-model", model, "--draft-tokens", "3")):
        usages[options[0]] = json.loads(run(*arguments, *options).stdout)
    off, drafted = usages.values()
    assert off["usage"]["drafted_tokens"] == 0
    assert off["text"] == drafted["text"]
    monkeypatch.setenv("BITLLM_SPECULATION", "off")
    refused = run(*arguments, "--draft-model", model)
    assert refused.exit_code != 0
    assert "speculation is off" in refused.stderr


def test_a_stop_string_from_the_environment_keeps_its_spaces(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(model, "abc", max_tokens=30, temperature=1, seed=5)
    monkeypatch.setenv("BITLLM_STOP", f"{whole[3]} {whole[6]}")
    sampling = ["--max-tokens", "30", "--temperature", "1", "--seed", "5"]
    assert run("abc", "-m", model, *sampling).stdout == whole + "\n"
    monkeypatch.setenv("BITLLM_STOP", whole[3:6])
    assert run("abc", "-m", model, *sampling).stdout == whole[:3] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "9000"], "9000"),
        (["--temperature", "0.0001"], "temperature"),
        (["--device", "abacus"], "abacus"),
        (["--device", "cuda"], "cuda"),
        (["--context", "100000"], "100000"),
    ],
)
def test_what_the_engine_refuses_is_an_error(
    model: str, arguments: list[str], message: str
) -> None:
    result = run("abc", "-m", model, *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert "\n\nhint: " in result.stderr


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = run("abc", "-m", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: there is no model ")
    assert "\n\nhint: " in result.stderr


def test_the_status_line_leaves_out_what_is_not_known() -> None:
    info = DecoderInfo("cpu", "avx2", 2, 0, 0, 0)
    usage = Usage(512, 128, 0.5, 2.0)
    assert status_line(usage, info, 45_100_000) == (
        "prompt 512 tok 1024 tok/s · gen 128 tok 63.5 tok/s · 45.1 MB · avx2 ×2"
    )
    assert status_line(Usage(3, 1, 0.0, 0.0), info, None) == "prompt 3 tok · gen 1 tok · avx2 ×2"
