"""Files and directories that appear whole or not at all.

What is written gets a name of its own beside the target and takes the target's name when its last
byte is on the disk. An error, a full disk or Ctrl-C removes it and leaves the target as it was.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bitllm.errors import CheckpointError
from bitllm.formats.writers.planned import PlannedFile

__all__ = ["Advance", "Check", "check_target", "write_directory", "write_file"]

Advance = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes there will be."""

Check = Callable[[Path], None]
"""Called with the path of what is written but not named yet; what it raises undoes everything."""

_PIECE_BYTES = 1 << 22


def check_target(target: Path, replace: bool) -> None:
    """Refuse a target that cannot be written.

    Args:
        target: a file or directory.
        replace: whether one of that name may be replaced.

    Raises:
        CheckpointError: something has the name, or there is no directory to put it into.
    """
    if not target.name or not target.parent.is_dir():
        raise CheckpointError(
            f"{target}: there is no directory {target.parent}", hint="make it first"
        )
    if not replace and (target.exists() or target.is_symlink()):
        raise CheckpointError(
            f"{target} exists already", hint="choose another name, or give --force to replace it"
        )


def write_file(
    target: Path,
    file: PlannedFile,
    *,
    replace: bool = False,
    advance: Advance | None = None,
    check: Check | None = None,
) -> None:
    """Write one file.

    Args:
        target: its path; the directory has to be there.
        file: what to write; its name is not used.
        replace: whether a file of that name may be replaced.
        advance: told of the progress.
        check: looks at the result before it gets its name.

    Raises:
        CheckpointError: the target exists, the disk is full, or the system refuses to write.
    """
    check_target(target, replace)
    _check_space(target, file.nbytes)
    unfinished = _unfinished(target, target.suffix)
    try:
        _write(unfinished, file, _Count(file.nbytes, advance))
        if check is not None:
            check(unfinished)
        check_target(target, replace)  # others may have written it meanwhile
        os.replace(unfinished, target)
        _sync_directory(target.parent)
    except OSError as error:
        raise _write_error(target, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_directory(
    target: Path,
    files: Sequence[PlannedFile],
    *,
    replace: bool = False,
    advance: Advance | None = None,
    check: Check | None = None,
) -> None:
    """Write a directory of files.

    Args:
        target: its path; the directory above it has to be there.
        files: what to write into it.
        replace: whether a directory of that name may be replaced; all that is in it goes.
        advance: told of the progress.
        check: looks at the result before it gets its name.

    Raises:
        CheckpointError: the target exists, the disk is full, or the system refuses to write.
    """
    total = sum(file.nbytes for file in files)
    check_target(target, replace)
    _check_space(target, total)
    unfinished = _unfinished(target)
    try:
        unfinished.mkdir()
        count = _Count(total, advance)
        for file in files:
            _write(unfinished / file.name, file, count)
        _sync_directory(unfinished)
        if check is not None:
            check(unfinished)
        check_target(target, replace)
        _take_name(unfinished, target)
        _sync_directory(target.parent)
    except OSError as error:
        raise _write_error(target, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _take_name(unfinished: Path, target: Path) -> None:
    """Rename a directory; one that has the name is moved aside first and removed at the end."""
    if not target.exists():
        unfinished.rename(target)
        return
    aside = _unfinished(target)
    try:
        target.rename(aside)
        unfinished.rename(target)
    finally:  # an interrupt may come behind either of the two
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)


class _Count:
    """Bytes written so far, of all files together."""

    def __init__(self, total: int, advance: Advance | None) -> None:
        self._total = total
        self._done = 0
        self._advance = advance

    def add(self, count: int) -> None:
        self._done += count
        if self._advance is not None:
            self._advance(self._done, self._total)


def _write(path: Path, file: PlannedFile, count: _Count) -> None:
    with path.open("xb", buffering=0) as out:
        size = sum(_write_chunk(out, chunk, count) for chunk in file.chunks())
        # A size that differs would shift every tensor behind it.
        if size != file.nbytes:
            raise RuntimeError(f"{file.name}: {size} bytes written, {file.nbytes} planned")
        os.fsync(out.fileno())


def _write_chunk(out: BinaryIO, chunk: object, count: _Count) -> int:
    array = chunk if isinstance(chunk, np.ndarray) else np.frombuffer(chunk, np.uint8)  # type: ignore[call-overload]
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    written = 0
    while written < len(data):
        done = out.write(data[written : written + _PIECE_BYTES])
        written += done
        count.add(done)
    return written


def _unfinished(target: Path, suffix: str = "") -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.unfinished{suffix}")


def _check_space(target: Path, nbytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise CheckpointError(
            f"{target}: {nbytes / 1e9:.2f} GB are to be written, the disk has {free / 1e9:.2f} GB "
            "left",
            hint="free some space, or write to another disk",
        )


def _write_error(target: Path, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CheckpointError(
            f"{target}: no space left to write it ({error.strerror})",
            hint="nothing was left behind; free some space, or write to another disk",
        )
    return CheckpointError(f"{target}: {error.strerror or error}", hint="nothing was left behind")


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
