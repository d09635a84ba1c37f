"""`bitllm eval`: run the tasks of lm-eval on a model."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from bitllm.cli.model import load_model, split_options
from bitllm.cli.options import (
    chosen,
    engine_options,
    json_option,
    model_reference,
    option,
    verbose_option,
)
from bitllm.cli.terminal import emit, emit_json, note
from bitllm.errors import CheckpointError, ConfigError

__all__ = ["eval"]


class TaskNames(click.ParamType[tuple[str, ...]]):
    """Names of tasks with commas between them."""

    name = "tasks"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Return the names as a tuple, each once."""
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(name for part in value.split(",") if (name := part.strip())))
        if not names:
            self.fail("no task is named", param, ctx)
        return names


@click.command("eval")
@model_reference
@option(
    "--tasks",
    metavar="NAME,NAME",
    type=TaskNames(),
    required=True,
    help="Tasks, groups, patterns such as mmlu_*, or YAML files. `lm-eval ls tasks` lists them.",
)
@option(
    "--include-path",
    "include_paths",
    metavar="DIR",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A directory with tasks of your own; may be given several times.",
)
@option(
    "--limit",
    metavar="N",
    type=click.FloatRange(min=0, min_open=True),
    help="Only so many documents of each task; below 1, that part of them.",
)
@option(
    "--num-fewshot",
    metavar="N",
    type=click.IntRange(min=0),
    help="Examples before each question. Default: as the task says.",
)
@option("--chat", is_flag=True, help="Write prompts by the model's chat template.")
@option("--system", metavar="TEXT", help="System message of the chat template; implies --chat.")
@option("--unsafe-code", is_flag=True, help="Run tasks that execute what the model writes.")
@option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write lm-eval's whole results, each document with its answer, to a JSON file.",
)
@engine_options
@json_option
@verbose_option
def eval(
    model: str | None,
    tasks: tuple[str, ...],
    include_paths: tuple[Path, ...],
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the tasks of lm-eval on a model.

    Needs lm-eval: pip install 'bitllm[eval]'. Tasks that come with it fetch their data from the
    Hugging Face Hub; tasks of your own may read files. --kv-tokens above --context lets more
    documents run side by side.

    \b
    bitllm eval microsoft/bitnet-b1.58-2B-4T --tasks arc_easy,hellaswag --limit 100
    bitllm eval ./my-model --include-path ./tasks --tasks my_task -o results.json
    """  # noqa: D301
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    from bitllm.integrations.evaluation import TaskSettings, as_values, find_tasks, run_tasks

    engine, others = split_options(options)
    others["chat"] = others.get("chat", False) or "system" in others
    settings = TaskSettings(tasks=tasks, include_paths=include_paths, **chosen(**others))
    _check_output(output)
    found = find_tasks(settings)  # a mistyped name is told before a model is loaded
    llm = load_model(model, engine)
    started = time.perf_counter()
    results = run_tasks(llm, settings, found, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - started
    if output is not None:
        _write(output, results)
        note(f"eval: results in {output}")
    if as_json:
        emit_json({"model": llm.name, **as_values(results), "seconds": seconds})
    else:
        emit(f"{llm.name}\n\n{_tables(results)}")


def _tables(results: dict[str, Any]) -> str:
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables).rstrip()


def _check_output(output: Path | None) -> None:
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"{output}: there is no directory {output.parent}")


def _write(output: Path, results: dict[str, Any]) -> None:
    """Write the results beside their place, then move them there."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, output)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise CheckpointError(f"{output}: cannot be written ({error.strerror})") from error
