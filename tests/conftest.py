"""What every test runs under: memory that was never written is poisoned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

# Kernels for GPUs run under Triton's interpreter, which is chosen before Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"


def _poison(array: np.ndarray) -> np.ndarray:
    """Fill with what a reader of uninitialised memory cannot mistake for a result."""
    if array.dtype.kind in "fc":
        array.fill(np.nan)
    elif array.dtype.kind in "iu":
        (array if array.ndim else array.reshape(1)).view(np.uint8).fill(0xA5)
    return array


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """Make `np.empty` and `np.empty_like` return poison for the whole run."""
    empty, empty_like = np.empty, np.empty_like

    def poisoned_empty(*args: Any, **kwargs: Any) -> np.ndarray:
        return _poison(empty(*args, **kwargs))

    def poisoned_empty_like(*args: Any, **kwargs: Any) -> np.ndarray:
        return _poison(empty_like(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", poisoned_empty)
        patch.setattr(np, "empty_like", poisoned_empty_like)
        yield
