"""What a user may set: `SamplingParams` for a generation, `EngineOptions` for a loaded model.

Both are frozen and check themselves. A key that does not exist is an error, never dropped.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, TypeVar, get_args

from bitllm.errors import ConfigError

__all__ = [
    "CHOICES",
    "EngineOptions",
    "HeadName",
    "KvDtype",
    "PackingName",
    "SamplingParams",
    "SpeculationName",
    "as_integer",
    "as_number",
    "parse_size",
]

KvDtype = Literal["bf16", "fp32", "int8"]
PackingName = Literal["auto", "2bit", "base3"]
HeadName = Literal["auto", "full", "screened", "int8-screened", "int8"]
SpeculationName = Literal["auto", "off"]

CHOICES: Mapping[str, tuple[str, ...]] = {
    "kv_dtype": get_args(KvDtype),
    "packing": get_args(PackingName),
    "head": get_args(HeadName),
}
"""The values of each option that takes one of a few words."""

_MOST_THREADS = 1024
_MOST_ROWS = 2**31 - 1  # of a step: they are counted in int32
_MOST_CHOICES = 128
_MOST_DRAFT_TOKENS = 64
# Numbers reach the decoder as float32: these are its largest and its smallest normal number.
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
_SMALLEST_FLOAT32 = 2.0**-126

_Options = TypeVar("_Options", bound="SamplingParams | EngineOptions")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    None means "as the model says": the value in its generation_config.json, or, where that has
    none, the neutral value given below. So a model that comes with a temperature samples by
    default, and one without is greedy.

    Attributes:
        max_tokens: most tokens to generate, >= 1. None = the model's `max_new_tokens`, else 256 for
            a prompt and the rest of the context for a chat; never more than the context holds.
            A number given here that does not fit is a `ContextOverflowError`.
        temperature: 0 = always the likeliest token; else 0.001 to 1000. Neutral: 0.
        top_k: sample among the k likeliest, 0 = all. Neutral: 0.
        top_p: sample among the fewest tokens whose probabilities reach this sum, in (0, 1].
            Neutral: 1.
        min_p: drop tokens less likely than this fraction of the likeliest, in [0, 1]. Neutral: 0.
        typical_p: sample among the tokens that are about as surprising as the model expects, the
            fewest whose probabilities reach this sum (locally typical sampling, Meister et al.
            2022), in (0, 1]. Neutral: 1.
        seed: 0 to 2**64 - 1; the same seed gives the same text on every machine. None = drawn from
            the operating system and reported in the `Completion`.
        stop: a string, or several; generation ends before the first of them that is completed.
        stop_token_ids: ids that end the generation, besides the model's own.
        ignore_eos: do not end at the model's own stop ids.
        min_tokens: the fewest tokens to generate: no stop id is drawn, and no stop string counts,
            before that.
        repetition_penalty: > 0; divides positive and multiplies negative logits of ids seen in the
            prompt or the output. Neutral: 1.
        frequency_penalty: subtracted from a logit once for each time its id was generated.
        presence_penalty: subtracted from the logits of ids generated at least once.
        logit_bias: id -> finite number added to its logit.
        logprobs: None = none; k >= 0 = the log-probability of each token and of the k likeliest.
        prompt_logprobs: the same for the tokens of the prompt (its "echo"). `max_tokens` may then
            be 0: nothing is generated.
        json_schema: the text is JSON of this schema, without white space between its parts; a
            dictionary, or its JSON text.
        regex: the whole text matches this regular expression, in the syntax of Rust.
        grammar: the text is derived from the rule `start` of this Lark grammar, or from the rule
            `root` of this GBNF grammar.
        choice: the text is one of these strings.
        n: how many completions of the prompt, 1 to 128; the prompt is computed once. Number i of a
            seed is the same whatever `n` is; at temperature 0 all are alike.
        best_of: compute this many, and return the `n` of the highest log-probability a token, the
            best first; n to 128. None = `n`.
        priority: lower goes first, -1000 to 1000: one step is worth 100 places in the queue.
        timeout: seconds from the call after which the text ends with what there is, looked at
            between steps; None = never.
        adapter: name of a loaded adapter, as `LLM.load_adapter` returned it; None = the model as it
            is.

    Of `json_schema`, `regex`, `grammar` and `choice`, one at most. What they ask for holds for a
    text that ends by itself, with finish_reason "stop"; `max_tokens`, stop strings and own stop ids
    may cut it short, and where it is complete `min_tokens` does not prolong it.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = field(default=None, hash=False)
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    n: int = 1
    best_of: int | None = None
    priority: int = 0
    timeout: float | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        _integer(self, "prompt_logprobs", low=0, optional=True)
        fewest = 1 if self.prompt_logprobs is None else 0
        _integer(self, "max_tokens", low=fewest, optional=True)
        _number(self, "temperature", low=0.0, high=1000.0, optional=True)
        # Below this, logits divided by the temperature leave the range of float32.
        if self.temperature is not None and 0 < self.temperature < 0.001:
            raise ConfigError(
                f"temperature must be 0 or at least 0.001, got {self.temperature}",
                hint="temperature=0 always takes the likeliest token",
            )
        _integer(
            self,
            "top_k",
            low=0,
            high=2**31 - 1,
            optional=True,
            hint="top_k=0 switches the cut off",
        )
        _number(self, "top_p", low=0.0, high=1.0, above=True, optional=True)
        _number(self, "min_p", low=0.0, high=1.0, optional=True)
        _number(self, "typical_p", low=0.0, high=1.0, above=True, optional=True)
        _integer(self, "seed", low=0, high=2**64 - 1, optional=True)
        _boolean(self, "ignore_eos")
        _integer(self, "min_tokens", low=0)
        _number(self, "repetition_penalty", low=0.0, above=True, optional=True)
        _number(self, "frequency_penalty")
        _number(self, "presence_penalty")
        _integer(self, "logprobs", low=0, optional=True)
        _integer(self, "n", low=1, high=_MOST_CHOICES)
        _integer(self, "best_of", low=self.n, high=_MOST_CHOICES, optional=True)
        _integer(self, "priority", low=-1000, high=1000)
        _number(self, "timeout", low=0.0, above=True, optional=True)
        if self.adapter is not None and (not isinstance(self.adapter, str) or not self.adapter):
            raise ConfigError(
                f"adapter must be the name of a loaded adapter, got {self.adapter!r:.80}",
                hint="load_adapter(path) returns the name",
            )
        self._check_stops()
        self._check_bias()
        self._check_form()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens is {self.min_tokens}, but max_tokens only {self.max_tokens}"
            )

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
            raise ConfigError(f"stop must be a string or a list of strings, got {self.stop!r}")
        if "" in stop:
            raise ConfigError("stop must not hold an empty string: it would end every text at once")
        object.__setattr__(self, "stop", tuple(stop))
        ids: object = self.stop_token_ids
        if isinstance(ids, str) or not isinstance(ids, Sequence):
            raise ConfigError(f"stop_token_ids must be a list of token ids, got {ids!r}")
        checked = tuple(as_integer("stop_token_ids", token, low=0) for token in ids)
        object.__setattr__(self, "stop_token_ids", checked)

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        checked = {
            as_integer("logit_bias", token, low=0): as_number("logit_bias", value)
            for token, value in self.logit_bias.items()
        }
        object.__setattr__(self, "logit_bias", checked)

    def _check_form(self) -> None:
        forms = ("json_schema", "regex", "grammar", "choice")
        given = [name for name in forms if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} cannot be asked for together")
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise ConfigError(f"{name} must be a text that is not empty, got {text!r:.80}")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, whichever way `stop` was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def choices(self) -> int:
        """How many completions are computed: `best_of`, or `n`."""
        return self.n if self.best_of is None else self.best_of

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], base: SamplingParams | None = None
    ) -> SamplingParams:
        """Return `base` (default: `SamplingParams()`) with `options` set.

        Raises:
            ConfigError: a key that does not exist (with the likely one), or a value out of range.
        """
        return _with_options(cls() if base is None else base, options, "sampling option")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a model is loaded and run.

    Attributes:
        device: "auto", or the name of a backend such as "cpu" or "reference".
        threads: worker threads; None = one for each physical core the process may use.
        isa: kernel set of the CPU backend by name; None = the best this machine runs.
        kv_dtype: how keys and values are stored, "bf16", "fp32" or "int8".
        packing: how the CPU backend holds ternary weights: "2bit", "base3" (1.6 bits), or "auto" =
            the faster one on this machine.
        head: how the CPU backend computes logits: "full", or a way that reads fewer bytes:
            "screened" (the same tokens but for a stated probability), "int8-screened" (proven the
            same), "int8" (approximate); "auto" = the fastest with a stated guarantee.
        context: most tokens of one sequence, prompt and output together; None = what the model
            was made for.
        kv_tokens: positions the KV cache holds over all sequences together, at least `context`;
            None = `context`. More lets more sequences run at once.
        max_batch_tokens: most token rows of one step; longer prompts are computed in pieces.
        prefix_cache: keep the keys and values of texts that have ended, while nobody needs the
            room, for later prompts that begin alike. The output is the same, to the bit.
        speculation: "auto" = compute guesses at coming tokens along with a known one where that
            saves time, as in texts that repeat themselves or their prompt; "off" = never. The
            output is the same, to the bit.
        draft_model: a smaller model of the same vocabulary that guesses, too: a directory, a GGUF
            file, or "org/name" on the Hugging Face Hub; None = what the text itself suggests.
        draft_tokens: most guesses at once for a sequence, 1 to 64.
        memory_limit: bytes the model may use in all; None = what the machine has free. `parse_size`
            reads "2.5GB".
    """

    device: str = "auto"
    threads: int | None = None
    isa: str | None = None
    kv_dtype: KvDtype = "bf16"
    packing: PackingName = "auto"
    head: HeadName = "auto"
    context: int | None = None
    kv_tokens: int | None = None
    max_batch_tokens: int = 256
    prefix_cache: bool = True
    speculation: SpeculationName = "auto"
    draft_model: str | PathLike[str] | None = None
    draft_tokens: int = 16
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not self.device:
            raise ConfigError(f"device must be a name such as 'cpu', got {self.device!r}")
        if self.isa is not None and (not isinstance(self.isa, str) or not self.isa):
            raise ConfigError(f"isa must be a name such as 'avx2' or None, got {self.isa!r}")
        for name, choices in {**CHOICES, "speculation": get_args(SpeculationName)}.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        self._check_drafts()
        _integer(self, "threads", low=1, high=_MOST_THREADS, optional=True)
        for name in ("context", "kv_tokens", "memory_limit"):
            _integer(self, name, low=1, optional=True)
        _integer(self, "max_batch_tokens", low=1, high=_MOST_ROWS)
        _boolean(self, "prefix_cache")

    def _check_drafts(self) -> None:
        _integer(self, "draft_tokens", low=1, high=_MOST_DRAFT_TOKENS)
        if self.draft_model is None:
            return
        if not isinstance(self.draft_model, str | PathLike) or not str(self.draft_model):
            raise ConfigError(f"draft_model must name a model, got {self.draft_model!r}")
        if self.speculation == "off":
            raise ConfigError(
                "draft_model is given, but speculation is off",
                hint="leave one of them out",
            )

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], base: EngineOptions | None = None
    ) -> EngineOptions:
        """Return `base` (default: `EngineOptions()`) with `options` set.

        Raises:
            ConfigError: a key that does not exist (with the likely one), or a value out of range.
        """
        return _with_options(cls() if base is None else base, options, "engine option")


def parse_size(text: str) -> int:
    """Return the bytes that a text such as "800MB", "2.5 GB", "1GiB" or "4096" means.

    Raises:
        ConfigError: the text is no positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ConfigError(f"{text!r} is no size in bytes", hint="write 4096, 800MB, 2.5GB or 1GiB")
    base = 1024 if match[3] else 1000
    size = int(float(match[1]) * base ** " kmgt".index((match[2] or " ").lower()))
    if size < 1:
        raise ConfigError(f"{text!r} is less than one byte")
    return size


def _schema_text(schema: object) -> str:
    """Return a JSON schema as text."""
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(parsed, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema is no JSON: {error}") from error
    if not isinstance(parsed, Mapping):
        raise ConfigError(
            f"json_schema must be a JSON object, got {schema!r:.80}",
            hint='any JSON object is {"type": "object"}',
        )
    return text


def _choices(choice: object) -> tuple[str, ...]:
    texts = () if isinstance(choice, str) or not isinstance(choice, Sequence) else tuple(choice)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(
            f"choice must be a list of strings that are not empty, got {choice!r:.80}"
        )
    return texts


def as_integer(
    name: str, value: Any, *, low: int, high: int | None = None, hint: str | None = None
) -> int:
    """Return `value` as an int.

    Raises:
        ConfigError: `name` is no whole number, or out of range.
    """
    wanted = f"at least {low}" if high is None else f"{low} to {high}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{name} must be a whole number, {wanted}, got {value!r}", hint=hint)
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ConfigError(f"{name} must be {wanted}, got {number}", hint=hint)
    return number


def _with_options(base: _Options, options: Mapping[str, Any], what: str) -> _Options:
    known = [item.name for item in dataclasses.fields(base)]
    for key in options:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
            raise ConfigError(f"there is no {what} {key!r}", hint=hint)
    return dataclasses.replace(base, **options) if options else base


def _integer(
    owner: object,
    name: str,
    *,
    low: int,
    high: int | None = None,
    optional: bool = False,
    hint: str | None = None,
) -> None:
    value = getattr(owner, name)
    if not (optional and value is None):
        object.__setattr__(owner, name, as_integer(name, value, low=low, high=high, hint=hint))


def _number(
    owner: object,
    name: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    optional: bool = False,
) -> None:
    value = getattr(owner, name)
    if not (optional and value is None):
        checked = as_number(name, value, low=low, high=high, above=above)
        object.__setattr__(owner, name, checked)


def _boolean(owner: object, name: str) -> None:
    if not isinstance(getattr(owner, name), bool):
        raise ConfigError(f"{name} must be True or False, got {getattr(owner, name)!r}")


def as_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
) -> float:
    """Return `value` as a float that is finite and in the range of float32.

    Raises:
        ConfigError: `name` is no such number, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be finite, got {value!r:.40}")
    if number and not _SMALLEST_FLOAT32 <= abs(number) <= _LARGEST_FLOAT32:
        raise ConfigError(f"{name} is {number:g}, which is out of the range of float32")
    if number < low or number > high or (above and number == low):
        bound = "above" if above else "at least"
        upper = f" and at most {high:g}" if high < math.inf else ""
        raise ConfigError(f"{name} must be {bound} {low:g}{upper}, got {value}")
    return number
