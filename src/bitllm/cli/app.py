"""The root command: a group that imports a verb's module when the verb is used."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import Any

import click

from bitllm.cli import failures
from bitllm.cli.options import is_verbose, verbose_option
from bitllm.cli.terminal import note, paint, tolerate_narrow_encodings

__all__ = ["COMMANDS", "CommandGroup", "app"]

COMMANDS = {
    "run": "Continue a prompt and print the text.",
    "chat": "Talk with a model.",
    "serve": "Serve models over HTTP, by OpenAI's protocol.",
    "ps": "Show what a running server does: its models, requests and memory.",
    "pull": "Fetch a model from the Hugging Face Hub.",
    "list": "List the models in the cache that bitllm can run.",
    "rm": "Remove models from the cache.",
    "info": "Show what a model is and what it needs, without loading it.",
    "convert": "Write a model in another format, read back and compared.",
    "quantize": "Study what rounding a dense model to a few bits does.",
    "train": "Train a model by a recipe.",
    "export": "Write the model of a training run in the format it is wanted in.",
    "perplexity": "Measure how well a model foresees a text.",
    "eval": "Run the tasks of lm-eval on a model.",
    "bench": "Measure the speed of a model beside what this machine can do.",
    "doctor": "Check this machine: kernels, speed, versions, demo model.",
    "completion": "Print the script by which a shell completes.",
}
"""The verbs in the order of the help, with the first line of each verb's own help; verb `x` is the
command `x` of the module `bitllm.cli.x`."""


class CommandGroup(click.Group):
    """A group whose commands are imported on use, and whose failures are one clear message."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command of a verb; None if there is no such verb."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"bitllm.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb that `args` begin with; a mistyped one gets a suggestion."""
        if not ctx.resilient_parsing and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise _unknown_command(ctx, args[0])
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; report its failure, and end quietly if the reader of stdout went away."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _discard_stdout()
            raise click.exceptions.Exit(failures.EXIT_CLOSED) from None
        except (click.exceptions.Exit, click.Abort, EOFError):
            raise
        except Exception as error:
            status = failures.report(error, verbose=is_verbose(ctx))
            raise click.exceptions.Exit(status) from error

    def main(self, *args: Any, **extra: Any) -> Any:
        """Parse the command line, run it and exit with its code; never returns."""
        if sys.stderr is None:
            # Python has no stream for a descriptor that is closed, and `print` would take stdout.
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        if sys.stdout is None:
            failures.print_error("standard output is closed")
            sys.exit(failures.EXIT_FAILURE)
        tolerate_narrow_encodings()
        if not sys.stderr.isatty():
            # The Hub's client would draw its bars into files and pipes.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        extra["standalone_mode"] = False
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            try:
                status = super().main(*args, **extra)
            except (click.Abort, click.ClickException, OSError) as error:
                if isinstance(error, OSError):  # stdout took no help or version
                    _discard_stdout()
                status = failures.report(error, verbose=False)
        sys.exit(status if isinstance(status, int) else 0)


class _UnknownCommand(click.UsageError):
    """A verb that does not exist, with a hint of its own."""

    def __init__(self, message: str, ctx: click.Context, hint: str) -> None:
        super().__init__(message, ctx)
        self.hint = hint


def _unknown_command(ctx: click.Context, name: str) -> click.UsageError:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    if close:
        hint = f"did you mean '{ctx.command_path} {close[0]}'?"
    elif " " in name:
        hint = f'to continue a prompt: {ctx.command_path} run "{name.strip()}"'
    else:
        hint = f"the commands are {', '.join(COMMANDS)}; see '{ctx.command_path} --help'"
    return _UnknownCommand(f"no such command: '{name}'", ctx, hint)


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(f"{paint('warning:', 'yellow')} {message}")


def _discard_stdout() -> None:
    # What is still buffered would fail once more, loudly, when Python closes stdout at exit.
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from bitllm import __version__

        click.echo(f"bitllm {__version__}")
        ctx.exit()


@click.group(
    cls=CommandGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every option can be set by the environment variable that its help names.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
@verbose_option
@click.pass_context
def app(ctx: click.Context) -> None:
    """Run BitNet b1.58 language models on this machine.

    \b
    bitllm run "Once upon a time"            continue a prompt with the demo model
    bitllm chat -m ORG/NAME                  talk with a model from the Hugging Face Hub
    bitllm info ./my-model                   look at a model before loading it
    """  # noqa: D301
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
