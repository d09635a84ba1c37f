"""What the pages say about the code is held against the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import bitllm.errors

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_of_errors_has_a_row_for_each_exception() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(set(bitllm.errors.__all__) - {"BitllmError"})


def test_the_drawn_tree_of_errors_is_the_class_tree() -> None:
    drawn = re.findall(r"^(.*?)(\w+Error)\b", inspect.getdoc(bitllm.errors) or "", re.MULTILINE)
    parents: list[str] = []
    for indent, name in drawn:
        depth = (len(indent) - len(drawn[0][0])) // 4
        bases = [base.__name__ for base in getattr(bitllm.errors, name).__bases__]
        assert depth == 0 or parents[depth - 1] in bases, name
        parents[depth:] = [name]
    assert sorted(name for _, name in drawn) == sorted(bitllm.errors.__all__)


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
