"""Structured output: which tokens may come next, by a JSON schema, a regex, a grammar or a choice.

llguidance keeps the state of the parser and computes the masks; the sampler applies them.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from bitllm.config import SamplingParams
from bitllm.errors import ConfigError
from bitllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

__all__ = ["Grammar", "GrammarCompiler", "GrammarState"]

_KEPT = 16  # compiled grammars of a model that are remembered; the largest take some 20 MB each
# What making the automata may cost. The library's own limit, five times as much, lets one regex
# take 170 MB, and a tenth of a second of every step of all sequences.
_FUEL = 200_000

# Where white space is free, a model may write nothing else for ever.
_JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
}
# llguidance follows references by recursion, and splits ranges of integers in a way that does not
# end for the largest ones: beyond these limits the process would die of its stack.
_MOST_REFERENCES = 500
_MOST_RULES = 1000
_LARGEST_NUMBER = 2**53  # what a float holds exactly; so no number is rounded on its way, either
# Stands for "the text may end here" in the masks; ids of no model reach it.
_END = "<|bitllm: the grammar may end here|>"


class GrammarCompiler:
    """Compiles what `SamplingParams` say about the form of the text, for one model.

    Args:
        tokenizer: of the model; read when the first grammar is compiled.
        vocab_size: ids that the model draws from.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._vocabulary: tuple[llguidance.LLTokenizer, int] | None = None
        self._compiled: OrderedDict[tuple[str, str], Grammar] = OrderedDict()

    def compile(self, params: SamplingParams) -> Grammar | None:
        """Return the compiled grammar, None where the text is free.

        Raises:
            ConfigError: it is invalid, too large, allows no text, or llguidance is not installed.
        """
        source = _source(params)
        if source is None:
            return None
        with self._lock:
            found = self._compiled.pop(source, None) or self._compile(*source)
            self._compiled[source] = found
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return found

    def _compile(self, option: str, text: str) -> Grammar:
        library = _library()
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary(library)
        vocabulary, end_id = self._vocabulary
        _check_limits(option, text)
        try:
            matcher = library.LLMatcher(
                vocabulary,
                _grammar_text(library, option, text),
                log_level=0,
                limits=library.LLParserLimits(verbose_errors=False, initial_lexer_fuel=_FUEL),
            )
        except ValueError as error:
            raise ConfigError(f"{option} is invalid: {error}") from error
        if matcher.is_error():
            raise ConfigError(
                f"{option} cannot be compiled: {matcher.get_error():.500}", hint=_HINTS.get(option)
            )
        grammar = Grammar(option, matcher, end_id, self._vocab_size)
        grammar.start()  # states share their automata: what overflows here, the next one tells
        first = grammar.start()
        if first.error is not None:
            raise first.error
        if first.complete:
            raise ConfigError(f"{option} allows no text but the empty one")
        return grammar

    def _read_vocabulary(self, library: Any) -> tuple[llguidance.LLTokenizer, int]:
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._tokenizer.to_json())
        backend.add_special_tokens([_END])
        end_id = int(backend.token_to_id(_END) or 0)
        size = max(self._vocab_size, end_id + 1)
        try:
            vocabulary = library.LLTokenizer(backend.to_str(), n_vocab=size, eos_token=end_id)
        except ValueError as error:
            raise ConfigError(
                f"structured output does not work with the tokenizer of this model: {error}"
            ) from error
        return vocabulary, end_id


class Grammar:
    """A compiled grammar; `start` makes the state of one text."""

    def __init__(
        self, option: str, matcher: llguidance.LLMatcher, end_id: int, vocab_size: int
    ) -> None:
        self._option = option
        self._matcher = matcher
        self._end_id = end_id
        self._vocab_size = vocab_size

    def start(self) -> GrammarState:
        """Return the state before the first token."""
        return GrammarState(self._option, self._matcher.deep_copy(), self._end_id, self._vocab_size)


class GrammarState:
    """What may come next in one text.

    Attributes:
        mask: uint32 [ceil(vocab / 32)]; bit id % 32 of word id // 32 set = may come next.
        may_end: whether the text is complete as it is.
        complete: whether it is complete and nothing may follow.
        error: why it can go on no more, or None.
    """

    def __init__(
        self, option: str, matcher: llguidance.LLMatcher, end_id: int, vocab_size: int
    ) -> None:
        self._option = option
        self._matcher = matcher
        self._end_id = end_id
        self._vocab_size = vocab_size
        self._look()

    def accept(self, token_id: int) -> None:
        """Take the token that was drawn, one that `mask` allows."""
        self._matcher.consume_token(token_id)
        self._look()

    def _look(self) -> None:
        whole = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        word, bit = divmod(self._end_id, 32)
        ends = bool(whole[word] >> np.uint32(bit) & np.uint32(1))
        self.may_end = ends and not self._matcher.is_error()
        self.mask = whole[: -(-self._vocab_size // 32)].copy()
        if word < len(self.mask):
            self.mask[word] &= ~(np.uint32(1) << np.uint32(bit))
        if used := self._vocab_size % 32:
            self.mask[-1] &= np.uint32((1 << used) - 1)
        self.complete = self.may_end and not self.mask.any()
        self.error = self._error()

    def _error(self) -> ConfigError | None:
        stuck = self._matcher.get_error().startswith("NoExtension")
        if self._matcher.is_error() and not stuck:
            return ConfigError(
                f"{self._option} is too complex: {self._matcher.get_error():.300}",
                hint="make it smaller, or forbid what may be nested without end",
            )
        if not self.may_end and not self.mask.any():
            return ConfigError(
                f"{self._option} allows no token at this place: it matches no text, or one that "
                "the tokens of this model cannot spell"
            )
        return None


_HINTS = {
    "json_schema": "a keyword that is not supported can often be left out and checked afterwards",
    "regex": "the syntax is that of Rust: no look-around, no back-references",
    "grammar": "the syntax is that of Lark as llguidance reads it, or GBNF",
}


def _source(params: SamplingParams) -> tuple[str, str] | None:
    """Return the option that was given and its text."""
    for option in ("json_schema", "regex", "grammar"):
        text = getattr(params, option)
        if text is not None:
            return option, text
    if params.choice is not None:
        return "choice", "|".join(map(_escaped, params.choice))
    return None


def _escaped(text: str) -> str:
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", text)


def _grammar_text(library: Any, option: str, text: str) -> str:
    matcher = library.LLMatcher
    if option == "json_schema":
        schema = {} if text == "true" else json.loads(text)
        grammar = matcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    elif option == "grammar":
        grammar = matcher.grammar_from_lark(_lark(text))
    else:
        grammar = matcher.grammar_from_regex(text)
    return str(grammar)


def _check_limits(option: str, text: str) -> None:
    """Refuse what would overflow the stack of the library.

    Raises:
        ConfigError: naming the limit.
    """
    references, rules = text.count('"$ref"'), len(_RULE.findall(text))
    if option in ("json_schema", "grammar") and references > _MOST_REFERENCES:
        raise ConfigError(f"{option} has {references} references; {_MOST_REFERENCES} are possible")
    if option == "grammar" and rules > _MOST_RULES:
        raise ConfigError(f"grammar has {rules} rules; {_MOST_RULES} are possible")
    numbers: Iterable[float] = _numbers(json.loads(text)) if option == "json_schema" else []
    if option == "grammar":
        numbers = [float(number) for number in _LONG_NUMBER.findall(text)]
    for number in numbers:
        if abs(number) > _LARGEST_NUMBER:
            raise ConfigError(
                f"{option} holds the number {number}; {_LARGEST_NUMBER} is the largest possible"
            )


_RULE = re.compile(r"^\s*[?!]?\w[\w-]*(?:\[[^\]\n]*\])?(?:\.\d+)?\s*(?::|::=)", re.MULTILINE)
_LONG_NUMBER = re.compile(r"\d{16,}|\d(?:\.\d+)?[eE]\+?\d{2,}")


def _numbers(value: Any) -> Iterator[float]:
    """Yield all numbers in a JSON value; without recursion, as it may be deep."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield value


def _lark(text: str) -> str:
    if "::=" not in text:
        return text
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except Exception as error:  # the converter raises bare exceptions
        raise ConfigError(f"grammar is no valid GBNF: {error}") from error


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError(
            "structured output needs the package llguidance, which is not installed",
            hint='pip install "llguidance>=1.9,<2"',
        ) from error
    return llguidance
