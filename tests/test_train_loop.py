"""Training: the loss falls, a resumed run is the same run, and what stops it is said."""

from __future__ import annotations

import csv
import dataclasses
import math

import pytest
import torch

from bitllm.backends.base import LoadOptions
from bitllm.backends.reference import ReferenceBackend
from bitllm.errors import ConfigError, FormatError, TrainingError
from bitllm.formats import open_checkpoint
from bitllm.train.__main__ import main
from bitllm.train.bits import decoder_bits, held_out_pieces, torch_bits
from bitllm.train.data import TokenShards
from bitllm.train.documents import documents_sha256, file_documents
from bitllm.train.loop import CHECKPOINT_NAME, LOG_NAME, train
from bitllm.train.pipeline import prepare_text
from tiny_training import prepare_tiny, tiny_recipe, write_corpus
from torch_checkpoint import torch_checkpoint


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing by more threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    prepare_tiny(folder)
    return folder


def run(text, out, report=lambda line: None, stop_after=None, resume=False, **training):
    recipe = tiny_recipe(text, **training)
    shards = text / "shards"
    return train(recipe, shards, out, resume=resume, stop_after=stop_after, report=report)


def read_log(out):
    with (out / LOG_NAME).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole_run(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return run(text, out), out


def test_the_loss_falls(whole_run):
    result, _ = whole_run
    losses_of_a_flat_guess = math.log(300)
    assert result.losses[0] > losses_of_a_flat_guess - 1.0
    assert result.losses[-1] < losses_of_a_flat_guess - 2.0
    assert 0 < result.held_out_bpb < 4.0


def test_the_log_has_a_line_for_each_stretch(whole_run):
    result, out = whole_run
    rows = read_log(out)
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert [float(row["loss"]) for row in rows] == list(result.losses)
    assert [row["step"] for row in rows if row["held_out_bpb"]] == ["12", "24", "30"]
    assert float(rows[-1]["held_out_bpb"]) == result.held_out_bpb
    assert int(rows[-1]["tokens"]) == 30 * 2 * 24


@pytest.mark.parametrize("stop", [9, 14])
def test_a_resumed_run_is_the_same_run(text, whole_run, tmp_path, stop):
    whole, whole_out = whole_run
    run(text, tmp_path, stop_after=stop)
    lines: list[str] = []
    resumed = run(text, tmp_path, resume=True, report=lines.append)
    assert lines[0].startswith(f"resumed at step {stop}")
    assert resumed.held_out_bpb == whole.held_out_bpb
    state = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert (tmp_path / LOG_NAME).read_text() == (whole_out / LOG_NAME).read_text()


def test_the_seed_decides(text, whole_run, tmp_path):
    assert run(text, tmp_path, seed=1).losses != whole_run[0].losses


def test_a_damaged_checkpoint_is_refused(text, whole_run, tmp_path):
    path = tmp_path / CHECKPOINT_NAME
    whole = (whole_run[1] / CHECKPOINT_NAME).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="this checkpoint is damaged") as caught:
            run(text, tmp_path, resume=True)
        assert str(path) in caught.value.message


def test_a_checkpoint_of_other_tensors_is_damaged(text, whole_run, tmp_path):
    state = torch.load(whole_run[1] / CHECKPOINT_NAME, weights_only=True)
    del state["model"]["model.norm.weight"]
    torch.save(state, tmp_path / CHECKPOINT_NAME)
    with pytest.raises(FormatError, match="this checkpoint is damaged"):
        run(text, tmp_path, resume=True)


def test_a_checkpoint_of_another_recipe_is_refused(text, whole_run):
    with pytest.raises(ConfigError, match="belongs to another recipe"):
        run(text, whole_run[1], resume=True, seed=5)


def test_how_often_a_run_reports_may_change_between_resumes(text, tmp_path):
    run(text, tmp_path, stop_after=7)
    assert len(run(text, tmp_path, resume=True, log_every=30).losses) == 2


def test_nothing_to_resume_from_is_said(text, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        run(text, tmp_path, resume=True)


def test_a_loss_that_is_no_number_stops_the_run(text, tmp_path):
    with pytest.raises(TrainingError, match=r"step \d+: .* gradient norm nan") as caught:
        run(text, tmp_path, learning_rate=1e30, warmup_steps=0)
    assert "learning_rate" in caught.value.hint


def test_shards_of_another_vocabulary_are_refused(text, tmp_path):
    recipe = tiny_recipe(text)
    tokenizer = dataclasses.replace(recipe.tokenizer, vocab_size=301)
    other = dataclasses.replace(recipe, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="the shards have 300 ids"):
        train(other, text / "shards", tmp_path)


def test_without_held_out_text_its_figure_is_no_number(tmp_path):
    write_corpus(tmp_path)
    recipe = tiny_recipe(tmp_path, steps=4, warmup_steps=1)
    no_split = dataclasses.replace(recipe.text, held_out_percent=0.0)
    recipe = dataclasses.replace(recipe, text=no_split)
    prepare_text(recipe, tmp_path)
    result = train(recipe, tmp_path / "shards", tmp_path, report=lambda line: None)
    assert math.isnan(result.held_out_bpb)


def test_pieces_cover_every_held_out_token_once(text):
    shards = TokenShards.open(text / "shards", "held_out")
    pieces = held_out_pieces(shards, 10)
    assert all(2 <= len(piece) <= 10 and piece[0] == shards.begin_id for piece in pieces)
    documents = [ids[1:].tolist() for ids in shards.documents()]
    assert [i for piece in pieces for i in piece[1:]] == [i for ids in documents for i in ids]


def test_bits_are_the_same_in_torch_and_in_a_backend(text, whole_run):
    model = whole_run[0].model
    pieces = held_out_pieces(TokenShards.open(text / "shards", "held_out"), 40)
    options = LoadOptions(kv_tokens=64, kv_dtype="fp32")
    decoder = ReferenceBackend().load(torch_checkpoint(model), options)
    assert decoder_bits(decoder, pieces) == pytest.approx(torch_bits(model, pieces), rel=1e-3)


RECIPE = """
name = "tiny"
[text]
source = "files"
files = ["text0.txt", "text1.txt", "text2.txt"]
{pin}
[tokenizer]
vocab_size = 290
[model]
hidden_size = 32
layers = 1
heads = 2
kv_heads = 1
head_dim = 8
ffn_size = 48
context = 32
[training]
threads = 1
steps = 3
warmup_steps = 1
batch_size = 1
sequence_length = 16
checkpoint_every = 2
"""


def test_the_command_trains_exports_and_resumes(tmp_path, capsys):
    write_corpus(tmp_path)
    recipe, out = tmp_path / "tiny.toml", tmp_path / "out"
    found = documents_sha256(file_documents([tmp_path / f"text{i}.txt" for i in range(3)]))
    recipe.write_text(RECIPE.format(pin=f'sha256 = "{found}"'))
    assert main([str(recipe), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out / 'model'}\n"
    assert "step 3/3" in captured.err
    assert open_checkpoint(out / "model").spec.vocab_size == 290
    assert main([str(recipe), "--out", str(out), "--resume"]) == 0
    assert "resumed at step 3" in capsys.readouterr().err


def test_the_command_puts_errors_in_one_line_and_a_hint(tmp_path, capsys):
    write_corpus(tmp_path)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE.format(pin='sha256 = "00"\npython = "3.0"'))
    assert main([str(recipe), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the text hashes to ")
    assert "(that of Python 3.0)" in error
    assert "hint: " in error
    assert not (tmp_path / "out").exists()
