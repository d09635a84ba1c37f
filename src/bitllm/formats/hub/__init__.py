"""Models of the Hugging Face Hub: names for them, downloads, and the cache that keeps them."""

from bitllm.formats.hub.resolve import ModelFiles, resolve_model

__all__ = ["ModelFiles", "resolve_model"]
