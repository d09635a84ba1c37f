"""`bitllm pull`, `list` and `rm`, against a Hub on this machine and a cache of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bitllm.cli.app import app
from bitllm.formats import resolve_model
from bitllm.formats.hub import cache as module
from cli_model import write_model
from fake_hub import FakeHub, serve, use


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = write_model(tmp_path_factory.mktemp("models") / "tiny")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: dict[str, bytes]
) -> Iterator[FakeHub]:
    repos = {
        "tiiuae/Falcon-E-1B-Instruct": model,
        "org/dense": {**model, "config.json": b'{"architectures": ["LlamaForCausalLM"]}'},
        "org/ggufs": {"a-i2_s.gguf": b"GGUF one", "a-tq2_0.gguf": b"GGUF two"},
    }
    for name in os.environ:
        if name.startswith("BITLLM_"):
            monkeypatch.delenv(name)
    with serve(FakeHub(repos)) as hub:
        use(hub, monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that --offline is undone behind a test
        monkeypatch.chdir(tmp_path)
        yield hub


def bitllm(*arguments: object, **settings: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], prog_name="bitllm", **settings)


def listed(*arguments: str) -> dict[str, dict[str, Any]]:
    result = bitllm("list", "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    return {entry["name"]: entry for entry in json.loads(result.stdout)}


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").glob("models--*"))


class TestPull:
    def test_by_a_short_name(self, hub: FakeHub, model: dict[str, bytes]) -> None:
        facts = json.loads(bitllm("pull", "falcon-e-1b", "--json").stdout)
        assert facts["name"] == "tiiuae/Falcon-E-1B-Instruct"
        assert facts["bytes"] == sum(map(len, model.values()))
        assert facts["problem"] is None
        count = len(hub.downloads)
        text = bitllm("pull", "falcon-e-1b").stdout
        assert facts["path"] in text
        assert len(hub.downloads) == count

    def test_what_cannot_be_run_is_said(self, hub: FakeHub) -> None:
        result = bitllm("pull", "org/dense")
        assert result.exit_code == 0
        assert "warning: bitllm cannot run it: " in result.stderr
        assert "dense" in result.stderr

    def test_a_local_directory_does_not_hide_the_hub(self, hub: FakeHub, tmp_path: Path) -> None:
        (tmp_path / "org" / "ggufs").mkdir(parents=True)
        assert bitllm("pull", "org/ggufs:i2_s").exit_code == 0
        assert hub.downloads == [("org/ggufs", "a-i2_s.gguf")]

    @pytest.mark.parametrize(
        ("ref", "words"),
        [
            ("./here", "nothing to fetch"),
            ("falcon-e-1", "did you mean falcon-e-1b"),
            ("x/y", "no model x/y"),
        ],
    )
    def test_refusals(self, hub: FakeHub, tmp_path: Path, ref: str, words: str) -> None:
        (tmp_path / "here").mkdir()
        result = bitllm("pull", ref)
        assert result.exit_code == 1
        assert words in result.stderr
        assert "Traceback" not in result.stderr

    def test_check_finds_and_removes_what_is_damaged(self, hub: FakeHub) -> None:
        first = json.loads(bitllm("pull", "falcon-e-1b", "--check", "--json").stdout)
        assert first["checked"] == 4
        weights = Path(first["path"]) / "model.safetensors"
        whole = weights.read_bytes()
        weights.resolve().write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        result = bitllm("pull", "falcon-e-1b", "--check")
        assert result.exit_code == 1
        assert "damaged in the cache: model.safetensors" in result.stderr
        assert bitllm("pull", "falcon-e-1b", "--check").exit_code == 0
        assert weights.read_bytes() == whole

    def test_stopped_by_the_keyboard(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("bitllm.formats.resolve_model", stop)
        result = bitllm("pull", "falcon-e-1b")
        assert result.exit_code == 130
        assert "the same command goes on from there" in result.stderr


class TestList:
    def test_nothing(self, hub: FakeHub) -> None:
        result = bitllm("list")
        assert (result.exit_code, result.stdout) == (0, "")
        assert "no models" in result.stderr
        assert listed() == {}

    def test_what_can_be_run(self, hub: FakeHub, model: dict[str, bytes]) -> None:
        path = resolve_model("falcon-e-1b").path
        resolve_model("org/dense")
        # So old that to read it would change the time of access.
        for file in path.iterdir():
            os.utime(file, (1_000_000_000, 1_000_000_000))
        assert set(listed()) == {"tiiuae/Falcon-E-1B-Instruct"}
        entry = listed()["tiiuae/Falcon-E-1B-Instruct"]
        assert entry["path"] == str(path)
        assert entry["format"] == "safetensors"
        assert entry["bytes"] == sum(map(len, model.values()))
        assert entry["last_used"] == 1_000_000_000
        assert entry["problem"] is None
        text = bitllm("list").stdout
        assert "tiiuae/Falcon-E-1B-Instruct" in text
        assert "2001-09-09" in text
        assert "dense" in listed("--all")["org/dense"]["problem"]

    def test_gguf_files_stand_for_themselves(self, hub: FakeHub) -> None:
        resolve_model("org/ggufs:i2_s")
        resolve_model("org/ggufs:tq2_0")
        found = listed("--all")
        assert set(found) == {"org/ggufs/a-i2_s.gguf", "org/ggufs/a-tq2_0.gguf"}
        assert {entry["format"] for entry in found.values()} == {"gguf"}
        assert found["org/ggufs/a-i2_s.gguf"]["bytes"] == len(b"GGUF one")

    def test_a_download_that_ended_early(self, hub: FakeHub) -> None:
        (resolve_model("falcon-e-1b").path / "model.safetensors").unlink()
        blobs = next((module._cache()).glob("*/blobs"))
        (blobs / "0123.incomplete").write_bytes(b"x")
        entry = listed()["tiiuae/Falcon-E-1B-Instruct"]
        assert entry["complete"] is False
        assert "bitllm pull" in entry["problem"]

    def test_a_tokenizer_alone_is_no_model(self, hub: FakeHub) -> None:
        (resolve_model("falcon-e-1b").path / "model.safetensors").unlink()
        assert listed() == {}
        assert listed("--all")["tiiuae/Falcon-E-1B-Instruct"]["problem"] == "no weights"

    def test_revisions(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        resolve_model("falcon-e-1b")
        monkeypatch.setattr(FakeHub, "commit", lambda *_: "ab" * 20)
        resolve_model("falcon-e-1b@v1")
        assert set(listed()) == {"tiiuae/Falcon-E-1B-Instruct", "tiiuae/Falcon-E-1B-Instruct@v1"}

    def test_known_models(self, hub: FakeHub) -> None:
        text = bitllm("list", "--known").stdout
        assert "microsoft/bitnet-b1.58-2B-4T" in text
        assert {"alias": "2b"}.items() <= json.loads(bitllm("list", "--known", "--json").stdout)[
            0
        ].items()

    def test_a_file_where_the_cache_should_be(self, hub: FakeHub, tmp_path: Path) -> None:
        (tmp_path / "cache").write_bytes(b"")
        assert listed() == {}

    def test_nothing_is_asked_of_the_hub(self, hub: FakeHub) -> None:
        resolve_model("falcon-e-1b")
        count = len(hub.requests)
        listed()
        assert bitllm("info", "falcon-e-1b", "--offline").exit_code == 0
        assert len(hub.requests) == count
        result = bitllm("info", "org/ggufs:i2_s", "--offline")
        assert result.exit_code == 1
        assert "not in the cache" in result.stderr
        assert len(hub.requests) == count


class TestRm:
    def test_a_model(self, hub: FakeHub, tmp_path: Path) -> None:
        resolve_model("falcon-e-1b")
        resolve_model("org/dense")
        result = bitllm("rm", "falcon-e-1b", "--yes")
        assert result.exit_code == 0
        assert result.stdout == "removed tiiuae/Falcon-E-1B-Instruct\n"
        assert cached(tmp_path) == ["models--org--dense"]

    def test_json_says_what_went(self, hub: FakeHub) -> None:
        path = resolve_model("falcon-e-1b").path
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        result = bitllm("rm", "falcon-e-1b", "--yes", "--json")
        assert json.loads(result.stdout) == [{"name": "tiiuae/Falcon-E-1B-Instruct", "bytes": size}]

    def test_all_or_nothing(self, hub: FakeHub, tmp_path: Path) -> None:
        resolve_model("org/dense")
        result = bitllm("rm", "org/dense", "falcon-e-1b", "--yes")
        assert result.exit_code == 1
        assert "falcon-e-1b is not in the cache" in result.stderr
        assert cached(tmp_path) == ["models--org--dense"]

    @pytest.mark.parametrize(
        "ref", ["./org", "org/other", "org/dense@v9", "org/dense:i2_s", "demo"]
    )
    def test_what_is_not_there(self, hub: FakeHub, tmp_path: Path, ref: str) -> None:
        (tmp_path / "org").mkdir()
        resolve_model("org/dense")
        result = bitllm("rm", ref, "--yes")
        assert result.exit_code == 1
        assert "bitllm list" in result.stderr
        assert (tmp_path / "org").is_dir()
        assert cached(tmp_path) == ["models--org--dense"]

    def test_nobody_to_ask(self, hub: FakeHub, tmp_path: Path) -> None:
        resolve_model("org/dense")
        result = bitllm("rm", "org/dense")
        assert result.exit_code == 1
        assert "--yes" in result.stderr
        assert cached(tmp_path) == ["models--org--dense"]

    @pytest.mark.parametrize(("answer", "left"), [("y", []), ("n", ["models--org--dense"])])
    def test_it_asks_at_a_terminal(
        self,
        hub: FakeHub,
        tmp_path: Path,
        answer: str,
        left: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        resolve_model("org/dense")
        monkeypatch.setattr("bitllm.cli.rm._somebody_is_there", lambda: True)
        result = bitllm("rm", "org/dense", input=f"{answer}\n")
        assert "remove org/dense (" in result.stderr
        assert cached(tmp_path) == left

    def test_a_file_of_several(self, hub: FakeHub, tmp_path: Path) -> None:
        one, two = resolve_model("org/ggufs:i2_s").path, resolve_model("org/ggufs:tq2_0").path
        blob = one.resolve()
        assert bitllm("rm", "org/ggufs/a-i2_s.gguf", "--yes").exit_code == 0
        assert not one.exists()
        assert not blob.exists()
        assert two.read_bytes() == b"GGUF two"
        assert bitllm("rm", "org/ggufs:tq2_0", "--yes").exit_code == 0
        assert not two.exists()

    def test_one_revision_of_two(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        first = resolve_model("falcon-e-1b").path
        monkeypatch.setattr(FakeHub, "commit", lambda *_: "ab" * 20)
        resolve_model("falcon-e-1b@v1")
        assert bitllm("rm", "falcon-e-1b@v1", "--yes").exit_code == 0
        assert (first / "model.safetensors").is_file()
        assert set(listed()) == {"tiiuae/Falcon-E-1B-Instruct"}

    def test_a_blob_that_another_revision_uses_stays(
        self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = resolve_model("org/ggufs:i2_s").path
        monkeypatch.setattr(FakeHub, "commit", lambda *_: "ab" * 20)
        second = resolve_model("org/ggufs:i2_s@v1").path
        assert bitllm("rm", "org/ggufs:i2_s@v1", "--yes").exit_code == 0
        assert not second.exists()
        assert first.read_bytes() == b"GGUF one"

    def test_what_an_interrupted_download_left(self, hub: FakeHub, tmp_path: Path) -> None:
        blobs = tmp_path / "cache" / "models--org--begun" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / "0123.incomplete").write_bytes(b"x")
        assert bitllm("rm", "org/begun", "--yes").exit_code == 0
        assert cached(tmp_path) == []
