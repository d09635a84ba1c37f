"""Models whose GGUF files are known to say wrong things about their tokenizer, and what is right.

They are recognised by their vocabulary: its size, and what one of its ids stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["REPAIRS", "Repair", "find_repair"]

_BITNET_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Repair:
    """What is right for a model.

    Attributes:
        name: for messages.
        architectures: `general.architecture` of its files.
        vocab_size: tokens of its vocabulary.
        token: an id and what it stands for, to tell it from models of the same size.
        pre: the pre-tokenizer.
        wrong_pre: values of `tokenizer.ggml.pre` that its files have instead; None = no value.
        stops: tokens that end an answer, besides the one that the file names.
        template: its chat template, where files have another.
        wrong_template: parts of the templates that are no good.
    """

    name: str
    architectures: tuple[str, ...]
    vocab_size: int
    token: tuple[int, str]
    pre: str
    wrong_pre: tuple[str | None, ...] = (None, "default")
    stops: tuple[str, ...] = ()
    template: str | None = None
    wrong_template: tuple[str, ...] = ()


REPAIRS = (
    Repair(
        "BitNet b1.58 2B-4T",
        ("bitnet-b1.58", "bitnet-25"),
        128_256,
        (128_000, "<|begin_of_text|>"),
        pre="llama-bpe",
        stops=("<|end_of_text|>", "<|eot_id|>"),
        template=_BITNET_TEMPLATE,
        wrong_template=("BITNETAssistant", "Human: "),
    ),
    Repair(
        "a model with the vocabulary of Llama 3",
        ("llama", "bitnet"),
        128_256,
        (128_000, "<|begin_of_text|>"),
        pre="llama-bpe",
        stops=("<|eot_id|>",),
    ),
    Repair(
        "Falcon3", ("llama",), 131_072, (11, "<|endoftext|>"), pre="falcon3"
    ),
    Repair(
        "Falcon-E",
        ("llama",),
        32_768,
        (11, "<|endoftext|>"),
        pre="falcon_e",
        stops=("<|im_end|>",),
    ),
)  # fmt: skip
"""The known models, the more particular first."""


def find_repair(architecture: str, tokens: Sequence[str]) -> Repair | None:
    """Return the known model with this architecture and vocabulary, or None."""
    for known in REPAIRS:
        id, text = known.token
        same = len(tokens) == known.vocab_size and tokens[id] == text
        if same and architecture in known.architectures:
            return known
    return None
