"""The checks of `bitllm doctor`: each kernel set against the reference, and the demo model."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bitllm.cli.failures import CheckFailedError
from bitllm.cli.terminal import note
from bitllm.errors import BitllmError

__all__ = ["Check", "check_demo", "run_checks"]

DEMO_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried: whether it passed, what was seen, and how long it took."""

    name: str
    passed: bool
    detail: str
    seconds: float


def run_checks(*, verbose: bool = False) -> list[Check]:
    """Run all checks; one that breaks counts as failed, and `verbose` shows its traceback."""
    tests: dict[str, Callable[[], str]] = {}
    try:
        from bitllm.backends.cpu import kernel_names
        from bitllm.cli.selftest import SelfTest
    except ImportError as error:
        tests["native module"] = partial(_fail, str(error))
    else:
        selftest = SelfTest()
        for name in kernel_names():
            tests[f"kernels {name}"] = partial(selftest.check, name)
    if importlib.util.find_spec("mlx") is not None:
        tests["mlx"] = _check_mlx
    tests["demo model"] = check_demo
    return [_try(name, test, verbose) for name, test in tests.items()]


def check_demo() -> str:
    """Let the demo model write and return what it did.

    Raises:
        CheckFailedError: it wrote another number of tokens than asked for.
        BitllmError: it is missing or cannot be loaded.
    """
    from bitllm.engine.loading import load
    from bitllm.formats import resolve_model

    with load(str(resolve_model(None).path)) as llm:
        usage = llm.generate("The", max_tokens=DEMO_TOKENS, ignore_eos=True, temperature=0).usage
    if usage.completion_tokens != DEMO_TOKENS:
        raise CheckFailedError(f"wrote {usage.completion_tokens} of {DEMO_TOKENS} tokens")
    return f"wrote {DEMO_TOKENS} of {DEMO_TOKENS} tokens"


def _check_mlx() -> str:
    from bitllm.backends.mlx.selftest import check_products

    return check_products()


def _fail(reason: str) -> str:
    raise CheckFailedError(reason)


def _try(name: str, test: Callable[[], str], verbose: bool) -> Check:
    start = time.perf_counter()
    try:
        passed, detail = True, test()
    except (CheckFailedError, BitllmError) as error:
        passed, detail = False, getattr(error, "message", str(error))
    except Exception as error:
        # A doctor that breaks on a broken installation would be of no use.
        passed, detail = False, f"{type(error).__name__}: {error}"
        if verbose:
            import traceback

            note(traceback.format_exc())
    return Check(name, passed, detail, time.perf_counter() - start)
