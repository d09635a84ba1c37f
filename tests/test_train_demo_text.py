"""The demo corpus: documentation of the running Python, in a fixed order and of a fixed kind."""

from __future__ import annotations

import json
from pydoc_data.topics import topics

import pytest

from bitllm.train.demo_text import python_documents
from bitllm.train.documents import documents_sha256, is_held_out


@pytest.fixture(scope="module")
def documents():
    return python_documents()


def test_order_and_text_are_the_same_each_time(documents):
    assert documents_sha256(python_documents()) == documents_sha256(documents)


def test_names_are_unique_and_nothing_is_empty(documents):
    names = [document.name for document in documents]
    assert len(set(names)) > 0.99 * len(names)
    assert all(turn.text.strip() for document in documents for turn in document.turns)


def test_it_holds_the_prose_it_is_meant_to(documents):
    texts = {d.name: d.turns[0].text for d in documents}
    assert json.__doc__.strip()[:60] in texts["json/__init__.py:0"]
    page = "\n\n".join(text for name, text in texts.items() if name.startswith("json/__init__.py:"))
    assert "\n\njson.loads(s, *, cls=None" in page
    assert texts["topic:assert:0"].startswith('The "assert" statement')
    assert sum(d.byte_count for d in documents) > 2_000_000


def test_tests_packages_and_machine_files_stay_out(documents):
    for document in documents:
        parts = document.name.split("#")[0].split("/")
        assert not {"test", "tests", "site-packages", "idlelib"}.intersection(parts), document.name
        assert "_sysconfigdata" not in document.name


def test_dialogues_ask_and_answer_about_public_names(documents):
    dialogues = [d for d in documents if d.turns[0].role is not None]
    assert all([t.role for t in d.turns] == ["user", "assistant"] for d in dialogues)
    answers = {d.name: d.turns[1].text for d in dialogues}
    assert answers["textwrap.py#textwrap.dedent"].startswith("Remove any common leading")
    assert not any("._" in d.turns[0].text for d in dialogues if "#" in d.name)


def test_pages_are_cut_between_paragraphs_and_nothing_is_lost(documents):
    passages = [d.turns[0].text for d in documents if d.group == "topic:strings"]
    assert len(passages) > 5
    assert all(len(passage) >= 800 for passage in passages[:-1])
    whole = topics["strings"].strip().split("\n\n")
    assert [p for passage in passages for p in passage.split("\n\n")] == whole


def test_long_answers_are_cut_behind_a_paragraph(documents):
    answers = [d.turns[1].text for d in documents if d.turns[0].role is not None]
    long = [answer for answer in answers if len(answer) > 520]
    assert all("\n\n" not in answer for answer in long)


def test_a_module_is_held_out_with_all_that_is_said_about_it(documents):
    for document in documents:
        if document.name.startswith("concurrent/"):
            assert document.group == "concurrent"
    held_out = {d.group for d in documents if is_held_out(d.group, 6.0)}
    assert 5 < len(held_out) < 40
    assert "greeting" not in held_out
