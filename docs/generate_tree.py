"""Write the annotated tree at the end of README.md from the first sentence of each file.

    python docs/generate_tree.py            rewrite that part of README.md
    python docs/generate_tree.py --check    exit 1 if it is not what this would write

The sentence of a Python file is the start of its docstring, that of a C++ file or a script its
first comment; a folder speaks through its `__init__.py`. So the tree cannot differ from the code.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- tree: written by docs/generate_tree.py -->\n", "<!-- end of tree -->\n"

LONGEST = 110
"""Characters of a clause; a longer one is cut at its first semicolon, colon or parenthesis."""

FOLDERS = {
    "src/bitllm": "the Python package, one folder a layer",
    "native": "the CPU decoder in C++, without Python but for bindings.cpp",
    "native/kernels": "one file an instruction set, the same functions in the same order",
    "benchmarks": "every figure of the docs comes from here",
    "recipes": "what was trained, exactly",
}
"""The folders shown file by file, in order, and what each is for."""

OTHERS = {
    "native/tests/": "the native tests: an executable without Python",
    "tests/": "pytest; file names mirror those of src/bitllm",
    "docs/": "the pages, and the scripts that write the generated ones",
    "Makefile": "the developer's commands; `make help`",
    "constraints.txt": "exact versions for tests and checks",
    ".ci/run": "everything a change has to pass",
}


def first_sentence(path: Path) -> str:
    """Return what a file says about itself, as one clause without a full stop."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        opening = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = re.match(r"(?://|#) (.+(?:\n(?://|#) .+)*)", text)
        opening = re.sub(r"\n(?://|#) ", " ", comment[1]) if comment else ""
    paragraph = " ".join(opening.partition("\n\n")[0].split())
    clause = re.split(r"(?<=[\w`)])\. ", paragraph, maxsplit=1)[0].rstrip(".")
    return clause if len(clause) <= LONGEST else re.split(r"; |: | \(", clause, maxsplit=1)[0]


def tracked(folder: str) -> list[Path]:
    """Return the files below a folder that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.splitlines() if (ROOT / name).is_file()]


def entries() -> list[tuple[str, str]]:
    """Return the lines of the tree: an indented name and its clause."""
    rows = []
    seen: set[Path] = set()
    for folder, purpose in FOLDERS.items():
        rows.append((f"{folder}/", purpose))
        inner = [other for other in FOLDERS if other.startswith(f"{folder}/")]
        files = set(tracked(folder))
        for path in sorted(files):
            name = path.relative_to(ROOT / folder).as_posix()
            relative = path.relative_to(ROOT).as_posix()
            skipped = any(relative.startswith((*OTHERS, f"{other}/")) for other in inner or OTHERS)
            if skipped or path.suffix not in (".py", ".cpp", ".h", ".toml", ".sh"):
                continue
            for parent in reversed(path.relative_to(ROOT / folder).parents[:-1]):
                package = ROOT / folder / parent / "__init__.py"
                if package.exists() and package not in seen:
                    seen.add(package)
                    indent = "  " * len(parent.parts)
                    rows.append((f"{indent}{parent.name}/", first_sentence(package)))
            # A header speaks for the file that implements it.
            if path.name == "__init__.py" or path.with_suffix(".h") in files - {path}:
                continue
            shown = (
                f"{path.name}, .cpp" if path.with_suffix(".cpp") in files - {path} else path.name
            )
            rows.append((f"{'  ' * (name.count('/') + 1)}{shown}", first_sentence(path)))
    return rows + list(OTHERS.items())


def tree() -> str:
    """Return the whole section, markers included."""
    rows = entries()
    width = max(len(name) for name, _ in rows)
    lines = "\n".join(f"{name:{width}}  {clause}".rstrip() for name, clause in rows)
    return f"{BEGIN}\n```text\n{lines}\n```\n\n{END}"


def main() -> int:
    """Write or check the section; return the exit code."""
    readme = README.read_text(encoding="utf-8")
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        print(f"{README}: the markers of the tree are missing")
        return 1
    wanted = before + tree() + after
    if "--check" not in sys.argv[1:]:
        README.write_text(wanted, encoding="utf-8")
    elif wanted != readme:
        print("README.md: the tree is out of date; run: make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
