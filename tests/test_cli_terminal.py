"""Bars and notes: what is drawn on a terminal, and that nothing is drawn elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitllm.engine.loading import load
from cli_model import LAYERS, write_model

COUNTED = """
import sys, time
from bitllm.cli import terminal
terminal.PROGRESS_DELAY_S = {delay}
with terminal.progress("loading the thing") as advance:
    for step in range(1, 4):
        time.sleep(0.1)
        advance(step, 3)
print("rich" in sys.modules)
"""
WAITING = """
import sys, time
from bitllm.cli import terminal
terminal.PROGRESS_DELAY_S = {delay}
with terminal.waiting("loading the thing"):
    time.sleep(0.5)
print("rich" in sys.modules)
"""


def draw(script: str, delay: float, terminal: bool) -> tuple[str, str]:
    """Run a script; return its stdout, and what came to stderr, a pty or a pipe."""
    reader, writer = os.openpty() if terminal else os.pipe()
    environment = {**os.environ, "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", script.format(delay=delay)],
        stdout=subprocess.PIPE,
        stderr=writer,
        env=environment,
        check=True,
    )
    if terminal:
        os.write(writer, b"end")
    os.close(writer)
    drawn = b""
    while not drawn.endswith(b"end") and (piece := os.read(reader, 4096)):
        drawn += piece
    os.close(reader)
    return done.stdout.decode(), drawn.decode().removesuffix("end")


@pytest.mark.parametrize("script", [COUNTED, WAITING])
def test_a_terminal_shows_a_bar_and_loses_it_again(script: str) -> None:
    output, drawn = draw(script, 0.05, terminal=True)
    assert output == "True\n"
    assert "loading the thing" in drawn
    # The last thing done is to erase the line.
    assert drawn.endswith("\x1b[2K")


@pytest.mark.parametrize("script", [COUNTED, WAITING])
def test_short_work_shows_nothing(script: str) -> None:
    assert draw(script, 60, terminal=True) == ("False\n", "")


@pytest.mark.parametrize("script", [COUNTED, WAITING])
def test_a_pipe_shows_nothing(script: str) -> None:
    assert draw(script, 0, terminal=False) == ("False\n", "")


def test_loading_counts_each_ternary_matrix(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    model = str(write_model(tmp_path / "model"))
    load(model, device="reference", progress=lambda *call: calls.append(call)).close()
    matrices = 7 * LAYERS
    assert calls == [(done, matrices) for done in range(1, matrices + 1)]
