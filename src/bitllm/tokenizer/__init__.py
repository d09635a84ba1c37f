"""Text to token ids and back: tokenizer.json, chat templates, streaming."""

from bitllm.tokenizer.chat_template import ChatTemplate
from bitllm.tokenizer.detokenizer import StreamDetokenizer
from bitllm.tokenizer.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatTemplate", "StreamDetokenizer", "Tokenizer", "load_tokenizer"]
