"""Text to token ids and back: tokenizer.json or GGUF metadata, chat templates, streaming."""

from bitllm.tokenizer.chat_template import ChatTemplate
from bitllm.tokenizer.detokenizer import StreamDetokenizer, token_bytes
from bitllm.tokenizer.gguf import gguf_tokenizer
from bitllm.tokenizer.tokenizer import Tokenizer, load_tokenizer, read_backend

__all__ = [
    "ChatTemplate",
    "StreamDetokenizer",
    "Tokenizer",
    "gguf_tokenizer",
    "load_tokenizer",
    "read_backend",
    "token_bytes",
]
