"""Fetching one large file of the Hub into its cache: resumed where it stopped, checked when whole.

huggingface_hub drops the part of a file that it has when a download ends early; a model of some
gigabytes should not begin anew. So weights are written here to `<blob>.incomplete`, continued with
a range request, and take their final name, the checksum that the Hub gives for them, only when the
bytes have it. huggingface_hub then finds the blob in the cache and links it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bitllm.errors import CheckpointError, ModelNotFoundError
from bitllm.formats.hub.failures import KEPT, reason

__all__ = ["check_file", "fetch_blob"]

CHUNK = 1 << 20
ATTEMPTS = 4
"""Attempts in a row that may bring nothing before a download is given up."""

PAUSE_S = 1.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
_BLOB_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Blob:
    """A file to fetch: its address, where it goes, how long it is."""

    repo: str
    name: str
    url: str
    path: Path
    size: int

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.incomplete")


def fetch_blob(repo: str, commit: str, name: str, cache: Path) -> None:
    """Bring a file of a repository into the directory of its blobs, if it is not there.

    Args:
        repo: `org/name`.
        commit: the commit.
        name: path of the file in the repository.
        cache: the repository's directory in the cache, which holds `blobs`.

    Raises:
        CheckpointError: the bytes do not have the checksum, or the disk cannot hold them.
        ModelNotFoundError: the connection broke; what came is kept.
        OSError, httpx errors: for `bitllm.formats.hub.failures.explained`.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    url = hf_hub_url(repo, name, revision=commit)
    found = get_hf_file_metadata(url)
    if found.etag is None or found.size is None or not _BLOB_NAME.fullmatch(found.etag):
        return  # a Hub of another kind: huggingface_hub fetches it in its own way
    blob = _Blob(repo, name, url, cache / "blobs" / found.etag, found.size)
    blob.path.parent.mkdir(parents=True, exist_ok=True)
    lock = cache.parent / ".locks" / cache.name / f"{found.etag}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.path.exists():
            _complete(blob)


def _complete(blob: _Blob) -> None:
    """Fetch what is missing, compare the checksum, give the file its name."""
    have = blob.part.stat().st_size if blob.part.is_file() else 0
    if have > blob.size:
        blob.part.unlink()
        have = 0
    _require_space(blob, blob.size - have)
    with _bar(blob.name, blob.size, have) as bar, blob.part.open("ab") as file:
        _stream(blob, file, bar.update)
    if not _has_checksum(blob.part, blob.path.name):
        blob.part.unlink()
        raise CheckpointError(
            f"{blob.repo}: {blob.name} arrived damaged, its checksum is another",
            hint="it was removed; run the same command again",
        )
    blob.part.replace(blob.path)


def _stream(blob: _Blob, file: BinaryIO, advance: Callable[[int], Any]) -> None:
    """Append to `file` until it is whole; a broken connection is taken up again."""
    failures = 0
    while (start := file.tell()) < blob.size:
        try:
            _request(blob, file, start, advance)
            problem = "the connection ended early"
        except OSError:
            raise  # the disk, not the network
        except Exception as error:
            if not _is_transport_error(error):
                raise
            problem = reason(error)
        finally:
            file.flush()
        failures = 0 if file.tell() > start else failures + 1
        if file.tell() < blob.size and failures >= ATTEMPTS:
            raise ModelNotFoundError(
                f"{blob.repo}: {blob.name} stopped after {file.tell()} of {blob.size} bytes",
                hint=f"{KEPT} ({problem})",
            )
        if failures:
            time.sleep(PAUSE_S)


def _request(blob: _Blob, file: BinaryIO, start: int, advance: Callable[[int], Any]) -> None:
    """Ask for the bytes from `start` on, and append at most those that belong to the file."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", blob.url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:
            advance(-start)  # a server without ranges sends the file from its beginning
            file.seek(0)
            file.truncate()
        for chunk in response.iter_bytes():
            if file.tell() + len(chunk) > blob.size:
                raise CheckpointError(
                    f"{blob.repo}: {blob.name} is longer than the {blob.size} bytes announced",
                    hint="the server or a proxy between sends something else",
                )
            file.write(chunk)
            advance(len(chunk))


def _is_transport_error(error: Exception) -> bool:
    """Whether a connection broke, by the class that httpx and its successor have for that."""
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)


def _require_space(blob: _Blob, needed: int) -> None:
    free = shutil.disk_usage(blob.path.parent).free
    if needed > free:
        raise CheckpointError(
            f"{blob.repo}: {blob.name} needs {needed} more bytes, the disk of the cache has {free}",
            hint=f"free some, or set HF_HOME to a directory on another disk; {KEPT}",
        )


def check_file(path: Path) -> bool | None:
    """Compare a file of the cache with the checksum that is its blob's name.

    Args:
        path: a file of a snapshot, which is a link to a blob.

    Returns:
        Whether they are equal; None where the name is no checksum (a cache without links).
    """
    name = path.resolve().name
    if not (_SHA256.fullmatch(name) or _GIT_SHA1.fullmatch(name)):
        return None
    return _has_checksum(path, name)


def _has_checksum(path: Path, name: str) -> bool:
    """Whether the bytes have the checksum `name`: SHA-256, or Git's SHA-1 of a blob.

    A name of another kind is no checksum and cannot be compared.
    """
    if _SHA256.fullmatch(name):
        digest = hashlib.sha256()
    elif _GIT_SHA1.fullmatch(name):
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        return True
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest() == name


def _bar(name: str, size: int, done: int) -> Any:
    """Return a bar for people at a terminal, not for log files."""
    from huggingface_hub.utils.tqdm import tqdm

    return tqdm(  # type: ignore[no-untyped-call]
        total=size,
        initial=done,
        desc=os.path.basename(name),
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
    )
