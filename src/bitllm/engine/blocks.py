"""Which KV blocks belong to whom: ids only, the decoder owns the storage."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["BlockPool"]


class BlockPool:
    """Hands out the ids of a decoder's KV blocks and counts who holds them.

    A block is held by every sequence that reads it; it is free again when the last one lets go. A
    block with more than one holder must be copied before it is written.

    Args:
        count: number of blocks; ids are 0 .. count - 1.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.reset()

    def reset(self) -> None:
        """Take every block back, whoever holds it."""
        self._holders = [0] * self._count
        # A stack with the lowest id on top: blocks used before are used again first, so storage
        # that was never touched stays untouched.
        self._free = list(range(self._count - 1, -1, -1))

    @property
    def capacity(self) -> int:
        """Number of blocks in all."""
        return self._count

    @property
    def available(self) -> int:
        """Number of blocks nobody holds."""
        return len(self._free)

    def allocate(self) -> int:
        """Return the id of a free block, now held once.

        Raises:
            RuntimeError: no block is free; ask `available` first.
        """
        if not self._free:
            raise RuntimeError(f"all {self._count} KV blocks are held")
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of these blocks, all of them held already."""
        for block in blocks:
            if self._holders[block] == 0:
                raise RuntimeError(f"KV block {block} is free and cannot be shared")
            self._holders[block] += 1

    def is_shared(self, block: int) -> bool:
        """Whether writing to the block would change it for another holder."""
        return self._holders[block] > 1

    def release(self, blocks: Iterable[int]) -> None:
        """Let go of each of these blocks once; those without a holder are free again."""
        for block in blocks:
            if self._holders[block] == 0:
                raise RuntimeError(f"KV block {block} is released more often than it is held")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)
