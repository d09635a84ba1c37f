"""Files that appear whole or not at all: full disks, interrupts, errors, older targets."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitllm.errors import CheckpointError
from bitllm.formats.writers import PlannedFile, write_directory, write_file
from interrupted import process_to_interrupt

BIG = 3 << 20


def planned(name: str = "x", *chunks: Any) -> PlannedFile:
    sizes = [chunk.nbytes if isinstance(chunk, np.ndarray) else len(chunk) for chunk in chunks]
    return PlannedFile(name, sum(sizes), lambda: iter(chunks))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def failing(error: BaseException) -> PlannedFile:
    def chunks() -> Iterator[bytes]:
        yield bytes(BIG)
        raise error

    return PlannedFile("x", 2 * BIG, chunks)


def test_bytes_and_arrays_come_in_their_order(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype="<u2").reshape(2, 3)
    file = planned("x", b"head", matrix.T, b"", np.float32(1.5).reshape(1))
    done: list[tuple[int, int]] = []
    write_file(tmp_path / "out", file, advance=lambda *counts: done.append(counts))
    wanted = b"head" + np.ascontiguousarray(matrix.T).tobytes() + np.float32(1.5).tobytes()
    assert (tmp_path / "out").read_bytes() == wanted
    assert done[-1] == (len(wanted), len(wanted))


def test_a_directory_holds_exactly_its_files(tmp_path: Path) -> None:
    write_directory(tmp_path / "out", [planned("a", b"1"), planned("b", b"2")])
    assert names(tmp_path / "out") == ["a", "b"]
    assert names(tmp_path) == ["out"]
    umask = (tmp_path / "plain").mkdir() or (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "out").stat().st_mode == umask


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), CheckpointError("x")])
def test_an_error_leaves_nothing_behind(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        write_file(tmp_path / "out", failing(error))
    with pytest.raises(type(error)):
        write_directory(tmp_path / "out", [planned("a", b"1"), failing(error)])
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_an_error_leaves_an_older_target_as_it_was(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "config.json").write_bytes(b"old")
    with pytest.raises(type(error)):
        write_file(tmp_path / "file", failing(error), replace=True)
    with pytest.raises(type(error)):
        write_directory(tmp_path / "directory", [failing(error)], replace=True)
    assert names(tmp_path) == ["directory", "file"]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "directory" / "config.json").read_bytes() == b"old"


def test_a_check_that_fails_undoes_everything(tmp_path: Path) -> None:
    seen = []

    def refuse(path: Path) -> None:
        seen.append(path.read_bytes() if path.is_file() else names(path))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_file(tmp_path / "out.gguf", planned("x", b"new"), check=refuse)
    with pytest.raises(ValueError, match="no"):
        write_directory(tmp_path / "out", [planned("a", b"1")], check=refuse)
    assert seen == [b"new", ["a"]]
    assert names(tmp_path) == []


def test_a_check_sees_the_suffix_of_the_target(tmp_path: Path) -> None:
    suffixes: list[str] = []
    write_file(
        tmp_path / "out.gguf", planned("x", b"1"), check=lambda path: suffixes.append(path.suffix)
    )
    assert suffixes == [".gguf"]


def test_a_target_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "stale").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "directory", "link"):
        with pytest.raises(CheckpointError, match="exists already"):
            write_file(tmp_path / name, planned("x", b"new"))
        with pytest.raises(CheckpointError, match="exists already"):
            write_directory(tmp_path / name, [planned("x", b"new")])
    write_file(tmp_path / "file", planned("x", b"new"), replace=True)
    write_directory(tmp_path / "directory", [planned("x", b"new")], replace=True)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path / "directory") == ["x"]
    assert names(tmp_path) == ["directory", "file", "link"]


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def file(unfinished: Path) -> None:
        write_file(tmp_path / "file", planned("x", b"other"))

    def directory(unfinished: Path) -> None:
        write_directory(tmp_path / "out", [planned("other", b"1")])

    with pytest.raises(CheckpointError, match="exists already"):
        write_file(tmp_path / "file", planned("x", b"new"), check=file)
    with pytest.raises(CheckpointError, match="exists already"):
        write_directory(tmp_path / "out", [planned("x", b"new")], check=directory)
    assert names(tmp_path) == ["file", "out"]
    assert (tmp_path / "file").read_bytes() == b"other"
    assert names(tmp_path / "out") == ["other"]


@pytest.mark.parametrize(("renames", "content"), [(1, b"old"), (2, b"new")])
def test_an_interrupt_between_two_names(
    renames: int, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "x").write_bytes(b"old")
    done = 0
    rename = Path.rename

    def interrupted(self: Path, goal: Path) -> Path:
        nonlocal done
        done += 1
        moved = rename(self, goal)
        if done == renames:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_directory(target, [planned("x", b"new")], replace=True)
    assert names(tmp_path) == ["out"]
    assert (target / "x").read_bytes() == content


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2))
    with pytest.raises(CheckpointError, match="the disk has 0"):
        write_file(tmp_path / "out", planned("x", b"123"))
    assert names(tmp_path) == []


LIMITED = """
import resource, sys
from pathlib import Path
from bitllm.errors import CheckpointError
from bitllm.formats.writers import PlannedFile, write_directory, write_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
big = PlannedFile("big", 3 << 20, lambda: iter([bytes(3 << 20)]))
for write in (lambda: write_file(Path(sys.argv[1]) / "file", big, replace=True),
              lambda: write_directory(Path(sys.argv[1]) / "directory", [big], replace=True)):
    try:
        write()
    except CheckpointError as error:
        print(error.message)
"""


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path) -> None:
    """A limit to the size of files stands in for the disk: the same error at the same place."""
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "old").write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert [line.split(": ")[1][:21] for line in done.stdout.splitlines()] == [
        "no space left to writ"
    ] * 2
    assert names(tmp_path) == ["directory", "file"]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path / "directory") == ["old"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1 << 20


WAITING = """
import sys, time
from pathlib import Path
from bitllm.formats.writers import PlannedFile, write_directory
def chunks():
    yield bytes(1 << 20)
    print("half", flush=True)
    time.sleep(60)
write_directory(Path(sys.argv[1]) / "out", [PlannedFile("x", 2 << 20, chunks)])
"""


def test_an_interrupted_process_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process_to_interrupt(command, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        assert len(names(tmp_path)) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
        assert b"KeyboardInterrupt" in process.communicate()[1]
    assert names(tmp_path) == []


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no directory"):
        write_file(tmp_path / "a" / "b", planned("x", b"1"))


def test_a_plan_that_is_wrong_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="1 bytes written, 5 planned"):
        write_file(tmp_path / "out", PlannedFile("x", 5, lambda: iter([b"1"])))
    assert names(tmp_path) == []


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    """Each has a name of its own; the last one to finish has the target."""
    errors: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            write_file(tmp_path / "out", planned("x", content * BIG), replace=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set((tmp_path / "out").read_bytes())) == 1
    assert names(tmp_path) == ["out"]
