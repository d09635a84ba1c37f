"""Running tasks of lm-eval on a loaded model: found first, then run, then told in plain values."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitllm.engine.llm import LLM
from bitllm.errors import BitllmError, ConfigError, MeasurementError
from bitllm.integrations.lm_eval import BitllmLM

__all__ = ["FoundTasks", "TaskSettings", "as_values", "find_tasks", "run_tasks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """Which tasks are run, and how.

    Attributes:
        tasks: names of tasks, groups or tags; patterns of names; YAML files.
        include_paths: directories with tasks of one's own.
        limit: documents of each task; below 1, that part of them. None = all.
        num_fewshot: examples before each question; None = as the task says.
        chat: write prompts by the model's chat template.
        system: a system message for that.
        unsafe_code: run tasks that execute what the model writes.
    """

    tasks: Sequence[str]
    include_paths: Sequence[Path] = ()
    limit: float | None = None
    num_fewshot: int | None = None
    chat: bool = False
    system: str | None = None
    unsafe_code: bool = False


@dataclass(frozen=True, slots=True)
class FoundTasks:
    """Tasks that are there: lm-eval's manager of them, and what it is to load."""

    manager: Any
    names: Sequence[str]


def find_tasks(settings: TaskSettings) -> FoundTasks:
    """Find tasks by their names; the thousands that come with lm-eval are read only if needed.

    Raises:
        ConfigError: there is no such task or directory, or it cannot be read.
    """
    from lm_eval.tasks import TaskManager

    for path in settings.include_paths:
        if not path.is_dir():
            raise ConfigError(f"{path}: there is no such directory with tasks")
    own = [str(path) for path in settings.include_paths]
    try:
        manager = TaskManager(include_path=own, include_defaults=False)
        if not set(settings.tasks) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=own)
    except Exception as error:  # whatever reading YAML of somebody's own brings
        raise ConfigError(f"the tasks cannot be read: {_told(error)}") from error
    found: dict[str, None] = {}
    for name in settings.tasks:
        matches = [name] if _is_yaml(name) else manager.match_tasks([name])
        if not matches:
            raise _unknown_task(name, manager.all_tasks)
        found |= dict.fromkeys(matches)
    return FoundTasks(manager, tuple(found))


def _is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _unknown_task(name: str, known: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(name, list(known), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
    return ConfigError(f"lm-eval has no task {name!r:.100}", hint=hint)


def run_tasks(
    llm: LLM, settings: TaskSettings, found: FoundTasks | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Run tasks on a model; return lm-eval's own results, the answers to each document included.

    Args:
        llm: the model.
        settings: which tasks, and how.
        found: what `find_tasks` returned for these settings; None = they are looked for.
        progress: draw bars; these, and what lm-eval and the tasks print, go to stderr.

    Raises:
        ConfigError: no such task, or the tasks ask for what bitllm cannot do.
        ContextOverflowError: an answer does not fit into the context.
        ChatTemplateError: `chat`, and the model has no template, or one that fails.
        MeasurementError: lm-eval failed; names the reason.
    """
    from lm_eval.evaluator import simple_evaluate

    found = find_tasks(settings) if found is None else found
    limit = settings.limit
    with contextlib.redirect_stdout(sys.stderr), _bars(progress):
        try:
            results: dict[str, Any] | None = simple_evaluate(
                model=BitllmLM(llm, progress=progress),
                tasks=list(found.names),
                task_manager=found.manager,
                limit=int(limit) if limit is not None and limit >= 1 else limit,
                num_fewshot=settings.num_fewshot,
                apply_chat_template=settings.chat,
                system_instruction=settings.system,
                confirm_run_unsafe_code=settings.unsafe_code,
            )
        except BitllmError:
            raise
        except Exception as error:
            raise MeasurementError(
                f"lm-eval could not run {', '.join(found.names)}: {_told(error)}",
                hint="--verbose shows where; data that is not in the cache needs the network",
            ) from error
    if results is None:
        raise MeasurementError("lm-eval gave no results: another process of the job writes them")
    return results


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Let data sets draw bars, or not."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hides = not shown and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            enable_progress_bars()


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def as_values(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what lm-eval found, task by task, in plain values.

    Each entry of "tasks" and "groups" has "version", "samples", "num_fewshot", and in "metrics" a
    list of {"name", "filter", "value", "stderr", "higher_is_better"}; what is unknown is None.
    """
    groups = results.get("groups") or {}
    described = {
        name: _described(name, values, results) for name, values in results["results"].items()
    }
    return {
        "tasks": {name: each for name, each in described.items() if name not in groups},
        "groups": {name: each for name, each in described.items() if name in groups},
    }


def _described(name: str, values: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    better = results.get("higher_is_better", {}).get(name) or {}
    metrics = []
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            metrics.append(
                {
                    "name": metric,
                    "filter": kind,
                    "value": _number(value),
                    "stderr": _number(values.get(f"{metric}_stderr,{kind}")),
                    "higher_is_better": better.get(metric),
                }
            )
    samples = results.get("n-samples", {}).get(name) or {}
    return {
        "version": results.get("versions", {}).get(name),
        "samples": samples.get("effective"),
        "num_fewshot": results.get("n-shot", {}).get(name),
        "metrics": metrics,
    }


def _number(value: Any) -> float | None:
    """Return a finite number, or None; lm-eval writes "N/A" where there is no error."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None
