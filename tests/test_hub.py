"""Model references: local paths, the Hub (one on this machine), the demo model, typing errors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from bitllm.errors import (
    BitllmError,
    CheckpointError,
    ConfigError,
    FormatError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from bitllm.formats import resolve_model
from bitllm.formats.hub import download
from bitllm.formats.hub import resolve as module
from bitllm.formats.hub.download import check_file
from bitllm.formats.hub.failures import reason
from bitllm.formats.hub.known_models import KNOWN_MODELS
from bitllm.formats.hub.references import HubReference, parse_reference
from fake_hub import FakeHub, git_sha1, serve, use

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
LARGE = bytes(range(256)) * 4096


def index_of(shard: str) -> dict[str, bytes]:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    return {"config.json": b"{}", "model.safetensors.index.json": index, "secret.bin": b"s"}


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
    "org/gguf": {"model.gguf": b"GGUF", "tokenizer.json": b"{}"},
    "org/ggufs": {
        "config.json": b"{}",
        "m-i2_s.gguf": b"GGUF i2_s",
        "m-i2_s_big.gguf": b"GGUF i2_s_big",
        "m.TQ2_0.gguf": b"GGUF tq2_0",
        "sub/m-TQ1_0-00001-of-00002.gguf": b"GGUF one",
        "sub/m-TQ1_0-00002-of-00002.gguf": b"GGUF two",
    },
    "org/bin": {"config.json": b"{}", "pytorch_model.bin": b"w"},
    "org/none": {"config.json": b"{}", "weights.npz": b"w"},
    "org/words": {"README.md": b"words"},
    "org/wild": index_of("*"),
    "org/climbing": index_of("../../x.safetensors"),
    "org/absolute": index_of("/etc/passwd"),
    "org/backslash": index_of("..\\x.safetensors"),
    "org/gone": index_of("gone.safetensors"),
    "org/large": {"config.json": b"{}", "model.safetensors": LARGE},
    "microsoft/bitnet-b1.58-2B-4T": {"config.json": b"{}", "model.safetensors": b"2b"},
    "microsoft/bitnet-b1.58-2B-4T-gguf": {"ggml-model-i2_s.gguf": b"GGUF 2b"},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with serve(FakeHub(REPOS, gated=frozenset({"org/gated"}))) as hub:
        use(hub, monkeypatch, tmp_path / "cache")
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
        found = resolve_model(tmp_path / "m.gguf")
        assert (found.path, found.directory) == (tmp_path / "m.gguf", tmp_path)
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

    def test_a_path_that_is_not_there_is_called_that(self, tmp_path: Path) -> None:
        assert "no such file or directory" in refusal(str(tmp_path / "nothing"))
        assert "no such file or directory" in refusal("./nothing")

    def test_a_name_in_a_directory_of_this_machine_is_a_path(
        self, hub: FakeHub, tmp_path: Path
    ) -> None:
        (tmp_path / "models" / "mine").mkdir(parents=True)
        message = refusal("models/mien")
        assert "there is no file or directory 'models/mien', nor a model" in message
        assert message.endswith("hint: did you mean models/mine?")
        assert "HF_TOKEN" in refusal("models/other")  # nothing is near
        assert "file or directory" not in refusal("hf:models/mien")
        assert "file or directory" not in refusal("elsewhere/mine")

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
        first, file = resolve_model("org/plain"), resolve_model("org/gguf")
        hub.broken = True
        assert resolve_model("org/plain") == first
        assert resolve_model("org/gguf") == file

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
        assert "no model.safetensors" in refusal("org/none", UnsupportedModelError)
        assert "no config.json and no GGUF" in refusal("org/words", UnsupportedModelError)
        assert "no GGUF" in refusal("org/words:I2_S", UnsupportedModelError)

    def test_pytorch_weights_where_there_are_no_others(self, hub: FakeHub) -> None:
        assert (resolve_model("org/bin").path / "pytorch_model.bin").read_bytes() == b"w"

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

    def test_offline_from_now_on(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        first, file = resolve_model("org/plain"), resolve_model("org/gguf")
        asked = len(hub.requests)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert resolve_model("org/plain") == first
        assert resolve_model("org/gguf") == file
        assert "HF_HUB_OFFLINE" in refusal("org/sharded")
        assert "bitllm list" in refusal("org/gguf:TQ2_0@v1", ModelNotFoundError)
        assert len(hub.requests) == asked

    def test_offline_with_a_part_of_a_model(
        self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (resolve_model("org/sharded").path / "x-2.safetensors").unlink()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert "not all of it" in refusal("org/sharded")

    def test_no_network(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        message = refusal("org/plain")
        assert "cannot be reached" in message
        assert "HF_ENDPOINT" in message
        assert "://" not in message

    @pytest.mark.parametrize("repo", ["wild", "climbing", "absolute", "backslash"])
    def test_an_index_that_leads_elsewhere(self, hub: FakeHub, repo: str) -> None:
        if repo == "wild":  # a file of that name, and not a pattern for all files
            assert "org/wild lacks *\n" in refusal("org/wild")
        else:
            assert "which is no file name" in refusal(f"org/{repo}", FormatError)
        assert not [file for _, file in hub.downloads if not file.endswith(".json")]

    def test_reasons_hold_no_addresses(self) -> None:
        said = "404 Client Error: Not Found for url: https://host/org/x/resolve/main/y.json"
        assert reason(ValueError(said)) == "404 Client Error: Not Found"
        quoted = "Server error '503 Busy' for url 'http://127.0.0.1:1/a'\nmore"
        assert reason(ValueError(quoted)) == "Server error '503 Busy'"
        assert reason(ValueError("https://host/a")) == "ValueError"

    def test_an_index_that_names_what_is_not_there(self, hub: FakeHub) -> None:
        message = refusal("org/gone")
        assert "org/gone lacks gone.safetensors" in message
        assert "://" not in message

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


class TestGguf:
    def test_the_only_file(self, hub: FakeHub) -> None:
        found = resolve_model("org/gguf")
        assert found.name == "org/gguf/model.gguf"
        assert found.path.read_bytes() == b"GGUF"
        assert (found.directory / "tokenizer.json").is_file()

    @pytest.mark.parametrize(
        ("ref", "file"),
        [
            ("org/ggufs:I2_S", "m-i2_s.gguf"),
            ("org/ggufs:i2_s", "m-i2_s.gguf"),
            ("hf:org/ggufs:TQ2_0@v1", "m.TQ2_0.gguf"),
            ("org/ggufs/m.TQ2_0.gguf", "m.TQ2_0.gguf"),
            ("org/ggufs/m.TQ2_0.gguf@main", "m.TQ2_0.gguf"),
        ],
    )
    def test_one_of_several(self, hub: FakeHub, ref: str, file: str) -> None:
        found = resolve_model(ref)
        assert found.path.name == file
        assert found.name == f"org/ggufs/{file}"
        weights = {path for _, path in hub.downloads if path.endswith(".gguf")}
        assert weights == {file}

    def test_all_parts_of_a_split_file(self, hub: FakeHub) -> None:
        found = resolve_model("org/ggufs:TQ1_0")
        assert found.path.name == "m-TQ1_0-00001-of-00002.gguf"
        second = found.path.with_name("m-TQ1_0-00002-of-00002.gguf")
        assert second.read_bytes() == b"GGUF two"

    def test_several_of_which_none_is_named(self, hub: FakeHub) -> None:
        message = refusal("org/ggufs")
        assert "4 GGUF files" in message
        assert "org/ggufs/m-i2_s.gguf" in message
        assert "no files of kind Q9" in refusal("org/ggufs:Q9")
        assert not [file for _, file in hub.downloads if file.endswith(".gguf")]

    def test_a_file_that_is_not_there(self, hub: FakeHub) -> None:
        assert "org/ggufs lacks none.gguf" in refusal("org/ggufs/none.gguf")


class TestAliases:
    def test_they_are_references(self) -> None:
        for model in KNOWN_MODELS:
            wanted = HubReference(model.repo, model.file, None, model.revision)
            assert parse_reference(model.alias) == wanted
            assert parse_reference(model.alias.upper()) == wanted
            assert parse_reference(model.reference) == wanted
        assert len({model.alias for model in KNOWN_MODELS}) == len(KNOWN_MODELS)

    def test_a_short_name(self, hub: FakeHub) -> None:
        assert resolve_model("2b").name == "microsoft/bitnet-b1.58-2B-4T"
        assert resolve_model("hf:2B@v1").path == resolve_model("2b").path
        assert resolve_model("2b-gguf").path.read_bytes() == b"GGUF 2b"

    @pytest.mark.parametrize(
        ("ref", "meant"), [("falcon-e1b", "falcon-e-1b"), ("2bf16", "2b-bf16")]
    )
    def test_typing_errors(self, ref: str, meant: str) -> None:
        assert f"did you mean {meant}" in refusal(ref)


class TestResuming:
    """A hub that breaks off, sends damaged bytes, or meets a full disk."""

    @pytest.fixture(autouse=True)
    def _no_pause(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(download, "PAUSE_S", 0.0)

    def part(self, tmp_path: Path) -> Path:
        return blobs(tmp_path, "org/large") / f"{hashlib.sha256(LARGE).hexdigest()}.incomplete"

    def test_a_broken_connection_is_taken_up_again(self, hub: FakeHub) -> None:
        hub.cuts = [300_000, 300_000]
        assert (resolve_model("org/large").path / "model.safetensors").read_bytes() == LARGE
        assert hub.starts == [0, 300_000, 600_000]

    def test_the_next_command_goes_on(self, hub: FakeHub, tmp_path: Path) -> None:
        hub.cuts = [300_000] + [0] * download.ATTEMPTS
        resumed = [300_000] * download.ATTEMPTS
        message = refusal("org/large")
        assert f"stopped after 300000 of {len(LARGE)} bytes" in message
        assert "goes on from there" in message
        assert self.part(tmp_path).read_bytes() == LARGE[:300_000]
        assert hub.starts == [0, *resumed]
        assert (resolve_model("org/large").path / "model.safetensors").read_bytes() == LARGE
        assert hub.starts == [0, *resumed, 300_000]
        assert not self.part(tmp_path).exists()

    def test_a_server_without_ranges(self, hub: FakeHub) -> None:
        hub.cuts, hub.without_ranges = [300_000], True
        assert (resolve_model("org/large").path / "model.safetensors").read_bytes() == LARGE
        assert hub.starts == [0, 300_000]

    def test_damaged_bytes_are_not_kept(self, hub: FakeHub, tmp_path: Path) -> None:
        hub.spoiled = True
        message = refusal("org/large", CheckpointError)
        assert "arrived damaged" in message
        assert "model.safetensors" in message
        assert {path.name for path in blobs(tmp_path, "org/large").iterdir()} == {git_sha1(b"{}")}
        hub.spoiled = False
        assert (resolve_model("org/large").path / "model.safetensors").read_bytes() == LARGE

    def test_a_part_that_is_longer_than_the_file(self, hub: FakeHub, tmp_path: Path) -> None:
        self.part(tmp_path).parent.mkdir(parents=True)
        self.part(tmp_path).write_bytes(LARGE + b"x")
        assert (resolve_model("org/large").path / "model.safetensors").read_bytes() == LARGE

    def test_a_part_of_something_else_is_found_by_its_checksum(
        self, hub: FakeHub, tmp_path: Path
    ) -> None:
        self.part(tmp_path).parent.mkdir(parents=True)
        self.part(tmp_path).write_bytes(b"x" * 1000)
        assert "arrived damaged" in refusal("org/large", CheckpointError)
        assert not self.part(tmp_path).exists()

    def test_a_full_disk(self, hub: FakeHub, tmp_path: Path) -> None:
        self.part(tmp_path).parent.mkdir(parents=True)
        self.part(tmp_path).symlink_to("/dev/full")
        message = refusal("org/large", CheckpointError)
        assert "no space left" in message
        assert "goes on from there" in message

    def test_a_disk_that_is_too_small(
        self, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.part(tmp_path).parent.mkdir(parents=True)
        self.part(tmp_path).write_bytes(LARGE[:1000])
        monkeypatch.setattr(download.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=9))
        message = refusal("org/large", CheckpointError)
        assert f"needs {len(LARGE) - 1000} more bytes, the disk of the cache has 9" in message
        assert not hub.starts
        assert self.part(tmp_path).stat().st_size == 1000

    def test_checksums_of_what_is_in_the_cache(self, hub: FakeHub, tmp_path: Path) -> None:
        path = resolve_model("org/large").path
        assert check_file(path / "model.safetensors") is True
        assert check_file(path / "config.json") is True
        (path / "model.safetensors").resolve().write_bytes(LARGE[:-1])
        (path / "config.json").resolve().write_bytes(b"[]")
        assert check_file(path / "model.safetensors") is False
        assert check_file(path / "config.json") is False
        (tmp_path / "plain").write_bytes(b"x")
        assert check_file(tmp_path / "plain") is None


def blobs(tmp_path: Path, repo: str) -> Path:
    return tmp_path / "cache" / f"models--{repo.replace('/', '--')}" / "blobs"


class TestDemo:
    def test_nothing_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.importlib.resources, "files", lambda _: tmp_path)
        assert "microsoft/" in refusal(None)
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo" / "model.safetensors").touch()
        found = resolve_model()
        assert found.is_demo
        assert found.path == tmp_path / "demo"
