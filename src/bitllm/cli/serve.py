"""`bitllm serve`: models over HTTP, by OpenAI's protocol."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitllm.cli.model import split_options
from bitllm.cli.options import (
    Size,
    engine_options,
    option,
    speculation_options,
    verbose_option,
)
from bitllm.cli.terminal import note, paint

if TYPE_CHECKING:
    from bitllm.server import ServedModels, ServerOptions

__all__ = ["serve"]


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@option(
    "-m",
    "--model",
    "more",
    metavar="REF",
    multiple=True,
    help="A model, as the argument; may be given several times.",
)
@option(
    "--adapter",
    "adapters",
    metavar="[MODEL:][NAME=]PATH",
    multiple=True,
    help="A low-rank adapter that is served as a model of its own; may be given several times.",
)
@option(
    "--keep-alive",
    metavar="S",
    type=click.FloatRange(min=0),
    help="Unload a model that nobody has used for so many seconds. Default: when room is needed.",
)
@option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen at. 0 = one that is free.",
)
@option(
    "--api-key-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Answer only who has one of these keys, one a line. BITLLM_API_KEY holds one more.",
)
@option(
    "--cors-origin",
    "cors_origins",
    metavar="URL",
    multiple=True,
    help="Let pages of this origin ask; may be given several times, * = all.",
)
@option(
    "--allowed-host",
    "allowed_hosts",
    metavar="NAME",
    multiple=True,
    help="Another name by which clients call this server.",
)
@option("--strict-model", is_flag=True, help="Refuse names of models that are not served.")
@option(
    "--max-requests",
    metavar="N",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Requests under way, waiting ones included; one more is answered 429.",
)
@option(
    "--max-body",
    metavar="SIZE",
    type=Size(),
    default="32MiB",
    show_default=True,
    help="Bytes of a request.",
)
@option(
    "--timeout",
    metavar="S",
    type=click.FloatRange(min=0, min_open=True),
    help="End each text after this many seconds, with what there is. Default: never.",
)
@option(
    "--grace",
    metavar="S",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    help="Seconds that requests get to end when the server is told to.",
)
@option(
    "--pooling",
    type=click.Choice(["mean", "last"]),
    help="How hidden states become an embedding. Default: as the model says.",
)
@option("--page/--no-page", default=True, help="Serve the chat page at /.")
@option("--access-log/--no-access-log", default=True, help="Write a line for each request.")
@option("--log-bodies", is_flag=True, help="Write requests into the log, with their prompts.")
@engine_options
@speculation_options
@verbose_option
def serve(models: tuple[str, ...], more: tuple[str, ...], **options: Any) -> None:
    """Serve models over HTTP, by OpenAI's protocol.

    Clients that speak OpenAI's protocol work with the URL that is printed, and a browser finds a
    chat page there. NAME=REF serves a model under another name. One model answers to every name
    unless --strict-model; several answer to their own, and are loaded when they are asked for, as
    many at a time as --memory-limit has room for. SIGTERM and Ctrl-C let requests end first.

    \b
    bitllm serve                                     the demo model
    bitllm serve microsoft/bitnet-b1.58-2B-4T --kv-tokens 16384
    bitllm serve 2b=microsoft/bitnet-b1.58-2B-4T small=./my-model --keep-alive 300
    bitllm serve ./my-model --adapter poet=./poems
    """  # noqa: D301
    from bitllm.cli.served_models import Wanted, open_models
    from bitllm.server.run import listen, url_of

    adapters, keep_alive = options.pop("adapters"), options.pop("keep_alive")
    settings, engine = _settings(options)
    listener = listen(settings)
    try:
        wanted = Wanted.of([*models, *more], adapters, engine, keep_alive)
        _log_to_stderr()
        url = url_of(listener)
        opened = open_models(wanted, strict=settings.strict_model)
        asyncio.run(_serve(opened, settings, listener, lambda: _greet(url, wanted.names, settings)))
    finally:
        listener.close()


async def _serve(
    models: Coroutine[Any, Any, ServedModels], settings: ServerOptions, listener: Any, on_ready: Any
) -> None:
    from bitllm.server import serve as run

    def on_drain(count: int) -> None:
        what = "request" if count == 1 else "requests"
        note(f"ending; {count} {what} under way (Ctrl-C again: at once)")

    await run(models, settings, listener, on_ready=on_ready, on_drain=on_drain)


def _settings(options: dict[str, Any]) -> tuple[ServerOptions, dict[str, Any]]:
    """Return the options of the server, and those that say how a model is loaded."""
    from bitllm.server import ServerOptions

    engine, rest = split_options(options)
    rest["api_keys"] = _api_keys(rest.pop("api_key_file", None))
    return ServerOptions(**rest), engine


def _api_keys(file: Path | None) -> tuple[str, ...]:
    import os

    from bitllm.server.options import read_api_keys

    key = os.environ.get("BITLLM_API_KEY", "").strip()
    keys = () if file is None else read_api_keys(file)
    return (*keys, key) if key else keys


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name, level in (
        ("bitllm.access", logging.INFO),
        ("bitllm.server", logging.WARNING),
        ("uvicorn.error", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


def _greet(url: str, names: list[str], settings: ServerOptions) -> None:
    """Tell the person at the terminal how to use the server."""
    note(f"{', '.join(names)} at {paint(url, 'green')} (OpenAI: base_url={url}/v1)")
    key = ' -H "Authorization: Bearer $KEY"' if settings.api_keys else ""
    body = '{"prompt": "The list", "max_tokens": 32}'
    note(f"try: curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    if not settings.api_keys and not settings.is_local:
        note(
            f"{paint('warning:', 'yellow')} {settings.host} can be reached from the network, and "
            "whoever reaches it is answered; --api-key-file asks for a key"
        )
