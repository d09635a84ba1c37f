"""Training models of few bits: `BitLinear`, `quantize_model`, recipes, the loop, export."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitllm.errors import BackendUnavailableError

if TYPE_CHECKING:
    from bitllm.train.bitlinear import BitLinear
    from bitllm.train.in_place import (
        QuantizationReport,
        dequantize_model,
        quantize_model,
        set_strength,
    )

__all__ = [
    "BitLinear",
    "QuantizationReport",
    "dequantize_model",
    "quantize_model",
    "set_strength",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: text and recipes need no PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "bitlinear" if name == "BitLinear" else "in_place"
    try:
        value = getattr(import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise BackendUnavailableError(
            f"bitllm.train.{name} needs PyTorch, which is not installed",
            hint='pip install "bitllm[train]"',
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
