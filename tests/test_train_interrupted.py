"""Runs that are killed, terminated, or meet trouble: what comes out is what would have come out."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bitllm.errors import CheckpointError, TrainingError
from bitllm.train import loop
from bitllm.train.loop import CHECKPOINT_NAME, LOG_NAME, train
from bitllm.train.run_checkpoint import write_state
from interrupted import process_to_interrupt
from tiny_training import prepare_tiny, tiny_recipe

EVERYTHING = {
    "optimizer": "muon", "ema": 0.9, "accumulation": 2, "precision": "bf16",
    "document_mask": True, "schedule": "cosine", "checkpoint_every": 3,
}  # fmt: skip


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


def run(text, out, resume=False, stop_after=None, report=lambda line: None, **training):
    recipe = tiny_recipe(text, **training)
    return train(recipe, text / "shards", out, resume=resume, stop_after=stop_after, report=report)


def same(left, right):
    state = right.model.state_dict()
    assert left.held_out_bpb == right.held_out_bpb
    assert all(torch.equal(value, state[name]) for name, value in left.model.state_dict().items())


@pytest.mark.parametrize("training", [EVERYTHING, {"on_anomaly": "roll_back"}])
def test_every_kind_of_run_resumes_to_the_same_bits(text, tmp_path, training):
    whole = run(text, tmp_path / "whole", **training)
    run(text, tmp_path / "cut", stop_after=11, **training)
    same(run(text, tmp_path / "cut", resume=True, **training), whole)
    log = (tmp_path / "whole" / LOG_NAME).read_text()
    assert (tmp_path / "cut" / LOG_NAME).read_text() == log


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny_training import tiny_recipe
from bitllm.train.loop import train
text, out = Path(sys.argv[1]), Path(sys.argv[2])
recipe = tiny_recipe(text, steps=60, checkpoint_every=2, log_every=1)
resume = (out / "checkpoint.pt").exists()
train(recipe, text / "shards", out, resume=resume)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bits(text, tmp_path):
    run(text, tmp_path / "whole", steps=60, checkpoint_every=2, log_every=1)
    out = tmp_path / "killed"
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    moments = random.Random(7)
    for _ in range(3):
        with process_to_interrupt(
            [sys.executable, "-c", program, str(text), str(out)], stderr=subprocess.PIPE
        ) as process:
            steps = (line for line in process.stderr if line.startswith(b"step "))
            for _ in range(moments.randrange(2, 12)):
                assert next(steps)
            time.sleep(moments.uniform(0.0, 0.02))
            process.kill()
    last = [sys.executable, "-c", program, str(text), str(out)]
    subprocess.run(last, check=True, stderr=subprocess.DEVNULL)
    whole = torch.load(tmp_path / "whole" / CHECKPOINT_NAME, weights_only=True)
    killed = torch.load(out / CHECKPOINT_NAME, weights_only=True)
    assert all(torch.equal(value, whole["model"][n]) for n, value in killed["model"].items())
    assert (out / LOG_NAME).read_text() == (tmp_path / "whole" / LOG_NAME).read_text()


def test_sigterm_ends_it_behind_a_step_with_a_checkpoint(text, tmp_path):
    whole = run(text, tmp_path / "whole")
    lines = []

    def terminate(line):
        lines.append(line)
        if line.startswith("step 16/"):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        run(text, tmp_path / "out", report=terminate)
    assert caught.value.code == 128 + signal.SIGTERM
    assert lines[-1] == "interrupted behind step 16; go on with --resume"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    same(run(text, tmp_path / "out", resume=True), whole)


def poison(monkeypatch, steps, value=float("nan")):
    """Make the loss wrong in the steps of these batches."""
    original = loop._Run._loss

    def loss(self, batch):
        right = original(self, batch)
        numbers = [self.corpus.batches.batch(step).ids.tolist() for step in steps]
        return right * value if batch.ids.tolist() in numbers else right

    monkeypatch.setattr(loop._Run, "_loss", loss)


def test_a_loss_that_jumps_stops_the_run(text, tmp_path, monkeypatch):
    poison(monkeypatch, [20], 50.0)
    with pytest.raises(TrainingError, match=r"step 20: the loss jumped to \d+\.\d+, from \d"):
        run(text, tmp_path)
    assert len(run(text, tmp_path / "patient", spike_factor=1e3).losses) == 8


@pytest.mark.parametrize("value", [float("nan"), 50.0])
def test_it_can_go_back_and_on_with_other_text(text, tmp_path, monkeypatch, value):
    poison(monkeypatch, [16], value)
    lines = []
    options = {"on_anomaly": "roll_back", "checkpoint_every": 5}
    result = run(text, tmp_path / "whole", report=lines.append, **options)
    back = [line for line in lines if "back to step 15, with other text" in line]
    assert len(back) == 1
    assert result.losses[-1] < result.losses[0]
    run(text, tmp_path / "cut", stop_after=18, **options)
    same(run(text, tmp_path / "cut", resume=True, **options), result)


def test_it_does_not_go_back_for_ever(text, tmp_path, monkeypatch):
    poison(monkeypatch, range(8, 30))
    with pytest.raises(TrainingError, match="after 3 roll-backs"):
        run(text, tmp_path, on_anomaly="roll_back")


def test_a_full_disk_leaves_the_last_checkpoint(text, tmp_path):
    run(text, tmp_path, stop_after=7)
    kept = (tmp_path / CHECKPOINT_NAME).read_bytes()
    (tmp_path / f"{CHECKPOINT_NAME}.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint") as caught:
        write_state(tmp_path, {"weights": torch.zeros(1 << 20)})
    assert "--resume" in caught.value.hint
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == kept
    assert not (tmp_path / f"{CHECKPOINT_NAME}.tmp").is_symlink()


def test_accumulated_batches_are_one_large_batch(text, tmp_path):
    """The windows are the same, cut otherwise: the gradients differ by their rounding alone."""
    large = run(text, tmp_path / "large", batch_size=4, steps=6, log_every=1)
    small = run(text, tmp_path / "small", batch_size=2, accumulation=2, steps=6, log_every=1)
    assert small.losses == pytest.approx(large.losses, rel=1e-3)
    assert small.losses[0] == pytest.approx(large.losses[0], rel=1e-6)


def test_the_average_is_evaluated_and_given_back(text, tmp_path):
    plain = run(text, tmp_path / "plain", log_every=1)
    averaged = run(text, tmp_path / "averaged", log_every=1, ema=0.95)
    assert averaged.losses == plain.losses
    assert averaged.held_out_bpb != plain.held_out_bpb
    state = torch.load(tmp_path / "averaged" / CHECKPOINT_NAME, weights_only=True)
    for name, value in averaged.model.named_parameters():
        assert torch.equal(state["average"][name], value.detach()), name
        assert torch.equal(state["model"][name], plain.model.get_parameter(name).detach()), name


def test_muon_moves_the_matrices_of_the_layers(text, tmp_path):
    adam = run(text, tmp_path / "adam", steps=8, learning_rate=1e-3)
    muon = run(text, tmp_path / "muon", steps=8, learning_rate=1e-3, optimizer="muon")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(muon.model.get_parameter(name), adam.model.get_parameter(name))
    assert muon.losses[-1] < muon.losses[0]
