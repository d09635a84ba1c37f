"""Write docs/cli.md from the help texts of the `bitllm` command, so that the two cannot differ.

python docs/generate_cli.py            write docs/cli.md
python docs/generate_cli.py --check    exit 1 if docs/cli.md is not what this would write
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from bitllm.cli.app import app

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100
INTRODUCTION = """\
# The `bitllm` command

<!-- Written by docs/generate_cli.py from the help texts; edit those. -->

Data goes to stdout, everything else (progress, status, errors) to stderr. Bars are drawn only on a
terminal; `NO_COLOR` turns colours off. `--json`, where a command has it, prints one JSON document.

Exit codes: 0 done, 1 an error or a failed check, 2 a wrong command line, 130 stopped by Ctrl-C,
141 the reader of stdout went away.

Each option can also be set by an environment variable, named in its help; an option on the command
line wins. `BITLLM_TRACEBACK=1` shows tracebacks, as `--verbose` does.
"""


def commands() -> Iterator[click.Context]:
    """Yield the context of the root command, then that of each verb."""
    root = click.Context(app, info_name="bitllm", **app.context_settings)
    yield root
    for name in app.list_commands(root):
        command = app.get_command(root, name)
        assert command is not None
        yield click.Context(command, parent=root, info_name=name)


def page() -> str:
    """Return the whole page."""
    sections = [INTRODUCTION]
    for context in commands():
        context.terminal_width = WIDTH
        context.max_content_width = WIDTH
        sections.append(f"## {context.command_path}\n\n```text\n{context.get_help()}\n```\n")
    return "\n".join(sections)


def main() -> int:
    """Write or check the page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    found = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    changes = difflib.unified_diff(
        found.splitlines(), page().splitlines(), str(PAGE), "the help texts", lineterm=""
    )
    difference = "\n".join(changes)
    if difference:
        print(f"{difference}\n\n{PAGE} is out of date; run: python docs/generate_cli.py")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
