"""The exceptions bitllm raises on purpose; everything else is a bug.

    BitllmError
    ├── ConfigError               an option, argument or recipe key that cannot be meant
    ├── ModelNotFoundError        a model reference that names nothing we can reach
    ├── CheckpointError           the files of a model
    │   ├── FormatError           bytes that break their own format: truncated, overlapping, hostile
    │   ├── MissingTensorError    a tensor the architecture needs is not there
    │   ├── TensorShapeError      a tensor has another shape or dtype than the configuration says
    │   ├── NotTernaryError       weights that are no ternary network
    │   └── UnsupportedModelError an architecture, feature or format bitllm does not run
    ├── QuantizationError         values that cannot be quantised, codes that are no ternary codes
    ├── TokenizerError            text to ids, ids to text
    │   └── ChatTemplateError     no chat template, or one that fails
    ├── ConversionError           a converted model that is not what was to be written
    ├── TrainingError             a training run that cannot go on
    ├── MeasurementError          a benchmark whose output is wrong, or whose figure cannot be
    ├── BackendUnavailableError   a device that is not on this machine, or lacks its library
    ├── ContextOverflowError      more tokens than the context window or the KV cache holds
    └── InsufficientMemoryError   the memory plan does not fit

Every message names the thing (file, tensor, option, value); `hint` says the way out and is printed
after a blank line.
"""

from __future__ import annotations

__all__ = [
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
]


class BitllmError(Exception):
    """Base of every deliberate error.

    Args:
        message: what happened, naming the thing.
        hint: what the reader can do about it, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class ConfigError(BitllmError, ValueError):
    """An option, argument or recipe key that cannot be meant."""


class ModelNotFoundError(BitllmError):
    """A model reference that names nothing we can reach."""


class CheckpointError(BitllmError):
    """Something is wrong with the files of a model."""


class FormatError(CheckpointError):
    """Bytes that break their own format: truncated, overlapping, out of bounds, hostile.

    Args:
        message: what is wrong, naming the file.
        hint: what the reader can do about it; None = what helps against most damage.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint or "the file is damaged; fetch it again")


class MissingTensorError(CheckpointError):
    """A tensor the architecture needs is not in the checkpoint."""


class TensorShapeError(CheckpointError):
    """A tensor has another shape or dtype than the configuration says."""


class NotTernaryError(CheckpointError):
    """The weights are those of a dense model, not of a ternary one."""


class UnsupportedModelError(CheckpointError):
    """An architecture, feature or format that bitllm recognises or not, but does not run."""


class QuantizationError(BitllmError, ValueError):
    """Values that cannot be quantised (NaN, infinity) or codes outside {-1, 0, +1}."""


class TokenizerError(BitllmError):
    """Text that cannot become ids, or ids that cannot become text."""


class ChatTemplateError(TokenizerError):
    """The model has no chat template, or its template fails on these messages."""


class ConversionError(BitllmError):
    """A converted model that, read back, is not what was to be written."""


class TrainingError(BitllmError):
    """A training run that cannot go on: its loss is no number any more."""


class MeasurementError(BitllmError):
    """A benchmark whose output is wrong, or whose figure cannot be."""


class BackendUnavailableError(BitllmError):
    """The asked-for device is not on this machine, or its library is not installed."""


class ContextOverflowError(BitllmError, ValueError):
    """More tokens than the context window or the KV cache can hold."""


class InsufficientMemoryError(BitllmError, MemoryError):
    """The memory plan of a model does not fit into the memory there is."""
