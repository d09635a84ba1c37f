"""The `bitllm` command: one module a verb, loaded only when that verb is used.

Data goes to stdout, everything else to stderr. A user's mistake ends in `error:` and `hint:`
lines, never in a traceback. Exit codes: 0 done, 1 a deliberate error or a failed check, 2 a wrong
command line, 130 stopped by Ctrl-C, 141 nobody reads the output any more.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line on `sys.argv` and exit; the entry point of the `bitllm` script."""
    from bitllm.cli.app import app

    app(prog_name="bitllm")
