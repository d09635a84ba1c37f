"""Options that several commands share; each has an environment variable, BITLLM_<NAME>."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from bitllm.config import CHOICES, parse_size
from bitllm.errors import ConfigError

__all__ = [
    "Decorator",
    "adapter_option",
    "chosen",
    "complete_model",
    "device_option",
    "engine_options",
    "form_options",
    "is_verbose",
    "json_option",
    "model_option",
    "model_reference",
    "option",
    "sampling_options",
    "together",
    "verbose_option",
]

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]

_VERBOSE = "bitllm.cli.verbose"


class OneString(click.types.StringParamType):
    """Text of which an environment variable holds one, white space included."""

    name = "text"

    def split_envvar_value(self, rv: str) -> list[str]:
        """Return the variable's value as the only one."""
        return [rv]


class Size(click.ParamType[int]):
    """Bytes, as 4096, 800MB, 2.5GB or 1GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes that a text means."""
        try:
            return value if isinstance(value, int) else parse_size(str(value))
        except ConfigError as error:
            self.fail(f"{error.message}; {error.hint}" if error.hint else error.message, param, ctx)


class TokenBias(click.ParamType[tuple[int, float]]):
    """A token id and the number added to its logit, as 42=-1.5."""

    name = "bias"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        """Return id and number."""
        if isinstance(value, tuple):
            return value
        token, _, number = str(value).partition("=")
        try:
            return int(token), float(number)
        except ValueError:
            self.fail(f"{value!r} is no token id and number such as 42=-1.5", param, ctx)


def option(*names: str, **settings: Any) -> Decorator[F]:
    """Return `click.option` with the environment variable BITLLM_<LONG NAME>, shown in the help."""
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = long.removeprefix("--").replace("-", "_").upper()
    return click.option(*names, **{"envvar": f"BITLLM_{variable}", "show_envvar": True, **settings})


def together(*decorators: Decorator[F]) -> Decorator[F]:
    """Return one decorator for several; the help lists them in the order given."""

    def decorate(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def is_verbose(ctx: click.Context) -> bool:
    """Whether --verbose stood anywhere on the command line, or BITLLM_TRACEBACK is set."""
    return bool(ctx.meta.get(_VERBOSE)) or os.environ.get("BITLLM_TRACEBACK", "0") not in ("", "0")


def _remember_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not is_verbose(ctx):
        ctx.meta[_VERBOSE] = True
        _log_to_stderr()


def _log_to_stderr() -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(relativeCreated)d ms %(name)s: %(message)s"))
    logger = logging.getLogger("bitllm")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def chosen(**values: Any) -> dict[str, Any]:
    """Return the options that were given, so that the model's own defaults hold for the others."""
    return {name: value for name, value in values.items() if value is not None and value != ()}


verbose_option: Decorator[Any] = option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_remember_verbose,
    help="Log what happens, and show the traceback of an error.",
)

json_option: Decorator[Any] = option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of text."
)


def complete_model(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return what a model may be called that begins like this: short, in the cache, a file."""
    from bitllm.errors import BitllmError
    from bitllm.formats.hub.cache import cached_models
    from bitllm.formats.hub.known_models import KNOWN_MODELS

    names = {model.alias: model.what for model in KNOWN_MODELS}
    with suppress(BitllmError, OSError):  # nobody reads errors while typing
        names |= {model.name: "in the cache" for model in cached_models() if model.complete}
    found = [
        CompletionItem(name, help=what)
        for name, what in names.items()
        if name.lower().startswith(incomplete.lower())
    ]
    # Shells take files only where no name fits, or where they come first.
    return [CompletionItem(incomplete, type="file"), *found]


model_option: Decorator[Any] = option(
    "-m",
    "--model",
    metavar="REF",
    shell_complete=complete_model,
    help="A directory, a GGUF file, a short name such as 2b, or org/name[@revision] on the"
    " Hugging Face Hub."
    " Default: the demo model inside bitllm.",
)


def _one_model(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Return the model that --model names, or the argument, which stands for it."""
    argument = ctx.params.pop("ref", None)
    if argument is None:
        return value
    if ctx.get_parameter_source("model") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError(f"two models are named, {argument!r} and {value!r}", ctx)
    return str(argument)


# The argument is processed first, so that the option finds it.
model_reference: Decorator[Any] = together(
    click.argument(
        "ref", metavar="[MODEL]", required=False, is_eager=True, shell_complete=complete_model
    ),
    option(
        "-m",
        "--model",
        metavar="REF",
        shell_complete=complete_model,
        callback=_one_model,
        help="The same as MODEL: a directory, a GGUF file, a short name such as 2b, or"
        " org/name[@revision] on the Hugging Face Hub. Default: the demo model inside bitllm.",
    ),
)


def _leave_to_the_backend(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> str | None:
    # Backends read BITLLM_DEVICE themselves, and then say that it was the variable.
    source = ctx.get_parameter_source(param.name or "")
    return None if source is click.core.ParameterSource.ENVIRONMENT else value


def _go_offline(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        # The variable of the Hub's client: for everything that runs in this process.
        os.environ["HF_HUB_OFFLINE"] = "1"


device_option: Decorator[Any] = option(
    "--device",
    callback=_leave_to_the_backend,
    metavar="auto|cpu|cuda|mlx|reference",
    help="What computes: native kernels (cpu), a GPU (cuda, mlx) or plain NumPy (reference).",
)

engine_options: Decorator[Any] = together(
    option(
        "--offline",
        is_flag=True,
        expose_value=False,
        callback=_go_offline,
        help="Ask nothing of the Hugging Face Hub: only models in the cache.",
    ),
    device_option,
    option(
        "--threads",
        metavar="N",
        type=click.IntRange(min=1),
        help="Worker threads. Default: one for each physical core.",
    ),
    option(
        "--context",
        metavar="N",
        type=click.IntRange(min=1),
        help="Tokens of prompt and answer together. Default: what the model was made for.",
    ),
    option(
        "--kv-dtype",
        type=click.Choice(CHOICES["kv_dtype"]),
        help="How keys and values are stored. Default: bf16.",
    ),
    option(
        "--packing",
        type=click.Choice(CHOICES["packing"]),
        help="How the cpu device holds weights. Default: auto, the faster one here.",
    ),
    option(
        "--head",
        type=click.Choice(CHOICES["head"]),
        help="How the cpu device computes logits. Default: auto, the fastest that is exact.",
    ),
    option("--isa", metavar="NAME", help="Kernel set of the cpu device. Default: the best here."),
    option(
        "--kv-tokens",
        metavar="N",
        type=click.IntRange(min=1),
        help="Tokens of keys and values over all texts together. Default: as many as --context.",
    ),
    option(
        "--max-batch-tokens",
        metavar="N",
        type=click.IntRange(min=1),
        help="Most tokens that are computed in one step. Default: 256.",
    ),
    option(
        "--prefix-cache/--no-prefix-cache",
        default=None,
        help="Keep what was computed for texts that begin alike. Default: yes.",
    ),
    option(
        "--memory-limit",
        metavar="SIZE",
        type=Size(),
        help="Memory the model may take, such as 2.5GB. Default: what is free.",
    ),
)

adapter_option: Decorator[Any] = option(
    "--adapter",
    metavar="PATH",
    help="A low-rank adapter: a directory that PEFT has written.",
)

sampling_options: Decorator[Any] = together(
    option(
        "-n",
        "--max-tokens",
        metavar="N",
        type=click.IntRange(min=1),
        help="Stop after this many tokens. Default: 256, in a chat the rest of the context.",
    ),
    option(
        "-t",
        "--temperature",
        metavar="X",
        type=click.FloatRange(min=0),
        help="0 always takes the likeliest token; higher is more varied.",
    ),
    option(
        "--top-k",
        metavar="N",
        type=click.IntRange(min=0),
        help="Draw from the K likeliest tokens. 0 = all.",
    ),
    option(
        "--top-p",
        metavar="X",
        type=click.FloatRange(min=0, max=1, min_open=True),
        help="Draw from the likeliest tokens that hold this much probability.",
    ),
    option(
        "--min-p",
        metavar="X",
        type=click.FloatRange(min=0, max=1),
        help="Drop tokens less likely than this part of the likeliest.",
    ),
    option(
        "--typical-p",
        metavar="X",
        type=click.FloatRange(min=0, max=1, min_open=True),
        help="Draw from the tokens about as surprising as expected that hold this probability.",
    ),
    option(
        "--repetition-penalty",
        metavar="X",
        type=click.FloatRange(min=0, min_open=True),
        help="Above 1: make tokens that occurred before less likely.",
    ),
    option(
        "--frequency-penalty",
        metavar="X",
        type=float,
        help="Subtracted from a logit for each time its token was written.",
    ),
    option(
        "--presence-penalty",
        metavar="X",
        type=float,
        help="Subtracted from the logits of tokens that were written.",
    ),
    option(
        "--logit-bias",
        metavar="ID=X",
        type=TokenBias(),
        multiple=True,
        callback=lambda ctx, param, value: dict(value) or None,
        help="Added to the logit of a token id; may be given several times.",
    ),
    option(
        "--seed", metavar="N", type=click.IntRange(min=0), help="The same seed gives the same text."
    ),
    option(
        "--stop",
        type=OneString(),
        multiple=True,
        help="End the text before this string; may be given several times.",
    ),
    option(
        "--stop-token-id",
        "stop_token_ids",
        metavar="ID",
        type=click.IntRange(min=0),
        multiple=True,
        help="End the text at this token id; may be given several times.",
    ),
    option(
        "--ignore-eos", is_flag=True, default=None, help="Do not end at the model's own stop ids."
    ),
    option(
        "--min-tokens", metavar="N", type=click.IntRange(min=0), help="End no text before this."
    ),
    option(
        "--timeout",
        metavar="S",
        type=click.FloatRange(min=0, min_open=True),
        help="Seconds after which a text ends with what there is.",
    ),
)


def _read_schema(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Return a JSON schema: the value itself if it is JSON, or else the file that it names."""
    return value if value is None or value.lstrip().startswith("{") else _read(value)


def _read_grammar(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return value if value is None else _read(value)


def _read(path: str) -> str:
    from bitllm.cli.text_input import read_file

    return read_file(path)


form_options: Decorator[Any] = together(
    option(
        "--json-schema",
        metavar="FILE|JSON",
        callback=_read_schema,
        help="Write JSON of this schema.",
    ),
    option("--regex", metavar="REGEX", help="Write text that matches this as a whole."),
    option(
        "--grammar",
        metavar="FILE",
        callback=_read_grammar,
        help="Write text of this grammar (Lark or GBNF).",
    ),
    option(
        "--choice",
        metavar="TEXT",
        type=OneString(),
        multiple=True,
        help="Write one of these texts; to be given several times.",
    ),
)
