"""Distillation: both divergences against their written-out sums, and a student that learns."""

from __future__ import annotations

import math

import pytest
import torch

from bitllm.errors import ConfigError
from bitllm.train.distillation import Distillation, logits_divergence, relation_divergence
from bitllm.train.model import UNTRAINED
from bitllm.train.recipe import DistillationSettings
from bitllm.train.start import teacher_model
from small_llama import write_llama


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_divergence_of_logits_is_the_sum_written_out():
    torch.manual_seed(1)
    teacher, student = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    targets = torch.tensor([[1, UNTRAINED, 2], [UNTRAINED, 3, UNTRAINED]])
    wanted, count = 0.0, 0
    for row, place in (0, 0), (0, 2), (1, 1):
        p = (teacher[row, place].double() / 2.5).softmax(0)
        q = (student[row, place].double() / 2.5).softmax(0)
        wanted, count = wanted + (p * (p / q).log()).sum().item(), count + 1
    found = logits_divergence(teacher, student, targets, 2.5).item()
    assert found == pytest.approx(wanted / count, rel=1e-5)
    assert logits_divergence(teacher, teacher, targets, 2.5).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("masked", [False, True])
def test_the_divergence_of_relations_is_the_sum_written_out(masked):
    torch.manual_seed(2)
    teacher, student, heads = torch.randn(2, 5, 8), torch.randn(2, 5, 12), 2
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]) if masked else None
    wanted = 0.0
    for row in range(2):
        for head in range(heads):
            of_teacher, of_student = (
                states[row].double().chunk(heads, dim=1)[head] for states in (teacher, student)
            )
            for i in range(5):
                seen = [
                    j
                    for j in range(i + 1)
                    if documents is None or documents[row, i] == documents[row, j]
                ]
                p, q = (
                    torch.stack([a[i] @ a[j] / math.sqrt(a.shape[1]) for j in seen]).softmax(0)
                    for a in (of_teacher, of_student)
                )
                wanted += (p * (p / q).log()).sum().item()
    found = relation_divergence(teacher, student, documents, heads).item()
    assert found == pytest.approx(wanted / (2 * heads * 5), rel=1e-5)


@pytest.fixture
def pair(tmp_path):
    write_llama(tmp_path / "dense")
    write_llama(tmp_path / "other", seed=2)
    return teacher_model("dense", tmp_path), teacher_model("other", tmp_path)


def settings(**changes):
    return DistillationSettings(teacher="dense", **changes)


def batch():
    ids = torch.randint(5, 261, (2, 21), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1], None, ids[:, 1:]


def test_a_teacher_has_nothing_to_teach_itself(pair):
    teacher, _ = pair
    distillation = Distillation(teacher, teacher, settings())
    ids, documents, targets = batch()
    plain = Distillation(teacher, teacher, settings(logits_weight=0.0, relation_weight=0.0))
    found = distillation.loss(teacher, ids, documents, targets)
    torch.testing.assert_close(found, plain.loss(teacher, ids, documents, targets))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 100.0)])
def test_a_student_comes_nearer_to_its_teacher(pair, weights):
    teacher, student = pair
    student.requires_grad_(True)
    logits, relation = weights
    distillation = Distillation(
        teacher, student, settings(logits_weight=logits, relation_weight=relation, temperature=1.0)
    )
    ids, documents, targets = batch()
    nothing = torch.full_like(targets, UNTRAINED)
    nothing[:, 0] = targets[:, 0]
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = distillation.loss(student, ids, documents, targets if logits else nothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relation_layer": 2}, "relation_layer 2 is not there: a model has 2 layers"),
        ({"relation_heads": 3}, "relation_heads 3 does not divide 32"),
    ],
)
def test_what_does_not_fit_is_refused(pair, changes, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(*pair, settings(**changes))


def test_teachers_of_another_vocabulary_are_refused(pair, tmp_path):
    write_llama(tmp_path / "wide", vocab_size=300)
    with pytest.raises(ConfigError, match="the teacher has 300 ids, the student 261"):
        Distillation(teacher_model("wide", tmp_path), pair[0], settings())
