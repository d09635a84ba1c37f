"""The adapters of a loaded model: their names, their slots, and who uses them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitllm.adapter import Adapter
from bitllm.backends.base import Decoder
from bitllm.errors import ConfigError, InsufficientMemoryError

if TYPE_CHECKING:
    from bitllm.engine.sequence import Sequence

__all__ = ["AdapterTable", "LoadedAdapter", "find_adapter"]

_LONGEST_NAME = 1000


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter that requests can ask for.

    Attributes:
        name: what requests call it.
        origin: the directory it was read from.
        rank: the largest rank of its matrices.
        nbytes: bytes that it took when it was loaded.
        slot: its number in the decoder.
        key: what its keys and values are kept under in the prefix cache; no two loads share one,
            also not of the same files.
    """

    name: str
    origin: str
    rank: int
    nbytes: int
    slot: int
    key: bytes


class AdapterTable:
    """The adapters of one decoder. Whoever calls `load`, `unload`, `hold` or `let_go` has its lock.

    Args:
        decoder: what holds the matrices.
        room: bytes that adapters may take together; None = what the machine has.
    """

    def __init__(self, decoder: Decoder, room: int | None = None) -> None:
        self._decoder = decoder
        self._room = room
        self._by_name: dict[str, LoadedAdapter] = {}
        self._users: dict[LoadedAdapter, set[Sequence]] = {}  # those without a name are leaving
        self._loads = itertools.count()

    @property
    def loaded(self) -> dict[str, LoadedAdapter]:
        """The adapters by name, as of now."""
        return dict(self._by_name)

    def load(self, name: str, adapter: Adapter) -> None:
        """Copy an adapter to the device under this name.

        Raises:
            ConfigError: the name is in use, or is none.
            TensorShapeError: the adapter was made for another architecture.
            InsufficientMemoryError: it does not fit.
        """
        if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
            raise ConfigError(
                f"the name of an adapter must be a text of 1 to {_LONGEST_NAME} characters, "
                f"got {name!r:.80}"
            )
        if name in self._by_name:
            raise ConfigError(
                f"an adapter {name!r} is loaded already",
                hint="unload it first, or load this one under another name",
            )
        adapter.check(self._decoder.spec)
        nbytes = self._decoder.adapter_bytes(adapter)
        held = sum(each.nbytes for each in self._users)
        if self._room is not None and held + nbytes > self._room:
            raise InsufficientMemoryError(
                f"{adapter.origin}: the adapter needs {nbytes / 1e6:.3g} MB, but memory_limit "
                f"leaves {max(0, self._room - held) / 1e6:.3g} MB",
                hint="unload another adapter, raise memory_limit, or lower context or kv_tokens",
            )
        slot = self._decoder.load_adapter(adapter)
        key = b"adapter %d" % next(self._loads)
        loaded = LoadedAdapter(name, adapter.origin, adapter.rank, nbytes, slot, key)
        self._users[loaded] = set()
        self._by_name[name] = loaded

    def unload(self, name: str) -> None:
        """Take a name away; the adapter itself goes when the last sequence has let go of it.

        Raises:
            ConfigError: no adapter has this name.
        """
        loaded = find_adapter(self._by_name, name)
        if loaded is not None:
            del self._by_name[name]
            self._free_unused(loaded)

    def hold(self, loaded: LoadedAdapter, sequences: list[Sequence]) -> None:
        """Keep an adapter for these sequences.

        Raises:
            ConfigError: it was unloaded after the request had been made.
        """
        if self._by_name.get(loaded.name) is not loaded:
            raise ConfigError(f"the adapter {loaded.name!r} was unloaded")
        self._users[loaded].update(sequences)

    def let_go(self, sequence: Sequence) -> None:
        """Forget a sequence, which may have let go before, or never have had an adapter."""
        loaded = sequence.request.adapter
        if loaded is not None and loaded in self._users:
            self._users[loaded].discard(sequence)
            if self._by_name.get(loaded.name) is not loaded:
                self._free_unused(loaded)

    def clear(self) -> None:
        """Forget all adapters; the decoder has been closed."""
        self._by_name.clear()
        self._users.clear()

    def _free_unused(self, loaded: LoadedAdapter) -> None:
        if not self._users[loaded]:
            del self._users[loaded]
            self._decoder.unload_adapter(loaded.slot)


def find_adapter(loaded: Mapping[str, LoadedAdapter], name: str | None) -> LoadedAdapter | None:
    """Return the adapter of this name, None for None.

    Raises:
        ConfigError: no adapter has this name; tells those there are.
    """
    if name is None:
        return None
    found = loaded.get(name) if isinstance(name, str) else None
    if found is None:
        there = f"there are: {', '.join(sorted(loaded))}" if loaded else "no adapter is loaded"
        raise ConfigError(f"there is no adapter {name!r:.80}", hint=f"{there}; see load_adapter")
    return found
