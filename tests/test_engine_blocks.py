"""BlockPool: every block has as many holders as it is said to have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitllm.engine.blocks import BlockPool, block_key, root_key


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


def keys(*blocks: list[int]) -> list[bytes]:
    """Return the keys of blocks that follow each other."""
    found = [root_key(b"")]
    for tokens in blocks:
        found.append(block_key(found[-1], tokens))
    return found[1:]


def test_a_key_stands_for_all_tokens_up_to_the_end_of_the_block() -> None:
    one, two = [1] * 32, [2] * 32
    assert keys(one, two) == keys(one, two)
    assert keys(one, two)[1] != keys(two, two)[1]
    assert keys(one)[0] != keys(two)[0]
    assert block_key(root_key(b"adapter"), one) != keys(one)[0]
    assert keys([256])[0] != keys([1])[0]  # ids are more than bytes


def test_kept_blocks_are_found_until_their_room_is_needed() -> None:
    pool = BlockPool(3)
    first, second = keys([1], [2])
    blocks = [pool.allocate(), pool.allocate()]
    pool.keep(blocks[0], first)
    pool.keep(blocks[1], second)
    pool.release(blocks)
    assert (pool.available, pool.idle) == (3, 2)
    assert pool.allocate() == 2  # one with nothing in it comes first
    assert pool.find(first) == blocks[0]
    assert pool.allocate() == blocks[1]  # of one text, the end goes before the beginning
    assert pool.find(second) is None
    pool.share([blocks[0]])
    assert (pool.available, pool.idle) == (0, 0)
    assert pool.find(first) == blocks[0]


def test_the_longest_unused_goes_first() -> None:
    pool = BlockPool(3)
    for number in range(3):
        pool.keep(pool.allocate(), bytes([number]))
    pool.release([0])
    pool.release([1])
    pool.release([2])
    pool.share([0])
    pool.release([0])
    assert [pool.allocate() for _ in range(3)] == [1, 2, 0]


def test_the_first_block_under_a_key_is_the_one_that_is_kept() -> None:
    pool = BlockPool(2)
    one, two = pool.allocate(), pool.allocate()
    pool.keep(one, b"key")
    pool.keep(two, b"key")
    assert pool.find(b"key") == one
    pool.release([one, two])
    assert pool.idle == 1
    pool.forget(two)
    assert pool.find(b"key") == one


def test_reset_keeps_what_is_kept() -> None:
    pool = BlockPool(3)
    one, two = pool.allocate(), pool.allocate()
    pool.keep(one, b"key")
    pool.share([one, two])
    pool.reset()
    assert (pool.available, pool.idle) == (3, 1)
    assert pool.find(b"key") == one
    assert [pool.allocate() for _ in range(3)] == [two, 2, one]
