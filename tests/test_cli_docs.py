"""docs/cli.md is what the help texts say, and the generator notices when it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATOR = ROOT / "docs" / "generate_cli.py"


def generate(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)


def test_the_page_is_up_to_date() -> None:
    done = generate(GENERATOR, "--check")
    assert done.returncode == 0, done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The generator in a directory of its own, where it may write."""
    script = tmp_path / GENERATOR.name
    script.write_text(GENERATOR.read_text())
    return script


def test_a_page_that_differs_is_refused_and_written_anew(copy: Path) -> None:
    page = copy.with_name("cli.md")
    assert generate(copy, "--check").returncode == 1
    assert generate(copy).returncode == 0
    assert generate(copy, "--check").returncode == 0
    assert page.read_text() == (ROOT / "docs" / "cli.md").read_text()
    page.write_text(page.read_text().replace("--max-tokens", "--most-tokens"))
    done = generate(copy, "--check")
    assert done.returncode == 1
    assert "-  -n, --most-tokens" in done.stdout
    assert "+  -n, --max-tokens" in done.stdout
