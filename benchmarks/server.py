"""What a client sees of `bitllm serve` under load: throughput, latencies, memory, and bad clients.

    python benchmarks/server.py                                  # the demo model, 256 streams
    python benchmarks/server.py build/models/2b --streams 16 --tokens 32
    python benchmarks/server.py --hostile                        # beside clients that behave badly

The server is a process of its own, as people run it. The client is this one: it counts events in
the bytes of its sockets and decodes none of them, so that it costs little beside the server. "loop"
is the processor time of the server's event loop for each streamed token: all that HTTP, encoding
and the hand-over from the engine take. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

_TICKS = os.sysconf("SC_CLK_TCK")
_LARGE = 100 * 2**20


@dataclass
class Served:
    """A server process.

    Attributes:
        pid: of the process.
        port: where it listens, at 127.0.0.1.
    """

    pid: int
    port: int

    def stats(self) -> dict[str, Any]:
        """Return what the server tells of itself."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def loop_seconds(self) -> float:
        """Return the processor time of the main thread, which runs the event loop."""
        fields = Path(f"/proc/{self.pid}/task/{self.pid}/stat").read_text().rpartition(")")[2]
        user, system = fields.split()[11:13]
        return (int(user) + int(system)) / _TICKS


@contextmanager
def serving(model: str | None, options: list[str]) -> Iterator[Served]:
    """Run `bitllm serve` while the block runs."""
    command = [sys.executable, "-m", "bitllm", "serve", "--port", "0", "--no-access-log"]
    process = subprocess.Popen(
        [*command, *([] if model is None else [model]), *options], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        said = ""
        while not (found := re.search(r"at \S*http://127\.0\.0\.1:(\d+)", said)):
            line = process.stderr.readline()
            if not line:
                raise SystemExit(said)
            said += line
        yield Served(process.pid, int(found[1]))
    finally:
        process.terminate()
        process.communicate(timeout=60)


@dataclass
class Stream(asyncio.Protocol):
    """One streamed request; notes when its events come.

    Attributes:
        body: the request.
        times: of each event, by `time.perf_counter`.
        tail: the last bytes.
    """

    body: bytes
    times: list[float] = field(default_factory=list)
    tail: bytes = b""
    started: float = 0.0
    head: bytes = b""

    def connection_made(self, transport: Any) -> None:
        """Send the request."""
        self.done = asyncio.get_running_loop().create_future()
        self.started = time.perf_counter()
        transport.write(head_of(len(self.body), close=True) + self.body)

    def data_received(self, data: bytes) -> None:
        """Count the events in what has come."""
        if not self.head:
            self.head = data[:15]
        self.times += [time.perf_counter()] * data.count(b"data: {")
        self.tail = (self.tail + data)[-64:]

    def connection_lost(self, error: Exception | None) -> None:
        """Note the end."""
        self.done.set_result(None)

    @property
    def complete(self) -> bool:
        """Whether the answer came to its end."""
        return self.head.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in self.tail


def head_of(length: int, *, close: bool) -> bytes:
    """Return the head of a completion request."""
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n%b\r\n" % (length, b"Connection: close\r\n" if close else b"")
    )


def body_of(number: int, tokens: int) -> bytes:
    """Return a request whose prompt no other has, so that each prompt is computed."""
    return json.dumps(
        {
            "prompt": f"{number}: the list of things that are",
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0.8,
            "seed": number,
            "stream": True,
        }
    ).encode()


async def load(server: Served, streams: int, tokens: int, offset: int) -> list[Stream]:
    """Run so many streams at once, to their ends."""
    loop = asyncio.get_running_loop()
    opened = []
    for number in range(offset, offset + streams):
        _, stream = await loop.create_connection(
            partial(Stream, body_of(number, tokens)), "127.0.0.1", server.port
        )
        opened.append(stream)
    await asyncio.gather(*(stream.done for stream in opened))
    return opened


async def misbehave(server: Served, until: asyncio.Event) -> dict[str, int]:
    """Hang up, stall, send garbage and send 100 MB, all at once; count what was done."""
    counts = dict.fromkeys(("hung up", "stalled", "garbage", "100 MB"), 0)
    large = head_of(_LARGE, close=False)

    async def hang_up(number: int) -> None:
        body = body_of(10**6 + number, 200)
        await send([head_of(len(body), close=False) + body], server, read=10, seconds=1)

    async def stall(number: int) -> None:  # half a head, or an answer that nobody reads
        body = body_of(2 * 10**6 + number, 400)
        whole = head_of(len(body), close=False) + body
        await send([whole if number % 2 else whole[:20]], server, read=0, seconds=3)

    async def garbage(number: int) -> None:
        await send([os.urandom(4000) + b"\r\n\r\n"], server, read=64, seconds=1)

    async def too_large(number: int) -> None:  # announced only, or sent
        pieces = [large] + [b" " * 2**20] * (_LARGE // 2**20 if number % 2 else 0)
        await send(pieces, server, read=64, seconds=3)

    async def again(what: str, misdeed: Callable[[int], Awaitable[None]], pause: float) -> None:
        while not until.is_set():
            await misdeed(counts[what])
            counts[what] += 1
            await asyncio.sleep(pause)

    await asyncio.gather(
        again("hung up", hang_up, 0.02), again("garbage", garbage, 0.02),
        again("100 MB", too_large, 0.5), *(again("stalled", stall, 0) for _ in range(16)),
    )  # fmt: skip
    return counts


async def send(pieces: list[bytes], server: Served, *, read: int, seconds: float) -> None:
    """Send something, read or wait for so long at most, and break the connection off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    with suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(seconds):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            await (reader.read(read) if read else asyncio.sleep(seconds))
    writer.transport.abort()


def figures(streams: list[Stream], seconds: float) -> dict[str, Any]:
    """Return throughput, and latencies in milliseconds."""
    first = [s.times[0] - s.started for s in streams if s.times]
    between = np.concatenate([np.diff(s.times) for s in streams if len(s.times) > 1])
    events = sum(len(s.times) for s in streams)
    p = {f"ttft_ms_p{q}": float(np.percentile(first, q)) * 1e3 for q in (50, 99)}
    p |= {f"between_ms_p{q}": float(np.percentile(between, q)) * 1e3 for q in (50, 99)}
    return {"complete": sum(s.complete for s in streams), "events": events,
            "tokens_per_second": events / seconds, **p}  # fmt: skip


async def measure(server: Served, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of each round."""
    rounds = []
    await load(server, min(8, settings.streams), 8, 10**7)  # buffers and code paths are warm
    for number in range(settings.rounds):
        over = asyncio.Event()
        bad = asyncio.create_task(misbehave(server, over)) if settings.hostile else None
        loop, start = server.loop_seconds(), time.perf_counter()
        streams = await load(server, settings.streams, settings.tokens, number * settings.streams)
        found = figures(streams, time.perf_counter() - start)
        found["loop_us_per_token"] = (server.loop_seconds() - loop) / found["events"] * 1e6
        over.set()
        if bad is not None:
            found["bad_clients"] = await bad
        found["resident_mb"] = (await asyncio.to_thread(server.stats))["resident_bytes"] / 1e6
        rounds.append(found)
    return rounds


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="default: the demo model")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hostile", action="store_true", help="beside clients that behave badly")
    settings, options = parser.parse_known_args()
    limit = str(settings.streams + 128)
    with serving(settings.model, ["--max-requests", limit, *options]) as server:
        rounds = asyncio.run(measure(server, settings))
    print("round  complete  tok/s  TTFT p50/p99 ms  between p50/p99 ms  loop us/token  RSS MB")
    for number, each in enumerate(rounds):
        print(
            f"{number:5}  {each['complete']:4}/{settings.streams:<4}"
            f" {each['tokens_per_second']:6.0f}"
            f"  {each['ttft_ms_p50']:7.0f} {each['ttft_ms_p99']:7.0f}"
            f"  {each['between_ms_p50']:8.2f} {each['between_ms_p99']:8.2f}"
            f"  {each['loop_us_per_token']:13.1f}  {each['resident_mb']:6.1f}"
        )
        if "bad_clients" in each:
            print("       beside: " + ", ".join(f"{n} {w}" for w, n in each["bad_clients"].items()))
    print(json.dumps({"model": settings.model or "demo", "streams": settings.streams,
                      "tokens": settings.tokens, "rounds": rounds}))  # fmt: skip


if __name__ == "__main__":
    main()
