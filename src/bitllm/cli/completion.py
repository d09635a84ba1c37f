"""`bitllm completion`: the script by which a shell completes commands, options and models."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from bitllm.cli.options import verbose_option
from bitllm.cli.terminal import emit

__all__ = ["completion"]

_VARIABLE = "_BITLLM_COMPLETE"  # the one that click looks at in a program of this name


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@verbose_option
@click.pass_context
def completion(ctx: click.Context, /, shell: str) -> None:
    """Print the script by which a shell completes.

    It completes commands, options, their values, and models: short names, those in the cache, and
    files. Bash 4.4 or later.

    \b
    eval "$(bitllm completion bash)"                                   in ~/.bashrc
    eval "$(bitllm completion zsh)"                                    in ~/.zshrc, after compinit
    bitllm completion fish > ~/.config/fish/completions/bitllm.fish
    """  # noqa: D301
    kind = get_completion_class(shell)
    assert kind is not None, shell  # click knows these three
    script = kind(ctx.find_root().command, {}, "bitllm", _VARIABLE)
    # Without the check of `source`, which starts the shell to ask for its version.
    emit(script.source_template % script.source_vars())
