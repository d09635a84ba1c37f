"""`bitllm bench`: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bitllm.bench import model as workbench
from bitllm.bench.random_model import Shape, write_checkpoint
from bitllm.bench.roofline import Limits
from bitllm.cli.app import app

TINY = Shape(hidden=32, ffn=64, layers=2, heads=2, kv_heads=1, head_dim=16, vocab=640)
SHORT = ("-p", "12", "-n", "2", "--depth", "0,33", "--batch", "1,2", "--repeats", "2")
QUICK = (*SHORT, "--no-small")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(path, TINY)
    return path


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BITLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="bitllm")


def test_a_table_on_stdout_and_progress_on_stderr(model: Path) -> None:
    result = bench("-m", model, *QUICK)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[2].startswith("model         tiny: kernels ")
    assert lines[3] == "output        equal to that of the scalar kernels"
    assert [line.split()[:4] for line in lines if line.startswith(("prefill", "decode"))] == [
        ["prefill", "12", "1", "0"],
        ["decode", "2", "1", "0"],
        ["decode", "2", "1", "33"],
        ["prefill", "12", "2", "0"],
        ["decode", "2", "2", "0"],
        ["decode", "2", "2", "33"],
    ]
    assert "bench: checking the output against the scalar kernels" in result.stderr
    assert all(line.startswith("bench: ") for line in result.stderr.splitlines())


def test_json_is_the_whole_result(model: Path) -> None:
    result = bench("-m", model, *QUICK, "--profile", "--json", "--threads", 1, "--isa", "scalar")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["model"], document["kernel"], document["threads"]) == ("tiny", "scalar", 1)
    assert [row["work"] for row in document["speed"]].count("decode") == 4
    assert {row["work"] for row in document["stages"]} == {"prefill", "decode"}
    assert document["limits"]["bandwidth"] > 0
    assert document["operations"] == document["latency"] == document["impossible"] == []
    assert document["tuned"] is None


@pytest.mark.parametrize("packing", ["2bit", "base3"])
def test_engine_options_reach_the_engine(model: Path, packing: str) -> None:
    result = bench(
        *("-m", model, *QUICK, "--json", "--packing", packing),
        *("--head", "int8-screened", "--kv-dtype", "int8"),
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["packing"] == packing
    assert document["head"] == "int8-screened"
    assert document["kv_dtype"] == "int8"


def test_tuning_is_kept_and_told_by_info(model: Path) -> None:
    result = bench("-m", model, *QUICK, "--tune", "--batch", "1")
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("faster packing: ")]
    best = line.split()[2].rstrip(",")
    told = CliRunner().invoke(app, ["info", str(model)]).stdout
    assert f"packing       {best} (measured here by bitllm bench --tune, tok/s: 2bit " in told
    forced = CliRunner().invoke(app, ["info", str(model), "--packing", "base3"]).stdout
    assert "packing       base3 (asked for)" in forced


def test_info_names_the_packing_and_why(model: Path) -> None:
    facts = json.loads(CliRunner().invoke(app, ["info", str(model), "--json"]).stdout)
    assert facts["packing"]["reason"].startswith("by the table for ")
    other = CliRunner().invoke(app, ["info", str(model), "--device", "reference", "--json"])
    assert json.loads(other.stdout)["packing"] is None


def test_a_figure_above_the_limits_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Limits(bandwidth=10.0, multiplications=10.0, buffer=64, threads=2)

    class SlowLimits:
        @staticmethod
        def measure(*_: object) -> Limits:
            return slow

    monkeypatch.setattr(workbench, "Limits", SlowLimits)
    result = bench("-m", model, *QUICK)
    assert result.exit_code == 1
    assert result.stdout.count("IMPOSSIBLE") == 6
    assert "error: above what this machine can do: prefill of 12 tokens, batch 1" in result.stderr
    assert "% of the read bandwidth" in result.stderr
    assert "hint: measure again while nothing else runs" in result.stderr


def test_a_picture_is_drawn(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "picture.svg"
    result = bench("-m", model, *QUICK, "--plot", file)
    assert result.exit_code == 0, result.stderr
    assert f"picture in {file}" in result.stderr
    assert "decode 2 at 33, batch 2" in file.read_text()


def test_a_missing_matplotlib_is_told_before_anything_is_measured(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **settings: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", refuse)
    result = bench("-m", model, *QUICK, "--plot", "x.png")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "error: a picture needs matplotlib, which cannot be imported: No module named"
        " 'matplotlib'\n\nhint: install it with `pip install 'bitllm[plots]'`\n"
    )


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("x.doc", "x.doc: no picture can be written as .doc"),
        ("x", "x: no picture can be written as a file without suffix"),
        ("nowhere/x.png", "nowhere/x.png: there is no such directory"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_early(model: Path, file: str, message: str) -> None:
    result = bench("-m", model, *QUICK, "--plot", file)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "0"], "0 is less than 1"),
        (["-p", "12,x"], "'12,x' is no list of whole numbers such as 1,8"),
        (["--depth", "-1"], "-1 is less than 0"),
        (["--batch", ""], "'' is no list of whole numbers"),
        (["-n", "0"], "0 is not in the range"),
    ],
)
def test_a_wrong_number_ends_with_2(arguments: list[str], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_context_that_is_too_short_is_an_error(model: Path) -> None:
    result = bench("-m", model, "--context", 40, "--depth", "39", "-n", 2)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: 128 tokens are more than the context of 40") or (
        "41 tokens are more than the context of 40 tokens" in result.stderr
    )


def test_small_work_has_its_own_tables(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitllm.bench import operations

    monkeypatch.setattr(operations, "SECONDS", 1e-3)
    monkeypatch.setattr(operations, "TOKENS", 4)
    monkeypatch.setattr(operations, "SHAPES", {"1m": TINY, "10m": TINY})
    result = bench("-m", model, *SHORT)
    assert result.exit_code == 0, result.stderr
    assert "quantised operations a second: quantise, ternary mat-vec, rescale" in result.stdout
    assert "\n512 x 512 " in result.stdout
    assert "\n1M random " in result.stdout
    assert "\n10M random " in result.stdout


def test_more_sequences_than_a_step_has_rows_are_refused_at_once(model: Path) -> None:
    result = bench("-m", model, "--batch", "1,257", "--no-small")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "batch 257: a step has at most 256 token rows" in result.stderr
    assert "checking the output" not in result.stderr
