"""The tokenizer that a GGUF file describes in its metadata, built for the tokenizers library.

Two kinds are read: byte-level BPE ("gpt2", with a list of merges and the name of a pre-tokenizer)
and the BPE of SentencePiece ("llama", with scores and tokens for single bytes).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitllm.errors import TokenizerError
from bitllm.tokenizer.gguf_repairs import Repair, find_repair
from bitllm.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, build_pre_tokenizer
from bitllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

__all__ = ["gguf_tokenizer"]

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_LONGEST_PIECE = 256  # of SentencePiece vocabularies, in characters
_MOST_CHARACTERS = 1 << 24  # of all pieces together
_SPACE = "▁"
_EMBEDDED = "tokenizer.huggingface.json"
"""Key under which a file may hold the whole of tokenizer.json, which is then what is used."""


class _Metadata:
    """The metadata of a tokenizer with typed access; every failure names the file and the key."""

    def __init__(self, fields: Mapping[str, Any], name: str) -> None:
        self._fields, self.name = fields, name
        self.tokens: list[str] = self.list_of(str, "tokens")
        if not self.tokens:
            raise TokenizerError(
                f"{name}: the file holds no tokenizer",
                hint="put the tokenizer.json of the model beside the file",
            )
        self.types: list[int] = self.list_of(int, "token_type", len(self.tokens))
        self.architecture = self.text("general.architecture", "") or ""

    def get(self, key: str) -> Any:
        return self._fields.get(key if "." in key else f"tokenizer.ggml.{key}")

    def fail(self, key: str, wanted: str) -> TokenizerError:
        return TokenizerError(
            f"{self.name}: {key} of the tokenizer should be {wanted}, got {self.get(key)!r:.80}",
            hint="the file is damaged; put the tokenizer.json of the model beside it",
        )

    def list_of(self, kind: type, key: str, count: int | None = None) -> list[Any]:
        """A list of one type; `count` = its length, if it is there at all."""
        value = self.get(key)
        if value is None:
            return []
        values = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(values, list) or not all(isinstance(entry, kind) for entry in values):
            raise self.fail(key, f"a list of {kind.__name__}")
        if count is not None and len(values) != count:
            raise self.fail(key, f"a list of {count}, not {len(values)}")
        return values

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, "text")
        return value

    def switch(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def token_id(self, key: str) -> int | None:
        """The id under `key`; None if there is none, or one that no token has (-1, 2**32 - 1)."""
        value = self.get(key)
        if value is not None and type(value) is not int:
            raise self.fail(key, "a token id")
        return value if value is not None and 0 <= value < len(self.tokens) else None

    def ids_of(self, kind: int) -> list[int]:
        return [id for id, of_type in enumerate(self.types) if of_type == kind]


def gguf_tokenizer(
    fields: Mapping[str, Any], name: str, backend: tokenizers.Tokenizer | None = None
) -> Tokenizer:
    """Build the tokenizer of a GGUF file.

    What files of known models say wrongly is put right, with a warning.

    Args:
        fields: metadata of the file: `general.architecture` and `tokenizer.*`, arrays decoded.
        name: of the file, for messages.
        backend: a tokenizer.json of the same vocabulary, which is used instead of that of the file;
            the rules around it still come from the metadata.

    Raises:
        TokenizerError: the metadata hold no tokenizer, or one that cannot be built.
    """
    found = _Metadata(fields, name)
    known = find_repair(found.architecture, found.tokens)
    kind = found.text("model", "gpt2")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            f"{name}: the tokenizer model {kind!r:.40} is not read",
            hint="put the tokenizer.json of the model beside the file",
        )
    embedded = found.text(_EMBEDDED)
    if backend is None and embedded:
        backend = _guarded(found, lambda: _from_json(embedded))
        pre = PreTokenizer(adds_bos=kind == "llama")
    else:
        pre = _pre_tokenizer(found, known) if kind == "gpt2" else PreTokenizer(adds_bos=True)
    if backend is None:
        backend = _guarded(found, lambda: (_byte_level if kind == "gpt2" else _pieces)(found, pre))
    template, stops = _repaired_text(found, known)
    eos = found.token_id("eos_token_id")
    ends = [eos, found.token_id("eot_token_id"), found.token_id("eom_token_id"), *stops]
    return Tokenizer(
        backend,
        _config(found, pre),
        template=template,
        bos_id=found.token_id("bos_token_id"),
        eos_ids=[id for id in ends if id is not None],
        name=name,
    )


def _pre_tokenizer(found: _Metadata, known: Repair | None) -> PreTokenizer:
    name = found.text("pre")
    if known is not None and name in known.wrong_pre:
        warnings.warn(
            f"{found.name}: {_said('pre-tokenizer', name)}; it is {known.name}, so {known.pre!r} "
            "is used",
            stacklevel=3,
        )
        name = known.pre
    if name is None or name not in PRE_TOKENIZERS:
        warnings.warn(
            f"{found.name}: {_said('pre-tokenizer', name)}, which bitllm does not know; the one of "
            "GPT-2 is used, and some words may be cut wrongly. Put the tokenizer.json of the model "
            "beside the file",
            stacklevel=3,
        )
        return PRE_TOKENIZERS["gpt-2"]
    return PRE_TOKENIZERS[name]


def _said(what: str, value: str | None) -> str:
    return f"the file names no {what}" if value is None else f"the file names the {what} {value!r}"


def _repaired_text(found: _Metadata, known: Repair | None) -> tuple[str | None, list[int]]:
    """Return the chat template and further ids that end an answer."""
    template = found.text("tokenizer.chat_template")
    if known is None:
        return template, []
    if known.template and template and any(part in template for part in known.wrong_template):
        warnings.warn(
            f"{found.name}: the chat template of the file is a placeholder; that of {known.name} "
            "is used",
            stacklevel=3,
        )
        template = known.template
    stops = [id for id in found.ids_of(_CONTROL) if found.tokens[id] in known.stops]
    return template, stops


def _config(found: _Metadata, pre: PreTokenizer) -> dict[str, Any]:
    """What tokenizer_config.json would hold."""
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    ids = {key: found.token_id(stored) for key, stored in keys.items()}
    return {
        **{key: found.tokens[id] for key, id in ids.items() if id is not None},
        "add_bos_token": found.switch("add_bos_token", pre.adds_bos),
        "add_eos_token": found.switch("add_eos_token", False),
    }


def _guarded(found: _Metadata, build: Callable[[], tokenizers.Tokenizer]) -> tokenizers.Tokenizer:
    """Build a tokenizer; the library raises bare exceptions, and panics, which are none."""
    try:
        return build()
    except (KeyboardInterrupt, SystemExit, MemoryError, TokenizerError):
        raise
    except BaseException as error:
        raise TokenizerError(
            f"{found.name}: its tokenizer cannot be built: {str(error)[:300]}",
            hint="the file is damaged; put the tokenizer.json of the model beside it",
        ) from error


def _from_json(text: str) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Library

    backend = Library.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _vocabulary(found: _Metadata) -> dict[str, int]:
    vocab = {token: id for id, token in enumerate(found.tokens)}
    if len(vocab) < len(found.tokens):
        twice = next(token for id, token in enumerate(found.tokens) if vocab[token] != id)
        raise TokenizerError(
            f"{found.name}: two ids stand for the token {twice!r:.80}",
            hint="the file is damaged; put the tokenizer.json of the model beside it",
        )
    return vocab


def _byte_level(found: _Metadata, pre: PreTokenizer) -> tokenizers.Tokenizer:
    """Build byte-level BPE from tokens and merges."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    merges = []
    for merge in found.list_of(str, "merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise TokenizerError(f"{found.name}: {merge!r:.80} is no merge of two tokens")
        merges.append((left, right))
    model = models.BPE(_vocabulary(found), merges, ignore_merges=pre.whole_pieces)
    backend = Library(model)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = build_pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, found)
    return backend


def _pieces(found: _Metadata, _: PreTokenizer) -> tokenizers.Tokenizer:
    """Build the BPE of SentencePiece: the pair whose union has the best score is merged first."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    scores = found.list_of(float, "scores", len(found.tokens))
    if not scores:
        raise found.fail("scores", "a list of numbers")
    unknown = found.token_id("unknown_token_id")
    unknown = unknown if unknown is not None else next(iter(found.ids_of(_UNKNOWN)), None)
    model = models.BPE(
        _vocabulary(found),
        _merges_by_score(found, scores),
        unk_token=None if unknown is None else found.tokens[unknown],
        fuse_unk=True,
        byte_fallback=bool(found.ids_of(_BYTE)),
    )
    backend = Library(model)
    prefixed = found.switch("add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    _add_tokens(backend, found)
    return backend


def _merges_by_score(found: _Metadata, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return every pair of pieces whose union is a piece, the best score first."""
    plain = {
        token: id
        for id, token in enumerate(found.tokens)
        if not found.types or found.types[id] not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    if sum(map(len, plain)) > _MOST_CHARACTERS or max(map(len, plain), default=0) > _LONGEST_PIECE:
        raise TokenizerError(
            f"{found.name}: the pieces of its vocabulary are too long",
            hint="the file is damaged; put the tokenizer.json of the model beside it",
        )
    pairs: list[tuple[float, int, int, str, str]] = []
    for token, id in plain.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in plain and right in plain:
                pairs.append((-scores[id], plain[left], plain[right], left, right))
    return [(left, right) for *_, left, right in sorted(pairs)]


def _add_tokens(backend: tokenizers.Tokenizer, found: _Metadata) -> None:
    """Make tokens of the text that stands for them: special ones, and those of users."""
    from tokenizers import AddedToken

    def added(ids: Iterable[int], special: bool) -> list[Any]:
        return [AddedToken(found.tokens[id], special=special, normalized=False) for id in ids]

    backend.add_tokens(added(found.ids_of(_USER_DEFINED), special=False))
    backend.add_special_tokens(added(found.ids_of(_CONTROL), special=True))
