"""Sampling: what each cut keeps, what penalties change, and the distribution of the draws."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batches import Draw, make_plan
from bitllm.backends.sampling import adjust_logits, draw_token, kept_ids, score_row

VOCAB = 40
DRAWS = 1000
LOGITS = arrays.arrays(np.float32, VOCAB, elements=st.integers(-80, 80).map(lambda n: n / 8))
QUICK = settings(max_examples=80, deadline=None)


def drawn(logits, **fields):
    return draw_token(make_plan([Draw(**fields)], len(logits)), 0, np.asarray(logits, np.float32))


def kept(logits, **fields):
    ids = kept_ids(make_plan([Draw(**fields)], len(logits)), 0, np.asarray(logits, np.float32))
    return ids.tolist()


def probabilities(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


# Greedy


def test_greedy_takes_the_highest_logit_and_the_lowest_id_of_a_tie():
    assert drawn([1, 5, 3, 5, 2], temperature=0) == 1


def test_greedy_ignores_cuts_and_seed():
    assert drawn([1, 5, 3], temperature=0, top_k=1, top_p=0.01, min_p=1.0, seed=9) == 1


def test_nothing_allowed_draws_minus_one():
    for temperature in (0.0, 1.0):
        assert drawn([1, 2, 3], temperature=temperature, allowed=frozenset()) == -1


# Cuts


@QUICK
@given(LOGITS, st.integers(1, VOCAB + 5))
def test_top_k_keeps_the_k_highest(logits, k):
    order = sorted(range(VOCAB), key=lambda i: (-logits[i], i))
    assert kept(logits, top_k=k) == order[:k]


@QUICK
@given(LOGITS, st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99]), st.sampled_from([0.5, 1.0, 2.0]))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p, temperature):
    ids = kept(logits, top_p=p, temperature=temperature)
    order = sorted(range(VOCAB), key=lambda i: (-logits[i], i))
    assert ids == order[: len(ids)]
    mass = probabilities(logits, temperature)[ids]
    assert mass.sum() >= p - 1e-6
    assert mass[:-1].sum() <= p + 1e-6


@QUICK
@given(LOGITS, st.sampled_from([0.02, 0.1, 0.5, 1.0]))
def test_min_p_drops_what_is_unlikely_beside_the_likeliest(logits, p):
    ids = kept(logits, min_p=p)
    ratio = probabilities(logits) / probabilities(logits).max()
    assert set(np.flatnonzero(ratio >= p * (1 + 1e-6))) <= set(ids)
    assert set(ids) <= set(np.flatnonzero(ratio >= p * (1 - 1e-6)))


def test_top_p_counts_within_the_top_k():
    # The two likeliest of four equal ids hold all of the mass that top-k leaves.
    assert kept([1, 1, 1, 1], top_k=2, top_p=0.5) == [0]
    assert kept([1, 1, 1, 1], top_k=2, top_p=0.51) == [0, 1]


@QUICK
@given(
    LOGITS,
    st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99]),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0, 7]),
)
def test_typical_keeps_the_smallest_set_nearest_to_the_entropy(logits, p, temperature, top_k):
    ids = kept(logits, typical_p=p, temperature=temperature, top_k=top_k)
    left = kept(logits, temperature=temperature, top_k=top_k)
    mass = np.zeros(VOCAB)
    mass[left] = probabilities(np.asarray(logits, np.float64)[left], temperature)
    surprise = -np.log(mass[left])
    distance = dict(zip(left, np.abs(surprise - (mass[left] * surprise).sum()), strict=True))
    rest = [distance[i] for i in left if i not in ids]
    assert max(distance[i] for i in ids) <= min(rest, default=np.inf) + 1e-5
    assert mass[ids].sum() >= p - 1e-6
    furthest = max(distance[i] for i in ids)
    inner = [i for i in ids if distance[i] < furthest - 1e-5]
    assert mass[inner].sum() <= p + 1e-6
    assert ids == [i for i in left if i in ids]


def test_typical_may_drop_the_likeliest():
    logits = np.log([0.4, *[0.05] * 12])  # surprise of the first 0.9, of the others 3.0, mean 2.2
    assert 0 not in kept(logits, typical_p=0.5)
    assert kept(logits, typical_p=0.5) == list(range(1, 12))[: len(kept(logits, typical_p=0.5))]
    assert kept([0, 5, 1], typical_p=1e-6, temperature=1e-30) == [1]


def test_min_p_comes_after_top_p():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert kept(logits, top_p=0.9, min_p=0.31) == [0, 1]
    assert kept(logits, top_p=0.4, min_p=0.1) == [0]


def test_each_cut_keeps_at_least_the_likeliest():
    assert kept([0, 3, 1], top_k=1, top_p=1e-6, min_p=1.0) == [1]


def test_forbidden_ids_are_never_kept():
    assert kept([1, -np.inf, 0]) == [0, 2]


# Penalties, bias, mask


def test_repetition_penalty_shrinks_towards_unlikely():
    plan = make_plan([Draw(repetition_penalty=2.0, seen={0: 0, 1: 3})], 3)
    assert adjust_logits(plan, 0, np.float32([4, -4, 4])).tolist() == [2, -8, 4]


def test_frequency_and_presence_count_only_what_was_generated():
    plan = make_plan([Draw(frequency_penalty=0.5, presence_penalty=0.25, seen={0: 0, 1: 3})], 3)
    assert adjust_logits(plan, 0, np.float32([1, 1, 1])).tolist() == [1, 1 - 1.5 - 0.25, 1]


def test_bias_comes_before_penalties_and_mask_after_them():
    draw = Draw(bias={0: 3.0, 2: 1.0}, repetition_penalty=2.0, seen={0: 1}, allowed={0, 1})
    adjusted = adjust_logits(make_plan([draw], 3), 0, np.float32([1, 1, 1]))
    assert adjusted.tolist() == [2, 1, -np.inf]


def test_entries_use_their_own_lists():
    draws = [
        Draw(bias={1: 1.0}, seen={0: 1}, presence_penalty=1.0),
        Draw(),
        Draw(bias={0: 2.0, 2: 3.0}, seen={2: 2}, frequency_penalty=1.0, allowed={2, 33}),
    ]
    plan = make_plan(draws, 34)
    zeros = np.zeros(34, np.float32)
    assert adjust_logits(plan, 0, zeros)[:3].tolist() == [-1, 1, 0]
    assert (adjust_logits(plan, 1, zeros) == 0).all()
    third = adjust_logits(plan, 2, zeros)
    assert np.flatnonzero(third > -np.inf).tolist() == [2, 33]
    assert third[2] == 1.0


def test_the_logits_themselves_stay_as_they_are():
    logits = np.float32([1, 2, 3])
    drawn(logits, bias={0: 5.0}, allowed={0, 1}, seen={1: 1}, repetition_penalty=3.0)
    assert logits.tolist() == [1, 2, 3]


@QUICK
@given(LOGITS, st.sets(st.integers(0, VOCAB - 1), min_size=1), st.integers(0, 2**64 - 1))
def test_only_allowed_ids_are_drawn(logits, allowed, seed):
    assert drawn(logits, allowed=frozenset(allowed), seed=seed) in allowed


# Draws


def test_the_same_seed_draws_the_same_and_each_part_of_the_key_matters():
    logits = np.zeros(1000, np.float32)
    base = {"seed": 2**63 + 5, "choice": 1, "position": 7}
    first = drawn(logits, **base)
    assert first == drawn(logits, **base)
    for change in ({"seed": 5}, {"choice": 2}, {"position": 8}):
        assert first != drawn(logits, **{**base, **change})


def test_a_draw_does_not_depend_on_the_ids_that_a_cut_removed():
    """The noise belongs to the id: a cut that keeps the winner cannot change it."""
    rng = np.random.default_rng(3)
    for position in range(50):
        logits = rng.normal(size=100).astype(np.float32)
        free = drawn(logits, position=position)
        rank = int((logits > logits[free]).sum())
        assert drawn(logits, position=position, top_k=rank + 1) == free


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [({}, 1.0), ({"temperature": 0.5}, 0.5), ({"temperature": 3.0}, 3.0)],
)
def test_draws_have_the_distribution_of_the_softmax(fields, temperature):
    logits = np.float32([1.0, 0.0, -1.0, 2.0, 0.5, -3.0])
    count = DRAWS
    draws = [draw_at(logits, position, fields) for position in range(count)]
    expected = probabilities(logits, temperature) * count
    observed = np.bincount(draws, minlength=6)
    # 99.9 % point of chi-square with 5 degrees of freedom.
    assert ((observed - expected) ** 2 / expected).sum() < 20.52


def test_draws_after_a_cut_have_the_renormalised_distribution():
    logits = np.float32([1.0, 0.0, -1.0, 2.0, 0.5, -3.0])
    draws = [draw_at(logits, position, {"top_k": 3}) for position in range(DRAWS)]
    expected = probabilities(logits[[3, 0, 4]]) * DRAWS
    observed = np.bincount(draws, minlength=6)
    assert observed.sum() == observed[[3, 0, 4]].sum()
    # 99.9 % point with 2 degrees of freedom.
    assert ((observed[[3, 0, 4]] - expected) ** 2 / expected).sum() < 13.82


def draw_at(logits, position, fields):
    return drawn(logits, position=position, seed=11, **fields)


# Log-probabilities


def test_scores_are_log_probabilities_of_the_softmax():
    logits = np.random.default_rng(2).normal(size=300, scale=4).astype(np.float32)
    score, ids, logprobs = score_row(logits, 17, 5)
    exact = np.log(probabilities(logits))
    np.testing.assert_allclose(score, exact[17], rtol=1e-6)
    assert ids.tolist() == np.argsort(-logits)[:5].tolist()
    np.testing.assert_allclose(logprobs, exact[ids], rtol=1e-6)


def test_ties_are_listed_by_lowest_id_and_lists_end_with_the_vocabulary():
    _, ids, logprobs = score_row(np.float32([1, 3, 3, 1]), 0, 9)
    assert ids.tolist() == [1, 2, 0, 3]
    assert len(logprobs) == 4


def test_no_target_scores_nan():
    assert np.isnan(score_row(np.float32([1, 2]), -1, 0)[0])
