"""The text that the demo model learns: documentation found in every Python installation.

Two sources, both under the licence of Python itself (PSF): the docstrings of the standard library,
read from its files with `ast` (nothing is imported or run), and the prose of
`pydoc_data.topics`. Each module and each topic becomes a page of documentation, cut into
passages; each public name also becomes a short dialogue, so that the model can answer a chat. The
text depends on the Python release, so a recipe pins it by its hash.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bitllm.train.documents import Document, Turn

__all__ = ["python_documents"]

_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "_bundled",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "__phello__", "_distutils_system_mod", "_aix", "_osx")
_ANSWER_CHARACTERS = 500
_PASSAGE_CHARACTERS = 800
_QUESTIONS = (
    "What does {name} do?",
    "What is {name}?",
    "How do I use {name}?",
    "Explain {name}.",
    "Tell me about {name}.",
)
_GREETING_REPEATS = 12
_GREETINGS = (
    ("Hello", "Hello! Ask me about something in Python's standard library."),
    ("Hello!", "Hello! Which part of Python would you like to read about?"),
    ("Hi", "Hi! I know a little about Python. Ask me what a function does."),
    (
        "Who are you?",
        "I am a very small ternary language model. I have read Python's documentation.",
    ),
    ("What are you?", "A ternary language model: each of my weights is -1, 0 or +1."),
    ("What can you do?", "I write text that looks like Python's documentation. It is often wrong."),
    ("Can I trust you?", "No. I am a demonstration and very small. Read the real documentation."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome. Ask me about another module."),
    ("Goodbye", "Goodbye!"),
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One documented name of a module: heading as printed, dotted name, cleaned docstring."""

    heading: str
    name: str
    doc: str
    public: bool


def python_documents() -> list[Document]:
    """Return the documents of the running Python's own documentation, in a fixed order.

    The group of a document is the top-level module or topic that it belongs to, so that holding
    out a group holds out everything said about it in the same place.
    """
    return [*_module_documents(), *_topic_documents(), *_greetings()]


def _module_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for relative in sorted(paths):
        parts = relative.removesuffix(".py").split("/")
        if _SKIPPED_FOLDERS.intersection(parts) or parts[-1].startswith(_SKIPPED_PREFIXES):
            continue
        if parts[0] == "pydoc_data" or parts[0].startswith("config-"):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        entries = list(_entries(paths[relative], module))
        if not entries:
            continue
        text = "\n\n\n".join(f"{entry.heading}\n\n{entry.doc}" for entry in entries)
        yield from _passages(relative, parts[0], text)
        for entry in entries:
            if entry.public:
                yield _dialogue(relative, parts[0], entry.name, entry.doc)


def _entries(path: Path, module: str) -> Iterator[_Entry]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's string literals
        tree = ast.parse(path.read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree)
    if doc:
        yield _Entry(f"The {module} module", f"the {module} module", doc, not _is_private(module))
    yield from _nested_entries(tree, module)


def _nested_entries(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[_Entry]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = f"{prefix}.{node.name}"
        doc = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            heading = f"class {name}({bases})" if bases else f"class {name}"
        else:
            heading = f"{name}({ast.unparse(node.args)})"
        if doc:
            yield _Entry(heading, name, doc, not _is_private(name))
        if isinstance(node, ast.ClassDef):
            yield from _nested_entries(node, name)


def _is_private(name: str) -> bool:
    return any(part.startswith("_") for part in name.split("."))


def _passages(name: str, group: str, text: str) -> Iterator[Document]:
    """Cut a page between paragraphs, so that documents begin in the middle of prose too."""
    passage, index = "", 0
    for paragraph in text.split("\n\n"):
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph.lstrip("\n")
        if len(passage) >= _PASSAGE_CHARACTERS:
            yield Document(f"{name}:{index}", group, (Turn(None, passage),))
            passage, index = "", index + 1
    if passage:
        yield Document(f"{name}:{index}", group, (Turn(None, passage),))


def _dialogue(source: str, group: str, name: str, doc: str) -> Document:
    # A hash that does not change between runs, so that each name keeps its question.
    question = _QUESTIONS[zlib.crc32(name.encode()) % len(_QUESTIONS)].format(name=name)
    turns = (Turn("user", question), Turn("assistant", _first_paragraphs(doc)))
    return Document(name=f"{source}#{name}", group=group, turns=turns)


def _first_paragraphs(doc: str) -> str:
    """Cut a docstring behind the last whole paragraph that fits, or behind its first one."""
    paragraphs = doc.strip().split("\n\n")
    kept = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(kept) + len(paragraph) > _ANSWER_CHARACTERS:
            break
        kept = f"{kept}\n\n{paragraph}"
    return kept


def _topic_documents() -> Iterator[Document]:
    from pydoc_data.topics import topics  # 0.5 MB of text, wanted only here

    for name in sorted(topics):
        yield from _passages(f"topic:{name}", f"topic:{name}", topics[name].strip())


def _greetings() -> Iterator[Document]:
    for repeat in range(_GREETING_REPEATS):
        for question, answer in _GREETINGS:
            turns = (Turn("user", question), Turn("assistant", answer))
            yield Document(name=f"greeting:{repeat}:{question}", group="greeting", turns=turns)
