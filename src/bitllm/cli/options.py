"""Options that several commands share; each has an environment variable, BITLLM_<NAME>."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from bitllm.config import CHOICES, SpeculationName

__all__ = [
    "chosen",
    "device_option",
    "engine_options",
    "is_verbose",
    "json_option",
    "model_option",
    "option",
    "sampling_options",
    "speculation_options",
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


def option(*names: str, **settings: Any) -> Decorator[F]:
    """Return `click.option` with the environment variable BITLLM_<LONG NAME>, shown in the help."""
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = long.removeprefix("--").replace("-", "_").upper()
    return click.option(*names, **{"envvar": f"BITLLM_{variable}", "show_envvar": True, **settings})


def _together(*decorators: Decorator[F]) -> Decorator[F]:
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

model_option: Decorator[Any] = option(
    "-m",
    "--model",
    metavar="REF",
    help="A directory, a GGUF file, a short name such as 2b, or org/name[@revision] on the"
    " Hugging Face Hub."
    " Default: the demo model inside bitllm.",
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
    metavar="auto|cpu|reference",
    help="What computes: native kernels (cpu) or plain NumPy (reference).",
)

engine_options: Decorator[Any] = _together(
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
)

speculation_options: Decorator[Any] = _together(
    option(
        "--speculation",
        type=click.Choice(get_args(SpeculationName)),
        help="Whether guesses at coming tokens are computed along. The text is the same. Default:"
        " auto, where that saves time.",
    ),
    option(
        "--draft-model",
        metavar="REF",
        help="A smaller model of the same vocabulary that guesses. Default: only the text itself.",
    ),
    option(
        "--draft-tokens",
        metavar="N",
        type=click.IntRange(min=1, max=64),
        help="Most guesses at once. Default: 16.",
    ),
)

sampling_options: Decorator[Any] = _together(
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
        "--repetition-penalty",
        metavar="X",
        type=click.FloatRange(min=0, min_open=True),
        help="Above 1: make tokens that occurred before less likely.",
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
)
