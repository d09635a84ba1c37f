"""From a model reference to its files: a local path, a model of the Hugging Face Hub, or nothing.

A reference is, in this order: an existing local path; a name on the Hub
(`bitllm.formats.hub.references`), with `hf:` before it to mean nothing else; None, the embedded
demo model. The Hub is reached through huggingface_hub, which is imported only then: its cache and
its HF_* variables hold.
"""

from __future__ import annotations

import difflib
import errno
import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath

from bitllm.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from bitllm.formats.gguf.file_names import gguf_names, gguf_parts, is_of_kind
from bitllm.formats.hub.failures import explained, is_offline, unreachable
from bitllm.formats.hub.known_models import KNOWN_MODELS, near_names
from bitllm.formats.hub.references import HubReference, parse_reference
from bitllm.formats.json_file import read_json_object

__all__ = ["ModelFiles", "resolve_model"]

_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "1_Pooling/config.json",
]
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MODEL_FILES = frozenset({*_SMALL_FILES, *_SINGLE_FILES})
_MOST_SHARDS = 1000


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the files of a model are.

    Attributes:
        path: the directory, or the GGUF file.
        name: what to call the model: the reference on the Hub, or the name of the file or
            directory.
        origin: where it came from, for people to read.
        is_demo: it is the embedded demo model.
    """

    path: Path
    name: str
    origin: str
    is_demo: bool = False

    @property
    def directory(self) -> Path:
        """The directory that the files lie in."""
        return self.path.parent if self.path.suffix == ".gguf" else self.path


def resolve_model(
    ref: str | PathLike[str] | None = None, *, revision: str | None = None
) -> ModelFiles:
    """Find the files of a model, downloading those that are needed and not in the cache.

    Args:
        ref: a model directory or a file in it, a name on the Hub as in
            `bitllm.formats.hub.references`, or None.
        revision: branch, tag or commit on the Hub; instead of `@revision`.

    Raises:
        ModelNotFoundError: nothing is there under this reference, or it cannot be reached.
        UnsupportedModelError: a repository or a file of a format that is not read.
        CheckpointError: the files cannot be written to the cache, or arrived damaged.
        ConfigError: a revision is given twice, or for something that is not on the Hub.
    """
    if ref is None:
        _refuse_revision(revision, "the embedded demo model")
        return _demo_model()
    text = os.fspath(ref)
    forced = text.startswith("hf:")
    local = None if forced else _existing(text)
    if local is not None:
        _refuse_revision(revision, f"the local path {text!r}")
        return _local_model(local)
    found = parse_reference(text) if forced or not _looks_like_path(text) else None
    if found is None:
        why = ": no such file or directory" if _looks_like_path(text) else ""
        raise ModelNotFoundError(f"there is no model {text!r:.200}{why}", hint=_suggest(text))
    try:
        return _hub_model(found.at(revision))
    except ModelNotFoundError as error:
        if forced or not _lies_in_a_directory(text):
            raise
        # org/name, in a directory org of this machine: more likely a mistyped path.
        near = _near_paths(text)
        raise ModelNotFoundError(
            f"there is no file or directory {text!r}, nor a model of that name: {error.message}",
            hint=f"did you mean {' or '.join(near)}?" if near else error.hint,
        ) from error


def _lies_in_a_directory(text: str) -> bool:
    parent = Path(text).parent
    return parent != Path() and _existing(str(parent)) is not None


def _existing(text: str) -> Path | None:
    """The local file or directory that `text` names, or None."""
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (RuntimeError, ValueError):  # ~user, and there is no such user; a NUL character
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise CheckpointError(f"{text}: {error.strerror}") from error


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise ConfigError(f"{what} has no revision {revision!r}", hint="leave the revision out")


def _demo_model() -> ModelFiles:
    path = Path(str(importlib.resources.files("bitllm") / "demo"))
    if not (path / _SINGLE_FILES[0]).is_file():
        raise ModelNotFoundError(
            "this installation has no embedded demo model",
            hint=f"name a model, for example {KNOWN_MODELS[0].repo}",
        )
    return ModelFiles(path, "demo", "embedded in bitllm", is_demo=True)


def _local_model(path: Path) -> ModelFiles:
    if path.is_dir() or path.suffix == ".gguf":
        # A file is not resolved: in a cache of downloads it is a link to a nameless one.
        found = path.resolve() if path.is_dir() else path.absolute()
        return ModelFiles(found, found.name.removesuffix(".gguf"), str(found))
    if path.name not in _MODEL_FILES and path.suffix not in (".safetensors", ".bin"):
        raise ModelNotFoundError(
            f"{path} is not a file of a model",
            hint="name the directory that holds config.json and model.safetensors, or a GGUF file",
        )
    return _local_model(path.parent)


def _looks_like_path(text: str) -> bool:
    """Whether `text` cannot be meant for the Hub, though its form allows it."""
    named_file = text.endswith((".safetensors", ".json")) or (
        text.endswith(".gguf") and text.count("/") < 2
    )
    return text.startswith((".", "~", "/")) or named_file


def _suggest(text: str) -> str:
    """Say what might have been meant: a neighbour on disk, or a well-known model."""
    near = _near_paths(text) or near_names(text.removeprefix("hf:").partition("@")[0])
    if near:
        return f"did you mean {' or '.join(near)}?"
    return (
        "give a model directory, a short name such as 2b, or org/name on the Hugging Face Hub, "
        f"for example {KNOWN_MODELS[0].repo}"
    )


def _near_paths(text: str) -> list[str]:
    try:
        path = Path(text).expanduser()
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, RuntimeError, ValueError):
        return []
    return [
        str(path.parent / name) for name in difflib.get_close_matches(path.name, names, 2, 0.75)
    ]


def _hub_model(ref: HubReference) -> ModelFiles:
    snapshot = _fetch_small_files(ref)
    # The directory is named after the commit: the weights come from the same one.
    commit = snapshot.name
    origin = f"{ref.repo}@{commit[:12]} from the Hugging Face Hub"
    if ref.file is None and ref.kind is None:
        weights = _safetensors_names(ref, snapshot)
        if weights:
            _fetch_weights(ref, snapshot, weights)
            return ModelFiles(snapshot, ref.repo, origin)
    file = ref.file or _choose_gguf(ref, snapshot)
    _fetch_weights(ref, snapshot, gguf_parts(file))
    return ModelFiles(snapshot / file, f"{ref.repo}/{file}", origin)


def _fetch_small_files(ref: HubReference) -> Path:
    """Fetch everything but weights; return the directory of the revision in the cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelNotFoundError(
            f"{ref.repo} is not a local path, and huggingface_hub is not installed",
            hint="pip install huggingface_hub, or name a local directory",
        ) from error
    from huggingface_hub.utils.tqdm import tqdm

    class NoBar(tqdm):
        """These files are small: no bar."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    def download() -> str:
        return snapshot_download(
            ref.repo,
            revision=ref.revision,
            allow_patterns=_SMALL_FILES,
            tqdm_class=NoBar,
            local_files_only=is_offline(),
        )

    return Path(explained(ref.repo, ref.revision, download))


def _safetensors_names(ref: HubReference, snapshot: Path) -> list[str]:
    """Return the weight files of a transformers model; none if the repository holds GGUF only."""
    if not (snapshot / "config.json").is_file():
        return []
    for index in (snapshot / name for name in _INDEX_FILES):
        if index.is_file():
            return _shard_names(index)
    if (snapshot / _SINGLE_FILES[0]).is_file():
        return [_SINGLE_FILES[0]]
    names = _file_names(ref, snapshot)
    weights = [name for name in _SINGLE_FILES if name in names]
    if not weights and not gguf_names(names):
        raise UnsupportedModelError(
            f"{ref.repo} has no {_SINGLE_FILES[0]}",
            hint="bitllm reads safetensors and GGUF; look for another revision or a converted "
            "repository",
        )
    return weights[:1]


def _shard_names(index: Path) -> list[str]:
    """Return the files that an index names; each lies beside it."""
    weight_map = read_json_object(index).get("weight_map")
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    shards = {shard for shard in named if isinstance(shard, str)}
    for shard in shards:
        if shard in ("", ".", "..") or PurePosixPath(shard).name != shard or "\\" in shard:
            raise FormatError(
                f"{index}: a shard is called {shard!r:.100}, which is no file name",
                hint="the index is damaged, or not to be trusted",
            )
    if not 0 < len(shards) <= _MOST_SHARDS or not all(isinstance(name, str) for name in named):
        raise FormatError(f"{index}: weight_map should map tensor names to files")
    return sorted(shards)


def _file_names(ref: HubReference, snapshot: Path) -> list[str]:
    """Return the paths of all files of the repository; of those in the cache when offline."""
    cached = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]
    if is_offline():
        return cached
    from huggingface_hub import HfApi

    def ask() -> list[str]:
        found = HfApi().model_info(ref.repo, revision=snapshot.name)
        return [file.rfilename for file in found.siblings or ()]

    try:
        return explained(ref.repo, ref.revision, ask)
    except ModelNotFoundError:
        if any(name.endswith((*_SINGLE_FILES, ".gguf")) for name in cached):
            return cached
        raise


def _choose_gguf(ref: HubReference, snapshot: Path) -> str:
    """Return the one GGUF file that is meant.

    Raises:
        UnsupportedModelError: the repository has neither GGUF files nor a transformers model.
        ModelNotFoundError: none or several match; names them.
    """
    files = gguf_names(_file_names(ref, snapshot))
    if not files:
        if is_offline():
            raise unreachable(ref.repo, FileNotFoundError(ref.repo))
        raise UnsupportedModelError(
            f"{ref.repo} has no config.json and no GGUF file: it is no language model that "
            "bitllm reads",
            hint="look for its safetensors or GGUF version",
        )
    chosen = [name for name in files if ref.kind is None or is_of_kind(name, ref.kind)]
    if len(chosen) == 1:
        return chosen[0]
    what = "GGUF files" if ref.kind is None else f"files of kind {ref.kind}"
    listed = ", ".join(f"{ref.repo}/{name}" for name in (chosen or files)[:8])
    raise ModelNotFoundError(
        f"{ref.repo} has {len(chosen) or 'no'} {what}; one has to be named", hint=f"name {listed}"
    )


def _fetch_weights(ref: HubReference, snapshot: Path, names: Sequence[str]) -> None:
    """Bring weight files into the snapshot; nothing is asked for those that are there."""
    missing = [name for name in names if not (snapshot / name).is_file()]
    if missing and is_offline():
        raise unreachable(ref.repo, FileNotFoundError(missing[0]))
    from huggingface_hub import hf_hub_download

    from bitllm.formats.hub.download import fetch_blob

    for name in missing:

        def fetch(name: str = name) -> None:
            fetch_blob(ref.repo, snapshot.name, name, snapshot.parent.parent)
            hf_hub_download(ref.repo, name, revision=snapshot.name)

        explained(ref.repo, ref.revision, fetch)
