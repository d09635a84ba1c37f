"""Several ranks: the losses of one process, checkpoints that a killed rank leaves whole."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from bitllm.errors import BackendUnavailableError, ConfigError, FormatError
from bitllm.train.loop import LOG_NAME, train
from bitllm.train.ranks import Ranks
from bitllm.train.recipe import DistillationSettings
from bitllm.train.run_checkpoint import write_state
from bitllm.train.sharded_checkpoint import read_shards
from interrupted import unmeasured
from tiny_training import prepare_tiny, tiny_recipe

PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny_training import tiny_recipe
from bitllm.errors import BitllmError
from bitllm.train.pipeline import run_recipe
text, out, resume, training = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
recipe = tiny_recipe(text, **json.loads(training))
try:
    made = run_recipe(recipe, out, resume == "resume")
except BitllmError as error:
    sys.exit(f"refused: {{error}}")
print(made)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    prepare_tiny(folder)
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(stack: ExitStack, text: Path, out: Path, resume: str, size: int, **training: Any) -> list:
    """Start the ranks of a run, as torchrun does."""
    port = str(free_port())
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", program, str(text), str(out), resume, json.dumps(training)]
    started = []
    for rank in range(size):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, env=unmeasured() | where | meeting,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.callback(process.communicate)
        stack.callback(process.kill)
        started.append(process)
    return started


def run_ranks(text: Path, out: Path, resume: str = "", size: int = 2, **training: Any) -> list:
    with ExitStack() as stack:
        started = start(stack, text, out, resume, size, **training)
        told = [process.communicate(timeout=100) for process in started]
        assert [process.returncode for process in started] == [0] * size, told
        return told


def losses(out: Path) -> np.ndarray:
    return np.genfromtxt(out / LOG_NAME, delimiter=",", names=True)["loss"]


SETTINGS: dict[str, Any] = {
    "log_every": 1, "steps": 8, "accumulation": 2, "document_mask": True, "ema": 0.9,
    "checkpoint_every": 3, "evaluate_every": 4,
}  # fmt: skip


def test_two_ranks_compute_the_losses_of_one_process(text, tmp_path):
    told = run_ranks(text, tmp_path / "two", **SETTINGS)
    assert told[0][0].strip() == str(tmp_path / "two" / "model")
    assert told[1][0].strip() == "None"
    recipe = tiny_recipe(text, **SETTINGS)
    one = train(recipe, tmp_path / "two" / "shards", tmp_path / "one", report=lambda line: None)
    assert abs(losses(tmp_path / "two") - np.array(one.losses)).max() < 1e-6
    assert len(one.losses) == 8
    two = np.genfromtxt(tmp_path / "two" / LOG_NAME, delimiter=",", names=True)["held_out_bpb"]
    assert abs(two[7] - one.held_out_bpb) < 1e-6
    exported = load_file(tmp_path / "two" / "masters" / "model.safetensors")
    for name, parameter in one.model.named_parameters():  # of the average, evaluated and exported
        assert abs(exported[name] - parameter.detach().numpy()).max() < 1e-4, name


@pytest.mark.slow
def test_a_killed_rank_leaves_a_checkpoint_from_which_the_same_bits_come(text, tmp_path):
    settings = {**SETTINGS, "steps": 12, "checkpoint_every": 2}
    run_ranks(text, tmp_path / "whole", **settings)
    out = tmp_path / "killed"
    with ExitStack() as stack:
        started = start(stack, text, out, "", 2, **settings)
        while not list(out.glob("checkpoint-*/.metadata")):
            assert started[1].poll() is None
            time.sleep(0.02)
        started[1].kill()
        assert started[0].wait(timeout=60) != 0  # the other one cannot go on alone
    assert not (out / "model").exists()
    run_ranks(text, out, "resume", **settings)
    assert (out / LOG_NAME).read_text() == (tmp_path / "whole" / LOG_NAME).read_text()
    for name in "model", "masters":
        found = (out / name / "model.safetensors").read_bytes()
        assert found == (tmp_path / "whole" / name / "model.safetensors").read_bytes()
    assert len(list(out.glob("checkpoint-*"))) == 1


def test_one_process_does_not_take_the_checkpoint_of_several(text, tmp_path):
    (tmp_path / "checkpoint-00000004").mkdir()
    (tmp_path / "checkpoint-00000004" / ".metadata").write_bytes(b"")
    with pytest.raises(ConfigError, match="written by several ranks"):
        train(tiny_recipe(text), text / "shards", tmp_path, resume=True)


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({"WORLD_SIZE": "two"}, {}, "WORLD_SIZE must be a number"),
        ({"WORLD_SIZE": "0"}, {}, "WORLD_SIZE must be a number"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, {}, "the other processes cannot be met"),
    ],
)
def test_an_environment_that_cannot_be_meant(
    environment, settings, message, text, tmp_path, monkeypatch
):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train(tiny_recipe(text, **settings), text / "shards", tmp_path / "out")


def test_rows_are_shared_out_evenly_or_not_at_all():
    shared = [Ranks(rank, 3, torch.device("cpu")).rows(6) for rank in range(3)]
    assert [list(range(6))[part] for part in shared] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ConfigError, match="batch_size 4 cannot be shared out"):
        Ranks(0, 3, torch.device("cpu")).rows(4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(text, tmp_path):
    recipe = tiny_recipe(text, device="cuda")
    with pytest.raises(BackendUnavailableError, match="needs GPU 0"):
        train(recipe, text / "shards", tmp_path / "out")


@pytest.mark.parametrize(
    ("optimizer", "teacher", "message"),
    [
        ("muon", None, "needs whole matrices"),
        ("adamw", DistillationSettings("teacher"), "by one process"),
    ],
)
def test_what_ranks_do_not_compute_is_refused(optimizer, teacher, message, text, tmp_path):
    recipe = dataclasses.replace(tiny_recipe(text, optimizer=optimizer), distillation=teacher)
    ranks = Ranks(0, 2, torch.device("cpu"))  # refused before it meets the other one
    with pytest.raises(ConfigError, match=message):
        train(recipe, text / "shards", tmp_path, ranks=ranks)


@pytest.mark.parametrize("content", [b"", b"not a pickle", None])
def test_damaged_shards_are_named(content, tmp_path):
    path = tmp_path / "checkpoint-00000004"
    path.mkdir()
    (path / ".metadata").write_bytes(b"")
    if content is not None:
        write_state(path, {"recipe": "this one"})
        (path / ".metadata").write_bytes(content)
    with pytest.raises((FormatError, ConfigError), match=r"damaged|no checkpoint"):
        read_shards(tmp_path, "this one", None, Ranks(0, 2, torch.device("cpu")))
