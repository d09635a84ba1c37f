"""`bitllm ps`: what a running server does."""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import click

from bitllm.cli.options import json_option, option, verbose_option
from bitllm.cli.terminal import emit, emit_json
from bitllm.errors import ConfigError

__all__ = ["ps"]

_PATIENCE_S = 5.0
_HEAD: tuple[str, ...] = (
    "MODEL", "DEVICE", "CONTEXT", "RUNNING", "WAITING", "KV USED", "KV KEPT", "HITS",
)  # fmt: skip


@click.command()
@option(
    "--url",
    metavar="URL",
    default="http://127.0.0.1:8080",
    show_default=True,
    help="Of the server. Its key, if it wants one, is read from BITLLM_API_KEY.",
)
@json_option
@verbose_option
def ps(url: str, as_json: bool) -> None:
    """Show what a running server does: its models, requests and memory."""
    found = _ask(url.rstrip("/").removesuffix("/v1") + "/stats")
    if as_json:
        emit_json(found)
    else:
        emit("\n".join(_lines(found)))


def _ask(url: str) -> dict[str, Any]:
    headers = (
        {"Authorization": f"Bearer {key}"} if (key := os.environ.get("BITLLM_API_KEY")) else {}
    )
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("it begins with neither http:// nor https://")
        with urlopen(Request(url, headers=headers), timeout=_PATIENCE_S) as answer:
            found = json.load(answer)
        if not isinstance(found, dict) or "models" not in found:
            raise ValueError("the answer is none of a bitllm server")
    except HTTPError as error:
        hint = "set BITLLM_API_KEY" if error.code == 401 else "is this a bitllm server?"
        raise ConfigError(f"{url}: the server answers {error.code}", hint=hint) from error
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise ConfigError(
            f"{url}: {reason}", hint="start one with 'bitllm serve', or give its --url"
        ) from error
    return found


def _lines(found: dict[str, Any]) -> list[str]:
    memory = found.get("resident_bytes")
    held = f", {memory / 1e6:.0f} MB" if memory else ""
    state = ", ending" if found["draining"] else ""
    lines = [
        f"bitllm {found['version']}, up {_duration(found['uptime_seconds'])}, "
        f"{found['requests']} of {found['max_requests']} requests{held}{state}"
    ]
    rows = [_HEAD, *(_row(model) for model in found["models"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells))
    return [*lines, *_pool_lines(found)]


def _pool_lines(found: dict[str, Any]) -> list[str]:
    """Say what is not in memory, of a server that loads models when they are asked for."""
    if found.get("loading"):
        return ["loading: the server has not begun to take requests"]
    pool = found.get("pool")
    if pool is None:
        return []
    lines = [f"{name}: unloaded in {_duration(s)}" for name, s in pool["unload_seconds"].items()]
    for what in ("loading", "unloaded"):
        if pool[what]:
            lines.append(f"{what}: {', '.join(pool[what])}")
    limit = pool["memory_limit"]
    bound = "" if limit is None else f" of {limit / 1e6:.0f} MB"
    return [*lines, f"planned: {pool['planned_bytes'] / 1e6:.0f} MB{bound}"]


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    load = model["load"]
    blocks = max(1, load["blocks"])
    return (
        model["id"],
        f"{model['backend']} ({model['kernel']} x{model['threads']})",
        str(model["context"]),
        str(load["running"]),
        str(load["waiting"]),
        f"{load['used_blocks'] / blocks:.0%}",
        f"{load['cached_blocks'] / blocks:.0%}",
        f"{load['hit_rate']:.0%}",
    )


def _duration(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"
