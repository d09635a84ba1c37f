"""Which KV blocks belong to whom: ids only, the decoder owns the storage."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["BlockPool", "block_key", "root_key"]

_KEY_BYTES = 32


def root_key(name: bytes) -> bytes:
    """Return the key before the first block of sequences whose keys and values depend on `name`.

    Args:
        name: what they depend on besides the tokens, such as an adapter.
    """
    return _hash(name) if name else bytes(_KEY_BYTES)


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the key of a full block: a hash of its tokens and of all tokens before them.

    The tokens themselves are not kept to be compared: two texts of the same BLAKE2b hash of 256
    bits cannot be found even on purpose, so equal keys are equal tokens.

    Args:
        parent: key of the block before, or the `root_key`.
        token_ids: the block's tokens.
    """
    return _hash(parent + array("i", token_ids).tobytes())


def _hash(content: bytes) -> bytes:
    # Imported when first needed: it maps 4 MB of OpenSSL, which short prompts can do without.
    from hashlib import blake2b

    return blake2b(content, digest_size=_KEY_BYTES).digest()


class BlockPool:
    """Hands out the ids of a decoder's KV blocks, counts who holds them, and finds them again.

    A block is held by every sequence that reads it. A full one may be kept under a key that stands
    for all tokens up to its end: then it stays as it is after its last holder has let go, for
    others with the same tokens, until its storage is needed; the longest unused goes first. A
    block that is shared, or kept, must not be written.

    Args:
        count: number of blocks; ids are 0 .. count - 1.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._by_key: dict[bytes, int] = {}
        self.reset()

    def reset(self) -> None:
        """Take every block back, whoever holds it; those that are kept stay.

        Whatever was interrupted before, `_by_key` tells the truth: a block leaves it before anyone
        writes to it, and enters it in one operation.
        """
        self._holders = [0] * self._count
        self._keys: list[bytes | None] = [None] * self._count
        for key, block in self._by_key.items():
            self._keys[block] = key
        self._idle = OrderedDict.fromkeys(self._by_key.values())  # longest unused first
        # A stack with the lowest id on top: blocks used before are used again first, so storage
        # that was never touched stays untouched.
        self._free = [block for block in reversed(range(self._count)) if not self._keys[block]]

    @property
    def capacity(self) -> int:
        """Number of blocks in all."""
        return self._count

    @property
    def available(self) -> int:
        """Number of blocks nobody holds, kept or not."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Number of blocks nobody holds that are kept."""
        return len(self._idle)

    def allocate(self) -> int:
        """Return the id of a block that nobody held, now held once and not kept.

        Raises:
            RuntimeError: every block is held; ask `available` first.
        """
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block = next(iter(self._idle))
            self.forget(block)
            del self._idle[block]
        else:
            raise RuntimeError(f"all {self._count} KV blocks are held")
        self._holders[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of these blocks, all of them held or kept."""
        for block in blocks:
            if self._holders[block] == 0:
                if self._keys[block] is None:
                    raise RuntimeError(f"KV block {block} is free and cannot be shared")
                del self._idle[block]
            self._holders[block] += 1

    def is_held(self, block: int) -> bool:
        """Whether anybody holds the block."""
        return self._holders[block] > 0

    def is_shared(self, block: int) -> bool:
        """Whether writing to the block would change it for another holder."""
        return self._holders[block] > 1

    def is_writable(self, block: int) -> bool:
        """Whether the block has one holder and is not kept."""
        return self._holders[block] == 1 and self._keys[block] is None

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of each of these blocks once; those without a holder can be had again.

        Of a sequence's blocks, in order of position, the last is given up first: more texts have
        their beginning in common than their end.
        """
        for block in reversed(blocks):
            if self._holders[block] == 0:
                raise RuntimeError(f"KV block {block} is released more often than it is held")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def keep(self, block: int, key: bytes) -> None:
        """Keep a full block that is held under this key, unless another is kept under it."""
        if key not in self._by_key:
            self._by_key[key] = block
            self._keys[block] = key

    def forget(self, block: int) -> None:
        """Keep the block no more; harmless if it is not."""
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None

    def find(self, key: bytes) -> int | None:
        """Return the block that is kept under this key."""
        return self._by_key.get(key)
