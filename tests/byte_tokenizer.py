"""A tokenizer whose ids are bytes: 0 to 255, then the start 256 and the end 257."""

from __future__ import annotations

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from bitllm.tokenizer import Tokenizer

START, END = 256, 257
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[reply]"


def byte_tokenizer(*, chat: bool = True, template: str = TEMPLATE) -> Tokenizer:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    backend = Library(models.BPE(vocab={letter[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    return Tokenizer(backend, config, template=template if chat else None, name="byte model")
