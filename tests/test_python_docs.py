"""The examples of docs/python.md are run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
EXAMPLES = re.findall(r"^## ([^\n]+)\n+```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def test_each_way_has_an_example() -> None:
    names = ["Simple", "Advanced", "Streaming, for servers"]
    names += ["Several models", "Adapters", "Tools"]
    assert [name for name, _ in EXAMPLES] == names
    assert PAGE.read_text().count("```python") == len(names)


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_runs_and_is_short(name: str, code: str) -> None:
    assert len(code.splitlines()) < 30
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if name == "Tools":
        assert done.stdout.startswith("get_weather {'place': ")
