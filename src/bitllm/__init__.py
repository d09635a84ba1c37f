"""bitllm: run, serve, train and convert ternary (1.58-bit) language models.

    import bitllm

    llm = bitllm.load()                      # the demo model; or bitllm.load("org/name")
    print(llm.generate("A list is", max_tokens=40))

Names are imported when they are first used, so that `import bitllm` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitllm.config import EngineOptions as EngineOptions
    from bitllm.config import SamplingParams as SamplingParams
    from bitllm.engine.async_llm import AsyncLLM as AsyncLLM
    from bitllm.engine.async_model_pool import AsyncModelPool as AsyncModelPool
    from bitllm.engine.llm import LLM as LLM
    from bitllm.engine.loading import load as load
    from bitllm.engine.model_pool import LoadedModel as LoadedModel
    from bitllm.engine.model_pool import ModelPool as ModelPool
    from bitllm.engine.outputs import Chunk as Chunk
    from bitllm.engine.outputs import Completion as Completion
    from bitllm.engine.outputs import Score as Score
    from bitllm.engine.outputs import TextScore as TextScore
    from bitllm.engine.outputs import TokenLogprob as TokenLogprob
    from bitllm.engine.outputs import ToolCall as ToolCall
    from bitllm.engine.outputs import Usage as Usage
    from bitllm.engine.stats import EngineStats as EngineStats
    from bitllm.errors import BackendUnavailableError as BackendUnavailableError
    from bitllm.errors import BitllmError as BitllmError
    from bitllm.errors import ChatTemplateError as ChatTemplateError
    from bitllm.errors import CheckpointError as CheckpointError
    from bitllm.errors import ConfigError as ConfigError
    from bitllm.errors import ContextOverflowError as ContextOverflowError
    from bitllm.errors import ConversionError as ConversionError
    from bitllm.errors import FormatError as FormatError
    from bitllm.errors import InsufficientMemoryError as InsufficientMemoryError
    from bitllm.errors import MeasurementError as MeasurementError
    from bitllm.errors import MissingTensorError as MissingTensorError
    from bitllm.errors import ModelNotFoundError as ModelNotFoundError
    from bitllm.errors import NotTernaryError as NotTernaryError
    from bitllm.errors import QuantizationError as QuantizationError
    from bitllm.errors import TensorShapeError as TensorShapeError
    from bitllm.errors import TokenizerError as TokenizerError
    from bitllm.errors import TrainingError as TrainingError
    from bitllm.errors import UnsupportedModelError as UnsupportedModelError

    __version__: str

_HOMES = {
    "bitllm.config": ("EngineOptions", "SamplingParams"),
    "bitllm.engine.async_llm": ("AsyncLLM",),
    "bitllm.engine.async_model_pool": ("AsyncModelPool",),
    "bitllm.engine.llm": ("LLM",),
    "bitllm.engine.loading": ("load",),
    "bitllm.engine.model_pool": ("LoadedModel", "ModelPool"),
    "bitllm.engine.outputs": (
        "Chunk",
        "Completion",
        "Score",
        "TextScore",
        "TokenLogprob",
        "ToolCall",
        "Usage",
    ),
    "bitllm.engine.stats": ("EngineStats",),
    "bitllm.errors": (
        "BackendUnavailableError",
        "BitllmError",
        "ChatTemplateError",
        "CheckpointError",
        "ConfigError",
        "ContextOverflowError",
        "ConversionError",
        "FormatError",
        "InsufficientMemoryError",
        "MeasurementError",
        "MissingTensorError",
        "ModelNotFoundError",
        "NotTernaryError",
        "QuantizationError",
        "TensorShapeError",
        "TokenizerError",
        "TrainingError",
        "UnsupportedModelError",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncModelPool",
    "BackendUnavailableError",
    "BitllmError",
    "ChatTemplateError",
    "CheckpointError",
    "Chunk",
    "Completion",
    "ConfigError",
    "ContextOverflowError",
    "ConversionError",
    "EngineOptions",
    "EngineStats",
    "FormatError",
    "InsufficientMemoryError",
    "LoadedModel",
    "MeasurementError",
    "MissingTensorError",
    "ModelNotFoundError",
    "ModelPool",
    "NotTernaryError",
    "QuantizationError",
    "SamplingParams",
    "Score",
    "TensorShapeError",
    "TextScore",
    "TokenLogprob",
    "TokenizerError",
    "ToolCall",
    "TrainingError",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME_OF:
        from importlib import import_module

        value = getattr(import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'bitllm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bitllm")
    except PackageNotFoundError:
        return "0+source"
