"""Model references: local paths, the Hub (one on this machine), the demo model, typing errors."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from bitllm.errors import (
    BitllmError,
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from bitllm.formats import hub as module
from bitllm.formats import resolve_model
from fake_hub import FakeHub, serve

PLAIN = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "model.safetensors": b"weights",
    "README.md": b"words",
    "pytorch_model.bin": b"the same again",
    "original/model.safetensors": b"the same in another layout",
    "onnx/config.json": b"{}",
}
SHARDS = {"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-1.safetensors"}}
REPOS = {
    "org/plain": PLAIN,
    "org/gated": {"config.json": b"{}", "model.safetensors": b"w"},
    "org/sharded": {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(SHARDS).encode(),
        "x-1.safetensors": b"1",
        "x-2.safetensors": b"2",
        "x-3.safetensors": b"not named by the index",
    },
    "org/gguf": {"model.gguf": b"GGUF"},
    "org/bin": {"config.json": b"{}", "pytorch_model.bin": b"w"},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with serve(FakeHub(REPOS, gated=frozenset({"org/gated"}))) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield hub


def refusal(ref: str | None, error: type[BitllmError] = ModelNotFoundError) -> str:
    with pytest.raises(error) as caught:
        resolve_model(ref)
    assert caught.value.hint
    return str(caught.value)


class TestLocal:
    def test_directory(self, tmp_path: Path) -> None:
        found = resolve_model(tmp_path)
        assert (found.path, found.name) == (tmp_path.resolve(), tmp_path.name)
        assert not found.is_demo
        assert resolve_model(str(tmp_path) + "/").name == tmp_path.name

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "x-1.safetensors"])
    def test_a_file_in_it(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        assert resolve_model(tmp_path / name).path == tmp_path.resolve()

    def test_files_of_other_kinds(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").touch()
        assert resolve_model(tmp_path / "m.gguf").path == tmp_path / "m.gguf"
        (tmp_path / "notes.txt").touch()
        assert "notes.txt" in refusal(str(tmp_path / "notes.txt"))

    def test_an_existing_path_wins_over_the_hub(self, hub: FakeHub, tmp_path: Path) -> None:
        (tmp_path / "org" / "plain").mkdir(parents=True)
        assert resolve_model("org/plain").path == tmp_path / "org" / "plain"
        assert not hub.downloads
        (tmp_path / "hf:org" / "plain").mkdir(parents=True)
        assert resolve_model("hf:org/plain").path.name == hub.commit("org/plain")

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "model").mkdir()
        assert resolve_model("~/model").path == tmp_path / "model"

    def test_no_revision(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="revision"):
            resolve_model(tmp_path, revision="main")
        with pytest.raises(ConfigError, match="revision"):
            resolve_model(None, revision="main")

    def test_near_names_on_disk(self, tmp_path: Path) -> None:
        (tmp_path / "my-model").mkdir()
        assert "my-model" in refusal(str(tmp_path / "my-modle"))


class TestNames:
    @pytest.mark.parametrize(
        ("ref", "meant"),
        [
            ("bitnet-b1.58-2B-4T", "microsoft/bitnet-b1.58-2B-4T"),
            ("bitnet-b1.58-2b4t", "microsoft/bitnet-b1.58-2B-4T"),
            ("Falcon3-1B-Instruct-1.58bit", "tiiuae/Falcon3-1B-Instruct-1.58bit"),
        ],
    )
    def test_well_known_models(self, ref: str, meant: str) -> None:
        assert meant in refusal(ref)

    @pytest.mark.parametrize(
        "ref", ["", "./none", "/none/at/all", "a/b/c", "hf:", "hf:x", "a b/c", "x"]
    )
    def test_what_is_no_reference(self, ref: str) -> None:
        assert repr(ref) in refusal(ref)

    @pytest.mark.parametrize("ref", ["~no such user/model", "x" * 5000, "a/" * 3000])
    def test_what_is_no_path_either(self, ref: str) -> None:
        assert repr(ref)[:200] in refusal(ref)

    def test_two_revisions(self) -> None:
        with pytest.raises(ConfigError, match="two revisions"):
            resolve_model("org/name@main", revision="v1")


class TestHub:
    def test_only_the_needed_files(self, hub: FakeHub) -> None:
        found = resolve_model("org/plain")
        assert found.name == "org/plain"
        assert hub.commit("org/plain")[:12] in found.origin
        assert (found.path / "model.safetensors").read_bytes() == b"weights"
        assert {file for _, file in hub.downloads} == {
            "config.json", "tokenizer.json", "model.safetensors",
        }  # fmt: skip

    def test_no_progress_bar_without_a_terminal(
        self, hub: FakeHub, capfd: pytest.CaptureFixture[str]
    ) -> None:
        resolve_model("org/plain")
        assert capfd.readouterr() == ("", "")

    def test_shards(self, hub: FakeHub) -> None:
        path = resolve_model("hf:org/sharded").path
        assert {file.name for file in path.glob("*.safetensors")} == {
            "x-1.safetensors", "x-2.safetensors",
        }  # fmt: skip

    @pytest.mark.parametrize("ref", ["org/plain@v1", "hf:org/plain@main"])
    def test_revisions(self, hub: FakeHub, ref: str) -> None:
        assert resolve_model(ref).path.name == hub.commit("org/plain")
        assert resolve_model("org/plain", revision="v1").path.name == hub.commit("org/plain")

    def test_the_cache_serves_the_second_time(self, hub: FakeHub) -> None:
        first = resolve_model("org/plain")
        count = len(hub.downloads)
        assert resolve_model("org/plain") == first
        assert len(hub.downloads) == count

    def test_the_cache_serves_when_the_hub_is_down(self, hub: FakeHub) -> None:
        first = resolve_model("org/plain")
        hub.broken = True
        assert resolve_model("org/plain") == first

    def test_typing_error(self, hub: FakeHub) -> None:
        message = refusal("microsoft/bitnet-b1.58-2B4T")
        assert "no model microsoft/bitnet-b1.58-2B4T" in message
        assert "did you mean microsoft/bitnet-b1.58-2B-4T" in message

    def test_unknown_revision(self, hub: FakeHub) -> None:
        assert "no revision 'v9'" in refusal("org/plain@v9")

    def test_gated(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        message = refusal("org/gated")
        assert "gated" in message
        assert "HF_TOKEN" in message
        monkeypatch.setenv("HF_TOKEN", hub.token)
        assert resolve_model("org/gated").path.is_dir()

    def test_repositories_of_other_formats(self, hub: FakeHub) -> None:
        assert "no config.json" in refusal("org/gguf", UnsupportedModelError)
        assert "no model.safetensors" in refusal("org/bin", UnsupportedModelError)

    def test_offline(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        first = resolve_model("org/plain")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
        try:
            assert resolve_model("org/plain") == first
            assert "HF_HUB_OFFLINE" in refusal("org/sharded")
        finally:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            huggingface_hub.close_session()

    def test_no_network(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        message = refusal("org/plain")
        assert "cannot be reached" in message
        assert "HF_ENDPOINT" in message

    @pytest.mark.parametrize(
        ("code", "words"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "cannot be written")]
    )
    def test_the_cache_cannot_hold_it(
        self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, code: int, words: str
    ) -> None:
        def full(*_: object, **__: object) -> str:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
        message = refusal("org/plain", CheckpointError)
        assert words in message
        assert "HF_HOME" in message

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert "pip install huggingface_hub" in refusal("org/plain")

    def test_variables_of_the_environment(self, hub: FakeHub, tmp_path: Path) -> None:
        code = (
            "import sys; from bitllm.formats import resolve_model;"
            "assert 'huggingface_hub' not in sys.modules;"
            "print(resolve_model('org/gated').path)"
        )
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **variables, "HF_TOKEN": hub.token},
            capture_output=True,
            text=True,
            check=True,
        )
        path = Path(done.stdout.strip())
        assert path.is_relative_to(tmp_path / "home")
        assert (path / "model.safetensors").read_bytes() == b"w"


class TestDemo:
    def test_nothing_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.importlib.resources, "files", lambda _: tmp_path)
        assert "microsoft/" in refusal(None)
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo" / "model.safetensors").touch()
        found = resolve_model()
        assert found.is_demo
        assert found.path == tmp_path / "demo"
