"""Loading of lm_eval's tasks by name or path, without running downloaded code."""

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_tool.errors import DataSourceError, MoeToolError, NotFoundError, UsageError
from moe_tool.formats.home_folder import from_home
from moe_tool.progress import Progress
from moe_tool.text.hub_datasets import why_offline

_FEWSHOT_SEED = 1234
"""Seed that lm_eval uses, so that a task has its usual examples"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessOptions:
    """Tasks to run, and their number of documents and examples."""

    tasks: tuple[str, ...]
    """Names of tasks in lm_eval or in `include`, or paths of YAML files and folders"""
    include: tuple[Path, ...] = ()
    """Folders with more tasks"""
    limit: int | None = None
    """Documents per task"""
    num_fewshot: int | None = None
    """Solved examples before each question; None: the task's default"""
    decode_context: bool = False
    """Whether the policy applies to the context of a log-likelihood too"""
    offline: bool = False


def load_tasks(
    options: HarnessOptions, refused: list[str], *, is_online: bool
) -> dict[str, dict[str, Any]]:
    """Return tasks, groups and group_map, as lm_eval's own `load` does.

    Args:
        refused: the list that `no_downloaded_metrics` yields.
        is_online: whether the hub may be used.

    Raises:
        UsageError: a task is unknown, or needs a metric whose code would be downloaded.
        NotFoundError, DataSourceError: a file or the data of a task cannot be read.
    """
    manager, names = _find_tasks(options)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            found = manager.load([name])
        except MoeToolError:
            raise
        except Exception as error:  # tasks run code of their authors, which may raise anything
            raise _cannot_load(name, error, options, is_online=is_online) from error
        if refused:
            raise _downloaded_metric(refused[0])
        for part in loaded:
            loaded[part] |= found.get(part, {})
    return loaded


def _find_tasks(options: HarnessOptions) -> tuple[Any, list[str]]:
    """Return the lm_eval index that contains the tasks, and their names or paths in it.

    Listing lm_eval's own tasks takes 10 s, so they are left out if the local ones suffice.
    """
    from lm_eval.tasks import TaskManager

    for folder in options.include:
        if not folder.is_dir():
            raise NotFoundError(
                f"--include {folder}: there is no such folder", hint="name a folder of .yaml tasks"
            )
    folders, names, is_local = list(options.include), [], True
    for task in options.tasks:
        path = from_home(task)
        if not (os.sep in task or path.suffix in (".yaml", ".yml")):
            names.append(task)
        elif path.is_dir():
            folders.append(path)
            names += _tasks_of_folder(path)
        elif path.is_file():
            names.append(str(path))
            is_local = is_local and "\ngroup:" not in f"\n{path.read_text(encoding='utf-8')}"
        else:
            raise NotFoundError(
                f"there is no task file {task}",
                hint="a name without a slash is looked for among lm_eval's own tasks",
            )
    local = TaskManager(include_path=folders, include_defaults=False)
    wanted = [name for name in names if not Path(name).is_file()]
    if is_local and set(wanted) <= set(local.all_subtasks):
        return local, names
    manager = TaskManager(include_path=folders)
    for name in wanted:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise UsageError(
                f"task '{name}' is not known to lm_eval",
                hint=f"did you mean {', '.join(near)}?"
                if near
                else "`lm_eval ls tasks` lists them; a file of your own is named by its path, "
                "./mine.yaml",
            )
    return manager, names


def _tasks_of_folder(folder: Path) -> list[str]:
    from lm_eval.tasks import TaskManager

    names = TaskManager(include_path=[folder], include_defaults=False).all_subtasks
    if not names:
        raise DataSourceError(
            f"{folder} holds no task", hint="a task is a .yaml file with `task: NAME` in it"
        )
    return list(names)


def set_up_tasks(tasks: dict[str, Any], num_fewshot: int | None, progress: Progress) -> None:
    """Set shots and seed, as lm_eval's `simple_evaluate` does; zero-shot tasks stay so.

    Raises:
        UsageError: a task is not supported.
    """
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(
                f"task '{name}' runs code written by the model, which is not supported",
                hint="choose another task",
            )
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"task '{name}' needs more than text", hint="choose another task")
        own = task.get_config("num_fewshot")
        if own != 0 and (num_fewshot is not None or own is None):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        elif num_fewshot:
            progress.note(f"task '{name}' is zero-shot: --num-fewshot is ignored")
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _cannot_load(
    name: str, error: Exception, options: HarnessOptions, *, is_online: bool
) -> MoeToolError:
    import datasets

    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    reason = reason or type(error).__name__
    is_missing = isinstance(error, (ConnectionError, datasets.exceptions.DatasetNotFoundError))
    if is_missing and not is_online:
        return NotFoundError(
            f"task '{name}': {why_offline(offline=options.offline)}, and its data is not in the "
            f"local cache ({reason})",
            hint="run it once on a machine with network, or give a task of your own with local "
            "data",
        )
    kind = NotFoundError if is_missing else DataSourceError
    return kind(
        f"task '{name}' cannot be loaded: {reason}",
        hint="`lm_eval validate --tasks NAME` gives details",
    )


def _downloaded_metric(name: str) -> UsageError:
    return UsageError(
        f"the task's metric '{name}' is not part of lm_eval: its code would be downloaded and run, "
        "which is not supported",
        hint="choose a task with lm_eval's own metrics",
    )


@contextmanager
def no_downloaded_metrics() -> Iterator[list[str]]:
    """Refuse metrics whose code the `evaluate` library would download.

    Yields a list that collects their names, because lm_eval swallows the refusal.
    """
    import evaluate

    refused: list[str] = []

    def refuse(name: str, *_: object, **__: object) -> None:
        refused.append(name)
        raise _downloaded_metric(name)

    load: Callable[..., Any] = evaluate.load
    evaluate.load = refuse
    try:
        yield refused
    finally:
        evaluate.load = load
