"""The tables of docs/formats.md are what conversions give, and the generator notices if not."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The generator with a page of its own, which it may write."""
    monkeypatch.setenv("BITLLM_DEVICE", "reference")
    path = ROOT / "docs" / "generate_formats.py"
    spec = importlib.util.spec_from_file_location("generate_formats", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGE", tmp_path / "formats.md")
    shutil.copy(ROOT / "docs" / "formats.md", tmp_path)
    return module


def run(generator: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["generate_formats.py", *arguments])
    status: int = generator.main()
    return status


def test_the_page_is_what_conversions_give(generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that says too much is noticed, and writing it anew gives the one in the repository."""
    page = generator.PAGE
    text = page.read_text()
    assert "within 2^-11" in text
    page.write_text(text.replace("within 2^-11", "equal"))
    assert run(generator, monkeypatch, "--check") == 1
    assert run(generator, monkeypatch) == 0
    assert page.read_text() == text


def test_a_page_without_markers_is_an_error(
    generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator.PAGE.write_text("nothing")
    assert run(generator, monkeypatch) == 1
    assert generator.PAGE.read_text() == "nothing"
