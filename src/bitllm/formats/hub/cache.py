"""The models in the cache of the Hugging Face Hub: what is there, and taking it away again.

The cache is that of huggingface_hub, shared with every program that uses it. Only repositories of
models are looked at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitllm.errors import CheckpointError, ModelNotFoundError
from bitllm.formats.gguf.file_names import gguf_names, gguf_parts, is_of_kind
from bitllm.formats.hub.references import HubReference, parse_reference
from bitllm.formats.json_file import read_json_object

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo

__all__ = ["CachedModel", "Removal", "cached_models", "keep_times", "plan_removal"]

_INDEX_SUFFIX = ".index.json"
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the cache.

    Attributes:
        name: the reference that names it: `org/name[/file.gguf][@revision]`.
        path: directory of the revision, or the GGUF file.
        format: "safetensors", "gguf" or "pytorch"; "" = there are no weights.
        bytes: bytes of its files; files that several revisions share count in each.
        last_used: when a file of it was last read, in seconds since 1970, as exact as the file
            system keeps it.
        complete: whether all weight files are there.
    """

    name: str
    path: Path
    format: str
    bytes: int
    last_used: float
    complete: bool


@dataclass(frozen=True, slots=True)
class Removal:
    """What would be taken out of the cache, and the function that does it.

    Attributes:
        name: what it is.
        bytes: about how many bytes that frees.
        run: removes it.

    Raises (run):
        CheckpointError: something could not be removed.
    """

    name: str
    bytes: int
    run: Callable[[], None]


def cached_models() -> list[CachedModel]:
    """Return the models in the cache, by name; nothing is asked of the Hub.

    A revision is a model, and in it each GGUF file.
    """
    return sorted(
        (
            model
            for repo in _repositories()
            for revision in repo.revisions
            for model in _models_of(repo, revision)
        ),
        key=lambda model: model.name.lower(),
    )


@contextmanager
def keep_times(path: Path) -> Iterator[None]:
    """Leave the times of access as they are: to list models is not to use them.

    Args:
        path: the directory of a revision, or a file in one.
    """
    directory = path if path.is_dir() else path.parent
    times = [(file, file.stat()) for file in directory.rglob("*") if file.is_file()]
    try:
        yield
    finally:
        for file, stat in times:
            with suppress(OSError):  # somebody else's file, or gone meanwhile
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _repositories() -> Iterator[CachedRepoInfo]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir(_cache())
    except (CacheNotFound, ValueError):  # ValueError: a file stands where the cache should be
        return
    yield from (repo for repo in found.repos if repo.repo_type == "model")


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _models_of(repo: CachedRepoInfo, revision: CachedRevisionInfo) -> Iterator[CachedModel]:
    at = _revision_suffix(repo, revision)
    root = revision.snapshot_path
    sizes = {file.file_path.relative_to(root).as_posix(): file for file in revision.files}
    files = gguf_names(list(sizes))
    kind = _format(list(sizes))
    if kind or not files:
        yield CachedModel(
            name=f"{repo.repo_id}{at}",
            path=root,
            format=kind,
            bytes=sum(file.size_on_disk for name, file in sizes.items() if name not in files),
            last_used=max((file.blob_last_accessed for file in revision.files), default=0.0),
            complete=bool(kind) and _has_all_shards(root),
        )
    for name in files:
        parts = gguf_parts(name)
        there = [sizes[part] for part in parts if part in sizes]
        yield CachedModel(
            name=f"{repo.repo_id}/{name}{at}",
            path=root / name,
            format="gguf",
            bytes=sum(file.size_on_disk for file in there),
            last_used=max(file.blob_last_accessed for file in there),
            complete=len(there) == len(parts),
        )


def _revision_suffix(repo: CachedRepoInfo, revision: CachedRevisionInfo) -> str:
    """Return what has to stand behind the repository's name to mean this revision."""
    if "main" in revision.refs or len(repo.revisions) == 1:
        return ""
    return f"@{min(revision.refs, default=revision.commit_hash)}"


def _format(names: list[str]) -> str:
    top = [name for name in names if "/" not in name]
    if "config.json" not in top:
        return ""
    if any(name.endswith(".safetensors") for name in top):
        return "safetensors"
    return "pytorch" if any(name.endswith(".bin") for name in top) else ""


def _has_all_shards(root: Path) -> bool:
    for index in root.glob(f"*{_INDEX_SUFFIX}"):
        try:
            with keep_times(root):
                shards = read_json_object(index).get("weight_map")
        except CheckpointError:
            return False
        names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
        if all((root / name).is_file() for name in names):
            return True
    return any(
        (root / f"{stem}{end}").is_file() for stem in ("model", "pytorch_model") for end in _WEIGHTS
    )


def plan_removal(ref: str) -> Removal:
    """Find in the cache what `ref` names.

    Args:
        ref: a short name, `org/name` (all its revisions and files), or with a GGUF file or a
            revision.

    Raises:
        ModelNotFoundError: it is no name of a model on the Hub, or not in the cache.
    """
    found = parse_reference(ref)
    if found is None:
        raise ModelNotFoundError(
            f"{ref!r:.200} is no name of a model in the cache",
            hint="`bitllm list` shows them; nothing else is ever removed",
        )
    repo = next((repo for repo in _repositories() if repo.repo_id == found.repo), None)
    folder = _cache() / f"models--{found.repo.replace('/', '--')}"
    if repo is None and folder.is_dir() and found == HubReference(found.repo):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return Removal(found.repo, size, lambda: _remove_tree(folder))
    if repo is None:
        raise _not_there(ref)
    revisions = [revision for revision in repo.revisions if _matches(revision, found.revision)]
    if not revisions:
        raise _not_there(ref)
    if found.file is None and found.kind is None:
        return _removal_of_revisions(repo, revisions)
    return _removal_of_files(ref, found, repo, revisions)


def _not_there(ref: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{ref} is not in the cache", hint="`bitllm list` shows what is")


def _matches(revision: CachedRevisionInfo, wanted: str | None) -> bool:
    return wanted is None or wanted in (*revision.refs, revision.commit_hash)


def _removal_of_revisions(repo: CachedRepoInfo, revisions: list[CachedRevisionInfo]) -> Removal:
    if len(revisions) == len(repo.revisions):
        parts = (repo.repo_path / "blobs").glob("*.incomplete")
        size = repo.size_on_disk + sum(part.stat().st_size for part in parts)
        return Removal(repo.repo_id, size, lambda: _remove_tree(repo.repo_path))
    from huggingface_hub import scan_cache_dir

    strategy = scan_cache_dir(_cache()).delete_revisions(*(r.commit_hash for r in revisions))

    def run() -> None:
        strategy.execute()
        for revision in revisions:  # failures are only logged there
            if revision.snapshot_path.exists():
                raise CheckpointError(f"{revision.snapshot_path}: cannot be removed")

    names = ", ".join(f"{repo.repo_id}@{min(r.refs, default=r.commit_hash)}" for r in revisions)
    return Removal(names, strategy.expected_freed_size, run)


def _removal_of_files(
    ref: str, wanted: HubReference, repo: CachedRepoInfo, revisions: list[CachedRevisionInfo]
) -> Removal:
    """Remove GGUF files from revisions, and the blobs that nothing else of the repository uses."""
    names = {
        part
        for revision in revisions
        for name in gguf_names([_place(revision, file.file_path) for file in revision.files])
        if name == wanted.file or (wanted.kind and is_of_kind(name, wanted.kind))
        for part in gguf_parts(name)
    }
    gone = [
        file
        for revision in revisions
        for file in revision.files
        if _place(revision, file.file_path) in names
    ]
    if not gone:
        raise _not_there(ref)
    links = {file.file_path for file in gone}
    kept = {
        file.blob_path
        for revision in repo.revisions
        for file in revision.files
        if file.file_path not in links
    }
    blobs = {file.blob_path: file.size_on_disk for file in gone if file.blob_path not in kept}

    def run() -> None:
        for path in (*links, *blobs):
            _unlink(path)

    shown = ", ".join(f"{repo.repo_id}/{name}" for name in sorted(names))
    return Removal(shown, sum(blobs.values()), run)


def _place(revision: CachedRevisionInfo, path: Path) -> str:
    return path.relative_to(revision.snapshot_path).as_posix()


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be removed ({error.strerror})") from error


def _remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be removed ({error.strerror})"
        ) from error
