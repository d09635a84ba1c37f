"""Merging adapters into ternary weights: the rounding, the loss it reports, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from batches import logits_of, prompt_ids
from bitllm.adapter import Adapter, LowRankUpdate
from bitllm.backends.base import LoadOptions
from bitllm.backends.reference import ReferenceBackend
from bitllm.checkpoint import DenseTensor
from bitllm.cli.app import app
from bitllm.convert.merge import merge_adapter, merge_losses
from bitllm.errors import UnsupportedModelError
from bitllm.formats import open_adapter, open_checkpoint
from cli_model import write_model
from peft_adapter import make_adapter
from synthetic import random_adapter, random_checkpoint, tiny_spec


def one_update(a, b, scale=1.0):
    tensors = (DenseTensor(np.asarray(v, np.float32), "f32") for v in (a, b))
    return Adapter("made", {"layers.0.q": LowRankUpdate(*tensors, scale)})


def test_an_adapter_that_adds_nothing_changes_nothing():
    checkpoint = random_checkpoint(tiny_spec())
    adapter = random_adapter(checkpoint.spec)
    zero = Adapter("zero", {
        name: LowRankUpdate(u.a, DenseTensor(np.zeros(u.b.shape, np.float32), "f32"), u.scale)
        for name, u in adapter.updates.items()
    })  # fmt: skip
    merged = merge_adapter(checkpoint, zero)
    for name, _ in checkpoint.spec.linear_names():
        before, after = checkpoint.ternary(name), merged.ternary(name)
        assert (before.codes() == after.codes()).all()
        assert (before.scales == after.scales).all()
    assert {loss.missing for loss in merge_losses(checkpoint, zero).values()} == {0.0}


def test_an_update_of_whole_steps_is_merged_without_loss():
    """W + U is ternary again: one code is moved by just the scale, and all the sums are exact."""
    checkpoint = random_checkpoint(tiny_spec())
    matrix = checkpoint.ternary("layers.0.q")
    row, column = map(int, np.argwhere(matrix.codes() == 0)[0])
    a, b = np.zeros((1, matrix.in_features)), np.zeros((matrix.out_features, 1))
    scales = matrix.scales if matrix.scales.ndim == 0 else matrix.scales[row]
    a[0, column], b[row, 0] = 1.0, scales / 2
    adapter = one_update(a, b, 2.0)
    codes = matrix.codes()
    codes[row, column] = 1
    merged = merge_adapter(checkpoint, adapter).ternary("layers.0.q")
    assert (merged.codes() == codes).all()
    np.testing.assert_allclose(merged.scales, matrix.scales, rtol=1e-2)
    loss = merge_losses(checkpoint, adapter)["layers.0.q"]
    assert loss.changed == 1 / codes.size
    assert loss.missing < 1e-2


def test_the_loss_is_that_of_the_sums_written_out():
    checkpoint = random_checkpoint(tiny_spec(), 3)
    adapter = random_adapter(checkpoint.spec, 3, scale=0.2)
    merged, losses = merge_adapter(checkpoint, adapter), merge_losses(checkpoint, adapter)
    for name, update in adapter.updates.items():
        matrix, after = checkpoint.ternary(name), merged.ternary(name)
        before = matrix.codes() * np.float64(matrix.scales)
        added = 0.2 * update.b.to_float32().astype(np.float64) @ update.a.to_float32()
        left = before + added - after.codes() * np.float64(after.scales)
        wanted = np.linalg.norm(left) / np.linalg.norm(added)
        assert losses[name].missing == pytest.approx(wanted, rel=1e-4)
        assert losses[name].update == pytest.approx(
            np.linalg.norm(added) / np.linalg.norm(before), rel=1e-4
        )
        # No code, and no scale, would have been nearer than those that were taken.
        for scale in after.scales * 0.98, after.scales * 1.02:
            assert np.linalg.norm(before + added - after.codes() * scale) > np.linalg.norm(left)


def test_what_sees_another_input_or_has_groups_is_not_merged():
    spec = tiny_spec(linear_norm_eps=1e-6)
    checkpoint = random_checkpoint(spec)
    with pytest.raises(UnsupportedModelError, match="norm of its own"):
        merge_adapter(checkpoint, random_adapter(spec))
    grouped = random_checkpoint(tiny_spec(), granularity="group", group_size=8)
    with pytest.raises(UnsupportedModelError, match="scales for groups"):
        merge_adapter(grouped, random_adapter(grouped.spec))


def test_a_merged_model_is_written_and_says_what_it_lost(tmp_path):
    write_model(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    make_adapter(base.spec, alpha=12.0).write(tmp_path / "run" / "adapter")
    asked = ["export", str(tmp_path / "run"), "--merge", str(tmp_path / "base"), "--json"]
    result = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "merged")])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)["merge"]
    assert len(told) == 14
    assert all(loss["missing"] > 0 for loss in told.values())
    adapter = open_adapter(tmp_path / "run" / "adapter")
    wanted, found = merge_adapter(base, adapter), open_checkpoint(tmp_path / "merged")
    for name, _ in base.spec.linear_names():
        assert (wanted.ternary(name).codes() == found.ternary(name).codes()).all()
        assert (wanted.ternary(name).scales == found.ternary(name).scales).all()
        assert (base.ternary(name).codes() != found.ternary(name).codes()).any()
    plain = CliRunner().invoke(app, [*asked[:-1], "-o", str(tmp_path / "told")])
    assert "of the codes and lost" in plain.stdout


def test_an_adapter_is_no_model(tmp_path):
    base = open_checkpoint(write_model(tmp_path / "base"))
    make_adapter(base.spec).write(tmp_path / "run" / "adapter")
    for source in "run", "run/adapter":
        result = CliRunner().invoke(
            app, ["export", str(tmp_path / source), "-o", str(tmp_path / "out")]
        )
        assert result.exit_code != 0
        assert "--merge MODEL" in result.stderr


def test_what_is_merged_is_nearer_to_the_adapted_model_than_the_base():
    """For an update as large as the rounding steps, merging is worth something."""
    checkpoint = random_checkpoint(tiny_spec(), 5)
    adapter = random_adapter(checkpoint.spec, 5, scale=0.5)
    options, ids = LoadOptions(kv_tokens=64, kv_dtype="fp32"), prompt_ids(20, 40)
    base = ReferenceBackend().load(checkpoint, options)
    slot = base.load_adapter(adapter)
    merged = ReferenceBackend().load(merge_adapter(checkpoint, adapter), options)
    wanted, plain = logits_of(base, ids, adapter=slot), logits_of(base, ids)
    assert np.linalg.norm(logits_of(merged, ids) - wanted) < np.linalg.norm(plain - wanted)
