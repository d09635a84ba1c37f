"""The tokenizer of a model directory: tokenizer.json, and the rules around it.

Those rules are: which ids begin a text, which ids end one, and how messages become a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitllm.errors import BitllmError, ChatTemplateError, FormatError, TokenizerError
from bitllm.tokenizer.chat_template import ChatTemplate

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer", "load_tokenizer"]

_SPECIAL_NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
# Tokens by which chat templates end a turn; each counts where the model's own template writes it.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
_PROBE = "a"
# Characters from which on a text is encoded as a batch of one: encode() of the tokenizers library
# keeps the interpreter lock, seconds for a book, and batches let it go (and keep no offsets).
_LONG = 64 * 1024


class Tokenizer:
    """Text to token ids and back, by the rules of one model.

    Args:
        backend: the tokenizer proper.
        config: tokenizer_config.json.
        template: source of the chat template, or None.
        bos_id: id that the model's config.json or generation_config.json calls the beginning.
        eos_ids: ids that they call the end.
        name: what to call it in messages.

    Attributes:
        bos_id: id of the token that begins a text, or None.
        stop_ids: ids at which a text ends: those of config.json, generation_config.json and
            tokenizer_config.json together, and the end of a turn that the chat template writes.
        special_ids: ids that stand for no text.
        is_byte_level: tokens are bytes in the byte-level alphabet and decode one by one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        *,
        template: str | None = None,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        name: str = "the tokenizer",
    ) -> None:
        self._backend = backend
        self._name = name
        self._template_source = template
        self._special_tokens = {
            key: text for key in _SPECIAL_NAMES if (text := _token_text(config.get(key)))
        }
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.bos_id = self._id_of("bos_token", bos_id)
        eos_id = self._id_of("eos_token", None)
        turn_ends = [backend.token_to_id(end) for end in _TURN_ENDS if template and end in template]
        every_end = [*eos_ids, eos_id, *turn_ends]
        self.stop_ids = frozenset(end for end in every_end if end is not None and end >= 0)
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
        self.is_byte_level: bool = decoder.get("type") == "ByteLevel"
        self._before, self._after = self._affixes(config, eos_id)

    def _id_of(self, key: str, otherwise: int | None) -> int | None:
        text = self._special_tokens.get(key)
        found: int | None = None if text is None else self._backend.token_to_id(text)
        return otherwise if found is None else found

    def _affixes(
        self, config: Mapping[str, Any], eos_id: int | None
    ) -> tuple[list[int], list[int]]:
        """Ids that a plain text gets in front and behind.

        As in transformers 5: add_bos_token and add_eos_token decide if tokenizer_config.json has
        one of them, otherwise the post-processor of tokenizer.json does.
        """
        if "add_bos_token" in config or "add_eos_token" in config:
            before = [self.bos_id] if config.get("add_bos_token") else []
            after = [eos_id] if config.get("add_eos_token") else []
            return [id for id in before if id is not None], [id for id in after if id is not None]
        bare = self._encode_bare(_PROBE)
        whole = self._backend.encode(_PROBE, add_special_tokens=True).ids
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model came with a chat template."""
        return self._template_source is not None

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template, or None."""
        return self._template_source

    def to_json(self) -> str:
        """Return the text of a tokenizer.json, with the tokens that other files added."""
        return str(self._backend.to_str())

    def token(self, token_id: int) -> str | None:
        """Return the token with this id as the vocabulary writes it, or None."""
        try:
            return self._backend.id_to_token(token_id)
        except OverflowError:
            return None

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary writes it, or None."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Turn text into ids.

        Args:
            text: names of special tokens in it become those tokens.
            add_bos: put in front (and behind) what the model wants around a text.

        Raises:
            TokenizerError: `text` is no valid Unicode string.
        """
        ids = self._encode_bare(text)
        return [*self._before, *ids, *self._after] if add_bos else ids

    def _encode_bare(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TokenizerError(f"only text can be encoded, got {type(text).__name__}")
        try:
            if len(text) > _LONG:
                return list(
                    self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
                )
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizerError(
                "the text holds half of a character (a lone surrogate), which no token stands for",
                hint='it was decoded wrongly; text.encode("utf-8", "replace").decode() repairs it',
            ) from error
        except Exception as error:
            raise TokenizerError(
                f"{self._name}: its tokenizer cannot encode {text!r:.40}: {error}",
                hint="tokenizer.json is damaged, or lacks a token for unknown text",
            ) from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Turn ids into text; bytes that are no UTF-8 become U+FFFD, unknown ids nothing.

        Raises:
            TokenizerError: an id that is negative or no whole number.
        """
        try:
            kept = [int(id) for id in ids if not (skip_special and id in self.special_ids)]
            return self._backend.decode(kept, skip_special_tokens=False)
        except (OverflowError, TypeError, ValueError) as error:
            raise TokenizerError(f"not token ids: {list(ids)!r:.100}") from error

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """Write messages as the prompt that the model was trained on.

        Args:
            messages: each with "role" and "content".
            add_generation_prompt: end with what introduces the assistant's answer.
            tools: JSON schemas of functions that the model may call.
            extra: further variables of the template.

        Raises:
            ChatTemplateError: the model has no chat template, or it fails on these messages.
        """
        _check_messages(messages)
        variables = {
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **extra,
        }
        return self._template.render(variables)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self._template_source is None:
            raise ChatTemplateError(
                f"{self._name} has no chat template: it is a base model, not one for chat",
                hint="give it a text to continue (bitllm run), or take an instruct version",
            )
        return ChatTemplate(self._template_source)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Turn messages into ids, with exactly one beginning of text where the model has one.

        Some templates write it and some leave it to the tokenizer; both are served. Arguments as
        in `apply_chat_template`.

        Raises:
            ChatTemplateError: the model has no chat template, or it fails on these messages.
            TokenizerError: a message is no valid Unicode string.
        """
        ids = self._encode_bare(self.apply_chat_template(messages, add_generation_prompt, tools))
        begun = ids[: len(self._before)] == self._before
        return ids if begun else [*self._before, *ids]


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError(
            "messages should be a list with at least one message",
            hint='for example [{"role": "user", "content": "Hello"}]',
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(
                f"message {index} has no role: {message!r:.100}",
                hint='a message looks like {"role": "user", "content": "Hello"}',
            )


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Load the tokenizer of a model directory.

    Args:
        path: holds tokenizer.json, and perhaps tokenizer_config.json, special_tokens_map.json,
            chat_template.jinja or chat_template.json, config.json and generation_config.json.

    Raises:
        TokenizerError: a file of the tokenizer is missing or broken.
        FormatError: config.json or generation_config.json is broken.
    """
    directory = Path(path)
    backend = read_backend(directory)
    config = {
        **_read_json(directory / "special_tokens_map.json"),
        **_read_json(directory / "tokenizer_config.json"),
    }
    model = _read_json(directory / "config.json", FormatError)
    generation = _read_json(directory / "generation_config.json", FormatError)
    return Tokenizer(
        backend,
        config,
        template=_find_template(directory, config),
        bos_id=next(iter(_ids(model, "bos_token_id") + _ids(generation, "bos_token_id")), None),
        eos_ids=_ids(model, "eos_token_id") + _ids(generation, "eos_token_id"),
        name=directory.name,
    )


def read_backend(directory: Path) -> tokenizers.Tokenizer:
    """Read tokenizer.json of a directory.

    Raises:
        TokenizerError: the file is missing or broken.
    """
    # The library costs 8 MB, which programs without text need not pay.
    import tokenizers

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(f"{directory}: no tokenizer.json there", hint=_no_tokenizer(directory))
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # The library raises bare exceptions, and panics, which are no Exception.
    except BaseException as error:
        raise TokenizerError(
            f"{file}: {str(error)[:300]}", hint="the file is damaged; download it again"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _no_tokenizer(directory: Path) -> str:
    if (directory / "tokenizer.model").is_file():
        return (
            "only a SentencePiece model is there; load it with transformers' AutoTokenizer and "
            "write tokenizer.json with save_pretrained"
        )
    return "download the model again, or copy the tokenizer of its base model"


def _read_json(file: Path, failure: type[BitllmError] = TokenizerError) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file; `failure` if it is broken."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8-sig")
        fields = json.loads(text)
        if "\\ud" in text.lower():  # half of an escaped pair is no text
            json.dumps(fields, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise failure(
            f"{file}: not readable as JSON ({error})", hint="the file is damaged; download it again"
        ) from error
    if not isinstance(fields, dict):
        raise failure(f"{file}: should hold a JSON object")
    return fields


def _find_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own counts more than tokenizer_config.json."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ChatTemplateError(f"{jinja}: {error}") from error
    found = _read_json(directory / "chat_template.json").get("chat_template")
    if found is None:
        found = config.get("chat_template")
    if isinstance(found, list):
        named = {
            entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)
        }
        found = named.get("default") or next(iter(named.values()), None)
    if found is not None and not isinstance(found, str):
        raise ChatTemplateError(f"{directory}: the chat template should be text")
    return found


def _token_text(value: Any) -> str | None:
    """A special token is stored as its text, or as an object with its text."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(fields: Mapping[str, Any], key: str) -> list[int]:
    value = fields.get(key)
    values = value if isinstance(value, list) else [value]
    return [id for id in values if type(id) is int]
