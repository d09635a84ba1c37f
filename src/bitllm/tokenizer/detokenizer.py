"""Token ids to text, one at a time, without ever cutting a character in two."""

from __future__ import annotations

import codecs
import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitllm.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDetokenizer", "token_bytes"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class StreamDetokenizer:
    """Turns ids into text as they come.

    What `push` returned so far never ends within a character. With byte-level tokenizers all that
    was pushed and flushed equals `Tokenizer.decode` of all ids, whatever the ids; with others,
    whenever the bytes of the ids are valid UTF-8.

    Args:
        tokenizer: what the ids belong to.
        skip_special: leave out special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # For decoders that look at neighbours: ids whose text is out, and ids that wait.
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; empty while a character is incomplete."""
        if token_id in self._skipped:
            return ""
        if self._tokenizer.is_byte_level:
            token = self._tokenizer.token(token_id)
            return self._utf8.decode(b"" if token is None else _token_bytes(token))
        self._waiting.append(token_id)
        text = self._waiting_text()
        if text.endswith(_REPLACEMENT) and len(self._waiting) < _LONGEST_CHARACTER:
            return ""
        self._context, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """Return what is left at the end of a text; an incomplete character becomes U+FFFD."""
        if self._tokenizer.is_byte_level:
            text = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return text
        text = self._waiting_text() if self._waiting else ""
        self._context, self._waiting = [], []
        return text

    def _waiting_text(self) -> str:
        # Decoders strip or join at the start, so the ids before are decoded along and cut off.
        before = self._tokenizer.decode(self._context, skip_special=False)
        return self._tokenizer.decode(self._context + self._waiting, skip_special=False)[
            len(before) :
        ]


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Return the bytes that a token writes, of a special token those of its name.

    With byte-level tokenizers the bytes of all tokens are those of the text. Others may drop the
    space before the first word of a text, which its token has.
    """
    token = tokenizer.token(token_id)
    if token is None:
        return b""
    if token_id in tokenizer.special_ids:
        return token.encode("utf-8", "replace")
    if tokenizer.is_byte_level:
        return _token_bytes(token)
    byte = _BYTE_TOKEN.fullmatch(token)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    return token.replace("\u2581", " ").encode(
        "utf-8", "replace"
    )  # how SentencePiece writes spaces


@lru_cache(maxsize=4096)  # most of a text is made of few tokens
def _token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; one with other characters (an added token) is text."""
    table = _byte_of_character()
    try:
        return bytes(table[character] for character in token)
    except KeyError:
        return token.encode("utf-8", "replace")


@cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies write printable Latin-1 as it is, other bytes from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(0x100) if byte not in printable]
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table
