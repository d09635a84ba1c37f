"""BlockPool: every block has as many holders as it is said to have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitllm.engine.blocks import BlockPool


def test_blocks_are_handed_out_lowest_first_and_reused() -> None:
    pool = BlockPool(4)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    pool.release([1])
    assert pool.allocate() == 1
    assert pool.available == 1


def test_a_shared_block_is_free_after_its_last_holder() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    assert not pool.is_shared(block)
    pool.share([block])
    assert pool.is_shared(block)
    pool.release([block])
    assert pool.available == 1
    assert not pool.is_shared(block)
    pool.release([block])
    assert pool.available == 2


def test_misuse_is_a_bug_and_says_so() -> None:
    pool = BlockPool(1)
    with pytest.raises(RuntimeError, match="released more often"):
        pool.release([0])
    with pytest.raises(RuntimeError, match="cannot be shared"):
        pool.share([0])
    pool.allocate()
    with pytest.raises(RuntimeError, match="all 1 KV blocks"):
        pool.allocate()


def test_reset_takes_all_back() -> None:
    pool = BlockPool(3)
    pool.share([pool.allocate()])
    pool.reset()
    assert (pool.available, pool.capacity) == (3, 3)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "drop"]), st.integers(0, 9))))
def test_pool_against_a_list_of_holders(actions: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(5), []
    for action, pick in actions:
        if action == "take" and pool.available:
            held.append(pool.allocate())
        elif action == "share" and held:
            held.append(held[pick % len(held)])
            pool.share(held[-1:])
        elif action == "drop" and held:
            pool.release([held.pop(pick % len(held))])
        assert pool.available == 5 - len(set(held))
        assert all(pool.is_shared(block) == (held.count(block) > 1) for block in held)
