"""GGUF files: the container, the block types, and what they say of model and tokenizer."""

from bitllm.formats.gguf.checkpoint import open_gguf
from bitllm.formats.gguf.shards import GgufModel, find_gguf
from bitllm.formats.gguf.texts import read_gguf_texts

__all__ = ["GgufModel", "find_gguf", "open_gguf", "read_gguf_texts"]
